"""A connection between the front and a worker: typed messages, length-prefixed, with arrays.

A frame is the length of its head, the head in JSON (number, kind, fields, and the types and
shapes of the arrays), and the arrays' bytes. Whoever does not know the secret of the fleet
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
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from curvd.errors import Internal
from curvd.tensors import Buffer, Pool
from curvd_server.fleet.messages import KINDS, Message
from curvd_server.fleet.values import plain, typed
from curvd_server.storage import mapped, region_of

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


class Frame(NamedTuple):
    """What arrived."""

    number: int
    """Of the command that it is, or answers; 0: none."""
    message: Message
    arrays: list[Array]


class Connection:
    """One end of a connection, after both have proved who they are.

    Any thread may send; one thread receives.

    Args:
        connected: The socket, connected and blocking; it is closed with this.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._sending = connected, threading.Lock()
        self._pool = Pool(_IDLE_BYTES)
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

    def send(self, number: int, message: Message, arrays: Sequence[Array] = ()) -> None:
        """Send a message; blocks until the other end has taken most of it.

        Args:
            number: Of the command that it is, or answers.
            message: The message.
            arrays: Those that its class names.

        Raises:
            OSError: If the connection is broken.
        """
        flat = [np.ascontiguousarray(array) for array in arrays]
        places, memories = self._shared(flat)
        head = {
            "number": number,
            "kind": type(message).__name__,
            "fields": plain(message),
            "arrays": [
                [a.dtype.str, list(a.shape), place]
                for a, place in zip(arrays, places, strict=True)
            ],
        }
        data = json.dumps(head).encode()
        with self._sending:
            if memories:  # with the first byte of the frame
                length = _LENGTH.pack(len(data))
                sent = socket.send_fds(self._socket, [length], memories)
                self._socket.sendall(length[sent:] + data)
            else:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
            for array, place in zip(flat, places, strict=True):
                if place is None:
                    self._socket.sendall(array.reshape(-1).view(np.uint8).data)

    def receive(self) -> Frame:
        """Wait for a message.

        Returns:
            The message.

        Raises:
            EOFError: If the other end is gone.
            OSError: If the connection is broken.
            Internal: If it is no message of the protocol.
        """
        (length,), memories = self._begin()
        if length > _HEAD_BYTES:
            msg = f"a message announces a head of {length} bytes, above {_HEAD_BYTES}"
            raise Internal(msg)
        try:
            head = json.loads(bytes(self._exactly(length)))
            number, kind = int(head["number"]), KINDS[head["kind"]]
            fields, described = head["fields"], list(head["arrays"])
        except (ValueError, TypeError, LookupError) as error:
            msg = f"a message between front and worker cannot be read: {error}"
            raise Internal(msg) from error
        message = typed(kind, fields)
        return Frame(
            number, message, [self._array(memories, *each) for each in described]
        )

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
            self._fill(memoryview(memory.data))
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
