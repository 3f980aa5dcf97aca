"""Whose connections there are, as soon as a call has told, and how many each may have."""

from __future__ import annotations

from typing import Protocol

from curvd.errors import ResourceExhausted
from curvd_server.system import Quotas, calling
from curvd_server.system.quotas import CONNECTIONS


class Owned(Protocol):
    """A connection, as far as somebody has it."""

    owner: str
    """Name of whose it is; empty: nobody knows."""

    @property
    def calls(self) -> int:
        """How many calls of it are under way."""

    def goaway(self) -> None:
        """Tell the client to make its next call elsewhere, and close."""


class Owners:
    """Counts the connections of each caller with a name. On the event loop.

    Args:
        quotas: How many each may have.
    """

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        # The longest known first.
        self._held: dict[str, dict[Owned, None]] = {}

    def claim(self, connection: Owned) -> bool:
        """Take note of whose a connection is: of who makes the call under way.

        The oldest of his without a call makes room.

        Args:
            connection: The connection that the call came by.

        Returns:
            Whether another one had to go for it.

        Raises:
            Overloaded: If he has as many as he may, and all have calls.
            LimitExceeded: If he may have none.
        """
        name = calling().name
        if connection.owner == name:
            return False
        self.leave(connection)
        held, is_full = self._held.get(name, {}), False
        try:
            self._quotas.check(CONNECTIONS, len(held), 1)
        except ResourceExhausted:
            idle = next((one for one in held if not one.calls), None)
            if idle is None:
                raise
            self.leave(idle)
            idle.goaway()
            is_full = True
        self._held.setdefault(name, {})[connection] = None
        connection.owner = name
        return is_full

    def leave(self, connection: Owned) -> None:
        """Take note that a connection is gone; it may be nobody's."""
        held = self._held.get(connection.owner, {})
        held.pop(connection, None)
        if not held:
            self._held.pop(connection.owner, None)
        connection.owner = ""

    def count(self, name: str) -> int:
        """Tell how many connections a caller has."""
        return len(self._held.get(name, {}))
