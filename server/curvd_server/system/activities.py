"""What takes long and goes on: which stage it is in, and how far it is.

Whoever does long work says so where it happens (`enter_stage`, `advance`), as he says where
it may pause (`yield_point`). Who hears it is decided by whoever began the work, with
`Ongoing.here`; where nobody did, it costs a look-up.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from curvd.contract import Activity, Stage, StageProgress, Work
from curvd_server.system.identity import calling
from curvd_server.system.logs import logger
from curvd_server.system.traced import TRACED

MOST = 100
"""Activities that are listed at most."""
_NOTED_S = 0.1
"""Waiting that took less is not worth a line of the log; none for an idle device is."""

_TRACED = (Work.OPENING, Work.BUILDING)
"""What a call waits for, and what is none of the device's requests."""

_here = threading.local()


@dataclass(slots=True)
class _Entered:
    """A stage that was entered."""

    stage: Stage
    detail: str
    total: int | None
    began_s: float
    done: int = 0
    ended_s: float | None = None
    told: bool = False
    """Whether `Ongoing.news` has told what it is like now."""


class Ongoing:
    """One thing that takes long; a context, in which it is listed. Threads may share it.

    It begins with waiting.

    Args:
        work: Why it takes long.
        subject: The kind of the operator, or the name of the query.
        session: Tells id and label of the session; the id is empty while that is created.
        activities: Where it is listed; None: nowhere.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        work: Work,
        subject: str = "",
        *,
        session: Callable[[], tuple[str, str]] = lambda: ("", ""),
        activities: Activities | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.work, self.subject, self.caller = work, subject, calling().name
        self._session, self._activities = session, activities
        self._clock, self._lock = clock, threading.Lock()
        self._traced = TRACED.get() if work in _TRACED else None
        self._began_s = clock()
        self._entered = [_Entered(Stage.WAITING, "", None, self._began_s)]

    def __enter__(self) -> Ongoing:
        if self._activities is not None:
            self._activities.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._activities is not None:
            self._activities.remove(self)
        with self._lock:
            ended = self._end()
        self._log(ended)

    def __str__(self) -> str:
        now = self.now
        words = [str(self.work), self.subject]
        if now.session_id:
            words.append(f"of session {now.session_id}")
        if self.caller:
            words.append(f"for {self.caller}")
        return " ".join(word for word in words if word)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Hear what this thread says inside, about the stages of its work.

        Yields:
            Nothing.
        """
        outside = getattr(_here, "ongoing", None)
        _here.ongoing = self
        try:
            yield
        finally:
            _here.ongoing = outside

    def enter(self, stage: Stage, detail: str = "", total: int | None = None) -> None:
        """Begin a stage; the one before ends.

        Args:
            stage: Which.
            detail: What it is about, for people.
            total: How much there is at most; None: nobody knows.
        """
        with self._lock:
            ended = self._end()
            self._entered.append(_Entered(stage, detail, total, self._clock()))
        self._log(ended)

    def advance(self, done: int | None = None, detail: str | None = None) -> None:
        """Go on within the stage.

        Args:
            done: How much of it is done; None: one more.
            detail: What it is about from now on; None: as before.
        """
        with self._lock:
            now = self._entered[-1]
            now.done = now.done + 1 if done is None else done
            now.detail = now.detail if detail is None else detail
            if now.total is not None:
                now.total = max(now.total, now.done)
            now.told = False

    @property
    def now(self) -> Activity:
        """What it is like now."""
        session_id, session_name = self._session()
        with self._lock:
            return Activity(
                work=self.work,
                session_id=session_id,
                session_name=session_name,
                subject=self.subject,
                progress=self._progress(self._entered[-1]),
                elapsed_s=self._clock() - self._began_s,
            )

    def news(self) -> list[StageProgress]:
        """Tell what has happened since the last call: each stage as it is by now."""
        with self._lock:
            news = [self._progress(one) for one in self._entered if not one.told]
            self._entered[-1].told = True
            del self._entered[:-1]
        return news

    def _progress(self, one: _Entered) -> StageProgress:
        until_s = self._clock() if one.ended_s is None else one.ended_s
        return StageProgress(
            stage=one.stage,
            detail=one.detail,
            done=one.done,
            total=one.total,
            elapsed_s=until_s - one.began_s,
        )

    def _end(self) -> _Entered:
        ended = self._entered[-1]
        ended.ended_s, ended.told = self._clock(), False
        return ended

    def _log(self, ended: _Entered) -> None:
        progress = self._progress(ended)
        if self._traced is not None and ended.stage is not Stage.WAITING:
            assert ended.ended_s is not None
            said = {"subject": self.subject, "detail": progress.detail}
            self._traced.add(
                "build",
                ended.began_s,
                ended.ended_s,
                work=str(self.work),
                stage=str(ended.stage),
                **{name: value for name, value in said.items() if value},
            )
        least_s = math.inf if self.work is Work.IMPROVING else _NOTED_S
        briefly = ended.stage is Stage.WAITING and progress.elapsed_s < least_s
        if self.work is Work.QUERY or briefly:
            return
        session_id, session_name = self._session()
        said = {
            "session": session_id or session_name,
            "subject": self.subject,
            "detail": progress.detail,
        }
        logger().info(
            f"{self.work}: {progress.stage} ended",
            done=progress.done,
            seconds=round(progress.elapsed_s, 3),
            **{name: value for name, value in said.items() if value},
        )


class Activities:
    """All that takes long at a server right now. Threads may share it."""

    def __init__(self) -> None:
        # In the order in which they began.
        self._ongoing: dict[Ongoing, None] = {}
        self._lock = threading.Lock()

    def add(self, ongoing: Ongoing) -> None:
        """List something that begins."""
        with self._lock:
            self._ongoing[ongoing] = None

    def remove(self, ongoing: Ongoing) -> None:
        """List it no longer."""
        with self._lock:
            del self._ongoing[ongoing]

    def counts(self) -> Counter[Work]:
        """Count what goes on of everybody's, by why it takes long."""
        with self._lock:
            return Counter(one.work for one in self._ongoing)

    def listed(self) -> tuple[Activity, ...]:
        """Tell what goes on of the caller's, the oldest first; `MOST` at most.

        An operator sees everybody's.
        """
        caller = calling()
        with self._lock:
            ongoing = list(self._ongoing)
        seen = [one for one in ongoing if caller.sees(one.caller, ())]
        return tuple(one.now for one in seen[:MOST])

    def under_way(self) -> tuple[str, ...]:
        """Name what goes on, whoever asked for it, the oldest first; for the log."""
        with self._lock:
            ongoing = list(self._ongoing)
        return tuple(map(str, ongoing[:MOST]))


def enter_stage(stage: Stage, detail: str = "", total: int | None = None) -> None:
    """Say that a stage of this thread's work begins, if anybody listens.

    Args:
        stage: Which.
        detail: What it is about, for people.
        total: How much there is at most; None: nobody knows.
    """
    ongoing: Ongoing | None = getattr(_here, "ongoing", None)
    if ongoing is not None:
        ongoing.enter(stage, detail, total)


def advance(done: int | None = None, detail: str | None = None) -> None:
    """Say how far the stage of this thread's work is, if anybody listens.

    Args:
        done: How much of it is done; None: one more.
        detail: What it is about from now on; None: as before.
    """
    ongoing: Ongoing | None = getattr(_here, "ongoing", None)
    if ongoing is not None:
        ongoing.advance(done, detail)
