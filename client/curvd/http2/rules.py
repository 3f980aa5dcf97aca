"""What a frame has to look like, whatever it carries (RFC 9113, section 6)."""

from __future__ import annotations

from typing import NamedTuple

from curvd.http2 import frames
from curvd.http2.frames import Code, Kind
from curvd.http2.stream import ProtocolError


class Shape(NamedTuple):
    """Where a kind of frame belongs, and how long it is."""

    on_stream: tuple[bool, ...]
    """Whether it may be on a stream, on the connection (stream 0), or both."""
    least: int
    most: int
    needed: int
    """More than that and nobody needs it: it is a flood."""
    flags: int = 0
    """Which of its flags change how long it may be."""


_STREAM, _CONNECTION, _EITHER = (True,), (False,), (False, True)
_ANY, _MUCH = frames.LONGEST, 1 << 14
_SETTINGS_BYTES = 64 * 6
_SHAPES = (  # by type, 0 to 9
    Shape(_STREAM, 0, _ANY, _ANY, frames.PADDED),
    Shape(_STREAM, 0, _ANY, _ANY, frames.PADDED | frames.PRIORITISED),
    Shape(_STREAM, 5, 5, 5),
    Shape(_STREAM, 4, 4, 4),
    Shape(_CONNECTION, 0, _ANY, _SETTINGS_BYTES, frames.ACK),
    Shape(_STREAM, 4, _ANY, _MUCH),
    Shape(_CONNECTION, 8, 8, 8),
    Shape(_CONNECTION, 8, _ANY, _MUCH),
    Shape(_EITHER, 4, 4, 4),
    Shape(_STREAM, 0, _ANY, _ANY),
)
KNOWN = len(_SHAPES)
"""Types of frames from here on are not known, and ignored (section 5.5)."""


def check_head(kind: int, flags: int, number: int, length: int) -> None:
    """Check the head of a frame.

    Args:
        kind: Type of the frame, one that is known.
        flags: Its flags.
        number: Its stream.
        length: Bytes of its payload.

    Raises:
        ProtocolError: If no such frame may be sent.
    """
    on_stream, least, most, needed, relevant = _SHAPES[kind]
    if (number > 0) not in on_stream:
        msg = f"a {Kind(kind).name} frame on stream {number}"
        raise ProtocolError(msg)
    if flags & relevant:
        least, most = _with_flags(kind, flags, most)
    if not least <= length <= most or (kind == Kind.SETTINGS and length % 6):
        msg = f"a {Kind(kind).name} frame of {length} bytes"
        raise ProtocolError(msg, Code.FRAME_SIZE_ERROR)
    if length > needed:
        msg = f"a {Kind(kind).name} frame of {length} bytes, of which nobody needs so many"
        raise ProtocolError(msg, Code.ENHANCE_YOUR_CALM)


def _with_flags(kind: int, flags: int, most: int) -> tuple[int, int]:
    """Tell how long a frame is whose flags make a difference."""
    if kind == Kind.SETTINGS:  # an acknowledgement says nothing more
        return 0, 0
    prioritised = kind == Kind.HEADERS and flags & frames.PRIORITISED
    return bool(flags & frames.PADDED) + (5 if prioritised else 0), most


def check_setting(name: int, value: int, *, client: bool) -> None:
    """Check one parameter of a peer (section 6.5.2).

    Args:
        name: Which; unknown ones may be anything.
        value: Its value.
        client: Whether this end is the client.

    Raises:
        ProtocolError: If the parameter cannot have this value.
    """
    setting = frames.Setting
    if name == setting.ENABLE_PUSH and value > (0 if client else 1):
        msg = f"ENABLE_PUSH of {value}"
        raise ProtocolError(msg)
    if name == setting.INITIAL_WINDOW_SIZE and value > frames.LARGEST_WINDOW:
        msg = f"an initial window of {value} bytes"
        raise ProtocolError(msg, Code.FLOW_CONTROL_ERROR)
    if name == setting.MAX_FRAME_SIZE and not (
        frames.DEFAULT_LONGEST <= value <= frames.LONGEST
    ):
        msg = f"a longest frame of {value} bytes"
        raise ProtocolError(msg)


def check_window(window: int, increment: int) -> None:
    """Check what may be sent after a window was widened (section 6.9.1).

    Args:
        window: Bytes.
        increment: The bytes by which it was widened.

    Raises:
        ProtocolError: If it is wider than windows can be.
    """
    if window > frames.LARGEST_WINDOW:
        msg = f"a window widened by {increment} bytes, beyond {frames.LARGEST_WINDOW}"
        raise ProtocolError(msg, Code.FLOW_CONTROL_ERROR)


def check_dependency(number: int, priority: bytes) -> None:
    """Check a priority, which is good for nothing else (RFC 7540, section 5.3.1).

    Args:
        number: The number of its stream.
        priority: Five bytes.

    Raises:
        ProtocolError: If a stream depends on itself.
    """
    if int.from_bytes(priority[:4], "big") & frames.LARGEST_WINDOW == number:
        msg = f"stream {number} depends on itself"
        raise ProtocolError(msg)
