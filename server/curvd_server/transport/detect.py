"""Telling from the first bytes of a connection whether a client of ours calls."""

from __future__ import annotations

from curvd.http2 import RECOGNISED, Kind, Setting, frames

ENOUGH_BYTES = 1 << 14
"""No greeting is longer."""
_HANDSHAKE = 22
"""Type of the TLS records that begin a connection (RFC 8446, section 5.1)."""
_RECORD_HEAD_BYTES = 5
_PROTOCOL = bytes([len(RECOGNISED)]) + RECOGNISED.encode()
"""As it stands in the list of ALPN (RFC 7301)."""


def is_ours(beginning: bytes, *, tls: bool) -> bool | None:
    """Tell whether a client of ours calls.

    It decides who answers, not whether it may: both ask for certificates and tokens.

    Args:
        beginning: What has come so far.
        tls: Whether it is encrypted.

    Returns:
        None if that cannot be told yet.
    """
    return _hello_is_ours(beginning) if tls else _greeting_is_ours(beginning)


def bytes_needed(beginning: bytes, *, tls: bool) -> int:
    """Tell how much must have come before there is more to say about a connection.

    Args:
        beginning: What has come so far; too little for `is_ours`.
        tls: Whether it is encrypted.

    Returns:
        Bytes from the beginning.
    """
    head = _RECORD_HEAD_BYTES if tls else len(frames.PREFACE) + frames.HEAD_BYTES
    if len(beginning) < head:
        return head
    start = 3 if tls else len(frames.PREFACE)
    length = int.from_bytes(beginning[start : start + (2 if tls else 3)], "big")
    return min(head + length, ENOUGH_BYTES)


def _greeting_is_ours(beginning: bytes) -> bool | None:
    size = len(frames.PREFACE)
    if beginning[:size] != frames.PREFACE[: len(beginning)]:
        return False
    if len(beginning) < size + frames.HEAD_BYTES:
        return None
    head = memoryview(beginning)[size : size + frames.HEAD_BYTES]
    length, kind, _, _ = frames.read_head(head)
    if kind != Kind.SETTINGS or length > ENOUGH_BYTES // 2:
        return False
    payload = beginning[size + frames.HEAD_BYTES :][:length]
    if len(payload) < length:
        return None
    return (Setting.DIRECT, 1) in frames.read_settings(payload)


def _hello_is_ours(beginning: bytes) -> bool | None:
    if beginning[:1] != bytes([_HANDSHAKE])[: len(beginning)]:
        return False
    if len(beginning) < _RECORD_HEAD_BYTES:
        return None
    end = _RECORD_HEAD_BYTES + int.from_bytes(beginning[3:_RECORD_HEAD_BYTES], "big")
    if end == _RECORD_HEAD_BYTES:  # which TLS forbids
        return False
    if len(beginning) < end:
        return None if len(beginning) < ENOUGH_BYTES else False
    return _PROTOCOL in beginning[:end]
