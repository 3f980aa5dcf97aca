"""Queries share a server: they stop when told to, take turns, and keep to its limits."""

import asyncio
import contextlib
import math
import threading

import numpy as np
import pytest
from support.small_net import connected

import curvd
from curvd_server.app import running
from curvd_server.config import LimitsConfig, ServerConfig
from curvd_server.device import turns
from curvd_server.engine import building
from curvd_server.engine.tuning import autotune
from curvd_server.service import query_run
from curvd_server.sessions.operator_cache import OperatorCache


class Pausing:
    """Wraps an operator's products so that a test decides when each may end."""

    def __init__(self, operator):
        self.inner, self.log = operator.multiply, []
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.stopped = threading.Event()

    def multiply(self, columns, *, cancelled):
        self.log.append("query")
        self.entered.release()
        while not self.gate.acquire(timeout=0.01):
            if cancelled():
                self.log.append("cancelled")
                self.stopped.set()
                msg = "given up"
                raise curvd.Cancelled(msg)
        return self.inner(columns, cancelled=cancelled)


async def held_operator(server, session):
    """The operator of a session, with its products in the test's hand."""
    async with server.sessions.lease(
        session.id, operator=session.hessian().spec
    ) as lease:
        pausing = Pausing(lease.operator)
        lease.operator.multiply = pausing.multiply
        return pausing, lease.operator


@pytest.fixture
def unhurried(monkeypatch):
    """An order of products that does not depend on how long a busy machine takes for them.

    One that took more than a moment would give way inside, and have a lane of its own,
    which may come before that of who multiplies. And no better plan takes over meanwhile:
    what a test has in its hand is the operator that answers.
    """
    monkeypatch.setattr(query_run, "LONG_S", math.inf)
    monkeypatch.setattr(turns, "_TURN_S", (math.inf, math.inf))
    monkeypatch.setattr(OperatorCache, "_prepare", lambda *args, **options: None)


def watched_batches(monkeypatch):
    """Operators whose second product halts in its second mini-batch until cancelled."""

    class Watched(building.Operator):
        armed, begun, done = False, 0, 0
        reached = threading.Event()

        def _batch_product(self, index, V, out, sizes, cancelled):
            Watched.begun += Watched.armed and index == 0
            if Watched.begun == 2 and index == 1:
                Watched.reached.set()
                gone = threading.Event()
                while not cancelled():
                    gone.wait(0.001)
            super()._batch_product(index, V, out, sizes, cancelled)
            Watched.done += Watched.armed

    monkeypatch.setattr(building, "Operator", Watched)
    monkeypatch.setattr(autotune, "LONGEST_STEP_S", 0.0)  # one mini-batch at a time
    return Watched


@pytest.mark.parametrize(
    "ask",
    [
        lambda H: H.eigsh(3),
        lambda H: H.trace(estimator="hutchinson", samples=1000),
        lambda H: H.trace(samples=40),
        lambda H: H.diagonal(estimator="hutchinson", samples=1000),
        lambda H: H.frobenius_norm(samples=1000),
        lambda H: H.spectral_density(),
        lambda H: H.solve(np.arange(57.0), solver="minres", tolerance=1e-12),
        lambda H: H.solve(np.arange(57.0), damping=5.0, tolerance=1e-12),
        lambda H: H.logdet(damping=5.0),
    ],
    ids=[
        "eigsh",
        "hutchinson",
        "xtrace",
        "diagonal",
        "norm",
        "density",
        "minres",
        "cg",
        "logdet",
    ],
)
async def test_cancelling_any_query_stops_within_one_mini_batch(
    tmp_path, monkeypatch, ask
):
    watched = watched_batches(monkeypatch)
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    async with running(config) as server, contextlib.AsyncExitStack() as stack:
        session = await connected(server, stack)
        H = session.hessian()
        await (H @ np.ones(57))
        watched.armed = True
        query = asyncio.create_task(ask(H))
        assert await asyncio.to_thread(watched.reached.wait, 30)
        done = watched.done
        query.cancel()
        with pytest.raises(asyncio.CancelledError):
            await query
        # Waits for the device: what was given up is over when this returns.
        await session.gradient()
        assert (watched.done, watched.begun) == (done, 2)


async def test_cancelling_stops_the_product_that_runs_and_no_other_begins(
    tmp_path, unhurried
):
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    async with running(config) as server, contextlib.AsyncExitStack() as stack:
        session = await connected(server, stack)
        pausing, _ = await held_operator(server, session)
        query = asyncio.create_task(session.hessian().eigsh(3))
        await asyncio.to_thread(pausing.entered.acquire)
        pausing.gate.release()
        await asyncio.to_thread(pausing.entered.acquire)
        query.cancel()
        with pytest.raises(asyncio.CancelledError):
            await query
        await asyncio.to_thread(pausing.stopped.wait)
        assert pausing.log == ["query", "query", "cancelled"]


async def test_deleting_the_session_ends_its_query_with_a_typed_error(
    tmp_path, unhurried
):
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    async with running(config) as server, contextlib.AsyncExitStack() as stack:
        session = await connected(server, stack)
        pausing, _ = await held_operator(server, session)
        query = asyncio.create_task(session.hessian().eigsh(3))
        await asyncio.to_thread(pausing.entered.acquire)
        await session.delete()
        with pytest.raises(curvd.Cancelled, match="was deleted while the call ran"):
            await query
        await asyncio.to_thread(pausing.stopped.wait)
        assert pausing.log == ["query", "cancelled"]


