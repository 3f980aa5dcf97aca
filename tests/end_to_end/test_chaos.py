"""Requests are lost, answers are lost, streams break: every result is exact all the same.

On every RPC, each with a chance of 30 %. Seeds are fixed, so a run can be repeated.
"""

import asyncio
import random
import sqlite3

import grpc
import grpc.aio
import numpy as np
import pytest

pytest.importorskip("torch")
import curvd
from curvd._calls import curvature_requests
from curvd_server.app import serve_in_thread
from curvd_server.config import LimitsConfig, ServerConfig
from curvd_server.service import endpoint

CALLS, CHANCE = 200, 0.3
RETRY = curvd.RetryConfig(first_s=0.0, longest_s=0.0, give_up_s=600.0)
WIDTHS, POINTS = [3, 4, 2], 20


class Chaos(grpc.aio.ServerInterceptor):
    """Loses and breaks what it is told to."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.on = False
        self.counts = {"request": 0, "answer": 0, "stream": 0}

    def happens(self, what):
        chosen = self.on and self.random.random() < CHANCE
        self.counts[what] += chosen
        return chosen

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/curvd."):
            return handler
        for name in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            inner = getattr(handler, name)
            if inner is not None:
                return handler._replace(**{name: self._surround(inner)})
        return handler

    def _surround(self, inner):
        async def call(request, context):
            if self.happens("request"):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the request was lost")
            lost, breaks = self.happens("answer"), self.happens("stream")
            line = Line(context, lost, self.random.randrange(8) if breaks else None)
            if hasattr(request, "__aiter__"):
                request = line.parts(request)
            work = asyncio.create_task(inner(request, line))
            broke = asyncio.create_task(line.broken.wait())
            await asyncio.wait([work, broke], return_when=asyncio.FIRST_COMPLETED)
            broke.cancel()
            if not work.done() or (breaks and line.broken.is_set()):
                work.cancel()
                line.gone.set()
                await asyncio.wait([work])
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream broke")
            response = await work
            if lost:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
            return response

        return call


class Line:
    """A call's context whose answers may get lost, and which may break."""

    def __init__(self, context, lost, messages):
        self._context, self._lost, self._messages = context, lost, messages
        self.broken, self.gone = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name):
        return getattr(self._context, name)

    async def parts(self, request):
        async for part in request:
            await self._pass()
            yield part

    async def write(self, part):
        await self._pass()
        if not self._lost:
            await self._context.write(part)

    async def _pass(self):
        if self._messages is None:
            return
        if self._messages == 0:
            self.broken.set()
            await self.gone.wait()  # until the work is cancelled
            msg = "the connection is gone"
            raise ConnectionError(msg)
        self._messages -= 1


@pytest.fixture
def chaos(monkeypatch):
    chaos = Chaos(seed=0)
    monkeypatch.setattr(endpoint, "interceptors_of", lambda callers, drops: [chaos])
    return chaos


