"""Runs grpcio's handlers, interceptors included, on the connections of our clients."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
import grpc.aio

from curvd.contract import BY_PATH
from curvd.errors import CurvdError, ResourceExhausted
from curvd.http2 import LONGEST_CHUNK, Format, Stream, framed
from curvd_server.system import logger
from curvd_server.transport.connection import ServerConnection
from curvd_server.transport.interceptors import abort
from curvd_server.transport.owners import Owners
from curvd_server.transport.requests import Requests
from curvd_server.transport.stalls import StallGuard

_GRPC = "application/grpc"
_ANSWER = ((":status", "200"), ("content-type", _GRPC))
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_BLANKS = re.compile("^ +| +$")
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
"""What gRPC leaves as it is in a status message."""

Interceptors = Sequence[grpc.aio.ServerInterceptor]


class Calls:
    """What our clients can call.

    Args:
        interceptors: What each call passes through, the outermost first.
        longest: Bytes of a message that are accepted.
        stalls: Says how long a request in one message may take to come.
    """

    def __init__(
        self, interceptors: Interceptors, longest: int, stalls: StallGuard
    ) -> None:
        self._interceptors, self._longest = interceptors, longest
        self._stalls = stalls
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._log = logger()

    def add_generic_rpc_handlers(
        self, handlers: Sequence[grpc.GenericRpcHandler]
    ) -> None:
        """Offer methods; the name is that of `grpc.aio.Server`."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Ignore what newer generated code adds: the generic handlers do."""

    def begin(self, connection: ServerConnection, stream: Stream) -> asyncio.Task[None]:
        """Start a call.

        Args:
            connection: The connection that it came by.
            stream: Its headers have come.

        Returns:
            Its task.
        """
        path = (stream.headers or {}).get(":path", "")
        rpc = BY_PATH.get(path)
        requests = Requests(connection, stream)
        format_ = _Bytes() if rpc is None else rpc.request
        stream.read(
            format_, self._longest, requests.place, LONGEST_CHUNK, requests.look
        )
        context = Context(connection, stream, _Bytes() if rpc is None else rpc.response)
        run = self._run(connection, path, requests, context, raw=rpc is None)
        return asyncio.create_task(run)

    async def _run(
        self,
        connection: ServerConnection,
        path: str,
        requests: Requests,
        context: Context,
        *,
        raw: bool,
    ) -> None:
        remaining_s = context.time_remaining()
        answering = self._answer(connection, path, requests, context, raw=raw)
        try:
            if remaining_s is None:
                await answering
            else:
                async with asyncio.timeout(remaining_s):
                    await answering
        except grpc.aio.AbortError:
            pass  # the context knows the status
        except TimeoutError:
            context.set_code(grpc.StatusCode.DEADLINE_EXCEEDED)
            context.set_details("the deadline passed")
        except asyncio.CancelledError:
            context.set_code(grpc.StatusCode.CANCELLED)
        except Exception as error:
            self._log.exception("defect", path=path)
            context.set_code(grpc.StatusCode.UNKNOWN)
            context.set_details(f"{type(error).__name__}: {error}")
        finally:
            context.end()

    async def _answer(
        self,
        connection: ServerConnection,
        path: str,
        requests: Requests,
        context: Context,
        *,
        raw: bool,
    ) -> None:
        if connection.is_ending_calls:
            await connection.ended_calls()
        await context.check()
        details = _Details(path, context.invocation_metadata())
        handler = await self._find(details, list(self._interceptors))
        if handler is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no method {path}")
        assert handler is not None
        if details.let_through and not raw:
            context.vouch()
        if raw:
            context.serialise = handler.response_serializer or _itself
        request: Any = requests
        if not handler.request_streaming:
            request = await self._only(requests, context)
            if raw:
                request = (handler.request_deserializer or _itself)(request)
        sides = (handler.request_streaming, handler.response_streaming)
        shape = "_".join("stream" if side else "unary" for side in sides)
        response = await getattr(handler, shape)(request, context)
        if not handler.response_streaming:
            await context.conclude(response)

    async def _find(self, details: _Details, interceptors: list[Any]) -> Any:
        if interceptors:
            first, rest = interceptors[0], interceptors[1:]

            async def onwards(details: _Details) -> Any:
                return await self._find(details, rest)

            return await first.intercept_service(onwards, details)
        details.let_through = True
        for handler in self._handlers:
            found = handler.service(details)
            if found is not None:
                return found
        return None

    async def _only(self, requests: Requests, context: Context) -> Any:
        """Wait for the message that is all of a request."""
        if requests.is_here:
            return await anext(requests)
        try:
            request = await self._stalls.watch(
                anext(requests, None), context.peer(), "send its request"
            )
        except CurvdError as error:  # no handler has begun that would tell the client
            await abort(context, error)
        if request is None:
            await context.abort(grpc.StatusCode.INTERNAL, "the request is missing")
        return request


