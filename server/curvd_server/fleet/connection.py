"""A connection between the front and a worker: typed messages, length-prefixed, with arrays.

A frame is the length of its head, the head in JSON (number, kind, fields, and the types and
shapes of the arrays), and the arrays' bytes. Those of large arrays follow in pieces, which are
frames of their own, so that other messages go between them, and who gives up need not send
the rest. Whoever does not know the secret of the fleet
is told nothing and read no further: both ends prove it before the first frame, each by an
HMAC over both challenges.

What comes from blobs lies in memory that another process of the machine can map: over a Unix
socket its descriptor travels, and no byte. So parameters and data lie there once, for the
front and all of its workers. Over a network the bytes travel.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import itertools
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from curvd.errors import Cancelled, Internal
from curvd.tensors import Buffer, Pool
from curvd_server.fleet.messages import KINDS, Message
from curvd_server.fleet.values import plain, typed
from curvd_server.storage import mapped, region_of
from curvd_server.system import Poll

Array = NDArray[Any]

_LENGTH = struct.Struct("<I")
_HEAD_BYTES = 1 << 30
"""Longest head; a graph of a model is in it."""
_ARRAY_BYTES = 1 << 42
_CHALLENGE = 32
_TYPES = frozenset("biuf")
"""Kinds of NumPy's types that travel; bfloat16 does as uint16 bits."""
_PIECE = 4 << 20
_SHARED_BYTES = 64 << 10
"""What is smaller travels in any case: to map it takes as long."""
_DESCRIPTORS = 64
"""Of one message at most; Linux allows 253."""
_IDLE_BYTES = 256 << 20
"""Memory of arrays that is kept for the next ones: fresh pages take as long as the bytes."""


class Took(NamedTuple):
    """What an answer took where it was made, in seconds of no clock in particular."""

    waited_s: float
    """Between the arrival of the command and its beginning."""
    computed_s: float
    """From there to its end."""
    device_s: float
    """Of that, while nobody else's turn was."""


class Frame(NamedTuple):
    """What arrived."""

    number: int
    """Of the command that it is, or answers; 0: none."""
    message: Message
    arrays: list[Array]
    took: Took | None = None
    """None: it is no answer, or nothing was computed for it."""
    came_s: float = 0.0
    """When all of it was here, by `time.monotonic`."""


@dataclass(slots=True)
class _Arriving:
    """A message whose arrays come in pieces."""

    frame: Frame
    arrays: Sequence[Buffer]
    """Their bytes, to be filled."""
    missing: int


