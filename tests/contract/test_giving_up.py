"""A client that disappears stops the compute within one mini-batch (counted)."""

import threading

import numpy as np
import pytest

pytest.importorskip("torch")
import curvd
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.engine import Operator


@pytest.fixture
def stalled(monkeypatch):
    """Lets a product reach its third mini-batch, and then waits to be let on."""
    reached, go_on, steps = threading.Event(), threading.Event(), []
    original = Operator._batch_product

    def counted(self, index, *rest):
        if armed.is_set():
            steps.append(index)
            if len(steps) == 3:
                reached.set()
                go_on.wait(30)
        return original(self, index, *rest)

    armed = threading.Event()
    monkeypatch.setattr(Operator, "_batch_product", counted)
    return armed, reached, go_on, steps


def test_a_client_that_disappears_stops_the_compute_within_one_mini_batch(
    stalled, tmp_path
):
    armed, reached, go_on, steps = stalled
    rng = np.random.default_rng(0)
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        session = client.create_session(
            client.register_model(
                "mlp", {"widths": [8, 3], "bias": False}, {"1.weight": np.ones((3, 8))}
            ),
            client.register_dataset(
                {"x": rng.normal(size=(100, 8)), "y": rng.integers(0, 3, 100)},
                inputs=["x"],
                target="y",
                batch_size=1,
            ),
            loss="cross_entropy",
            dtype="F64",
        )
        with curvd.connect(target) as leaver:
            hessian = leaver.session(session.id).hessian()
            failure = []

            def ask():
                try:
                    hessian @ np.ones(24)
                except curvd.CurvdError as error:
                    failure.append(error)

            armed.set()
            asking = threading.Thread(target=ask)
            asking.start()
            assert reached.wait(30)
        asking.join(30)
        assert isinstance(failure[0], curvd.Cancelled)
        # The server has heard of it once it answers this, over the same loop.
        client.server_info()
        go_on.set()
        armed.clear()
        # The compute thread is free again and right: this product has its turn.
        assert np.isfinite(session.hessian() @ np.ones(24)).all()
        assert len(steps) <= 4
