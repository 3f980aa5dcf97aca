"""Who gives up, or whose time is over, stops all workers within one step.

The workers are processes of a real server. They hold still at their first mini-batch (or
tensor of an update) until they are stopped, so nothing here would end if they were not.
"""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest

pytest.importorskip("torch")
from support.fleets import (
    SIZE,
    WIDTHS,
    B,
    ForkedLauncher,
    arrays,
    eager_hessian,
    state,
)

import curvd
from curvd_server import app
from curvd_server.config import ServerConfig

HELD = "from support.held_worker import main; main()"
BOUND_S = 300.0
LOSS = curvd.LossSpec(
    name="cross_entropy", ignore_index=-1, class_weights=(1.0, 2.0, 0.5)
)


class Held:
    """A server with two workers that can be held."""

    def __init__(self, target, folder):
        self.target, self.folder = target, folder
        with self.client() as client:
            self.model = client.register_model("mlp", WIDTHS, state()).id
            self.data = client.register_dataset(
                arrays(), inputs=["x"], target="y", batch_size=B
            ).id

    def client(self, deadline_s=BOUND_S):
        retry = curvd.RetryConfig(give_up_s=deadline_s)
        config = curvd.ClientConfig(deadline_s=deadline_s, retry=retry)
        return curvd.connect(self.target, config=config)

    def open(self, client):
        return client.create_session(
            self.model, self.data, loss=LOSS, dtype="F64", plan="final"
        )

    @contextlib.contextmanager
    def holding(self, what="products, loads"):
        for file in self.folder.glob("steps-*"):
            file.unlink()
        (self.folder / "hold").write_text(what)
        try:
            yield
        finally:
            (self.folder / "hold").unlink()

    def steps(self):
        """What each worker wrote down."""
        return sorted(file.read_bytes() for file in self.folder.glob("steps-*"))

    def wait_for(self, steps):
        """Wait until both workers have written so much down."""
        until_s = time.monotonic() + BOUND_S
        while self.steps() != [steps, steps]:
            assert time.monotonic() < until_s, f"they wrote {self.steps()}"
            threading.Event().wait(0.01)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURVD_TEST_HELD", str(folder))
        patch.setattr(app, "LocalLauncher", lambda: ForkedLauncher(HELD))
        config = ServerConfig(
            listen="127.0.0.1:0",
            data_dir=tmp_path_factory.mktemp("data"),
            devices="cpu:0,cpu:1",
            shards=4,
        )
        with app.serve_in_thread(config) as target:
            yield Held(target, folder)


@pytest.fixture
def session(held):
    with held.client() as client:
        opened = held.open(client)
        check_whole(opened)
        yield opened
        opened.delete()


def check_whole(session, version=1):
    """It answers as ever, at the version that it had."""
    operator = session.hessian()
    v = np.random.default_rng(3).standard_normal(operator.shape[0])
    np.testing.assert_allclose(operator @ v, eager_hessian() @ v, atol=1e-12)
    assert operator.last.version == version


def update(session):
    return session.update_parameters(state(5))


def multiply(session):
    return session.hessian() @ np.ones(SIZE)


def gradient(session):
    return session.gradient()


def query(session):
    return session.hessian().eigsh(k=2)


@pytest.mark.parametrize("call", [update, multiply, gradient, query])
def test_a_deadline_stops_all_workers_within_one_step(held, session, call):
    """Of an update, too: then no worker has the new version."""
    with held.holding():
        with held.client(deadline_s=2.0) as client:
            with pytest.raises(curvd.DeadlineExceeded):
                call(client.session(session.id))
        held.wait_for(b".!")
    check_whole(session)
    assert held.steps() == [b".!", b".!"]


def test_a_deadline_stops_the_opening_of_a_session_on_all_workers(held):
    with held.holding():
        with held.client(deadline_s=2.0) as client:
            with pytest.raises(curvd.DeadlineExceeded):
                held.open(client)
        held.wait_for(b".!")
    with held.client() as client:
        assert client.sessions() == []
        opened = held.open(client)
        check_whole(opened)
        opened.delete()


@pytest.mark.parametrize("call", [update, multiply, gradient, query])
async def test_who_leaves_stops_all_workers_within_one_step(held, session, call):
    async with curvd.aio.connect(held.target) as client:
        with held.holding():
            same = await client.session(session.id)
            task = asyncio.ensure_future(call(same))
            await asyncio.to_thread(held.wait_for, b".")
            task.cancel()
            await asyncio.to_thread(held.wait_for, b".!")
    await asyncio.to_thread(check_whole, session)
    assert held.steps() == [b".!", b".!"]


def test_an_update_that_one_worker_refuses_changes_no_version_anywhere(held, session):
    with held.client() as client:
        for worker in client.server_info().workers:
            refuses = held.folder / "refuses"
            refuses.write_text(str(worker.pid))
            with pytest.raises(curvd.OutOfMemory):
                session.update_parameters(state(5))
            refuses.unlink()
            check_whole(session)
            assert client.session(session.id).info.version == 1
    assert session.update_parameters(state(5)) == 2
    v = np.ones(SIZE)
    np.testing.assert_allclose(
        session.hessian() @ v, eager_hessian(state(5)) @ v, atol=1e-12
    )


async def test_products_do_not_wait_for_an_opening(held, session):
    """Neither in the server nor on a worker: it gives way at each of its steps."""
    async with curvd.aio.connect(held.target) as client:
        with held.holding("loads"):
            task = asyncio.ensure_future(held.open(client))
            await asyncio.to_thread(held.wait_for, b".")
            for _ in range(3):
                await asyncio.to_thread(check_whole, session)
            assert not task.done()
            task.cancel()
            await asyncio.to_thread(held.wait_for, b".!")
