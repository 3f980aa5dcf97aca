"""What the callbacks for trainers have in common: a watch from begin to end, and its news."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curvd.remote import Session
from curvd.watching.metrics import Metrics, chosen
from curvd.watching.outlets import Outlets
from curvd.watching.reading import Reading
from curvd.watching.troubles import Troubles
from curvd.watching.watch import Watch, check, watch

PREFIX = "curvature/"
"""Of the names that trainers log."""


class Follower:
    """A watch that a trainer begins, steps and ends.

    What the caller gave is looked at here, before the training begins; after that nothing that
    fails ends the training.

    Args:
        session: See `watch`.
        every: See `watch`.
        metrics: See `watch`.
        to: See `watch`.

    Raises:
        InvalidSpec: If the session is none, or `every` or a metric.
    """

    def __init__(
        self, session: Session, every: int, metrics: Metrics, to: Outlets
    ) -> None:
        check(session, every)
        chosen(metrics)
        self._session = session
        self._options = {"every": every, "metrics": metrics, "to": to}
        self._told = 0
        self.watch: Watch | None = None
        """The watch, once the training has begun; None, too, if it could not begin."""

    def begin(self, module: Any) -> None:
        """Follow a module from now on; that it cannot be done is logged.

        Args:
            module: The module, which may contain the session's.
        """
        self._told, self.watch = 0, None
        try:
            # The trainer counts: its steps are what its logs are about.
            self.watch = watch(self._session, module, optimizer=(), **self._options)
        except Exception as error:
            # Whatever it is, it is no reason for a training to end.
            troubles = Troubles(f"the watch of session {self._session.id}")
            troubles.add("its beginning", error, ends=True)

    def step(self, number: int) -> Sequence[Reading]:
        """Say that a step was made.

        Args:
            number: How many there are now.

        Returns:
            Readings that are new.
        """
        if self.watch is None:
            return ()
        self.watch.step(number)
        return self._news(self.watch)

    def end(self, *, wait_s: float = 10.0) -> Sequence[Reading]:
        """Follow no more.

        Args:
            wait_s: How long to wait for what was taken.

        Returns:
            Readings that are new.
        """
        if self.watch is None:
            return ()
        self.watch.close(wait_s=wait_s)
        return self._news(self.watch)

    def _news(self, followed: Watch) -> Sequence[Reading]:
        readings = followed.readings
        news = [reading for reading in readings if reading.version > self._told]
        self._told = readings[-1].version if readings else 0
        return news


def logged(reading: Reading) -> dict[str, float]:
    """Name the values of a reading, and their errors, as trainers log them.

    Args:
        reading: The reading.

    Returns:
        Numbers by name.
    """
    row = reading.to_dict()
    del row["step"]
    return {f"{PREFIX}{name}": value for name, value in row.items()}
