"""From methods to gRPC handlers: the table of RPCs gives names, shapes and codecs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import groupby
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from curvd.contract import RPCS, Codec, Framed, Joined, Part, Rpc
from curvd.errors import Internal, Overloaded
from curvd.http2 import BufferProvider, Landed, ReceivesInPlace
from curvd_server.service.streams import CALLER, LONGEST_CHUNK
from curvd_server.storage import ranges
from curvd_server.system import TRACED, Traces, calling
from curvd_server.transport import Context, Gate, Stalled, StallGuard
from curvd_server.trials import PEER


def generic_handlers(
    services: list[object], gate: Gate, stalls: StallGuard
) -> list[grpc.GenericRpcHandler]:
    """Make gRPC's handlers for all methods of the contract.

    A method takes the request, or an asynchronous iterator of its parts. It returns
    the response, or takes a `Send` for the parts of it.

    Args:
        services: Objects with a method ``mat_vec`` for each RPC ``MatVec``.
        gate: What each call passes through.
        stalls: Ends calls whose client neither sends nor reads.

    Returns:
        One handler per service.
    """
    return [
        grpc.method_handlers_generic_handler(
            service,
            {
                rpc.name: _handler(rpc, _method(services, rpc), gate, stalls)
                for rpc in rpcs
            },
        )
        for service, rpcs in groupby(RPCS.values(), key=lambda rpc: rpc.service)
    ]


def _method(services: list[object], rpc: Rpc) -> Callable[..., Awaitable[Any]]:
    name = method_name(rpc.name)
    (method,) = (getattr(s, name) for s in services if hasattr(s, name))
    bound: Callable[..., Awaitable[Any]] = method
    return bound


def method_name(rpc: str) -> str:
    """Spell the name of the method for an RPC: ``mat_vec`` for ``MatVec``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", rpc).lower()


class _Requests(ReceivesInPlace, AsyncIterator[Part]):
    """The parts of a request, each of which must come in time.

    Args:
        parts: As the transport has them.
        stalls: Says how long that is.
        peer: Who sends them.
    """

    def __init__(
        self, parts: AsyncIterator[Part], stalls: StallGuard, peer: str
    ) -> None:
        self._parts, self._stalls, self._peer = parts, stalls, peer
        # A generator of grpcio's must not be left unused, as by a call that is refused.
        self._begun: AsyncIterator[Part] | None = None

    @property
    def buffer_for(self) -> BufferProvider:
        """Finds the place of the next chunk, if the transport can use it."""
        raise NotImplementedError

    @buffer_for.setter
    def buffer_for(self, buffer_for: BufferProvider) -> None:
        if isinstance(self._parts, ReceivesInPlace):
            self._parts.buffer_for = buffer_for

    @property
    def landed(self) -> Landed:
        """Looks at what came to that place."""
        raise NotImplementedError

    @landed.setter
    def landed(self, landed: Landed) -> None:
        if isinstance(self._parts, ReceivesInPlace):
            self._parts.landed = landed

    async def __anext__(self) -> Part:
        """Wait for the next part."""
        if self._begun is None:
            self._begun = aiter(self._parts)
        awaited = anext(self._begun)
        part = await self._stalls.watch(awaited, self._peer, "go on with its request")
        _check_readable(part)
        return part


class _Responses:
    """The way back: parts are sent while the client reads them.

    Args:
        context: The context of the call.
        stalls: Says how long the client may take for each.
    """

    def __init__(
        self, context: grpc.aio.ServicerContext[Any, Any], stalls: StallGuard
    ) -> None:
        self._context, self._stalls = context, stalls
        self._direct = context if isinstance(context, Context) else None
        self._cut_off: asyncio.Future[None] | None = None

    async def send(self, part: Part | Joined) -> None:
        """Send one part; waits while the client reads slowly."""
        if self._direct is None:
            write = asyncio.ensure_future(self._context.write(part))
        elif self._direct.write_soon(part):
            await asyncio.sleep(0)  # whoever reads fast has others wait for one part
            return
        else:
            write = asyncio.ensure_future(self._direct.written())
        try:
            await self._stalls.watch(
                asyncio.shield(write), self._context.peer(), "read its answer"
            )
        except BaseException:
            if not write.done():
                self._cut_off = write
            raise

    async def settle(self, *, stalled: bool) -> None:
        """Wait until the call can be ended with a status.

        A write that is cut off leaves one that cannot (grpcio 1.85:
        TOO_MANY_OPERATIONS); it ends by itself when the client reads on or goes away.

        Args:
            stalled: Whether that was waited for already.
        """
        write = self._cut_off
        if write is None:
            return
        await asyncio.wait([write], timeout=0 if stalled else self._stalls.stall_s)
        if not write.done():
            # Our own connections carry one call each, so it may be closed.
            if self._direct is not None:
                self._direct.disconnect()
            await asyncio.wait([write])
        if not write.cancelled():
            write.exception()  # the call is over, whatever became of this part


