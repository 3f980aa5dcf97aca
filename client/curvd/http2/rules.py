"""What a frame has to look like, whatever it carries (RFC 9113, section 6)."""

from __future__ import annotations

from typing import NamedTuple

from curvd.http2 import frames
from curvd.http2.frames import Code, Kind
from curvd.http2.stream import Broken


class Shape(NamedTuple):
    """Where a kind of frame belongs, and how long it is."""

    on_stream: bool | None
    """On a stream, on the connection (stream 0), or either (None)."""
    least: int
    most: int


_ANY = frames.LONGEST
_SHAPES = {
    Kind.DATA: Shape(True, 0, _ANY),
    Kind.HEADERS: Shape(True, 0, _ANY),
    Kind.PRIORITY: Shape(True, 5, 5),
    Kind.RST_STREAM: Shape(True, 4, 4),
    Kind.SETTINGS: Shape(False, 0, _ANY),
    Kind.PUSH_PROMISE: Shape(True, 4, _ANY),
    Kind.PING: Shape(False, 8, 8),
    Kind.GOAWAY: Shape(False, 8, _ANY),
    Kind.WINDOW_UPDATE: Shape(None, 4, 4),
    Kind.CONTINUATION: Shape(True, 0, _ANY),
}
_MOST_BYTES = {
    Kind.SETTINGS: 64 * 6,
    Kind.GOAWAY: 1 << 14,
    Kind.PUSH_PROMISE: 1 << 14,
}
"""What the protocol allows and nobody needs; more is a flood."""


def check_head(kind: int, flags: int, number: int, length: int) -> None:
    """Check the head of a frame.

    Args:
        kind: Type of the frame; unknown ones may look as they like (section 5.5).
        flags: Its flags.
        number: Its stream.
        length: Bytes of its payload.

    Raises:
        Broken: If no such frame may be sent.
    """
    shape = _SHAPES.get(kind)  # type: ignore[call-overload]
    if shape is None:
        return
    if shape.on_stream is not None and shape.on_stream is not (number > 0):
        msg = f"a {Kind(kind).name} frame on stream {number}"
        raise Broken(msg)
    least, most = shape.least, shape.most
    if kind == Kind.SETTINGS and flags & frames.ACK:
        most = 0
    elif kind == Kind.HEADERS and flags & frames.PRIORITISED:
        least = 5
    if kind in (Kind.DATA, Kind.HEADERS) and flags & frames.PADDED:
        least += 1
    wrong = not least <= length <= most
    if wrong or (kind == Kind.SETTINGS and length % 6):
        msg = f"a {Kind(kind).name} frame of {length} bytes"
        raise Broken(msg, Code.FRAME_SIZE_ERROR)
    if length > _MOST_BYTES.get(kind, length):  # type: ignore[call-overload]
        msg = f"a {Kind(kind).name} frame of {length} bytes, of which nobody needs so many"
        raise Broken(msg, Code.ENHANCE_YOUR_CALM)


def check_setting(name: int, value: int, *, client: bool) -> None:
    """Check one parameter of a peer (section 6.5.2).

    Args:
        name: Which; unknown ones may be anything.
        value: Its value.
        client: Whether this end is the client.

    Raises:
        Broken: If the parameter cannot have this value.
    """
    setting = frames.Setting
    if name == setting.ENABLE_PUSH and value > (0 if client else 1):
        msg = f"ENABLE_PUSH of {value}"
        raise Broken(msg)
    if name == setting.INITIAL_WINDOW_SIZE and value > frames.LARGEST_WINDOW:
        msg = f"an initial window of {value} bytes"
        raise Broken(msg, Code.FLOW_CONTROL_ERROR)
    if name == setting.MAX_FRAME_SIZE and not (
        frames.DEFAULT_LONGEST <= value <= frames.LONGEST
    ):
        msg = f"a longest frame of {value} bytes"
        raise Broken(msg)


def check_window(window: int, increment: int) -> None:
    """Check what may be sent after a window was widened (section 6.9.1).

    Args:
        window: Bytes.
        increment: By which it was widened.

    Raises:
        Broken: If it is wider than windows can be.
    """
    if window > frames.LARGEST_WINDOW:
        msg = f"a window widened by {increment} bytes, beyond {frames.LARGEST_WINDOW}"
        raise Broken(msg, Code.FLOW_CONTROL_ERROR)


def check_dependency(number: int, priority: bytes) -> None:
    """Check a priority, which is good for nothing else (RFC 7540, section 5.3.1).

    Args:
        number: Of its stream.
        priority: Five bytes.

    Raises:
        Broken: If a stream depends on itself.
    """
    if int.from_bytes(priority[:4], "big") & frames.LARGEST_WINDOW == number:
        msg = f"stream {number} depends on itself"
        raise Broken(msg)
