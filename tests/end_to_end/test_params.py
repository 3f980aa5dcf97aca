"""Choosing parameters through the real service."""

import numpy as np
import pytest

pytest.importorskip("torch")

import curvd
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig


def register(client):
    rng = np.random.default_rng(0)
    state = {
        "1.weight": rng.normal(size=(5, 4)),
        "1.bias": rng.normal(size=5),
        "3.weight": rng.normal(size=(3, 5)),
        "3.bias": rng.normal(size=3),
    }
    model = client.register_model(
        "mlp", {"widths": [4, 5, 3], "activation": "tanh"}, state
    )
    data = {"x": rng.normal(size=(10, 4)), "y": rng.integers(0, 3, 10)}
    dataset = client.register_dataset(data, inputs=["x"], target="y", batch_size=4)
    return model, dataset


def open_session(client, **options):
    return client.create_session(
        *register(client), loss="cross_entropy", dtype="F64", **options
    )


@pytest.fixture
def config(tmp_path):
    return ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)


def test_chosen_parameters_are_the_session_and_survive_a_restart(config):
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        whole = open_session(client).hessian() @ np.eye(43)
        part = open_session(client, params=["3.*", "1.bias"])
        assert part.info.params == ("3.*", "1.bias")
        assert part.info.layout.names == ("3.weight", "3.bias", "1.bias")
        rows = np.r_[25:40, 40:43, 20:25]
        before = part.hessian() @ np.eye(23)
        np.testing.assert_allclose(before, whole[np.ix_(rows, rows)], atol=1e-12)
        blocks = part.hessian(block_sizes=[2, 1]) @ np.eye(23)
        assert not blocks[:18, 18:].any()
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        part = client.session(part.id)
        assert part.info.params == ("3.*", "1.bias")
        np.testing.assert_allclose(part.hessian() @ np.eye(23), before, atol=1e-12)
        # What operators do not act on can still be replaced, and shapes them.
        part.update_parameters({"1.weight": np.zeros((5, 4))})
        assert abs(part.hessian() @ np.eye(23) - before).max() > 1e-3


def test_one_glob_may_be_a_string_and_a_wrong_one_is_explained(live_target):
    with curvd.connect(live_target) as client:
        with open_session(client, params="1.weight") as session:
            assert session.info.layout.size == 20
        with pytest.raises(curvd.InvalidSpec, match=r"'1.wieght'.*'1.weight'") as error:
            open_session(client, params=["1.wieght"])
        assert "1.weight" in error.value.metadata["near"]
        with pytest.raises(curvd.InvalidSpec, match="is empty"):
            open_session(client, params=[""])