class _TimedRequests(_Requests):
    """Requests of a call that is traced: how long they came, and how much."""

    def __init__(
        self, parts: AsyncIterator[Part], stalls: StallGuard, peer: str
    ) -> None:
        super().__init__(parts, stalls, peer)
        self._began_s = self._latest_s = time.monotonic()
        self._bytes = 0

    async def __anext__(self) -> Part:
        """Wait for the next part."""
        part = await super().__anext__()
        self._latest_s = time.monotonic()
        self._bytes += part.nbytes if isinstance(part, memoryview) else 0
        return part

    def tell(self, traced: Traces) -> None:
        """Say how long all of them took to come."""
        traced.add("receive", self._began_s, self._latest_s, bytes=self._bytes)


class _TimedResponses(_Responses):
    """Responses of a call that is traced, likewise."""

    def __init__(
        self, context: grpc.aio.ServicerContext[Any, Any], stalls: StallGuard
    ) -> None:
        super().__init__(context, stalls)
        self._began_s = self._latest_s = 0.0
        self._bytes = 0

    async def send(self, part: Part | Joined) -> None:
        """Send one part; waits while the client reads slowly."""
        self._began_s = self._began_s or time.monotonic()
        await super().send(part)
        self._latest_s = time.monotonic()
        chunks = part if isinstance(part, tuple) else (part,)
        self._bytes += sum(c.nbytes for c in chunks if isinstance(c, memoryview))

    def tell(self, traced: Traces) -> None:
        """Say how long they were sent; they are computed at the same time."""
        if self._latest_s:
            traced.add("send", self._began_s, self._latest_s, bytes=self._bytes)


def _loader(codec: Codec) -> Callable[[bytes], Part | Framed | Internal]:
    """Parse messages of grpcio's, which hides what its deserializers raise."""

    def load(data: bytes) -> Part | Framed | Internal:
        try:
            return codec.load(data)
        except DecodeError as error:
            return Internal(f"a message that is none of its kind: {error}")

    return load


def _check_readable(part: object) -> None:
    """Raise what a message could not be read for."""
    if isinstance(part, Internal):
        raise part


def _handler(
    rpc: Rpc,
    method: Callable[..., Awaitable[Any]],
    gate: Gate,
    stalls: StallGuard,
) -> grpc.RpcMethodHandler[Any, Any]:
    async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        peer, stalled = context.peer(), False
        # All of grpcio's clients on our Unix socket have one name, and so none.
        CALLER.set("" if peer == "unix:" else peer)
        LONGEST_CHUNK.set(context.longest_chunk if isinstance(context, Context) else 0)
        PEER.set("" if peer == "unix:" else peer.rpartition(":")[0])

        async def answer() -> Any:
            nonlocal stalled
            traced, parts = TRACED.get(), request
            timed = traced is not None
            if rpc.client_streams:
                kind = _TimedRequests if timed else _Requests
                parts = kind(request, stalls, peer)
            responses = (_TimedResponses if timed else _Responses)(context, stalls)
            if not rpc.client_streams:
                _check_readable(parts)
                ranges.check(parts.message if rpc.request.framed else parts)
            if calling().name:  # who has a name has his turns by that, wherever he is
                PEER.set(calling().name)
            try:
                if rpc.server_streams:
                    # Written, not yielded: all of a call happens in one task, so that
                    # what it holds is let go when the call ends, not when a generator
                    # is collected.
                    return await method(parts, responses.send)
                return await method(parts)
            except Overloaded:
                stalls.press()
                raise
            except Stalled:
                stalled = True
                raise
            finally:
                await responses.settle(stalled=stalled)
                if traced is not None:
                    for end in (parts, responses):
                        if isinstance(end, _TimedRequests | _TimedResponses):
                            end.tell(traced)

        return await gate.call(rpc, context, answer)

    factory = getattr(grpc, f"{rpc.shape}_rpc_method_handler")
    handler: grpc.RpcMethodHandler[Any, Any] = factory(
        serve,
        request_deserializer=_loader(rpc.request),
        response_serializer=rpc.response.dump,
    )
    return handler