def states(count):
    """Parameters of so many versions."""
    rng = np.random.default_rng(1)
    shapes = {"1.weight": (4, 3), "1.bias": (4,), "3.weight": (2, 4), "3.bias": (2,)}
    return [{n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(count)]


class Script:
    """What the client does, and what each step must give."""

    def __init__(self, client, states):
        self.client, self.states = client, states
        rng = np.random.default_rng(2)
        self.data = {
            "x": rng.normal(size=(POINTS, 3)),
            "y": rng.normal(size=(POINTS, 2)),
        }
        self.session = self.create(0)
        size = self.session.layout.size
        self.V = rng.normal(size=(size, 5))
        self.version = 0
        self.updates = 0
        self.truths = []

    def create(self, version):
        model = self.client.register_model(
            "mlp", {"widths": WIDTHS, "activation": "tanh"}, self.states[version]
        )
        dataset = self.client.register_dataset(
            self.data, inputs="x", target="y", batch_size=7
        )
        return self.client.create_session(model, dataset, loss="mse", dtype="F64")

    def measure(self):
        """Ask for everything at every version, while all is calm."""
        for version in range(len(self.states)):
            self.session.update_parameters(self.states[version])
            H = self.session.hessian()
            self.truths.append({
                "matrix": H @ np.eye(H.shape[0]),
                "gradient": self.session.gradient(),
                "bf16": H.multiply(self.V[:, 0], wire="BF16"),
                "trace": H.trace(seed=4).value,
                "top": H.eigsh(k=2).values,
            })
        self.session.update_parameters(self.states[0])

    @property
    def truth(self):
        return self.truths[self.version]

    @property
    def product(self):
        return self.truth["matrix"] @ self.V

    def same(self, result, expected):
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)

    def matvec(self):
        self.same(self.session.hessian() @ self.V[:, 0], self.product[:, 0])

    def matmat(self):
        self.same(self.session.hessian() @ self.V, self.product)

    def blocks(self):
        found = list(self.session.hessian().iter_matmat(self.V, columns=2))
        self.same(np.concatenate(found, axis=1), self.product)

    def few_bits(self):
        product = self.session.hessian().multiply(self.V[:, 0], wire="BF16")
        np.testing.assert_array_equal(product, self.truth["bf16"])

    def gradient(self):
        loss, gradient = self.session.gradient()
        self.same(loss, self.truth["gradient"][0])
        self.same(gradient, self.truth["gradient"][1])

    def probe(self):
        probe = self.session.probe(seed=5, columns=3)
        columns = curvd.tensors.random_probes.probes(
            "rademacher", 5, range(3), len(self.V)
        )
        self.same(
            self.session.hessian().multiply(probe), self.truth["matrix"] @ columns.T
        )

    def chain(self):
        """Two products in a row, of which nothing travels but the last."""
        H = self.session.hessian()
        v = self.session.put("v", self.V)
        w = H.multiply(H.multiply(v, store="w"), store="w")
        self.same(self.session.get(w), self.truth["matrix"] @ self.product)
        self.session.discard(v)
        assert [s.name for s in self.session.vectors()] == ["w"]
        self.session.discard("w")

    def update(self):
        self.version = (self.version + 1) % len(self.states)
        self.session.update_parameters(self.states[self.version])
        self.updates += 1

    def another_session(self):
        session = self.create(0)
        assert len(self.client.sessions()) == 2
        assert self.client.session(session.id).info.version == 1
        session.renew()
        session.delete()
        assert [s.id for s in self.client.sessions()] == [self.session.id]

    def trace(self):
        self.same(self.session.hessian().trace(seed=4).value, self.truth["trace"])

    def eigenvalues(self):
        found = self.session.hessian().eigsh(k=2).values
        np.testing.assert_allclose(found, self.truth["top"], rtol=1e-6)


STEPS = {
    "matvec": 5, "matmat": 5, "blocks": 3, "few_bits": 2, "gradient": 3, "probe": 2,
    "chain": 2, "update": 2, "another_session": 1, "trace": 2, "eigenvalues": 1,
}  # fmt: skip


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_two_hundred_calls_through_chaos(tmp_path, chaos, monkeypatch, transport):
    patient = curvd.ClientConfig(retry=RETRY, transport=transport)
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=tmp_path,
        drain_s=0.0,
        limits=LimitsConfig(run_columns=2),  # so that matrices go in blocks
    )
    with (
        serve_in_thread(config) as target,
        curvd.connect(target, config=patient) as client,
    ):
        script = Script(client, states(3))
        script.measure()
        before = script.session.refresh().version
        order = random.Random(3)
        chaos.on = True
        for _ in range(CALLS):
            monkeypatch.setattr(
                curvature_requests, "SMALL_BYTES", order.choice([-1, 1 << 20])
            )
            (step,) = order.choices(list(STEPS), list(STEPS.values()))
            getattr(script, step)()
        chaos.on = False
        assert min(chaos.counts.values()) > 50
        assert script.session.refresh().version == before + script.updates
        assert script.updates > 5
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as catalogue:
        for table in ("models", "datasets", "sessions"):
            (count,) = catalogue.execute(f"SELECT count(*) FROM {table}").fetchone()
            assert count == 1, table