class _Details(grpc.HandlerCallDetails):
    """What interceptors are told of a call."""

    let_through = False
    """Whether no interceptor took the call away."""

    def __init__(self, method: str, metadata: Any) -> None:
        self.method, self.invocation_metadata = method, metadata


class _Bytes:
    """Messages that the handler reads and writes."""

    bulk = False

    def load(self, data: memoryview) -> bytes:
        """Copy a message."""
        return bytes(data)

    def views(self, part: bytes) -> tuple[memoryview, ...]:
        """Look at a message."""
        return (memoryview(part),)


class Context(grpc.aio.ServicerContext[Any, Any]):
    """What a handler may ask of its call, and tell it.

    Args:
        connection: The connection whose call it is.
        stream: The call.
        format_: How responses are written.
    """

    def __init__(
        self, connection: ServerConnection, stream: Stream, format_: Format
    ) -> None:
        self._connection, self._stream, self._format = connection, stream, format_
        self._begun = self._over = False
        self._status = "200"
        self._code, self._details = grpc.StatusCode.OK, ""
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()
        self._callbacks: list[Callable[[Any], None]] = []
        self._deadline = _deadline(self._headers.get("grpc-timeout", ""))
        self.came_s = time.monotonic()
        """When its headers came, on the clock of `time.monotonic`."""
        self.serialise: Callable[[Any], Any] = _itself
        """Turns responses into what the format writes."""

    @property
    def _headers(self) -> dict[str, str]:
        return self._stream.headers or {}

    async def check(self) -> None:
        """Refuse what is no call of gRPC, as HTTP does (gRPC over HTTP/2, Requests)."""
        headers = self._headers
        kind, timeout = headers.get("content-type", ""), headers.get("grpc-timeout")
        if headers[":method"] != "POST":
            await self._refuse("405", f"calls are POST, not {headers[':method']}")
        if kind != _GRPC and not kind.startswith((f"{_GRPC}+", f"{_GRPC};")):
            await self._refuse("415", f"the content-type is {kind!r}, not {_GRPC}")
        if timeout is not None and not _TIMEOUT.fullmatch(timeout):
            await self._refuse("400", f"the grpc-timeout is {timeout!r}")
        encoding = headers.get("grpc-encoding", "identity")
        if encoding != "identity":
            message = f"messages in {encoding!r}: only identity is understood"
            accepted = (("grpc-accept-encoding", "identity"),)
            await self.abort(grpc.StatusCode.UNIMPLEMENTED, message, accepted)

    async def _refuse(self, status: str, why: str) -> None:
        self._status = status
        await self.abort(grpc.StatusCode.INTERNAL, why)

    async def write(self, message: Any) -> None:
        """Send a response; waits while the client reads slowly."""
        if not self.write_soon(message):
            await self.written()

    def write_soon(self, message: Any) -> bool:
        """Send a response as far as the client takes it now.

        Args:
            message: The response; its memory is needed until it is written.

        Returns:
            Whether it is written; else `written` waits until it is.
        """
        views = framed(self._format, self.serialise(message))
        headers = () if self._begun else _ANSWER
        self._begun = True
        return self._connection.send_soon(self._stream, headers, views)

    async def written(self) -> None:
        """Wait until the client has taken what `write_soon` left."""
        await self._connection.sent(self._stream)

    async def conclude(self, message: Any) -> None:
        """Send the only response and the status in one go."""
        views = framed(self._format, self.serialise(message))
        self._over = True
        trailers = (("grpc-status", "0"), *self._trailing_text())
        try:
            await self._connection.send(self._stream, _ANSWER, views, trailers)
        finally:
            self._finished()

    async def read(self) -> NoReturn:
        """Not offered: handlers get their requests as an iterator."""
        raise NotImplementedError

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Any = (),
    ) -> NoReturn:
        """End the call with a status.

        Raises:
            grpc.aio.AbortError: Always.
        """
        self._code, self._details = code, details
        self._trailing = tuple(trailing_metadata)
        raise grpc.aio.AbortError

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the call with a status.

        Raises:
            grpc.aio.AbortError: Always.
        """
        await self.abort(status.code, status.details, status.trailing_metadata)

    def end(self) -> None:
        """Send the status."""
        if self._over:
            return
        self._over = True
        answer = [(":status", self._status), *_ANSWER[1:]]
        trailers = [] if self._begun else answer
        trailers.append(("grpc-status", str(self._code.value[0])))
        if self._details:
            message = quote(self._details, safe=_PRINTABLE)
            # HTTP/2 has no values that begin or end with a blank.
            message = _BLANKS.sub(lambda found: "%20" * len(found[0]), message)
            trailers.append(("grpc-message", message))
        trailers += self._trailing_text()
        self._connection.finish(self._stream, trailers)
        self._finished()

    def _trailing_text(self) -> list[tuple[str, str]]:
        return [(name, _text(value)) for name, value in self._trailing]

    def _finished(self) -> None:
        lost = self._connection.is_lost(self._stream)
        self._connection.concluded(
            success=self._code is grpc.StatusCode.OK and not lost
        )
        for callback in self._callbacks:
            callback(self)

    @property
    def longest_chunk(self) -> int:
        """Bytes of a chunk that the client takes in one message; 0: it did not say."""
        return self._connection.longest_chunk

    def disconnect(self) -> None:
        """End the call by closing its connection."""
        self._connection.close()

    def claim(self, owners: Owners) -> bool:
        """Say whose the connection is: of who makes the call; see `Owners.claim`."""
        try:
            is_full = owners.claim(self._connection)
        except ResourceExhausted:
            # He may not have it: it takes nobody's place, and no time of others' calls.
            self._connection.distrust()
            raise
        self._connection.left = owners.leave
        return is_full

    def vouch(self) -> None:
        """Trust the client: interceptors let its call through."""
        self._connection.vouch()

    def done(self) -> bool:
        """Whether nobody waits for an answer any more."""
        return self._over or self._connection.is_lost(self._stream)

    def cancelled(self) -> bool:
        """Whether the client gave the call up."""
        return self._connection.is_lost(self._stream)

    def peer(self) -> str:
        """Who calls."""
        return self._connection.peer

    def invocation_metadata(self) -> Any:
        """What the client sent with the call."""
        pairs = self._headers.items()
        return tuple([(k, v) for k, v in pairs if not k.startswith(":")])

    def header(self, name: str) -> str:
        """Find one header that the client sent; empty if it did not."""
        return self._headers.get(name, "")

    def time_remaining(self) -> float | None:  # type: ignore[override]
        """Seconds until the deadline; None if there is none."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def set_code(self, code: grpc.StatusCode) -> None:
        """Choose the status."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Choose its message."""
        self._details = details

    def code(self) -> grpc.StatusCode:
        """The status chosen so far."""
        return self._code

    def details(self) -> str:
        """Its message."""
        return self._details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Send more with the status."""
        self._trailing = tuple(trailing_metadata)

    def trailing_metadata(self) -> Any:
        """What is sent with the status."""
        return self._trailing

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Be told when the call is over."""
        self._callbacks.append(callback)

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Send the headers of the answer now."""
        if not self._begun:
            self._begun = True
            await self._connection.send(self._stream, (*_ANSWER, *initial_metadata))

    def set_compression(self, compression: grpc.Compression) -> None:
        """Nothing is compressed: the bits of vectors are noise."""

    def disable_next_message_compression(self) -> None:
        """Nothing is compressed."""

    def peer_identities(self) -> None:
        """Not looked at: whom to let in is decided when TLS begins."""

    def peer_identity_key(self) -> None:
        """Not looked at."""

    def auth_context(self) -> dict[str, Any]:
        """What the client's certificate says of it."""
        return self._connection.authentication


def _deadline(timeout: str) -> float | None:
    found = _TIMEOUT.fullmatch(timeout)
    if found is None:
        return None
    return time.monotonic() + int(found[1]) * _UNITS[found[2]]


def _itself(message: Any) -> Any:
    return message


def _text(value: str | bytes) -> str:
    if isinstance(value, str):
        return value
    return base64.b64encode(value).rstrip(b"=").decode()
