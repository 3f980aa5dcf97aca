"""Results that were computed, kept for a while for callers whose stream broke.

A product is pure, so nothing depends on this but time: without it a retry computes
again. It is bounded in bytes, in number and in time; the oldest makes room.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.tensors import Buffer
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.sessions import check_same
from curvd_server.system import RESULTS, HostMemory

Key = tuple[str, str, str]
"""Session id, request id, and who calls."""

_SEGMENT_BYTES = 64 << 10
# Odd, so that no bit of a word is lost modulo 2^64; scattered by the golden ratio.
_WEIGHTS = (2 * np.arange(_SEGMENT_BYTES // 8, dtype=np.uint64) + 1) * np.uint64(
    0x9E3779B97F4A7C15
)


@dataclass(frozen=True, slots=True)
class Content:
    """What makes two requests the same."""

    header: str
    """What was asked for."""
    operand: str = ""
    """Fingerprint of the operand; empty if it is not known, or there is none."""

    @classmethod
    def of(cls, request: curvature_pb.ProductHeader) -> Content:
        """Say what was asked for, whatever the caller has of it already.

        Args:
            request: The header.

        Returns:
            The content, without the operand.
        """
        asked = curvature_pb.ProductHeader()
        asked.CopyFrom(request)
        for field in ("resume", "checksum", "result_type"):
            asked.ClearField(field)
        return cls(asked.SerializeToString(deterministic=True).hex())


@dataclass(frozen=True, slots=True)
class CachedResult:
    """A result that was computed."""

    header: curvature_pb.ResultHeader
    rows: NDArray[Any]
    """[P] or [K, P]"""
    summary: curvature_pb.ResultSummary


@dataclass(frozen=True, slots=True)
class _Entry:
    content: Content
    value: CachedResult
    nbytes: int
    until_s: float


class ResultCache:
    """Results by request.

    Args:
        budget_bytes: Memory of all together; a larger one is not kept.
        keep_s: How long.
        entries: How many.
        memory: The host's memory, whose other users come first; None: no limit.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        keep_s: float,
        entries: int = 1024,
        memory: HostMemory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory or HostMemory()
        self._memory.cached(RESULTS, lambda: self._bytes)
        self._budget, self._keep_s = budget_bytes, keep_s
        self._capacity, self._clock = entries, clock
        # The oldest first, because all are kept equally long.
        self._entries: dict[Key, _Entry] = {}
        self._last: dict[str, Key] = {}
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return self._bytes

    def fits(self, nbytes: int) -> bool:
        """Tell whether a result of so many bytes can be kept at all."""
        return nbytes <= self._budget

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def put(
        self,
        key: Key,
        content: Content,
        value: CachedResult,
        nbytes: int,
        caller: str = "",
    ) -> None:
        """Keep a result, unless it has no request id or is too large.

        Args:
            key: The key of the request.
            content: What was asked for.
            value: The result.
            nbytes: Its memory.
            caller: Name of a connection that carries one call after the other.
        """
        self.drop(key)
        if not key[1] or not self.fits(nbytes):
            return
        if nbytes > self._memory.free():
            return
        until_s = self._clock() + self._keep_s
        self._entries[key] = _Entry(content, value, nbytes, until_s)
        self._bytes += nbytes
        if caller:
            self._last[caller] = key
        while self._bytes > self._budget or len(self._entries) > self._capacity:
            self.drop(next(iter(self._entries)))

    def get(self, key: Key, content: Content) -> CachedResult | None:
        """Find a result.

        Args:
            key: The key of the request.
            content: What is asked for; the operand counts if both know theirs.

        Returns:
            The result; None if it is not kept.

        Raises:
            RequestIdReused: If the same id asked for something else.
        """
        self.expire()
        entry = self._entries.get(key)
        if entry is None:
            return None
        check_same(entry.content.header, content.header, key[1])
        if content.operand:
            check_same(entry.content.operand, content.operand, key[1])
        return entry.value

    def received(self, caller: str, key: Key) -> None:
        """Forget the last result of a connection: its next call shows that it arrived.

        Args:
            caller: Name of the connection.
            key: What the next call asks for; perhaps the same again.
        """
        last = self._last.pop(caller, None)
        if last is not None and last != key:
            self.drop(last)

    def drop(self, key: Key) -> None:
        """Forget a result, if it is kept."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.nbytes

    def expire(self) -> None:
        """Forget what was kept long enough."""
        now_s = self._clock()
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.until_s > now_s:
                break
            self.drop(key)
        while self._entries and self._memory.free() < 0:
            self.drop(next(iter(self._entries)))
        if len(self._last) > self._capacity:  # connections that never called again
            self._last = {c: k for c, k in self._last.items() if k in self._entries}


class Fingerprint:
    """Tells operands apart, at the speed of memory, as they come.

    It guards against an id that is used twice by mistake, not against malice: the words
    of each segment of 64 KiB are summed with a weight for each place, so that unit
    vectors differ, and the sums are hashed.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._summed = 0
        self.nbytes = 0
        """Bytes that were looked at."""

    def update(self, raw: Buffer, stop: int) -> None:
        """Look at the bytes that are new; in the cache, that takes half of the time.

        Args:
            raw: The memory of the operand.
            stop: How many of its bytes have come; at least as many as before.
        """
        whole = stop - stop % _SEGMENT_BYTES
        if whole > self._summed:
            words = raw[self._summed : whole].view("<u8").reshape(-1, len(_WEIGHTS))
            self._sha.update(np.einsum("ij,j->i", words, _WEIGHTS).data)
        self._summed, self.nbytes = whole, stop

    def digits(self, raw: Buffer) -> str:
        """Finish, when all has come.

        Args:
            raw: The memory of the operand.

        Returns:
            Digits that equal operands share, in whatever pieces they came.
        """
        sha = self._sha.copy()
        sha.update(raw[self._summed : self.nbytes].data)
        return sha.hexdigest()


def fingerprint(columns: NDArray[Any]) -> str:
    """Compute the fingerprint of an operand that is there.

    Args:
        columns: [K, P], contiguous, float32 or float64.

    Returns:
        Digits that equal operands share.
    """
    raw, seen = columns.reshape(-1).view(np.uint8), Fingerprint()
    seen.update(raw, raw.nbytes)
    return seen.digits(raw)
