"""What only an asyncio client can get wrong."""

import asyncio
import threading

import numpy as np
import pytest
from support import fake_service

import curvd

V = np.random.default_rng(2).standard_normal((fake_service.P, 4))


@pytest.fixture
async def session(target):
    async with curvd.aio.connect(target) as client:
        yield await client.create_session("m", "d", loss="mse", dtype="F64")


async def test_many_products_run_at_once(session):
    H = session.hessian()
    products = await asyncio.gather(*(H @ V[:, k] for k in range(4)))
    np.testing.assert_allclose(np.stack(products, axis=1), fake_service.MATRIX @ V)


async def test_a_mistake_is_raised_where_it_is_made(session):
    H = session.hessian()
    with pytest.raises(curvd.InvalidVector):
        H @ np.ones(3)  # not awaited


async def test_connecting_needs_no_loop(target):
    client = await asyncio.to_thread(curvd.aio.connect, target)
    async with client:
        assert await client.healthy()


async def test_a_session_deletes_itself_in_an_async_with(target, service):
    async with curvd.aio.connect(target) as client:
        async with await client.create_session("m", "d", loss="mse"):
            assert len(service.sessions) == 1
    assert service.sessions == {}


class Waiting(fake_service.FakeService):
    """Answers a MatMat with its first column, then waits for the end of the call."""

    def __init__(self):
        super().__init__()
        self.ended = threading.Event()

    def handle(self, rpc, request, context):
        if rpc.name != "MatMat":
            yield from super().handle(rpc, request, context)
            return
        context.add_callback(self.ended.set)
        for count, part in enumerate(super().handle(rpc, request, context)):
            if count == 5:  # the header of both kinds, and one column
                self.ended.wait(300)
            yield part


async def test_cancelling_a_task_cancels_its_work():
    service = Waiting()
    with fake_service.serving(service) as target:
        async with curvd.aio.connect(target) as client:
            session = await client.create_session("m", "d", loss="mse", dtype="F64")
            blocks = session.hessian().iter_matmat(V)
            await anext(blocks)
            task = asyncio.ensure_future(anext(blocks))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(service.ended.wait, 30)


async def test_leaving_a_stream_of_blocks_ends_its_work():
    service = Waiting()
    with fake_service.serving(service) as target:
        async with curvd.aio.connect(target) as client:
            session = await client.create_session("m", "d", loss="mse", dtype="F64")
            blocks = session.hessian().iter_matmat(V)
            await anext(blocks)
            await blocks.aclose()
            assert await asyncio.to_thread(service.ended.wait, 30)


def test_leaving_a_blocking_stream_of_blocks_ends_its_work():
    service = Waiting()
    with fake_service.serving(service) as target, curvd.connect(target) as client:
        session = client.create_session("m", "d", loss="mse", dtype="F64")
        blocks = session.hessian().iter_matmat(V)
        next(blocks)
        blocks.close()
        assert service.ended.wait(300)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("header", "the header or the summary is missing"),
        ("summary", "the header or the summary is missing"),
        ("chunk", "the stream ended after"),
        ("name", "expected one tensor"),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_answer_that_breaks_the_contract_is_internal(kind, part, text):
    class Broken(fake_service.FakeService):
        def _result(self, message, info, result, *args, **extra):
            parts = list(super()._result(message, info, result, *args, **extra))
            chosen = {"header": 0, "summary": -1, "chunk": -2}.get(part)
            if chosen is not None:
                del parts[chosen]
            else:
                parts[1] = memoryview(bytes(parts[1]).replace(b"result", b"resalt"))
            return parts

    with fake_service.serving(Broken()) as target:
        if kind == "sync":
            with curvd.connect(target) as client:
                session = client.create_session("m", "d", loss="mse", dtype="F64")
                with pytest.raises(curvd.Internal, match=text):
                    session.hessian() @ V
        else:

            async def ask():
                async with curvd.aio.connect(target) as client:
                    session = await client.create_session(
                        "m", "d", loss="mse", dtype="F64"
                    )
                    with pytest.raises(curvd.Internal, match=text):
                        await (session.hessian() @ V)

            asyncio.run(ask())
