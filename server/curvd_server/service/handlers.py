"""From methods to gRPC handlers: the table of RPCs gives names, shapes and codecs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import grpc
import grpc.aio

from curvd.errors import InvalidSpec
from curvd.http2.messages import InPlace, Room
from curvd.rpcs import RPCS, Part, Rpc
from curvd_server.interceptors import Gate

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Name of the connection of the call under way, if it carries one after the other."""
Send = Callable[[Part], Awaitable[None]]
"""Sends one part of a response; waits while the client reads slowly."""


def generic_handlers(
    services: list[object], gate: Gate
) -> list[grpc.GenericRpcHandler]:
    """Make gRPC's handlers for all methods of the contract.

    A method takes the request, or an asynchronous iterator of its parts. It returns
    the response, or takes a `Send` for the parts of it.

    Args:
        services: Objects with a method ``mat_vec`` for each RPC ``MatVec``.
        gate: What each call passes through.

    Returns:
        One handler per service.
    """
    return [
        grpc.method_handlers_generic_handler(
            service,
            {rpc.name: _handler(rpc, _method(services, rpc), gate) for rpc in rpcs},
        )
        for service, rpcs in groupby(RPCS.values(), key=lambda rpc: rpc.service)
    ]


class Chunks(AsyncIterator[memoryview]):
    """The bytes of a tensor stream.

    Args:
        parts: What follows the header.
        first: A chunk that was taken off already.
    """

    def __init__(
        self, parts: AsyncIterator[Part], first: memoryview | None = None
    ) -> None:
        self._parts, self._first = parts, first

    async def __anext__(self) -> memoryview:
        """Wait for the next chunk.

        Raises:
            StopAsyncIteration: If there is none.
            InvalidSpec: If something else comes.
        """
        first, self._first = self._first, None
        part = await anext(self._parts) if first is None else first
        if not isinstance(part, memoryview):
            msg = "after the header, a stream carries chunks only"
            raise InvalidSpec(msg)
        return part

    def put_back(self, chunk: memoryview) -> None:
        """Have a chunk come once more."""
        self._first = chunk

    def come_to(self, room: Room) -> None:
        """Receive chunks where they belong, if the transport can.

        Args:
            room: Finds the place of the next chunk, all before were taken.
        """
        if isinstance(self._parts, InPlace):
            self._parts.room = room


async def opened(requests: AsyncIterator[Part]) -> tuple[Any, Chunks]:
    """Take the header off a stream of tensors.

    Args:
        requests: Its parts.

    Returns:
        The header, and the chunks that follow.

    Raises:
        InvalidSpec: If the stream does not begin with a header.
    """
    first: Any = await anext(aiter(requests), None)
    if first is None or isinstance(first, memoryview) or not first.HasField("header"):
        msg = "the first message of the stream must be a header"
        raise InvalidSpec(msg)
    return first.header, Chunks(aiter(requests))


def _method(services: list[object], rpc: Rpc) -> Callable[..., Awaitable[Any]]:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", rpc.name).lower()
    (method,) = (getattr(s, name) for s in services if hasattr(s, name))
    bound: Callable[..., Awaitable[Any]] = method
    return bound


def _handler(
    rpc: Rpc, method: Callable[..., Awaitable[Any]], gate: Gate
) -> grpc.RpcMethodHandler[Any, Any]:
    async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async def send(part: Part) -> None:
            # note: a write that is cut off leaves a call that cannot be ended with a
            # status any more (grpcio 1.85: TOO_MANY_OPERATIONS); it ends by itself
            # when the client reads on or goes away.
            write = asyncio.ensure_future(context.write(part))
            try:
                await asyncio.shield(write)
            except asyncio.CancelledError:
                await asyncio.wait([write])
                write.exception()  # the call is over, whatever became of this part
                raise

        peer = context.peer()
        # All of grpcio's clients on our Unix socket have one name, and so none.
        CALLER.set("" if peer == "unix:" else peer)
        async with gate.call(rpc, context):
            if rpc.server_streams:
                # Written, not yielded: all of a call happens in one task, so that
                # what it holds is let go when the call ends, not when a generator is
                # collected.
                return await method(request, send)
            return await method(request)

    factory = getattr(grpc, f"{rpc.shape}_rpc_method_handler")
    handler: grpc.RpcMethodHandler[Any, Any] = factory(
        serve,
        request_deserializer=rpc.request.load,
        response_serializer=rpc.response.dump,
    )
    return handler
