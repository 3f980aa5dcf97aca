"""One call on a line, as a generator that says when it has to wait."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from grpc import StatusCode

from curvd.contract import CODES, DETAILS_KEY, Ended, Rpc
from curvd.errors import CurvdError
from curvd.http2.connection import Line
from curvd.http2.frames import Code, named
from curvd.http2.messages import Room, framed
from curvd.http2.stream import Broken, Headers, Stream

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
class Terms:
    """What holds for one call."""

    headers: Headers
    deadline: float | None
    """On `clock`."""
    keepalive_s: float
    """Silence after which the peer is asked for a sign of life."""
    keepalive_timeout_s: float
    """Silence after that which means that it is gone."""
    longest: int
    """Bytes of a message that are accepted."""
    clock: Callable[[], float]


def exchange(
    line: Line, rpc: Rpc, parts: Iterator[Any], room: Room, terms: Terms
) -> Generator[Any, None, None]:
    """Send the parts of a request while those of the response come.

    Args:
        line: Free for a call.
        rpc: Which method.
        parts: Of the request.
        room: Finds the place for chunks of the response.
        terms: Metadata and times.

    Yields:
        `Wait`, or a part of the response. The next part comes to the same place.

    Raises:
        Ended: If the call ends with an error.
        Broken: If the connection is of no use.
        OSError: If it is gone.
    """
    stream = line.open(terms.headers)
    stream.read(rpc.response, terms.longest, room)
    silence = _Silence(line, terms)
    # In one go with the headers; it is all there is if the request is a message.
    sending, begun = _send_next(line, stream, rpc, parts), False
    try:
        while True:
            while stream.inbox:
                part, nbytes = stream.inbox.popleft()
                line.used(stream, nbytes)
                yield part
            if stream.failure is not None:
                line.push()  # what the server is told about it
                raise _not_grpc(stream) or _not_read(stream.failure)
            if stream.ended:
                break
            if sending and not stream.outbox:
                sending = _send_next(line, stream, rpc, parts)
            sent, heard = line.push(), line.heard
            # Nothing answers a whole request between two lines of Python.
            if begun or sending or stream.outbox:
                line.pull()
            begun, idle = True, line.heard == heard and not line.more
            if idle and (stream.outbox or not sent or not sending):
                yield Wait(not sent, silence.patience())
                silence.check()
        line.push()
        _conclude(stream)
    except Broken as error:
        line.leaving = True
        stream.give_up(error.code)
        if error.code is not Code.NO_ERROR:
            line.leave(error.code)
        raise
    finally:
        stream.reader = None  # it refers to the caller's memory
        if not stream.over:
            line.give_up(stream, Code.CANCEL)
            line.leaving = True


def _send_next(line: Line, stream: Stream, rpc: Rpc, parts: Iterator[Any]) -> bool:
    """Queue the next part; tell whether there may be more."""
    part = next(parts, None)
    more = part is not None and rpc.client_streams
    views = () if part is None else framed(rpc.request, part)
    line.send_data(stream, views, end=not more)
    return more


class _Silence:
    """Watches that a line is alive while a call waits."""

    def __init__(self, line: Line, terms: Terms) -> None:
        self._line, self._terms = line, terms
        self._heard, self._since = line.heard, terms.clock()
        self._asked = False

    def patience(self) -> float:
        """Tell how long to wait at most."""
        terms, now = self._terms, self._terms.clock()
        if self._line.heard != self._heard:
            self._heard, self._since, self._asked = self._line.heard, now, False
        silent = terms.keepalive_s + (terms.keepalive_timeout_s if self._asked else 0.0)
        until = self._since + silent
        if terms.deadline is not None:
            until = min(until, terms.deadline)
        return max(0.0, until - now)

    def check(self) -> None:
        """Look at the clock after a wait.

        Raises:
            Ended: If the deadline has passed.
            Broken: If the peer is gone.
        """
        terms, now = self._terms, self._terms.clock()
        if terms.deadline is not None and now >= terms.deadline:
            msg = "the deadline passed before the answer came"
            raise Ended(StatusCode.DEADLINE_EXCEEDED, msg)
        silent_s = now - self._since
        if not self._asked and silent_s >= terms.keepalive_s:
            self._line.ping()
            self._asked = True
        elif silent_s >= terms.keepalive_s + terms.keepalive_timeout_s:
            # What came in the meantime is still in the socket.
            self._line.pull()
            if self._line.heard == self._heard:
                msg = f"no sign of life for {silent_s:.0f} s"
                raise Broken(msg)


def _conclude(stream: Stream) -> None:
    """Read the status with which a call ended."""
    if stream.trailers is None:
        if stream.reset is None:
            msg = "the answer ended without a status"
            raise Ended(StatusCode.INTERNAL, msg)
        msg = f"the server gave the call up (HTTP/2 error {named(stream.reset)})"
        raise Ended(_RESET.get(stream.reset, StatusCode.INTERNAL), msg)
    found = stream.trailers
    number = found.get("grpc-status")
    if number is None:
        msg = "the answer ended without a status"
        raise _not_grpc(stream) or Ended(StatusCode.INTERNAL, msg)
    if number == "0":
        return
    code = CODES.get(number, StatusCode.UNKNOWN)
    message = unquote(found.get("grpc-message", ""))
    raise Ended(code, message, _decoded(found.get(DETAILS_KEY)))


def _not_grpc(stream: Stream) -> Ended | None:
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
    return Ended(_HTTP.get(status, StatusCode.UNKNOWN), msg)


def _decoded(value: str | None) -> bytes | None:
    if value is None:
        return None
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4))
    except binascii.Error:
        return None


def _not_read(error: CurvdError) -> Ended:
    return Ended(StatusCode[error.code], str(error))
