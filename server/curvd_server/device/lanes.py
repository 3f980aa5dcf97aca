"""Whose turn it is: requests in lanes, which take turns.

What has the same operator, or belongs to the same caller, runs in order in one lane. A lane
that had its turn goes behind all others, so whoever comes now waits for the turn under way
at most, however many queue. Callers with names share the device by their weights before
their lanes do (`shares`).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from curvd_server.device.requests import Multiplies, Ticket
from curvd_server.device.shares import Shares
from curvd_server.system import Identity, LongWork

MOST_LONG = 4
"""Openings that have begun and not ended; more wait."""


@dataclass(eq=False, slots=True)
class Run:
    """Requests that are worked off together."""

    operator: Multiplies | None
    tickets: list[Ticket[Any]]
    work: LongWork[list[Any]]
    in_turns: bool
    """Whether it gives way to others."""
    began_s: float
    spent_s: float = 0.0

    @property
    def columns(self) -> int:
        """Of all of them."""
        return sum(ticket.width for ticket in self.tickets)


@dataclass(eq=False, slots=True)
class Lane:
    """Requests that run in order: products with one operator, or jobs."""

    operator: Multiplies | None
    tickets: deque[Ticket[Any]]
    run: Run | None = None
    """The one that has begun; it may have given way."""

    @property
    def caller(self) -> str:
        """Name of who asks for what is first in it."""
        head = self.tickets[0] if self.run is None else self.run.tickets[0]
        return head.caller.name

    @property
    def is_long(self) -> bool:
        """Whether it is the turn of work that gives way to others."""
        return self.tickets[0].in_turns if self.run is None else self.run.in_turns

    @property
    def waits_for_idleness(self) -> bool:
        """Whether it goes on only when nobody else wants the device.

        Not in a section that others may wait for: they would want the device meanwhile.
        """
        if self.run is not None and self.run.work.is_alone:
            return False
        head = self.tickets[0] if self.run is None else self.run.tickets[0]
        return head.waits is not None and not head.abandoned and head.waits()

    @property
    def waits_for_room(self) -> bool:
        """Whether there must be room before it goes on."""
        if self.run is not None:
            return False
        head = self.tickets[0]
        return head.room_bytes is not None and not head.abandoned


def _equal(caller: Identity) -> float:
    return 1.0


class Lanes:
    """All lanes, in the order of their turns. Not for several threads at once.

    Args:
        long_bytes: Memory of openings that go on at once, unless one needs more.
        weight: Says how large a caller's share of the device is.
    """

    def __init__(
        self, long_bytes: float, weight: Callable[[Identity], float] = _equal
    ) -> None:
        self._long_bytes, self._shares = long_bytes, Shares(weight)
        self._lanes: OrderedDict[Hashable, Lane] = OrderedDict()
        self._in_room: list[Ticket[Any]] = []

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def add(
        self, key: Hashable, operator: Multiplies | None, ticket: Ticket[Any]
    ) -> None:
        """Queue a request.

        Args:
            key: Its lane's.
            operator: Which all products of the lane have; None for jobs.
            ticket: The request.
        """
        lane = self._lanes.setdefault(key, Lane(operator, deque()))
        lane.tickets.append(ticket)

    def next(
        self, *, idle: bool, expected: Collection[str] = ()
    ) -> tuple[Hashable, Lane | None]:
        """Choose whose turn it is: the first, but some may have to wait for room.

        What waits for room begins in the order in which it came. What waits for an idle
        device goes on one after the other, because what has begun holds memory.

        Args:
            idle: Whether nobody has asked for the device for a while.
            expected: Names of callers who will be back in a moment; those who have had
                more of the device wait for them.

        Returns:
            The lane and its key; None if nobody can go on.
        """
        full = False
        patient: list[tuple[Hashable, Lane]] = []
        for key, lane in self._in_turn(expected):
            if lane is None:  # a caller who is expected
                return None, None
            if lane.waits_for_idleness:
                patient.append((key, lane))
                continue
            if not lane.waits_for_room:
                return key, lane
            full = full or not self._has_room(lane.tickets[0])
            if not full:
                return key, lane
        for key, lane in sorted(patient, key=lambda item: item[1].run is None):
            fits = not lane.waits_for_room or self._has_room(lane.tickets[0])
            if idle and fits:
                return key, lane
        return None, None

    def charge(self, callers: Sequence[Identity], seconds: float) -> None:
        """Count the time of a turn against those who had it together."""
        self._shares.charge(callers, seconds)

    def charge_aside(
        self, caller: Identity, seconds: float, expected: Collection[str]
    ) -> None:
        """Count time that a caller had without a turn, while nobody computed.

        Args:
            caller: Who had it.
            seconds: How long.
            expected: Names of callers who will be back in a moment.
        """
        self._shares.had(self._callers() | {caller.name, *expected})
        self._shares.charge([caller], seconds)

    def is_owed(
        self, expected: Collection[str], callers: Sequence[Identity], seconds: float
    ) -> bool:
        """Tell whether somebody who is expected has had less than those whose turn it is.

        Args:
            expected: Names of callers who will be back in a moment.
            callers: Who have the turn.
            seconds: How long they have had it.
        """
        others = set(expected) - {caller.name for caller in callers}
        return bool(others) and self._shares.is_ahead(callers, seconds, others)

    def _in_turn(
        self, expected: Collection[str] = ()
    ) -> Sequence[tuple[Hashable, Lane | None]]:
        """List the lanes as their turns come: those of one caller as they stand here.

        Who has had less of the device than others comes before them, however many lanes
        they have; no lane stands for a caller who is expected. What waits for idleness is
        nobody's.
        """
        lanes = list(self._lanes.items())
        callers = self._callers()
        if not callers:
            return lanes
        away = set(expected) - callers
        # Also of one alone: his time must not be owed to who comes later.
        had_s = self._shares.had(callers | away)
        if len(callers) + len(away) < 2:
            return lanes
        places: list[tuple[float, tuple[Hashable, Lane | None]]] = [
            (had_s.get(lane.caller, math.inf), (key, lane)) for key, lane in lanes
        ]
        places += [(had_s[name], (None, None)) for name in away]
        return [place for _, place in sorted(places, key=lambda item: item[0])]

    def _callers(self) -> set[str]:
        """Name whose turn it may be."""
        lanes = self._lanes.values()
        return {lane.caller for lane in lanes if not lane.waits_for_idleness}

    def is_wanted(self) -> bool:
        """Tell whether anybody waits who does not wait for an idle device."""
        return any(not lane.waits_for_idleness for lane in self._lanes.values())

    def rotate(self, key: Hashable, lane: Lane, *, after_long: bool) -> None:
        """Put a lane that had its turn behind all others.

        That is also behind those that came during the turn: a caller who comes now
        waits for the turn under way at most, however many queue. After a turn of long
        work all others come before more of it.

        Args:
            key: The key of the lane.
            lane: Which goes, if nothing is left in it.
            after_long: Whether the turn was one of long work.
        """
        del self._lanes[key]
        if after_long:
            for other in [k for k, one in self._lanes.items() if one.is_long]:
                self._lanes.move_to_end(other)
        if lane.run is not None or lane.tickets:
            self._lanes[key] = lane

    def begin(self, tickets: list[Ticket[Any]]) -> None:
        """Count what needs room as going on."""
        self._in_room += [t for t in tickets if t.room_bytes is not None]

    def end(self, tickets: list[Ticket[Any]]) -> None:
        """Count it no more."""
        self._in_room = [t for t in self._in_room if t not in tickets]

    def clear(self) -> None:
        """Forget all lanes."""
        self._lanes.clear()

    def _has_room(self, ticket: Ticket[Any]) -> bool:
        nbytes = sum(t.room_bytes or 0 for t in (*self._in_room, ticket))
        openings = sum(t.waits is None for t in self._in_room)
        fits = openings < MOST_LONG and nbytes <= self._long_bytes
        return fits or not self._in_room
