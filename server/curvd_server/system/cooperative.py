"""Long work that takes turns with others: it gives way between two of its steps.

Opening a session keeps a device busy for up to a minute, a product over much data as
well. Such work has a thread of its own, which runs only while the device's thread waits
for it, and hands control back at yield points. One of them runs at any time, so that a
product shares neither the GIL nor the cores with half a step of somebody's opening, the
clock of plans counts no product, and what torch keeps per thread (grad mode, tracing,
`torch.func`) is each one's own.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from curvd.errors import Cancelled

T = TypeVar("T")
Poll = Callable[[], bool]

_here = threading.local()


class Threads:
    """Threads for long work, one after the other: a new one has to warm torch's pool."""

    def __init__(self) -> None:
        # The latest one first, so that work that comes singly has always the same.
        self._idle: list[queue.SimpleQueue[Callable[[], None] | None]] = []

    def run(self, job: Callable[[], None], done: Callable[[], None]) -> None:
        """Start a job on a thread of its own.

        Args:
            job: Must not raise.
            done: Called there when the thread is free again.
        """
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = queue.SimpleQueue()
            threading.Thread(
                target=self._work, args=(inbox,), name="long-work", daemon=True
            ).start()

        def whole() -> None:
            job()
            self._idle.append(inbox)
            done()

        inbox.put(whole)

    def close(self) -> None:
        """End those that are free."""
        while self._idle:
            self._idle.pop().put(None)

    @staticmethod
    def _work(inbox: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := inbox.get()) is not None:
            job()
            del job  # it holds what it worked with


class LongWork(Generic[T]):
    """Work on a thread of its own that runs when it is resumed, until it gives way.

    Args:
        work: Called with a poll that says whether to stop; polling is a yield point.
        stopped: Says whether nobody wants the work any more.
        gives_way: Says whether somebody waits long enough; asked at each yield point.
        threads: Where it runs.
        is_shared: Says whether others want short turns, so that yield points within a
            step pay.
    """

    def __init__(
        self,
        work: Callable[[Poll], T],
        *,
        stopped: Poll,
        gives_way: Poll,
        threads: Threads,
        is_shared: Poll = lambda: False,
    ) -> None:
        self.is_shared = is_shared
        self._work, self._stopped, self._gives_way = work, stopped, gives_way
        self._threads = threads
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._go: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._back: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._begun = False
        self.is_undivided = False
        """Whether it must not give way now."""
        self.is_alone = False
        """Whether it is in a section that keeps other long work out."""

    def resume(self) -> bool:
        """Run the work until its next pause.

        Returns:
            Whether it has ended; then `result` has its outcome.
        """
        if self._begun:
            self._go.put(None)
        else:
            self._begun = True
            self._threads.run(self._run, lambda: self._back.put(True))
        return self._back.get()

    def complete(self) -> None:
        """Run all of the work here, without a pause."""
        self._finish(self._stopped)

    def result(self) -> T:
        """Return what the work returned, or raise what it raised; once."""
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # or its traceback, with this frame, would hold itself
        (value,) = self._value
        return value

    def yield_point(self) -> None:
        """Pause if somebody waits.

        Raises:
            Cancelled: If nobody wants the work any more.
        """
        if self.is_given_up():
            msg = "the caller gave up; the work stopped between two steps"
            raise Cancelled(msg)

    def is_given_up(self) -> bool:
        """Pause if somebody waits; then say whether nobody wants the work any more."""
        if not self.is_undivided and self._gives_way():
            self.pause()
        return self._stopped()

    def pause(self) -> None:
        """Hand control back, until the work is resumed."""
        self._back.put(False)
        self._go.get()

    def _run(self) -> None:
        _here.work = self
        self._finish(self.is_given_up)
        _here.work = None

    def _finish(self, poll: Poll) -> None:
        try:
            self._value.append(self._work(poll))
        except BaseException as error:
            self._error = error


def yield_point() -> None:
    """Let others go first, if this thread does long work; else do nothing.

    Raises:
        Cancelled: If nobody wants the long work any more.
    """
    work: LongWork[object] | None = getattr(_here, "work", None)
    if work is not None:
        work.yield_point()


def given_up() -> bool:
    """Let others go first, if this thread does long work, and say whether nobody wants it.

    For work that is waited for elsewhere, and has to be stopped there.

    Returns:
        Whether to stop; False on a thread that does no long work.
    """
    work: LongWork[object] | None = getattr(_here, "work", None)
    return work is not None and work.is_given_up()


def is_shared() -> bool:
    """Tell whether this thread does long work beside others who want short turns."""
    work: LongWork[object] | None = getattr(_here, "work", None)
    return work is not None and work.is_shared()


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Let nobody go first inside, if this thread does long work.

    Yields:
        Nothing; polls go on telling whether somebody wants the work.
    """
    work: LongWork[object] | None = getattr(_here, "work", None)
    before = work is not None and work.is_undivided
    if work is not None:
        work.is_undivided = True
    try:
        yield
    finally:
        if work is not None:
            work.is_undivided = before


@contextlib.contextmanager
def alone(lock: threading.Lock) -> Iterator[None]:
    """Keep other long work out of a section that has yield points inside.

    The device's thread is let in: what it does in between ends before the section goes
    on, as if the section had called it. Work that waits for an idle device does not wait
    inside, because others may wait for the section.

    Args:
        lock: The lock of the section.

    Yields:
        Nothing.
    """
    work: LongWork[object] | None = getattr(_here, "work", None)
    if work is None:
        yield
        return
    while not lock.acquire(blocking=False):
        work.pause()
        work.yield_point()
    work.is_alone = True
    try:
        yield
    finally:
        work.is_alone = False
        lock.release()
