"""The front's side of what workers do in step: one command at a time, to all of them.

Workers that share parameters meet in groups, one after the other: whenever one is lost or
fails, all leave, and meet again before the next command. A command whose worker was lost is
sent again; of what was half done nothing is left but what workers may have cached, which they
drop when they meet.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from curvd.errors import Cancelled, Unavailable
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Frame
from curvd_server.fleet.fleet import Fleet
from curvd_server.fleet.seats import Lost, Request
from curvd_server.system import Poll, logger, undivided

ATTEMPTS = 4
"""How often one command is sent before its caller is told."""


class InStep:
    """Asks all workers of a fleet at once.

    Args:
        fleet: The workers.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._joined: Mapping[int, int] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="curvd-meet-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._places = itertools.count()

    @property
    def ranks(self) -> range:
        """Of all workers."""
        return range(len(self._fleet.seats))

    def ask(
        self,
        requests: Mapping[int, Request],
        *,
        cancelled: Poll,
        register: Callable[[], None] | None = None,
    ) -> dict[int, Frame]:
        """Ask all workers; nobody else has the device until they have answered.

        Args:
            requests: What each rank is asked.
            cancelled: Polled while they work; all stop within a mini-batch.
            register: Called when all have answered: notes what they hold now.

        Returns:
            The answers by rank.

        Raises:
            Cancelled: If the caller gave up.
            Unavailable: If workers were lost, or left each other, again and again.
            CurvdError: If a worker refuses; the first one, by rank.
        """
        why = ""
        for _ in range(ATTEMPTS):
            only = self._fleet.there(self.ranks, cancelled=cancelled)
            try:
                with undivided():
                    self._join(only, cancelled)
                    return self._fleet.together(
                        requests, only=only, cancelled=cancelled, register=register
                    )
            except Lost as error:
                why, self._joined = str(error), {}
                logger().warning("workers meet again", why=why)
            except Cancelled:
                raise  # they have stopped at the same place
            except BaseException:
                self._joined = {}
                raise
        msg = (
            f"workers that share parameters were lost, or left each other, {ATTEMPTS} times "
            f"while they worked on this call, last because {why}; try again, and look at "
            "the server's log and memory"
        )
        raise Unavailable(msg)

    def same(self, message: messages.Command) -> dict[int, Request]:
        """Write the same request for all."""
        return dict.fromkeys(self.ranks, Request(message))

    def _join(self, only: Mapping[int, int], cancelled: Poll) -> None:
        """Have the workers meet, if those that are there have not."""
        if only == self._joined:
            return
        place = self._folder / f"{next(self._places)}"
        try:
            self._fleet.together(
                self.same(messages.Join(place=str(place))),
                only=only,
                cancelled=lambda: False,
            )
        finally:
            place.unlink(missing_ok=True)
        self._joined = dict(only)
