"""One user multiplies beside another's long work: turns of the device are counted."""

import asyncio
import contextlib
import gc
import itertools
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from support.small_net import WIDTHS, data, module, open_session  # noqa: E402

import curvd  # noqa: E402
from curvd_server import app  # noqa: E402
from curvd_server.config import ServerConfig  # noqa: E402
from curvd_server.device import batcher  # noqa: E402
from curvd_server.models import builders  # noqa: E402

MOST_TURNS = 2
"""Which a product may wait for: the one under way, and one that came before it."""


class Turns:
    """Counts the turns of long work that each product waits for."""

    def __init__(self, monkeypatch):
        self.begun = 0
        self.waited, self.turn = [], threading.Semaphore(0)
        outer = self

        class Counting(batcher.Batcher):
            def __init__(self, **options):
                # Every look at the clock is a second: a turn is one step.
                super().__init__(**options, clock=itertools.count().__next__)

            def multiply_now(self, operator, columns):
                return None

            def _submit(self, key, operator, ticket):
                ticket.turns = outer.begun - (self._running_long is not None)
                return super()._submit(key, operator, ticket)

            _running_long = None

            def _advance(self, run):
                if run.in_turns:
                    outer.begun += 1
                    outer.turn.release()
                    self._running_long = run
                for ticket in run.tickets:
                    if run.operator is not None and not run.spent_s:
                        before = outer.begun - run.in_turns
                        outer.waited.append(before - ticket.turns)
                try:
                    return super()._advance(run)
                finally:
                    self._running_long = None

        monkeypatch.setattr(app, "Batcher", Counting)

    def wait(self, count):
        """Wait until so many turns more have begun."""
        while self.turn.acquire(blocking=False):
            pass
        for _ in range(count):
            assert self.turn.acquire(timeout=300)


@pytest.fixture
def turns(monkeypatch):
    return Turns(monkeypatch)


@pytest.fixture
def target(tmp_path, turns):
    config = ServerConfig(
        listen="127.0.0.1:0", data_dir=tmp_path, compile_after_s=0, drain_s=0
    )
    with app.serve_in_thread(config) as turns.target:
        yield turns.target


@contextlib.contextmanager
def multiplying(target, turns):
    """Someone who multiplies meanwhile; his products are right, and all counted."""
    stopped, wrong = threading.Event(), []
    with curvd.connect(target) as client:
        H = open_session(client).hessian()
        v = np.ones(H.shape[0])
        expected = H @ v

        def work():
            while not stopped.is_set():
                if not np.array_equal(H @ v, expected):
                    wrong.append("another product")

        thread = threading.Thread(target=work)
        turns.waited.clear()
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
    assert not wrong


def opening(client, turns):
    open_session(client, operators=[curvd.OperatorSpec(kind="ggn")])


def openings(client, turns):
    threads = [
        threading.Thread(target=open_session, args=(client,), kwargs={"params": [name]})
        for name in ("*.weight", "*.bias", "1.*")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def updates(client, turns):
    session = open_session(client)
    H = session.hessian()
    for scale in (0.5, 2.0):
        session.update_parameters({
            n: scale * a.numpy() for n, a in module().state_dict().items()
        })
        H @ np.ones(H.shape[0])


def queries(client, turns):
    H = open_session(client).hessian()
    H.eigsh(2)
    H.trace(samples=30)


def gradients(client, turns):
    session = open_session(client)
    for _ in range(5):
        session.gradient()


def given_up(client, turns):
    async def leave(after):
        async with curvd.aio.connect(turns.target) as there:
            model = await there.register_model("mlp", WIDTHS, module().state_dict())
            points = await there.register_dataset(
                data(), inputs=["x"], target="y", batch_size=8
            )
            opening = asyncio.create_task(
                there.create_session(model, points, loss="cross_entropy")
            )
            await asyncio.to_thread(turns.wait, after)
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await opening

    for after in (1, 30, 300):
        asyncio.run(leave(after))


def deletions(client, turns):
    for _ in range(3):
        open_session(client).delete()


LONG = [opening, openings, updates, queries, gradients, given_up, deletions]


@pytest.mark.parametrize("work", LONG, ids=lambda work: work.__name__)
def test_a_product_waits_for_two_turns_at_most(target, turns, work):
    with multiplying(target, turns), curvd.connect(target) as client:
        work(client, turns)
    assert turns.begun > 10
    assert max(turns.waited) <= MOST_TURNS


@pytest.fixture
def full_collections():
    """Counts collections that look at every object, while nobody else has the GIL."""
    counted = []

    def note(phase, info):
        if phase == "start" and info["generation"] == 2:
            counted.append(phase)

    gc.callbacks.append(note)
    yield counted
    gc.callbacks.remove(note)


def test_an_opening_of_many_layers_stops_nobody_to_look_for_garbage(
    target, full_collections
):
    widths = {"activation": "tanh", "widths": [2] * 81}
    state = builders.BUILDERS["mlp"](widths).double().state_dict()
    points = {"x": np.ones((2, 2)), "y": np.zeros(2, int)}
    with curvd.connect(target) as client:
        model = client.register_model("mlp", widths, state)
        dataset = client.register_dataset(
            points, inputs=["x"], target="y", batch_size=2
        )
        open_session(client).delete()  # imports what it needs
        gc.collect()
        full_collections.clear()
        session = client.create_session(
            model, dataset, loss="cross_entropy", dtype="F64"
        )
        assert not full_collections
        session.delete()
