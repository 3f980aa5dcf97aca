"""Counting what a peer sends for nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from curvd.http2.frames import Code
from curvd.http2.stream import ProtocolError

MOST_GLITCHES = 1000
"""Glitches without useful work between them after which a peer is sent away."""
RESET_GLITCHES = 4
"""What a call costs that was begun for nothing: reset, refused or malformed."""
CALL_CREDIT = 8
"""Glitches that one finished call excuses: its pings, settings and window updates."""
RECEIVED_PER_CREDIT = 1 << 12
"""Bytes of messages that came that excuse one glitch."""
SENT_PER_CREDIT = 1 << 5
"""Bytes that the peer let us send that excuse one: its window updates."""
CREDIT_PER_S = 10.0
"""Glitches that are forgiven with time: the pings of a connection that is kept open."""


class Glitches:
    """Balances frames that cost work and bring nothing against useful work.

    Frames of unknown type, priorities, acknowledgements, pings, settings, empty or tiny
    data, window updates, continuations, resets and frames on closed streams are each
    allowed, and a flood of them is an attack. Finished calls, transferred bytes and time
    pay for some. The debt is reckoned only when the count reaches the limit, so that a
    glitch costs one addition and useful work costs nothing.

    Args:
        limit: Glitches that are too many.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, limit: int = MOST_GLITCHES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._clock = limit, clock
        self._since = clock()
        self.count = 0
        """Glitches that nothing has paid for yet."""
        self.calls = self.parts = self.received = self.sent = 0
        """Useful work since the last reckoning: calls finished, messages that came,
        their bytes, and bytes of data that were sent."""

    def add(self, glitches: int = 1) -> None:
        """Count glitches.

        Args:
            glitches: How many.

        Raises:
            ProtocolError: If they are too many.
        """
        self.count += glitches
        if self.count > self._limit:
            self._reckon()

    def _reckon(self) -> None:
        now = self._clock()
        credit = int((now - self._since) * CREDIT_PER_S) + self.parts
        credit += self.received // RECEIVED_PER_CREDIT + self.sent // SENT_PER_CREDIT
        credit += self.calls * CALL_CREDIT
        self._since, self.calls, self.parts, self.received, self.sent = now, 0, 0, 0, 0
        self.count = max(0, self.count - credit)
        if self.count > self._limit:
            msg = (
                f"more than {self._limit} frames that bring nothing "
                "(resets, pings, priorities, empty data and the like)"
            )
            raise ProtocolError(msg, Code.ENHANCE_YOUR_CALM)
