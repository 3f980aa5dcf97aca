"""What is asked of a device, what waits for it, and what it answers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from numpy.typing import NDArray

from curvd_server.system import TRACED, Poll, Traces, calling

T = TypeVar("T")
Columns = NDArray[Any]


class Multiplies(Protocol):
    """What products are asked from."""

    @property
    def shares(self) -> bool:
        """Whether columns together cost less than one after the other."""

    @property
    def is_remote(self) -> bool:
        """Whether other processes make its products, which may fall silent."""

    def apply(
        self, columns: Columns, *, counts: Sequence[int] = (), cancelled: Poll
    ) -> Columns:
        """Multiply columns, and leave them as they are: [K, P] -> [K, P].

        Args:
            columns: [K, P].
            counts: Columns of each request that is in them, whose result does not
                depend, to the bit, on the others; none: it is one.
            cancelled: Polled between mini-batches.
        """


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """A result, and what it took."""

    value: T
    queue_s: float
    """Between submission and start."""
    compute_s: float
    """Of the run, shared with whoever was in it."""
    run_columns: int
    """Columns in the run, those of others included; 0 if it was no product."""


class Ticket(Future[Done[T]]):
    """A request in the queue. Cancelling it also stops a run that nobody else needs."""

    def __init__(
        self, job: Callable[[Poll], T] | None, columns: Columns | None
    ) -> None:
        super().__init__()
        self.job, self.columns = job, columns
        self.abandoned = self.alone = self.in_turns = False
        self.submitted_s = time.monotonic()
        self.caller = calling()
        """Who asks, whose share of the device it takes."""
        self.waits: Poll | None = None
        """Whether it still waits for an idle device; None: it takes its turn."""
        self.room_bytes: int | None = None
        """Memory that there must be room for before it begins; None: it needs none."""
        self.traced = TRACED.get()
        """Hears what it takes; None: nobody wants to know."""
        if self.traced is not None:
            self.add_done_callback(functools.partial(_trace, self.traced))

    @property
    def width(self) -> int:
        """Columns that it multiplies; 0 if it is no product."""
        return 0 if self.columns is None else len(self.columns)

    def let_go(self) -> None:
        """Forget the job, which holds what it works with; the answer stays."""
        self.job = None

    def cancel(self) -> bool:
        """Give up. A run stops at the next mini-batch if all its members have."""
        self.abandoned = True
        return super().cancel()


def _trace(traced: Traces, ticket: Ticket[Any]) -> None:
    """Tell whoever traces a call what one of its requests took."""
    ended_s = time.monotonic()
    if ticket.cancelled() or ticket.waits is not None or ticket.exception() is not None:
        return  # the call's own span says how it failed; of the rest nobody waits
    done = ticket.result()
    began_s = ticket.submitted_s + done.queue_s
    traced.add("queue", ticket.submitted_s, began_s)
    traced.add(
        "compute",
        began_s,
        ended_s,
        device_s=done.compute_s,
        columns=ticket.width,
        run_columns=done.run_columns,
    )
