"""Carries calls over a channel, blocking or not; the two differ in ``await`` only.

A channel belongs to the process that opened it: forked children open their own, and a
pickled connection is opened anew from its target and configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from curvd._calls import Call
from curvd._transport.diagnosis import advised, diagnosis
from curvd._transport.direct import AsyncDirectChannel, DirectChannel
from curvd._transport.grpcio import AsyncGrpcioChannel, GrpcioChannel, lost_in_fork
from curvd._transport.process import PerProcess, check_loop
from curvd._transport.retry import RetryPolicy
from curvd.config import ClientConfig, Transport, check_target
from curvd.contract import RpcError, translated
from curvd.errors import (
    Cancelled,
    CurvdError,
    InvalidSpec,
    Unauthenticated,
    Unavailable,
    install,
)
from curvd.tensors import Pool

if TYPE_CHECKING:  # of an extra, which few have
    from curvd._transport.tracing import CallSpans

C = TypeVar("C")
T = TypeVar("T")
_Kinds = Mapping[Transport, Callable[[str, ClientConfig], C]]

_IDLE_BYTES = 512 << 20
"""Memory of dropped results that a connection keeps for the next ones."""


class ConnectionBase(Generic[C]):
    """A channel to a server in each process that makes calls.

    Args:
        target: Where the server is.
        config: How to reach it.
        kinds: The channel of each transport.
    """

    def __init__(
        self,
        target: str,
        config: ClientConfig,
        kinds: _Kinds[C],
    ) -> None:
        self.target, self._config = check_target(target), config
        # Files are read now: children may have changed their directory or user.
        self._loaded = config.with_files_read()
        self._channels = PerProcess(
            functools.partial(_opened, target, self._loaded, kinds)
        )
        self._answered = self._closed = False
        self._pool = Pool(_IDLE_BYTES)
        self._spans = _spans(self.target) if config.tracing else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it takes to connect anew, the token included."""
        return type(self), (self.target, self._config), {"_closed": self._closed}

    def _begin(self, call: Call[Any]) -> RetryPolicy:
        """Get a call ready.

        Args:
            call: What to do.

        Returns:
            The time that it has.

        Raises:
            Cancelled: If the connection is closed.
        """
        if self._closed:
            msg = f"this client of {self.target} is closed"
            raise Cancelled(msg, target=self.target)
        policy = RetryPolicy(self._config)
        call.progressed, call.allocate = policy.progressed, self._pool.take
        return policy

    def _cause(self, error: CurvdError, policy: RetryPolicy) -> CurvdError:
        """Find what stands behind an error, if it can be told from here.

        Args:
            error: How a call failed.
            policy: What time it has.

        Returns:
            The error to raise: what to change, or the same.
        """
        if isinstance(error, Unauthenticated):
            return advised(error, self._config.token)
        if self._answered or not isinstance(error, Unavailable):
            return error
        return diagnosis(self.target, self._loaded, policy.timeout()) or error

    def _finish(self) -> C | None:
        """Make no further call.

        Returns:
            The channel of this process, to be closed.
        """
        self._closed = True
        self._pool.clear()
        return self._channels.made()


class Connection(ConnectionBase[DirectChannel | GrpcioChannel]):
    """A channel to a server. Threads may share it, and forked children too.

    Args:
        target: Where the server is.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        kinds: _Kinds[DirectChannel | GrpcioChannel] = {
            Transport.DIRECT: DirectChannel,
            Transport.GRPCIO: GrpcioChannel,
        }
        super().__init__(target, config, kinds)

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
        policy = self._begin(call)
        span = None if self._spans is None else self._spans.begin(call)
        try:
            while not call.done:
                try:
                    with translated(self.target):
                        call.restart()
                        while not call.done:
                            yield from self._attempt(call, policy)
                except CurvdError as failure:
                    error = self._cause(failure, policy)
                    recovers = call.recovers(error)
                    time.sleep(policy.pause_after(error, recovers=recovers))
                    if span is not None:
                        span.repeated(error)
        except BaseException as error:
            if span is not None:
                span.end(error)
            raise
        if span is not None:
            span.end(None)

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        if (channel := self._finish()) is not None:
            channel.close()

    def _attempt(self, call: Call[Any], policy: RetryPolicy) -> Iterator[Any]:
        response = self._channels.get().call(
            call.rpc, call.parts(), call.buffer_for, policy.timeout(), call.metadata
        )
        try:
            with contextlib.closing(response) as parts:
                for part in parts:
                    self._answered = True
                    yield from call.feed(part)
        except (grpc.RpcError, RpcError):
            if call.failure is None:
                raise
        if call.failure is not None:
            raise call.failure
        call.conclude()


class AsyncConnection(ConnectionBase[AsyncDirectChannel | AsyncGrpcioChannel]):
    """The same for asyncio. In each process it belongs to the event loop of a call.

    Args:
        target: Where the server is.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        kinds: _Kinds[AsyncDirectChannel | AsyncGrpcioChannel] = {
            Transport.DIRECT: AsyncDirectChannel,
            Transport.GRPCIO: AsyncGrpcioChannel,
        }
        super().__init__(target, config, kinds)

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
        check_loop(asyncio.get_running_loop())
        policy = self._begin(call)
        span = None if self._spans is None else self._spans.begin(call)
        try:
            while not call.done:
                try:
                    with translated(self.target):
                        call.restart()
                        while not call.done:
                            attempt = self._attempt(call, policy)
                            async with contextlib.aclosing(attempt) as blocks:
                                async for block in blocks:
                                    yield block
                except CurvdError as failure:
                    error = await asyncio.to_thread(self._cause, failure, policy)
                    recovers = call.recovers(error)
                    await asyncio.sleep(policy.pause_after(error, recovers=recovers))
                    if span is not None:
                        span.repeated(error)
        except BaseException as error:
            if span is not None:
                span.end(error)
            raise
        if span is not None:
            span.end(None)

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        if (channel := self._finish()) is not None:
            await channel.close()

    async def _attempt(
        self, call: Call[Any], policy: RetryPolicy
    ) -> AsyncGenerator[Any, None]:
        response = self._channels.get().call(
            call.rpc, call.parts(), call.buffer_for, policy.timeout(), call.metadata
        )
        try:
            async with contextlib.aclosing(response) as parts:
                async for part in parts:
                    self._answered = True
                    for block in call.feed(part):
                        yield block
        except (grpc.RpcError, RpcError):
            if call.failure is None:
                raise
        if call.failure is not None:
            raise call.failure
        call.conclude()


def _opened(
    target: str,
    config: ClientConfig,
    kinds: _Kinds[C],
) -> C:
    """Open a channel in this process."""
    transport = config.transport
    if transport is Transport.GRPCIO and lost_in_fork(target):
        transport = Transport.DIRECT  # the same on the wire, and it survives
    return kinds[transport](target, config)


def _spans(target: str) -> CallSpans:
    """Make what makes spans of calls.

    Raises:
        InvalidSpec: If OpenTelemetry is not installed.
    """
    try:
        from curvd._transport.tracing import CallSpans
    except ModuleNotFoundError as error:
        msg = (
            f"ClientConfig(tracing=True) needs OpenTelemetry ({error.name} is missing): "
            f"{install('otel')}"
        )
        raise InvalidSpec(msg, tracing=True) from error
    return CallSpans(target)
