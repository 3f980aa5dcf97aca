"""How many connections there may be: in all, from one address, and for the descriptors."""

from __future__ import annotations

import os
import resource
from collections import Counter
from typing import Protocol

from curvd_server.transport.limits import ConnectionLimits

OWN_DESCRIPTORS = 1
"""Descriptors of a connection that the server answers itself."""
RELAYED_DESCRIPTORS = 3
"""Descriptors of one that is passed on: its socket, and both ends of the one to grpcio."""
_RELAYED_SHARE = 0.5
"""The share of connections, and of descriptors, that may be passed on: what they do is
not seen, so they cannot be asked to make room."""
_RESERVED = 64
"""Descriptors for all else: files of the data directory, child processes, libraries."""
_SOME = 128
"""Descriptors that are open when nobody can tell."""


class Visitor(Protocol):
    """A connection, as far as it takes room."""

    @property
    def host(self) -> str:
        """Address it comes from; empty for Unix sockets."""

    @property
    def descriptors(self) -> int:
        """How many it has."""

    @property
    def known(self) -> bool:
        """Whether a call of it was ever let through."""

    @property
    def busy(self) -> bool:
        """Whether a call that was let through is under way, or nobody knows."""

    def send_away(self, reason: str) -> None:
        """End it."""


class Refused(Exception):
    """There is no room for a connection.

    Args:
        reason: A word for why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Admission:
    """Counts connections, and makes room for new ones.

    Args:
        limits: What is allowed.
        descriptors: What all connections together may open.
    """

    def __init__(self, limits: ConnectionLimits, descriptors: int) -> None:
        self._limits, self._descriptors = limits, descriptors
        self._visitors: dict[Visitor, int] = {}
        self._hosts: Counter[str] = Counter()
        self._relayed = self._used = 0

    def __len__(self) -> int:
        """Count the connections."""
        return len(self._visitors)

    @property
    def usage(self) -> dict[str, int]:
        """What connections take at present: how many, how many passed on, descriptors."""
        return {
            "open": len(self._visitors),
            "relayed": self._relayed,
            "descriptors": self._used,
        }

    def enter(self, visitor: Visitor) -> None:
        """Let a connection in; the oldest without a call may have to go for it.

        Args:
            visitor: The new one.

        Raises:
            Refused: If there is no room.
        """
        reason = self._obstacle(visitor.host, visitor.descriptors)
        if reason is not None:
            host = visitor.host if reason == "peer_connections" else None
            if not self._make_room(host, reason):
                raise Refused(reason)
        self._visitors[visitor] = visitor.descriptors
        self._hosts[visitor.host] += 1
        self._used += visitor.descriptors

    def relay(self, visitor: Visitor) -> None:
        """Let a connection that is in be passed on.

        Args:
            visitor: It is about to have the descriptors for that.

        Raises:
            Refused: If too many are.
        """
        more = RELAYED_DESCRIPTORS - self._visitors[visitor]
        descriptors = (self._relayed + 1) * RELAYED_DESCRIPTORS
        reason = None
        if (
            self._relayed >= _RELAYED_SHARE * self._limits.connections
            or descriptors > _RELAYED_SHARE * self._descriptors
        ):
            reason = "relayed_connections"
        elif self._used + more > self._descriptors:
            reason = None if self._make_room(None, "descriptors") else "descriptors"
        if reason is not None:
            raise Refused(reason)
        self._relayed += 1
        self._used += more
        self._visitors[visitor] += more

    def leave(self, visitor: Visitor) -> None:
        """Take note that a connection is gone, or about to be.

        Args:
            visitor: It may have left before.
        """
        descriptors = self._visitors.pop(visitor, 0)
        if not descriptors:
            return
        self._used -= descriptors
        self._relayed -= descriptors == RELAYED_DESCRIPTORS
        self._hosts[visitor.host] -= 1
        if not self._hosts[visitor.host]:
            del self._hosts[visitor.host]

    def _obstacle(self, host: str, descriptors: int) -> str | None:
        if host and self._hosts[host] >= self._limits.peer_connections:
            return "peer_connections"
        if len(self._visitors) >= self._limits.connections:
            return "connections"
        if self._used + descriptors > self._descriptors:
            return "descriptors"
        return None

    def _make_room(self, host: str | None, reason: str) -> bool:
        """Send the oldest unknown one away, or else the oldest without a call."""
        free = [
            visitor
            for visitor in self._visitors
            if not visitor.busy and host in (None, visitor.host)
        ]
        if not free:
            return False
        oldest = next((visitor for visitor in free if not visitor.known), free[0])
        self.leave(oldest)
        oldest.send_away(reason)
        return True


def raise_descriptor_limit() -> None:
    """Let this process open as many descriptors as the system allows it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptors_for_connections() -> int:
    """Count the descriptors that connections may take.

    Returns:
        What the limit of the process leaves beside those open now and a reserve.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = _SOME
    return max(2 * RELAYED_DESCRIPTORS, soft - used - _RESERVED)
