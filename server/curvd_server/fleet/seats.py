"""A worker as the front sees it: its connection, the answers that came, and its state."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from curvd.errors import BY_REASON, CurvdError, Internal
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Array, Connection, Frame
from curvd_server.fleet.messages import Message, Part


class Request(NamedTuple):
    """A command for one worker."""

    message: messages.Command
    arrays: Sequence[Array] = ()


class Lost(Exception):
    """A worker is gone, or was ended because it was frozen."""


@dataclass(eq=False, slots=True)
class Seat:
    """One rank of a fleet; the fleet's lock is held by whoever reads or writes it."""

    rank: int
    device: str
    connection: Connection | None = None
    """None: nobody is there."""
    incarnation: int = 0
    """How often it was started."""
    is_starting: bool = False
    is_ready: bool = False
    """Whether it holds all that the fleet has registered."""
    failures: int = 0
    """How often in a row it was lost before it was ready."""
    said: str = ""
    """Why it was lost the last time."""
    gone_s: float = field(default_factory=time.monotonic)
    """Since when nobody is there, by `time.monotonic`."""
    retry_s: float = 0.0
    """When it may be started again, by `time.monotonic`."""
    hello: messages.Hello | None = None
    alive: messages.Alive = field(default_factory=messages.Alive)
    """What it said of itself the last time."""
    is_condemned: bool = False
    """Whether it is to be ended, because it does not come back to the others."""
    answers: dict[int, Frame] = field(default_factory=dict)
    """What came and was not fetched, by number."""

    @property
    def restarts(self) -> int:
        """How often it was started after the first time."""
        return max(0, self.incarnation - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemEntry:
    """How a problem is made anew."""

    number: int
    root: int
    """The problem that was loaded; others are moved from it, and share its data."""
    load: messages.Load
    """With all of its own values, and the weight of the targets that count."""
    state: tuple[Array, ...]
    arrays: tuple[Array, ...]
    """The whole dataset, in the order of `load.arrays`."""
    deal: dict[int, tuple[Part, ...]]
    """The shards of each rank."""

    def request(self, rank: int) -> Request:
        """Write what a worker is asked to load: its own shards' rows."""
        parts, size = self.deal[rank], self.load.data.batch_size
        # One that has none has another's mini-batch to compute meanwhile.
        stop = max(parts[-1].stop, parts[0].start + 1)
        rows = slice(parts[0].start * size, stop * size)
        own = [array[rows] for array in self.arrays]
        return Request(replace(self.load, parts=parts), [*self.state, *own])

    def moved(self, source: int) -> Request:
        """Write what a worker is asked that has another version of the same root."""
        message = messages.Move(problem=self.number, old=source, state=self.load.state)
        return Request(message, self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorEntry:
    """How an operator is built anew: by the plan that was decided."""

    build: messages.Build | messages.MakeAnew
    ranks: frozenset[int]


def raised(frame: Frame) -> CurvdError | None:
    """Find the error that an answer reports.

    Args:
        frame: The answer.

    Returns:
        The error; None if it is none.
    """
    message: Message = frame.message
    if isinstance(message, messages.Refused):
        error = BY_REASON.get(message.reason, Internal)(message.message)
        error.metadata = dict(message.values)
        return error
    if isinstance(message, messages.Failed):
        text = f"a worker failed: {message.message}; its log has more"
        return Internal(text)
    return None


def raised_or_left(frame: Frame) -> bool:
    """Tell whether an answer says that something did not come to its end."""
    return isinstance(frame.message, messages.Left) or raised(frame) is not None


class Numbers:
    """Numbers that are given once, on any thread."""

    def __init__(self) -> None:
        self._last, self._lock = 0, threading.Lock()

    def next(self) -> int:
        """Give the next one; the first is 1."""
        with self._lock:
            self._last += 1
            return self._last


def silent_s(seat: Seat) -> float:
    """Tell how long nothing was heard of a worker."""
    assert seat.connection is not None
    return time.monotonic() - seat.connection.heard_s
