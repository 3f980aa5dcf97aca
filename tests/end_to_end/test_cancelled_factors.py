"""Making Kronecker factors ends within one mini-batch when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import numpy as np
import pytest

pytest.importorskip("torch")
import curvd
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.engine.kronecker import factors

BATCHES, REACHED = 40, 3
SIZE = 8


class Watched(factors._Making):
    """Says when it has seen some mini-batches of a pass, and goes on when it is cancelled."""

    armed = ""
    """Which pass is watched: ``_sum_up``, or EKFAC's ``_correct``."""
    reached = threading.Event()
    seen = 0

    def run(self, cancelled):
        self.cancelled = cancelled
        return super().run(cancelled)

    def _sum_up(self, batch):
        self._watch("_sum_up")
        super()._sum_up(batch)

    def _correct(self, batch, found):
        self._watch("_correct")
        super()._correct(batch, found)

    def _watch(self, which):
        if Watched.armed != which:
            return
        Watched.seen += 1
        if Watched.seen == REACHED:
            Watched.reached.set()
            gone = threading.Event()
            while not self.cancelled():
                gone.wait(0.001)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(factors, "_Making", Watched)
    monkeypatch.setattr(Watched, "seen", 0)
    monkeypatch.setattr(Watched, "armed", "")
    Watched.reached.clear()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    config = ServerConfig(
        listen="127.0.0.1:0", data_dir=tmp_path_factory.mktemp("data"), drain_s=0.0
    )
    with serve_in_thread(config) as target:
        yield target


def made(client):
    """A model and its data: both are there once, whatever the test."""
    rng = np.random.default_rng(0)
    state = {"1.weight": rng.normal(size=(2, 3)), "1.bias": np.zeros(2)}
    points = {"x": rng.normal(size=(BATCHES, 3)), "y": rng.normal(size=(BATCHES, 2))}
    return (
        client.register_model("mlp", {"widths": [3, 2]}, state),
        client.register_dataset(points, inputs=["x"], target="y", batch_size=1),
    )


def opened(client):
    return client.create_session(
        *made(client), loss="mse", dtype="F64", operators=None, plan="final"
    )


async def cancel(target, session_id, kind, v):
    """Cancel a product once its factors are being made."""
    async with curvd.aio.connect(target) as client:
        session = await client.session(session_id)
        product = asyncio.ensure_future(getattr(session, kind)(fisher="type-2") @ v)
        assert await asyncio.to_thread(Watched.reached.wait, 100)
        product.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await product


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    ("kind", "which"), [("kfac", "_sum_up"), ("ekfac", "_correct")]
)
def test_a_cancelled_product_makes_no_more_factors(target, watched, kind, which, moved):
    v = np.arange(SIZE) / SIZE
    with curvd.connect(target) as client, opened(client) as session:
        K = getattr(session, kind)(fisher="type-2")
        if moved:  # operators of a version are moved to the next, and made there
            _ = K @ v
            session.update_parameters({"1.bias": np.ones(2)})
        Watched.armed = which
        asyncio.run(cancel(target, session.id, kind, v))
        Watched.armed = ""
        session.gradient()  # waits for the device: what was given up is over then
        assert Watched.seen == REACHED
        found = K @ v  # nothing is half made
        with opened(client) as other:
            if moved:
                other.update_parameters({"1.bias": np.ones(2)})
            again = getattr(other, kind)(fisher="type-2") @ v
        np.testing.assert_allclose(found, again, rtol=1e-13)


def test_a_deadline_ends_the_making_of_factors(target, watched):
    config = curvd.ClientConfig(deadline_s=3.0)
    v = np.arange(SIZE) / SIZE
    with curvd.connect(target) as patient, opened(patient) as session:
        Watched.armed = "_sum_up"
        with (
            curvd.connect(target, config=config) as client,
            pytest.raises(curvd.DeadlineExceeded),
        ):
            client.session(session.id).kfac() @ v
        Watched.armed = ""
        session.gradient()
        assert Watched.seen <= REACHED
        assert np.isfinite(session.kfac() @ v).all()