async def test_a_matvec_waits_for_one_product_of_two_queries_at_most(
    tmp_path, unhurried
):
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    async with running(config) as server, contextlib.AsyncExitStack() as stack:
        session = await connected(server, stack)
        pausing, operator = await held_operator(server, session)
        product = operator.apply

        def logged(columns, *, cancelled):
            pausing.log.append("matvec")
            return product(columns, cancelled=cancelled)

        operator.apply = logged
        queued, multiply = asyncio.Event(), server.batcher.multiply

        def noted(*args):
            ticket = multiply(*args)
            queued.set()
            return ticket

        server.batcher.multiply = noted
        H, v = session.hessian(), np.ones(57)
        queries = [asyncio.create_task(H.eigsh(3, seed=s)) for s in (1, 2)]
        for _ in range(10):
            await asyncio.to_thread(pausing.entered.acquire)
            queued.clear()
            matvec = asyncio.create_task(H @ v)
            await queued.wait()
            at = len(pausing.log)
            pausing.gate.release()
            await matvec
            assert pausing.log[at:].index("matvec") == 0
        for query in queries:
            query.cancel()
        await asyncio.gather(*queries, return_exceptions=True)


async def test_two_queries_take_turns(tmp_path, unhurried):
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    async with running(config) as server, contextlib.AsyncExitStack() as stack:
        session = await connected(server, stack)
        pausing, operator = await held_operator(server, session)
        product, order = operator.multiply, []

        def told_apart(columns, *, cancelled):
            # Probes are signs; directions of Lanczos are not.
            order.append("trace" if (columns.abs() == 1).all() else "eigsh")
            return product(columns, cancelled=cancelled)

        operator.multiply = told_apart
        submitted, run = threading.Semaphore(0), server.batcher.run

        def counted(*args, **options):
            ticket = run(*args, **options)
            submitted.release()
            return ticket

        server.batcher.run = counted
        H = session.hessian()
        queries = [asyncio.create_task(H.eigsh(3, tolerance=1e-14))]
        await asyncio.to_thread(pausing.entered.acquire)
        await asyncio.to_thread(submitted.acquire)
        queries.append(
            asyncio.create_task(H.trace(estimator="hutchinson", samples=10**5))
        )
        for _ in range(12):
            # The other one waits in the queue before this one may end.
            await asyncio.to_thread(submitted.acquire)
            pausing.gate.release()
            await asyncio.to_thread(pausing.entered.acquire)
        assert order[:12] == ["eigsh", "trace"] * 6
        for query in queries:
            query.cancel()
        await asyncio.gather(*queries, return_exceptions=True)


async def test_vectors_that_the_session_has_no_room_for_are_refused_at_once(tmp_path):
    limits = LimitsConfig(stored_bytes=3 * 57 * 8 - 1)
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path, limits=limits)
    async with running(config) as server, contextlib.AsyncExitStack() as stack:
        session = await connected(server, stack)
        H = session.hessian()
        assert (await H.eigsh(2, store="two")).stored.shape == (2, 57)
        seen = []
        with pytest.raises(curvd.LimitExceeded, match="stored_bytes"):
            await H.eigsh(3, store="three", progress=seen.append)
        assert not seen
        # What is remembered for warm starts has the same limit.
        await H.eigsh(3)
        assert not (await H.eigsh(3, warm_start=True)).warm
        await H.eigsh(2)
        assert (await H.eigsh(2, warm_start=True)).warm


async def test_a_long_query_goes_on_in_the_last_tier_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "IDLE_S", 0.0)
    begun, go_on = threading.Event(), threading.Event()
    compute = query_run.QueryRun.compute

    def halting(run, job):
        rows = compute(run, job)
        if not begun.is_set():  # between two products nobody wants the device
            begun.set()
            assert go_on.wait(300)
        return rows

    monkeypatch.setattr(query_run.QueryRun, "compute", halting)
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path, compile_after_s=0)
    async with running(config) as server, contextlib.AsyncExitStack() as stack:
        session = await connected(server, stack)
        H = session.hessian()
        query = asyncio.create_task(H.trace(estimator="hutchinson", samples=3000))
        assert await asyncio.to_thread(begun.wait, 300)

        def tier():
            return dict(server.sessions.get(session.id).operators)[H.spec].tier

        async with asyncio.timeout(300):
            while tier() is not curvd.Tier.FINAL:  # noqa: ASYNC110 - threads change it
                await asyncio.sleep(0)
        go_on.set()
        found = await query
        tiers = [plan.tier for plan in found.info.plans]
        assert tiers == [curvd.Tier.FIRST, curvd.Tier.FINAL]
        assert found.info.plan == found.info.plans[0]
        again = await H.trace(estimator="hutchinson", samples=3000)
        assert [plan.tier for plan in again.info.plans] == [curvd.Tier.FINAL]
        assert found.value == pytest.approx(again.value, rel=1e-9)
