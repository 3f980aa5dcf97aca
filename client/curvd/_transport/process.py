"""What belongs to the process that made it, and is of no use to the children it forks.

``fork`` copies memory and descriptors, and one thread of all: a child has its parent's
connections, locks in the state of that moment, and none of the threads that would go on.
So it makes its own, and leaves alone what it inherited.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from curvd.errors import FailedPrecondition

T = TypeVar("T")

Process = tuple[int, int]

_generation = 0
_inherited: list[object] = []
_shared: weakref.WeakSet[PerProcess[Any]] = weakref.WeakSet()
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Process] = (
    weakref.WeakKeyDictionary()
)


def current_process() -> Process:
    """Tell which process this is, also after a ``fork`` that Python knows nothing of.

    Returns:
        The process id, and the number of forks since the first process, because ids are
        used again.
    """
    return os.getpid(), _generation


class PerProcess(Generic[T]):
    """One object in each process that asks for it. Threads may share it.

    Args:
        make: Makes the object. The first is made at once, so that errors come early.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        _watch_forks()
        self._make = make
        self._made = {current_process(): make()}
        _shared.add(self)

    def get(self) -> T:
        """Find the object of this process, or make it."""
        process = current_process()
        found = self._made.get(process)
        # No lock: a thread that does not exist in this process might hold it.
        return self._made.setdefault(process, self._make()) if found is None else found

    def made(self) -> T | None:
        """Find the object of this process, if there is one."""
        return self._made.get(current_process())


def keep_from_children(sock: socket.socket) -> None:
    """Make a socket lead nowhere in the children of this process.

    A child that goes on with what it inherited, in the middle of a call or at its end,
    finds the connection broken and cannot disturb it; and since no child holds it open,
    the server notices when this process closes it.

    Args:
        sock: Connected.
    """
    _watch_forks()
    _sockets.add(sock)


def check_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Refuse an event loop that was inherited: it would wait, and wake its parent.

    Args:
        loop: The one that runs.

    Raises:
        FailedPrecondition: If an ancestor of this process used it.
    """
    if _loops.setdefault(loop, current_process()) != current_process():
        msg = (
            "this event loop was inherited by fork: it shares its selector with the "
            "parent, and its threads are gone. Use a new one in the child, such as "
            "asyncio.run makes; the client may stay"
        )
        raise FailedPrecondition(msg)


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    global _generation
    _generation += 1
    for shared in list(_shared):
        # Dropping what has threads would wait for them: `grpc.aio` does, for ever.
        _inherited.extend(shared._made.values())
    open_sockets = [sock for sock in list(_sockets) if sock.fileno() >= 0]
    if open_sockets:
        nowhere, other_end = socket.socketpair()
        other_end.close()
        nowhere.setblocking(False)
        for sock in open_sockets:
            # Not closed: the number would soon be another file's, and TLS writes to
            # numbers.
            os.dup2(nowhere.fileno(), sock.fileno(), inheritable=False)
        nowhere.close()
    _sockets.clear()
