"""Channels of grpcio: with its name resolvers and proxies, and a few copies more.

grpcio does not survive ``fork``: its threads are gone, and a child that touches its
parent's channel, or makes one of its own, may wait for ever. Its handlers for forks have
to be asked for before it is imported, do nothing while a call is under way, and nothing
for `grpc.aio` (grpcio 1.85). So forked children use `curvd._transport.direct`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator
from typing import Any, TypeVar

import grpc
import grpc.aio

from curvd._transport.dial import client_context
from curvd._transport.process import Process, current_process
from curvd.config import ClientConfig, proxy_of
from curvd.contract import Rpc, RpcError
from curvd.errors import FailedPrecondition
from curvd.http2 import BufferProvider

T = TypeVar("T")

_HOME = current_process()
"""The process that imported grpcio; others inherited it by ``fork``."""


def lost_in_fork(target: str) -> bool:
    """Tell whether grpcio cannot be used, because an ancestor may have used it.

    Args:
        target: Where calls would go.

    Returns:
        True in forked children.

    Raises:
        FailedPrecondition: If the target is behind a proxy, which only grpcio speaks to.
    """
    if current_process() == _HOME:
        return False
    if proxy := proxy_of(target):
        msg = (
            f"grpcio does not survive fork, and only grpcio reaches {target} by the "
            f"proxy {proxy}: start this process by multiprocessing's 'spawn' or "
            "'forkserver', or name the target in no_proxy"
        )
        raise FailedPrecondition(msg, target=target, proxy=proxy)
    return True


def _check_files(config: ClientConfig) -> None:
    """Refuse TLS files that grpcio would take, and fail with later."""
    if config.tls is not None:
        client_context(config.tls)


def _check_process(home: Process) -> None:
    if home != current_process():
        msg = "the process was forked while the call was under way"
        raise RpcError(grpc.StatusCode.UNAVAILABLE, msg)


class GrpcioChannel:
    """Makes calls, and waits for them. Threads may share it.

    Args:
        target: Where the server is.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        self._metadata = config.metadata(target)
        self._home = current_process()
        _check_files(config)
        credentials, options = config.credentials(), config.channel_options()
        self._channel = (
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )

    def call(
        self,
        rpc: Rpc,
        parts: Iterator[Any],
        buffer_for: BufferProvider,
        timeout_s: float | None,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> Generator[Any, None, None]:
        """Make one call.

        Args:
            rpc: Which method.
            parts: The parts of the request; nothing is sent if a message would be missing.
            buffer_for: Not used: grpcio has memory of its own.
            timeout_s: Seconds; None: no deadline.
            metadata: Further headers.

        Yields:
            The parts of the response.

        Raises:
            grpc.RpcError: If it fails.
        """
        method = getattr(self._channel, rpc.shape)(
            rpc.path, rpc.request.dump, rpc.response.load
        )
        request = parts if rpc.client_streams else next(parts, None)
        if request is None:
            return
        metadata = self._metadata + metadata
        response = method(request, timeout=timeout_s, metadata=metadata)
        if not rpc.server_streams:
            yield response
            return
        try:
            for part in response:
                yield part
                _check_process(self._home)
        finally:
            if self._home == current_process():
                response.cancel()  # whoever leaves early stops the work

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()


class AsyncGrpcioChannel:
    """The same over `grpc.aio`. It belongs to the event loop of its first call.

    Args:
        target: Where the server is.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        self._target, self._config = target, config
        self._home = current_process()
        _check_files(config)
        self._metadata = config.metadata(target)
        self._channel: grpc.aio.Channel | None = None

    async def call(
        self,
        rpc: Rpc,
        parts: Iterator[Any],
        buffer_for: BufferProvider,
        timeout_s: float | None,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> AsyncGenerator[Any, None]:
        """Make one call.

        Args:
            rpc: Which method.
            parts: The parts of the request; nothing is sent if a message would be missing.
            buffer_for: Not used: grpcio has memory of its own.
            timeout_s: Seconds; None: no deadline.
            metadata: Further headers.

        Yields:
            The parts of the response.

        Raises:
            grpc.RpcError: If it fails.
        """
        method = getattr(self._open(), rpc.shape)(
            rpc.path, rpc.request.dump, rpc.response.load
        )
        request = parts if rpc.client_streams else next(parts, None)
        if request is None:
            return
        metadata = self._metadata + metadata
        response = method(request, timeout=timeout_s, metadata=metadata)
        statuses = _watch(response)
        try:
            if not rpc.server_streams:
                yield await response
            else:
                async for part in response:
                    yield part
                    _check_process(self._home)
        except grpc.RpcError as error:
            raise (statuses[0] if statuses else error) from None
        finally:
            if self._home == current_process():
                response.cancel()  # whoever leaves early stops the work

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        if self._channel is not None:
            await self._channel.close()

    def _open(self) -> grpc.aio.Channel:
        # Not in the constructor: a channel belongs to the loop that is running then.
        if self._channel is None:
            credentials = self._config.credentials()
            options = self._config.channel_options()
            self._channel = (
                grpc.aio.insecure_channel(self._target, options)
                if credentials is None
                else grpc.aio.secure_channel(self._target, credentials, options)
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
