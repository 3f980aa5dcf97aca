"""Carries calls over a channel, blocking or not; the two differ in ``await`` only."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

import grpc
import grpc.aio
import tenacity

from curvd._calls import Call
from curvd._retry import Patience
from curvd.buffers import Pool
from curvd.config import ClientConfig, check_target
from curvd.errors import Cancelled
from curvd.status import translated

T = TypeVar("T")

_IDLE_BYTES = 512 << 20
"""Memory of dropped results that a connection keeps for the next ones."""


class Connection:
    """A channel to a server. Threads may share it.

    Args:
        target: Where the server is.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        self.target, self._config = check_target(target), config
        self._metadata = config.metadata(target)
        credentials, options = config.credentials(), config.channel_options()
        self._channel = (
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )
        self._closed = False
        self._pool = Pool(_IDLE_BYTES)

    def run(self, call: Call[T]) -> T:
        """Make a call, again if need be.

        Args:
            call: What to do.

        Returns:
            Its result.
        """
        for _ in self.blocks(call):
            pass
        return call.result()

    def blocks(self, call: Call[Any]) -> Iterator[Any]:
        """Make a call, again if need be, and hand out what arrives.

        Args:
            call: What to do.

        Yields:
            Blocks, as they are complete.

        Raises:
            CurvdError: If it fails for good.
        """
        if self._closed:
            raise _closed(self.target)
        patience = Patience(self._config)
        call.progressed, call.allocate = patience.progressed, self._pool.take
        for attempt in tenacity.Retrying(
            **patience.policy(weakref.WeakMethod(call.recovers))
        ):
            with attempt, translated(self.target):
                call.restart()
                while not call.done:
                    yield from self._exchange(call, patience)

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._closed = True
        self._pool.clear()
        self._channel.close()

    def _exchange(self, call: Call[Any], patience: Patience) -> Iterator[Any]:
        rpc, parts = call.rpc, call.parts()
        method = getattr(self._channel, rpc.shape)(
            rpc.path, rpc.request.dump, rpc.response.load
        )
        request = parts if rpc.client_streams else next(parts, None)
        if call.failure is not None:
            raise call.failure
        try:
            response = method(
                request, timeout=patience.timeout(), metadata=self._metadata
            )
            if not rpc.server_streams:
                yield from call.feed(response)
            else:
                try:
                    for part in response:
                        yield from call.feed(part)
                finally:
                    response.cancel()  # whoever leaves early stops the work
        except grpc.RpcError:
            if call.failure is None:
                raise
        if call.failure is not None:
            raise call.failure
        call.conclude()


class AsyncConnection:
    """The same over `grpc.aio`. It belongs to the event loop of its first call.

    Args:
        target: Where the server is.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        self.target, self._config = check_target(target), config
        self._metadata = config.metadata(target)
        self._credentials = config.credentials()
        self._channel: grpc.aio.Channel | None = None
        self._closed = False
        self._pool = Pool(_IDLE_BYTES)

    async def run(self, call: Call[T]) -> T:
        """Make a call, again if need be.

        Args:
            call: What to do.

        Returns:
            Its result.
        """
        async for _ in self.blocks(call):
            pass
        return call.result()

    async def blocks(self, call: Call[Any]) -> AsyncGenerator[Any, None]:
        """Make a call, again if need be, and hand out what arrives.

        Args:
            call: What to do.

        Yields:
            Blocks, as they are complete.

        Raises:
            CurvdError: If it fails for good.
        """
        if self._closed:
            raise _closed(self.target)
        patience = Patience(self._config)
        call.progressed, call.allocate = patience.progressed, self._pool.take
        async for attempt in tenacity.AsyncRetrying(
            **patience.policy(weakref.WeakMethod(call.recovers))
        ):
            with attempt, translated(self.target):
                call.restart()
                while not call.done:
                    exchange = self._exchange(call, patience)
                    async with contextlib.aclosing(exchange) as blocks:
                        async for block in blocks:
                            yield block

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._closed = True
        self._pool.clear()
        if self._channel is not None:
            await self._channel.close()

    async def _exchange(
        self, call: Call[Any], patience: Patience
    ) -> AsyncGenerator[Any, None]:
        rpc, parts = call.rpc, call.parts()
        method = getattr(self._open(), rpc.shape)(
            rpc.path, rpc.request.dump, rpc.response.load
        )
        request = parts if rpc.client_streams else next(parts, None)
        if call.failure is not None:
            raise call.failure
        response = method(request, timeout=patience.timeout(), metadata=self._metadata)
        statuses = _watch(response)
        try:
            if not rpc.server_streams:
                for block in call.feed(await response):
                    yield block
            else:
                async for part in response:
                    for block in call.feed(part):
                        yield block
        except grpc.RpcError as error:
            if call.failure is None:
                raise (statuses[0] if statuses else error) from None
        finally:
            response.cancel()  # whoever leaves early stops the work
        if call.failure is not None:
            raise call.failure
        call.conclude()

    def _open(self) -> grpc.aio.Channel:
        # Not in the constructor: a channel belongs to the loop that is running then.
        if self._channel is None:
            options = self._config.channel_options()
            self._channel = (
                grpc.aio.insecure_channel(self.target, options)
                if self._credentials is None
                else grpc.aio.secure_channel(self.target, self._credentials, options)
            )
        return self._channel


def _watch(response: Any) -> list[grpc.aio.AioRpcError]:
    """Keep the status with which a call really ended.

    `grpc.aio` replaces it by INTERNAL when the server answers before it has read the
    whole request, and a write then fails: https://github.com/grpc/grpc/issues/36066.

    Args:
        response: A call of `grpc.aio`.

    Returns:
        A list that receives the status when it arrives.
    """
    statuses: list[grpc.aio.AioRpcError] = []

    def note(done: Any) -> None:
        code, details = _settled(done.code()), _settled(done.details())
        if code is grpc.StatusCode.OK or details == "Internal error from Core":
            # An answer that is lost, or a status that never came: asking again helps.
            code, details = grpc.StatusCode.UNAVAILABLE, "the connection broke"
        trailing = _settled(done.trailing_metadata())
        statuses.append(
            grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)
        )

    response.add_done_callback(note)
    return statuses


def _settled(value: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that has nothing left to wait for."""
    try:
        value.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    msg = "the call is not done"
    raise RuntimeError(msg)


def _closed(target: str) -> Cancelled:
    msg = f"this client of {target} is closed"
    return Cancelled(msg, target=target)
