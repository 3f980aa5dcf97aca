"""Carries calls over a channel, blocking or not; the two differ in ``await`` only."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, TypeVar

import grpc

from curvd._calls import Call
from curvd._direct import AsyncDirectChannel, DirectChannel
from curvd._grpcio import AsyncGrpcioChannel, GrpcioChannel
from curvd._retry import Patience
from curvd.buffers import Pool
from curvd.config import ClientConfig, Transport, check_target
from curvd.errors import Cancelled, CurvdError
from curvd.status import Ended, translated

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
        direct = config.transport is Transport.DIRECT
        self._channel = (DirectChannel if direct else GrpcioChannel)(target, config)
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
        while not call.done:
            try:
                with translated(self.target):
                    call.restart()
                    while not call.done:
                        yield from self._exchange(call, patience)
            except CurvdError as error:
                recovers = call.recovers(error)
                time.sleep(patience.pause_after(error, recovers=recovers))

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._closed = True
        self._pool.clear()
        self._channel.close()

    def _exchange(self, call: Call[Any], patience: Patience) -> Iterator[Any]:
        response = self._channel.exchange(
            call.rpc, call.parts(), call.room, patience.timeout()
        )
        try:
            with contextlib.closing(response) as parts:
                for part in parts:
                    yield from call.feed(part)
        except (grpc.RpcError, Ended):
            if call.failure is None:
                raise
        if call.failure is not None:
            raise call.failure
        call.conclude()


class AsyncConnection:
    """The same for asyncio. It belongs to the event loop of its first call.

    Args:
        target: Where the server is.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        self.target, self._config = check_target(target), config
        direct = config.transport is Transport.DIRECT
        kind = AsyncDirectChannel if direct else AsyncGrpcioChannel
        self._channel = kind(target, config)
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
        while not call.done:
            try:
                with translated(self.target):
                    call.restart()
                    while not call.done:
                        exchange = self._exchange(call, patience)
                        async with contextlib.aclosing(exchange) as blocks:
                            async for block in blocks:
                                yield block
            except CurvdError as error:
                recovers = call.recovers(error)
                await asyncio.sleep(patience.pause_after(error, recovers=recovers))

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._closed = True
        self._pool.clear()
        await self._channel.close()

    async def _exchange(
        self, call: Call[Any], patience: Patience
    ) -> AsyncGenerator[Any, None]:
        response = self._channel.exchange(
            call.rpc, call.parts(), call.room, patience.timeout()
        )
        try:
            async with contextlib.aclosing(response) as parts:
                async for part in parts:
                    for block in call.feed(part):
                        yield block
        except (grpc.RpcError, Ended):
            if call.failure is None:
                raise
        if call.failure is not None:
            raise call.failure
        call.conclude()


def _closed(target: str) -> Cancelled:
    msg = f"this client of {target} is closed"
    return Cancelled(msg, target=target)
