"""One call on a connection, as a generator that says when it has to wait."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from grpc import StatusCode

from curvd.contract import CODES, DETAILS_KEY, Rpc, RpcError
from curvd.errors import CurvdError
from curvd.http2.connection import H2Connection
from curvd.http2.frames import Code, named
from curvd.http2.messages import BufferProvider, framed
from curvd.http2.stream import Headers, ProtocolError, Stream

_RESET: dict[int, StatusCode] = {
    Code.REFUSED_STREAM: StatusCode.UNAVAILABLE,
    Code.CANCEL: StatusCode.CANCELLED,
    Code.ENHANCE_YOUR_CALM: StatusCode.RESOURCE_EXHAUSTED,
    Code.NO_ERROR: StatusCode.UNAVAILABLE,
}
_HTTP = {
    "400": StatusCode.INTERNAL,
    "401": StatusCode.UNAUTHENTICATED,
    "403": StatusCode.PERMISSION_DENIED,
    "404": StatusCode.UNIMPLEMENTED,
    "429": StatusCode.UNAVAILABLE,
    "502": StatusCode.UNAVAILABLE,
    "503": StatusCode.UNAVAILABLE,
    "504": StatusCode.UNAVAILABLE,
}
"""What gRPC makes of answers that are not its own (grpc/doc/http-grpc-status-mapping)."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Go on when the socket can be read, or after some seconds."""

    write: bool
    """Or when it can be written."""
    seconds: float


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What holds for one call."""

    headers: Headers
    deadline: float | None
    """When the call must be over, on `clock`; None: never."""
    keepalive_s: float
    """Silence after which the peer is asked for a sign of life."""
    keepalive_timeout_s: float
    """Silence after that which means that it is gone."""
    longest: int
    """Bytes of a message that are accepted."""
    clock: Callable[[], float]


def make_call(
    connection: H2Connection,
    rpc: Rpc,
    parts: Iterator[Any],
    buffer_for: BufferProvider,
    options: CallOptions,
) -> Generator[Any, None, None]:
    """Send the parts of a request while those of the response come.

    Args:
        connection: Free for a call.
        rpc: Which method.
        parts: The parts of the request.
        buffer_for: Finds the place for chunks of the response.
        options: Metadata and times.

    Yields:
        `Wait`, or a part of the response. The next part comes to the same place.

    Raises:
        RpcError: If the call ends with an error.
        ProtocolError: If the connection is of no use.
        OSError: If it is gone.
    """
    stream = connection.open(options.headers)
    stream.read(rpc.response, options.longest, buffer_for)
    silence = _Silence(connection, options)
    # In one go with the headers; it is all there is if the request is a message.
    sending, begun = _send_next(connection, stream, rpc, parts), False
    try:
        while True:
            while stream.inbox:
                part, nbytes = stream.inbox.popleft()
                connection.acknowledge(stream, nbytes)
                yield part
            if stream.failure is not None:
                connection.push()  # what the server is told about it
                raise _not_grpc(stream) or _not_read(stream.failure)
            if stream.ended:
                break
            if sending and not stream.outbox:
                sending = _send_next(connection, stream, rpc, parts)
            if begun:  # nothing answers before anything was sent
                connection.pull()
            sent, begun = connection.push(), True  # what came may have widened windows
            if stream.inbox or stream.ended or stream.failure is not None:
                continue
            idle = connection.drained and not connection.more
            if idle and (stream.outbox or not sent or not sending):
                yield Wait(not sent, silence.seconds_left())
                silence.check()
        connection.push()
        _conclude(stream)
    except ProtocolError as error:
        connection.is_going_away = True
        stream.reset(error.code)
        if error.code is not Code.NO_ERROR:
            connection.goaway(error.code)
        raise
    finally:
        stream.reader = None  # it refers to the caller's memory
        if not stream.over:
            connection.reset(stream, Code.CANCEL)
            connection.is_going_away = True


def _send_next(
    connection: H2Connection, stream: Stream, rpc: Rpc, parts: Iterator[Any]
) -> bool:
    """Queue the next part; tell whether there may be more."""
    part = next(parts, None)
    more = part is not None and rpc.client_streams
    views = () if part is None else framed(rpc.request, part)
    connection.send_data(stream, views, end=not more)
    return more


class _Silence:
    """Watches that a connection is alive while a call waits."""

    def __init__(self, connection: H2Connection, options: CallOptions) -> None:
        self._connection, self._options = connection, options
        self._received_before, self._since = connection.bytes_received, options.clock()
        self._asked = False

    def seconds_left(self) -> float:
        """Tell how long to wait at most."""
        options, now = self._options, self._options.clock()
        if self._connection.bytes_received != self._received_before:
            self._received_before = self._connection.bytes_received
            self._since, self._asked = now, False
        silent = options.keepalive_s + (
            options.keepalive_timeout_s if self._asked else 0.0
        )
        until = self._since + silent
        if options.deadline is not None:
            until = min(until, options.deadline)
        return max(0.0, until - now)

    def check(self) -> None:
        """Look at the clock after a wait.

        Raises:
            RpcError: If the deadline has passed.
            ProtocolError: If the peer is gone.
        """
        options, now = self._options, self._options.clock()
        if options.deadline is not None and now >= options.deadline:
            msg = "the deadline passed before the answer came"
            raise RpcError(StatusCode.DEADLINE_EXCEEDED, msg)
        silent_s = now - self._since
        if not self._asked and silent_s >= options.keepalive_s:
            self._connection.ping()
            self._asked = True
        elif silent_s >= options.keepalive_s + options.keepalive_timeout_s:
            # What came in the meantime is still in the socket.
            self._connection.pull()
            if self._connection.bytes_received == self._received_before:
                msg = f"no sign of life for {silent_s:.0f} s"
                raise ProtocolError(msg)


def _conclude(stream: Stream) -> None:
    """Read the status with which a call ended."""
    if stream.trailers is None:
        if stream.reset_code is None:
            msg = "the answer ended without a status"
            raise RpcError(StatusCode.INTERNAL, msg)
        msg = f"the server gave the call up (HTTP/2 error {named(stream.reset_code)})"
        raise RpcError(_RESET.get(stream.reset_code, StatusCode.INTERNAL), msg)
    found = stream.trailers
    number = found.get("grpc-status")
    if number is None:
        msg = "the answer ended without a status"
        raise _not_grpc(stream) or RpcError(StatusCode.INTERNAL, msg)
    if number == "0":
        return
    code = CODES.get(number, StatusCode.UNKNOWN)
    message = unquote(found.get("grpc-message", ""))
    raise RpcError(code, message, _decoded(found.get(DETAILS_KEY)))


def _not_grpc(stream: Stream) -> RpcError | None:
    """Say what an answer means that is none of gRPC, for example a proxy's."""
    headers = stream.headers
    if headers is None:
        return None
    kind, status = headers.get("content-type", ""), headers[":status"]
    if status == "200" and kind.startswith("application/grpc"):
        return None
    msg = (
        f"HTTP status {status} ({kind or 'no content-type'}) in place of a gRPC answer"
    )
    return RpcError(_HTTP.get(status, StatusCode.UNKNOWN), msg)


def _decoded(value: str | None) -> bytes | None:
    if value is None:
        return None
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4))
    except binascii.Error:
        return None


def _not_read(error: CurvdError) -> RpcError:
    return RpcError(StatusCode[error.code], str(error))
