"""Operands of many chunks, which are looked at while they land."""

import numpy as np
import pytest
from support.fake_device import FakeDevice
from support.served import server

import curvd
from curvd.contract.infos import TensorInfo
from curvd.http2 import messages
from curvd.tensors import vectors
from curvd_server.storage.registry import Architecture

SIZE = 3_000_000


class Large(FakeDevice):
    """Its one architecture has 24 MB of parameters in float64."""

    def architecture(self, spec):
        shapes = {"a": (SIZE,), "b": (3,)}
        return Architecture({n: TensorInfo(n, "F64", s) for n, s in shapes.items()}, {})


@pytest.fixture(params=["direct", "grpcio"])
def operator(tmp_path, monkeypatch, request):
    monkeypatch.setattr(messages, "_QUICK_BYTES_PER_S", 0)
    config = curvd.ClientConfig(transport=request.param)
    with (
        server(tmp_path, Large()) as channels,
        curvd.connect(channels.target, config=config) as client,
    ):
        state = {"a": np.zeros(SIZE), "b": np.array([5.0, 0.0, 0.0])}
        model = client.register_model("two", {}, state)
        dataset = client.register_dataset(
            {"x": np.ones((4, 2)), "y": np.ones(4)},
            inputs=["x"],
            target="y",
            batch_size=2,
        )
        session = client.create_session(model, dataset, loss="mse", dtype="F64")
        yield session.hessian()


def test_products_are_those_of_all_values(operator):
    for seed in range(2):
        v = np.random.default_rng(seed).standard_normal(SIZE + 3)
        np.testing.assert_array_equal(operator @ v, 5 * v)


@pytest.mark.parametrize(
    "index, parameter", [(0, "a"), (SIZE // 2, "a"), (SIZE + 2, "b")]
)
def test_a_value_that_is_not_finite_is_refused_wherever_it_lands(
    operator, monkeypatch, index, parameter
):
    v = np.ones(SIZE + 3)
    with monkeypatch.context() as patched:
        patched.setattr(vectors, "_check_finite", lambda *args: None)
        v[index] = np.nan
        text = f"column 0 has nan at index {index}, in parameter '{parameter}'"
        with pytest.raises(curvd.InvalidVector, match=text):
            operator @ v
    v[index] = 1
    np.testing.assert_array_equal(operator @ v, 5 * v)