class Connection:
    """One end of a connection, after both have proved who they are.

    Any thread may send; one thread receives.

    Args:
        connected: The socket, connected and blocking; it is closed with this.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._sending = connected, threading.Lock()
        self._pool = Pool(_IDLE_BYTES)
        self._transfers = itertools.count(1)
        self._arriving: dict[int, _Arriving] = {}
        self.heard_s = time.monotonic()
        """When the other end was last heard of, by `time.monotonic`."""

    def prove(self, secret: bytes, *, role: bytes, timeout_s: float) -> None:
        """Prove that this end knows the secret, and have the other prove it.

        Args:
            secret: What both know.
            role: ``front`` or ``worker``, so that no proof can be sent back.
            timeout_s: For all of it.

        Raises:
            EOFError: If the other end does not know it.
            OSError: If the connection broke, or took too long.
        """
        self._socket.settimeout(timeout_s)
        ours = secrets.token_bytes(_CHALLENGE)
        self._socket.sendall(ours)
        theirs = bytes(self._exactly(_CHALLENGE))
        other = {b"front": b"worker", b"worker": b"front"}[role]
        self._socket.sendall(_proof(secret, role, theirs + ours))
        given = bytes(self._exactly(hashlib.sha256().digest_size))
        if not hmac.compare_digest(given, _proof(secret, other, ours + theirs)):
            msg = "the other end does not know the secret of this fleet"
            raise EOFError(msg)
        self._socket.settimeout(None)

    def send(
        self,
        number: int,
        message: Message,
        arrays: Sequence[Array] = (),
        *,
        took: Took | None = None,
        cancelled: Poll = lambda: False,
    ) -> None:
        """Send a message; blocks until the other end has taken most of it.

        Args:
            number: Of the command that it is, or answers.
            message: The message.
            arrays: Those that its class names.
            took: What an answer took.
            cancelled: Polled between pieces of large arrays; the other end then never
                hears of the message.

        Raises:
            Cancelled: If the caller gave up.
            OSError: If the connection is broken.
        """
        flat = [np.ascontiguousarray(array) for array in arrays]
        places, memories = self._shared(flat)
        bytes_of = [
            array.reshape(-1).view(np.uint8)
            for array, place in zip(flat, places, strict=True)
            if place is None
        ]
        is_large = sum(each.nbytes for each in bytes_of) > _PIECE
        transfer = next(self._transfers) if is_large else 0
        head = {
            "number": number,
            "kind": type(message).__name__,
            "fields": plain(message),
            "arrays": [
                [a.dtype.str, list(a.shape), place]
                for a, place in zip(arrays, places, strict=True)
            ],
            "transfer": transfer,
            "took": took,
        }
        self._send(head, [] if is_large else bytes_of, memories)
        if is_large:
            self._send_pieces(transfer, bytes_of, cancelled)

    def _send_pieces(
        self, transfer: int, arrays: Sequence[Buffer], cancelled: Poll
    ) -> None:
        """Send the bytes of a message that was announced; others may send in between."""
        for index, array in enumerate(arrays):
            for start in range(0, array.nbytes, _PIECE):
                if cancelled():
                    self._send({"abandoned": transfer})
                    msg = "the caller gave up while a worker was sent what it needs"
                    raise Cancelled(msg)
                piece = array[start : start + _PIECE]
                at = [transfer, index, start, piece.nbytes]
                self._send({"piece": at}, [piece])

    def _send(
        self,
        head: Mapping[str, Any],
        arrays: Sequence[Buffer] = (),
        memories: Sequence[int] = (),
    ) -> None:
        data = json.dumps(head).encode()
        length = _LENGTH.pack(len(data))
        with self._sending:
            # Memories go with the first byte of the frame.
            sent = socket.send_fds(self._socket, [length], memories) if memories else 0
            self._socket.sendall(length[sent:] + data)
            for array in arrays:
                self._socket.sendall(array.data)

    def receive(self) -> Frame:
        """Wait for a message.

        Returns:
            The message.

        Raises:
            EOFError: If the other end is gone.
            OSError: If the connection is broken.
            Internal: If it is no message of the protocol.
        """
        while True:
            frame = self._received()
            if frame is not None:
                return frame._replace(came_s=time.monotonic())

    def _received(self) -> Frame | None:
        """Receive a frame; None if no message is complete by it."""
        (length,), memories = self._begin()
        if length > _HEAD_BYTES:
            msg = f"a message announces a head of {length} bytes, above {_HEAD_BYTES}"
            raise Internal(msg)
        try:
            head = json.loads(bytes(self._exactly(length)))
            if "piece" in head:
                return self._piece(*map(int, head["piece"]))
            if "abandoned" in head:
                del self._arriving[int(head["abandoned"])]
                return None
            number, kind = int(head["number"]), KINDS[head["kind"]]
            fields, described = head["fields"], list(head["arrays"])
            transfer = int(head["transfer"])
            taken = head.get("took")
            took = None if taken is None else Took(*map(float, taken))
        except (ValueError, TypeError, LookupError) as error:
            msg = f"a message between front and worker cannot be read: {error}"
            raise Internal(msg) from error
        message = typed(kind, fields)
        arrays, to_fill = list[Array](), list[Buffer]()
        for each in described:
            arrays.append(self._array(memories, to_fill, *each))
        frame = Frame(number, message, arrays, took)
        if transfer:
            missing = sum(each.nbytes for each in to_fill)
            self._arriving[transfer] = _Arriving(frame, to_fill, missing)
            return None
        for memory in to_fill:
            self._fill(memoryview(memory.data))
        return frame

    def _piece(self, transfer: int, index: int, start: int, size: int) -> Frame | None:
        """Receive a piece of a message; return it with the last one."""
        arriving = self._arriving[transfer]
        place = arriving.arrays[index][start : start + size]
        if min(index, start) < 0 or place.nbytes != size or size > arriving.missing:
            msg = f"piece {start}+{size} of array {index} does not lie in it"
            raise Internal(msg)
        self._fill(memoryview(place.data))
        arriving.missing -= size
        if arriving.missing:
            return None
        return self._arriving.pop(transfer).frame

    def close(self) -> None:
        """Close it, and wake up who receives."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it was broken already
        self._socket.close()

    def _shared(
        self, arrays: Sequence[Array]
    ) -> tuple[list[tuple[int, int] | None], list[int]]:
        """Find what need not travel.

        Returns:
            For each array, which memory it is in and where, or None; and the memories.
        """
        places: list[tuple[int, int] | None] = [None] * len(arrays)
        memories: list[int] = []
        if self._socket.family != socket.AF_UNIX:
            return places, memories
        for index, array in enumerate(arrays):
            region = region_of(array) if array.nbytes >= _SHARED_BYTES else None
            if region is None:
                continue
            if region.memory not in memories:
                if len(memories) == _DESCRIPTORS:
                    continue
                memories.append(region.memory)
            places[index] = memories.index(region.memory), region.offset
        return places, memories

    def _begin(self) -> tuple[tuple[int], list[Buffer]]:
        """Receive the length of a head, and the memories that come with it."""
        if self._socket.family != socket.AF_UNIX:
            return _LENGTH.unpack(self._exactly(_LENGTH.size)), []
        data, descriptors, flags, _ = socket.recv_fds(
            self._socket, _LENGTH.size, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        memories = [mapped(descriptor) for descriptor in descriptors]
        if not data:
            msg = "the other end is gone"
            raise EOFError(msg)
        if flags & socket.MSG_CTRUNC:
            msg = "this process has no descriptors left for what it is to map"
            raise OSError(errno.EMFILE, msg)
        self.heard_s = time.monotonic()
        rest = self._exactly(_LENGTH.size - len(data))
        return _LENGTH.unpack(data + bytes(rest)), memories

    def _array(
        self,
        memories: Sequence[Buffer],
        to_fill: list[Buffer],
        kind: str,
        shape: Sequence[int],
        place: Sequence[int] | None,
    ) -> Array:
        dtype = np.dtype(kind)
        size = int(np.prod([int(n) for n in shape], dtype=object)) if shape else 1
        fits = 0 <= size * dtype.itemsize <= _ARRAY_BYTES
        if dtype.kind not in _TYPES or not fits or min(shape, default=0) < 0:
            msg = f"a message has an array of {kind} {shape}, which does not travel"
            raise Internal(msg)
        if place is not None:
            which, start = place
            memory = memories[which][start : start + size * dtype.itemsize]
        else:
            memory = self._pool.take(size * dtype.itemsize)
            to_fill.append(memory)
        return memory.view(dtype).reshape(tuple(shape))

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        self._fill(memoryview(data))
        return data

    def _fill(self, place: memoryview) -> None:
        while place:
            count = self._socket.recv_into(place[:_PIECE])
            if not count:
                msg = "the other end is gone"
                raise EOFError(msg)
            self.heard_s = time.monotonic()
            place = place[count:]


def _proof(secret: bytes, role: bytes, challenges: bytes) -> bytes:
    return hmac.digest(secret, role + challenges, "sha256")
