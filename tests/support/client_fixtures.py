"""Both clients against one fake, in one style."""

import asyncio
import dataclasses
import inspect

import pytest
from support import fake_service

import curvd
from curvd._calls import curvature_requests

QUICK = curvd.ClientConfig(
    retry=curvd.RetryConfig(first_s=0.0, longest_s=0.0, give_up_s=10.0)
)
"""Repeats without a pause, so that tests never sleep."""


class Blocking:
    """An asyncio client that can be used like the blocking one."""

    def __init__(self, inner, loop):
        self.inner, self.loop = inner, loop

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self._wait(value(*args, **kwargs))

    def __matmul__(self, x):
        return self._wait(self.inner @ x)

    def __rmatmul__(self, x):
        return self._wait(x @ self.inner)

    __array_ufunc__ = None

    def __enter__(self):
        self._wait(self.inner.__aenter__())
        return self

    def __exit__(self, *args):
        self._wait(self.inner.__aexit__(*args))

    def _wait(self, value):
        if inspect.isawaitable(value):
            value = self.loop.run_until_complete(value)
        elif inspect.isasyncgen(value):
            return self._drain(value)
        if type(value).__name__.startswith("Async"):
            return Blocking(value, self.loop)
        return value

    def _drain(self, generator):
        try:
            while True:
                yield self.loop.run_until_complete(anext(generator))
        except StopAsyncIteration:
            pass
        finally:
            self.loop.run_until_complete(generator.aclose())


@pytest.fixture
def service():
    return fake_service.FakeService()


@pytest.fixture
def target(service):
    with fake_service.serving(service) as address:
        yield address


@pytest.fixture(params=["sync", "async", "sync-grpcio", "async-grpcio"])
def connect(request):
    """`curvd.connect`, or `curvd.aio.connect` made to block, over either transport."""
    kind, _, transport = request.param.partition("-")

    def configured(config=None):
        config = config or curvd.ClientConfig()
        return dataclasses.replace(config, transport=transport or config.transport)

    if kind == "sync":
        yield lambda target, config=None, **kwargs: curvd.connect(
            target, config=configured(config), **kwargs
        )
        return
    loop = asyncio.new_event_loop()
    yield lambda target, config=None, **kwargs: Blocking(
        curvd.aio.connect(target, config=configured(config), **kwargs), loop
    )
    loop.close()


@pytest.fixture
def client(connect, target):
    with connect(target, config=QUICK) as client:
        yield client


@pytest.fixture
def streams(monkeypatch):
    """Small vectors go in streams too."""
    monkeypatch.setattr(curvature_requests, "SMALL_BYTES", -1)


@pytest.fixture
def session(client):
    return client.create_session("m", "d", loss="mse", dtype="F64")
