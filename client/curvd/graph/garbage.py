"""Full collections of garbage, and exports, which they have no part in."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


class FullCollections:
    """Puts off Python's collections of all garbage, in which a trace has no part.

    Torch's imports leave so many objects that one is due about now; looking at all of
    them would take as long as half a small export. Nor does it follow at once, before
    the session's first answer: freezing all and back begins the counts anew. It is not
    put off for ever where one export follows the other, for traces leave garbage, too.
    """

    MOST = 100
    """Younger collections, of some thousand new objects each, between two full ones."""
    NEVER = 2**31 - 1

    def __init__(self) -> None:
        self._made = self._younger = 0
        self._usual = gc.get_threshold()

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """Have none inside, and none soon after; for one thread at a time."""
        if gc.get_threshold()[2] < self.NEVER:  # else a server of this process builds
            self._usual = gc.get_threshold()
        gc.set_threshold(*self._usual[:2], self.NEVER)
        try:
            yield
        finally:
            made = gc.get_stats()[2]["collections"]
            if made != self._made:
                self._made, self._younger = made, 0
            self._younger += gc.get_count()[2]
            frozen_by_others = gc.get_freeze_count() > 0
            if self._younger <= self.MOST and gc.isenabled() and not frozen_by_others:
                gc.collect(1)
                gc.freeze()
                gc.unfreeze()
            gc.set_threshold(*self._usual)


full_collections = FullCollections()
