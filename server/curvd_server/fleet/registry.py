"""What all workers hold, and how a new one makes it."""

from __future__ import annotations

from curvd_server.fleet import messages
from curvd_server.fleet.seats import OperatorEntry, ProblemEntry, Request


class Registry:
    """Problems and operators by number; the fleet's lock is held by whoever asks."""

    def __init__(self) -> None:
        self._problems: dict[int, ProblemEntry] = {}
        self._operators: dict[int, OperatorEntry] = {}

    def add_problem(self, entry: ProblemEntry) -> None:
        """Take note of a problem that all its workers hold."""
        self._problems[entry.number] = entry

    def add_operator(self, entry: OperatorEntry) -> None:
        """Take note of an operator that all its workers hold."""
        self._operators[entry.build.operator] = entry

    def forget(self, message: messages.Close) -> None:
        """Drop what nobody needs any more."""
        for number in message.problems:
            self._problems.pop(number, None)
        for number in message.operators:
            self._operators.pop(number, None)

    def numbers(self) -> set[int]:
        """List all numbers."""
        return {*self._problems, *self._operators}

    def missing(self, rank: int, made: set[int]) -> list[tuple[int, Request]]:
        """Say what a worker has to make.

        Args:
            rank: Its rank.
            made: What it has made.

        Returns:
            The number of each, and the command, in an order that works. Versions of one
            session share its data: the first is loaded, the others are moved from it.
        """
        steps = list[tuple[int, Request]]()
        sources = {
            entry.root: number
            for number, entry in self._problems.items()
            if number in made
        }
        for number, entry in self._problems.items():
            if number in made or rank not in entry.deal:
                continue
            if entry.root in sources:
                steps.append((number, entry.moved(sources[entry.root])))
            else:
                steps.append((number, entry.request(rank)))
                sources[entry.root] = number
        steps += [
            (number, Request(entry.build))
            for number, entry in self._operators.items()
            if number not in made and rank in entry.ranks
        ]
        return steps
