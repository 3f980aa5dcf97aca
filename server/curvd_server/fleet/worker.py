"""A worker: a process that holds shards of data and answers the front.

One thread reads, so that a cancellation is known at once; one says now and then that the
process is not frozen; queries have theirs (`programs`); the main one computes. It has a
lane for products that are short, which come first, and one for whatever takes long:
openings, and products over much data, which give way between two steps to each other and to
short ones (`system.cooperative`).

It ends with the front, however that ends: the system then closes the pipe and the
connection, and kills what is stopped (`PR_SET_PDEATHSIG`). A worker on another machine that
is cut off ends when what it says stays unacknowledged (`TCP_USER_TIMEOUT`).
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch

from curvd.errors import CurvdError, Internal
from curvd.tensors import tune_allocator
from curvd_server.device import LONG_S
from curvd_server.device.torch_device import TorchDevice, set_threads
from curvd_server.engine.sharding import Broken
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Connection, Frame, Took
from curvd_server.fleet.holdings import Holdings, Said, refused, use_device
from curvd_server.fleet.launcher import Invitation
from curvd_server.fleet.listener import connected
from curvd_server.fleet.programs import Programs
from curvd_server.fleet.sharded_holdings import ShardedHoldings
from curvd_server.system import LongWork, Poll, Threads, logs

BEAT_S = 0.5
"""How often a worker says that it is not frozen."""
CONNECT_S = 30.0
"""How long it may take to connect, and then to prove who it is."""
_TURN_S = (5e-3, 0.25)
"""Long work keeps its turn as long as the latest short product took, within these."""
_PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    """Read the invitation, connect, and work until the front is gone."""
    front = os.getppid()
    invitation = Invitation.read(sys.stdin.buffer.readline())
    _end_with(front)
    work(invitation)


def work(invitation: Invitation) -> NoReturn:
    """Connect, and work until the front is gone; then the process ends.

    Args:
        invitation: Where the front is, and what it knows of this worker.
    """
    tune_allocator()
    logs.set_up(invitation.log_level, invitation.log_style)
    set_threads(invitation.threads)
    made = connected(
        invitation.address,
        connect_s=CONNECT_S,
        lost_s=2 * invitation.patience_s,
    )
    connection = Connection(made)
    connection.prove(
        bytes.fromhex(invitation.secret), role=b"worker", timeout_s=CONNECT_S
    )
    device, refused = None, ""
    try:
        device = TorchDevice(
            invitation.builders,
            use_device(invitation.device),
            allowed=invitation.libraries,
            model_bytes=invitation.model_bytes,
        )
    except CurvdError as error:
        refused = str(error)
    gc.freeze()
    hello = messages.Hello(
        rank=invitation.rank,
        incarnation=invitation.incarnation,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=invitation.device,
        torch_version=torch.__version__,
        refused=refused,
    )
    connection.send(0, hello)
    if device is None:
        _leave()
    holdings = Holdings(device, invitation.idle_bytes)
    if invitation.world:
        holdings = ShardedHoldings(
            device, invitation.idle_bytes, invitation.rank, invitation.world
        )
    worker = Worker(connection, holdings, _leave)
    worker.run()
    _leave()


def _leave() -> NoReturn:
    """End the process, whatever it computes."""
    os._exit(0)


@dataclass(eq=False, slots=True)
class _Task:
    """A command under way."""

    frame: Frame
    work: LongWork[Said]
    began_s: float = 0.0
    """When its first turn began."""
    device_s: float = 0.0
    """How long its turns were."""

    def took(self, now_s: float) -> Took:
        """Say what it took until now."""
        waited_s = self.began_s - self.frame.came_s
        return Took(waited_s, now_s - self.began_s, self.device_s)


class Worker:
    """Answers one connection.

    Args:
        connection: To the front.
        holdings: What computes.
        leave: Called when the front is gone, on any thread; may end the process.
    """

    def __init__(
        self, connection: Connection, holdings: Holdings, leave: Callable[[], None]
    ) -> None:
        self._connection, self._holdings = connection, holdings
        self._programs = Programs(holdings.device, self._say)
        self._leave, self._is_over = leave, False
        self._changed = threading.Condition()
        self._new: deque[Frame] = deque()
        self._short: deque[_Task] = deque()
        self._long: deque[_Task] = deque()
        self._pending: set[int] = set()
        self._cancelled: set[int] = set()
        self._threads = Threads()
        self._turn_end_s = self._latest_s = 0.0

    def run(self) -> None:
        """Work until the front is gone."""
        for target in (self._read, self._beat):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        while not self._is_over:
            self._step()
        self._connection.close()
        self._threads.close()

    def _step(self) -> None:
        """Take the next task a step further."""
        with self._changed:
            while not (self._new or self._short or self._long or self._is_over):
                self._changed.wait()
            if self._is_over:
                return
            while self._new:
                self._sort(self._new.popleft())
            short = bool(self._short)
            task = self._short.popleft() if short else self._long.popleft()
        least_s, most_s = _TURN_S
        start_s = time.monotonic()
        self._turn_end_s = start_s + min(max(least_s, self._latest_s), most_s)
        task.began_s = task.began_s or start_s
        is_over = True
        if short:
            task.work.complete()
        else:
            is_over = task.work.resume()
        now_s = time.monotonic()
        task.device_s += now_s - start_s
        if short:
            self._latest_s = now_s - start_s
        if is_over:
            self._answer(task, task.took(now_s))
            return
        with self._changed:
            self._long.append(task)

    def _sort(self, frame: Frame) -> None:
        """Put a command into its lane."""
        message, number = frame.message, frame.number
        columns = len(frame.arrays[0]) if isinstance(message, messages.Product) else 0
        # Who stopped by itself what runs in step would leave the others alone.
        in_step = type(message) in self._holdings.in_step

        def is_stopped() -> bool:
            return number in self._cancelled

        def work(cancelled: Poll) -> Said:
            start_s = time.monotonic()
            poll = is_stopped if in_step else cancelled
            said = self._holdings.answer(message, frame.arrays, poll)
            if isinstance(message, messages.Product):
                seconds = time.monotonic() - start_s
                self._holdings.took(message, columns, seconds)
            return said

        long_work = LongWork(
            work,
            stopped=(lambda: False) if in_step else is_stopped,
            gives_way=self._gives_way,
            threads=self._threads,
        )
        is_short = isinstance(message, messages.Product) and (
            self._holdings.expected_s(message, columns) <= LONG_S
        )
        (self._short if is_short else self._long).append(_Task(frame, long_work))

    def _gives_way(self) -> bool:
        """Tell long work whether others wait, and its turn is over."""
        if time.monotonic() < self._turn_end_s:
            return False
        return bool(self._new or self._short or self._long)

    def _answer(self, task: _Task, took: Took) -> None:
        """Send how a command ended."""
        number = task.frame.number
        try:
            said = task.work.result()
        except CurvdError as error:
            said = refused(error)
        except Broken as error:
            said = messages.Left(why=str(error)), ()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            said = messages.Failed(message=text, trace=traceback.format_exc()), ()
        with self._changed:
            self._pending.discard(number)
            self._cancelled.discard(number)
        self._say(number, said, took)

    def _say(self, number: int, said: Said, took: Took | None = None) -> None:
        """Send an answer; on any thread."""
        try:
            self._connection.send(number, *said, took=took)
        except OSError:
            self._end()

    def _end(self) -> None:
        """Take note that the front is gone."""
        self._leave()
        self._programs.close()
        with self._changed:
            self._is_over = True
            # Long work that waits for its next turn stops there.
            self._cancelled |= self._pending
            self._changed.notify_all()

    def _read(self) -> None:
        """Receive commands until the front is gone."""
        try:
            while True:
                frame = self._connection.receive()
                if isinstance(
                    frame.message, messages.Begin | messages.Resume | messages.End
                ):
                    self._programs.take(frame)
                    continue
                with self._changed:
                    if isinstance(frame.message, messages.Cancel):
                        # What is answered already needs no stopping.
                        self._cancelled |= {frame.message.asked} & self._pending
                    else:
                        self._pending.add(frame.number)
                        self._new.append(frame)
                        self._changed.notify()
        except (EOFError, OSError, Internal):
            self._end()

    def _beat(self) -> None:
        """Say that the process is not frozen, whatever the others do."""
        pause = threading.Event()
        try:
            while not pause.wait(BEAT_S):
                self._connection.send(0, self._holdings.alive())
        except OSError:
            self._end()


def _end_with(front: int) -> None:
    """End this process when its parent does, even while it is stopped."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front
    if os.getppid() != front:
        os._exit(0)  # it ended before

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="watch", daemon=True).start()
