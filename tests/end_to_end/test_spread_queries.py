"""Queries of a real server with two workers, where vectors are large enough to be spread."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd_server.app import serve_in_thread  # noqa: E402
from curvd_server.config import ServerConfig  # noqa: E402
from curvd_server.fleet import operator, spread  # noqa: E402


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=tmp_path_factory.mktemp("data"),
        devices="cpu:0,cpu:1",
    )
    with serve_in_thread(config) as target:
        yield target


@pytest.fixture
def session(target):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(12, 4).double(), torch.randint(0, 3, (12,))
    with (
        curvd.connect(target) as client,
        client.session_for(net, nn.CrossEntropyLoss(), data, batch_size=3) as session,
    ):
        yield session


def begun(monkeypatch):
    """What is begun on the workers from now on."""
    names, attempt = [], spread.Spread._attempt

    def noted(self, products, algorithm, given):
        names.append(algorithm.__name__)
        return attempt(self, products, algorithm, given)

    monkeypatch.setattr(spread.Spread, "_attempt", noted)
    return names


def test_large_vectors_are_spread_and_the_answers_are_those_of_numpy(
    session, monkeypatch
):
    monkeypatch.setattr(operator, "SPREAD_SIZE", 1)
    names, G = begun(monkeypatch), session.ggn()
    dense = G.to_dense()
    damped = dense + 0.1 * np.eye(len(dense))
    b = np.random.default_rng(0).standard_normal((len(dense), 3))
    top = G.eigsh(k=3)
    np.testing.assert_allclose(top.values, np.linalg.eigvalsh(dense)[::-1][:3], 1e-6)
    found = G.solve(b, damping=0.1, tolerance=1e-10)
    np.testing.assert_allclose(found.x, np.linalg.solve(damped, b), rtol=1e-7)
    np.testing.assert_allclose(G.trace().value, np.trace(dense), rtol=1e-8)
    assert len(names) == 3


def test_small_vectors_stay_in_the_front(session, monkeypatch):
    names = begun(monkeypatch)
    values = session.ggn().eigsh(k=2).values
    dense = session.ggn().to_dense()
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[::-1][:2], 1e-6)
    assert not names
