"""Frames of HTTP/2 (RFC 9113, section 6)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from functools import lru_cache

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
LONGEST = (1 << 24) - 1
"""Payload of the longest frame that the protocol knows."""
DEFAULT_LONGEST = 1 << 14
DEFAULT_WINDOW = (1 << 16) - 1
LARGEST_WINDOW = (1 << 31) - 1

HTTP_1 = b"HTTP/1.1"[3]
"""Type of the frame as which an answer of HTTP/1 is misread."""

RECOGNISED = "curvd"
"""Offered by our clients beside ``h2`` when TLS begins (ALPN, RFC 7301), so that a
server that reads no further knows who calls."""

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITISED = 0x20

_HEAD = struct.Struct(">IBI")
_SETTING = struct.Struct(">HI")


class Kind(IntEnum):
    """Frame types."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Setting(IntEnum):
    """Parameters of a connection."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6
    DIRECT = 0xC52D
    """Ours: the sender reads and writes whole chunks. Others ignore it (section 6.5.2)."""
    LONGEST_CHUNK = 0xC52E
    """Ours: bytes of a chunk that the sender takes in one message. Others ignore it, too."""


class Code(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


def named(code: int) -> str:
    """Say what an error code means.

    Args:
        code: The code that a peer sent; it may be any number.

    Returns:
        Its name in RFC 9113, section 7.
    """
    known = code in Code.__members__.values()
    return Code(code).name if known else f"error code {code}"


def head(length: int, kind: int, flags: int, stream: int) -> bytes:
    """Write what stands before a payload.

    Args:
        length: Bytes of the payload.
        kind: Type of the frame.
        flags: Its flags.
        stream: 0 for the connection.

    Returns:
        9 bytes.
    """
    return _HEAD.pack(length << 8 | kind, flags, stream)


def read_head(data: memoryview) -> tuple[int, int, int, int]:
    """Read what `head` wrote.

    Args:
        data: 9 bytes.

    Returns:
        Length, type, flags and stream.
    """
    word, flags, stream = _HEAD.unpack(data)
    return word >> 8, word & 0xFF, flags, stream & LARGEST_WINDOW


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Write a frame.

    Args:
        kind: Its type.
        flags: Its flags.
        stream: 0 for the connection.
        payload: What it carries.

    Returns:
        Its bytes.
    """
    return head(len(payload), kind, flags, stream) + payload


def settings(values: Mapping[Setting, int]) -> bytes:
    """Write a SETTINGS frame."""
    payload = b"".join(_SETTING.pack(k, v) for k, v in values.items())
    return frame(Kind.SETTINGS, 0, 0, payload)


def read_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """Read the payload of a SETTINGS frame, of which the end may be missing.

    Yields:
        Parameter and value.
    """
    yield from _SETTING.iter_unpack(payload[: len(payload) // 6 * 6])


def number(value: int) -> bytes:
    """Write 32 bits: an increment or an error code."""
    return value.to_bytes(4, "big")


@lru_cache(maxsize=64)
def literals(headers: tuple[tuple[str, str], ...]) -> bytes:
    """Write headers as HPACK literals that no table remembers (RFC 7541, 6.2.2).

    So the bytes depend on nothing but the headers, and are written once for all calls.

    Args:
        headers: Names and values.

    Returns:
        A block of headers.
    """
    out = bytearray()
    for pair in headers:
        out.append(0)
        for text in pair:
            data = text.encode()
            out += _length(len(data)) + data
    return bytes(out)


def _length(size: int) -> bytes:
    """Write the length of a string: seven bits, then as many bytes as it needs."""
    if size < 0x7F:
        return bytes([size])
    out, size = bytearray([0x7F]), size - 0x7F
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)


def header_frames(stream: int, block: bytes, flags: int, longest: int) -> bytes:
    """Write a block of headers, continued as often as it needs.

    Args:
        stream: Its stream.
        block: The block, from HPACK.
        flags: END_STREAM or 0.
        longest: Payload that the peer takes in one frame.

    Returns:
        One HEADERS frame, and CONTINUATION frames.
    """
    cuts = [block[i : i + longest] for i in range(0, len(block), longest)] or [b""]
    out = bytearray()
    for index, piece in enumerate(cuts):
        kind = Kind.CONTINUATION if index else Kind.HEADERS
        last = END_HEADERS if index == len(cuts) - 1 else 0
        out += frame(kind, last | (0 if index else flags), stream, piece)
    return bytes(out)
