"""Fixtures of tests that need a server."""

import functools
from importlib.util import find_spec

import pytest


@pytest.fixture(autouse=True, scope="session")
def twice_differentiable_attention():
    """What the server does at start-up."""
    torch = pytest.importorskip("torch") if find_spec("torch") else None
    if torch is None:  # the base install alone
        return
    from curvd_server.engine.objective.layer_patches import use_differentiable_attention

    use_differentiable_attention()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tanh_session(live_target):
    """A session of a small float64 classifier with two layers."""
    import numpy as np
    import torch

    import curvd
    from curvd_server.models import builders

    config = {"activation": "tanh", "widths": [4, 5, 3]}
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    state = builders.BUILDERS["mlp"](config).double().state_dict()
    points = {"x": rng.standard_normal((20, 4)), "y": rng.integers(0, 3, 20)}
    with curvd.connect(live_target) as client:
        model = client.register_model("mlp", config, state)
        dataset = client.register_dataset(
            points, inputs=["x"], target="y", batch_size=8
        )
        with client.create_session(
            model, dataset, loss="cross_entropy", dtype="F64"
        ) as opened:
            yield opened


@pytest.fixture
def untimed(monkeypatch):
    """Operators take one plan if it is right, where plans are not what a test is about.

    Tracing and timing them takes most of the time of a small session; each of them is
    verified by the tests of the engine.
    """
    from curvd_server.engine import building
    from curvd_server.engine.tuning import Plan

    plain = functools.partial(building.build, plan=Plan("double_backward"))
    monkeypatch.setattr(building, "build", plain)


@pytest.fixture(params=["grpcio", "direct", "grpcio alone"])
def answers(request, monkeypatch):
    """Who answers clients of grpcio: grpcio behind the port, the port's own HTTP/2, or
    grpcio at the port."""
    if request.param == "direct":
        from curvd_server.transport import greeting

        monkeypatch.setattr(greeting, "is_ours", lambda beginning, *, tls: True)
    if request.param == "grpcio alone":
        from curvd_server.service import endpoint

        monkeypatch.setattr(endpoint, "_direct", endpoint._grpcio_alone)
    return request.param
