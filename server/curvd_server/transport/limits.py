"""What connections may take, whoever makes them: each limit once, units in the names."""

from __future__ import annotations

from dataclasses import dataclass

from curvd.errors import InvalidSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What the port grants to connections, most of it before anybody is known."""

    connections: int = 4096
    """Connections at once; fewer if the process may not open as many descriptors. The
    oldest without a call makes room for a new one."""
    peer_connections: int = 1024
    """Connections of one address at once, likewise. Unix sockets have no addresses."""
    greeting_s: float = 10.0
    """Seconds without a call that was let through, encryption included, after which a
    new connection is closed."""
    idle_connection_s: float = 600.0
    """Seconds without a call after which a connection is closed, politely."""
    stall_s: float = 60.0
    """Seconds for one message of a call, to come or to be taken, before the call ends."""
    streams: int = 100
    """Calls at once on one connection of a client that is not ours."""
    header_bytes: int = 64 << 10
    """Bytes of the headers of one call."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (value > 0 if name.endswith("_s") else value >= 1):
                least = "more than 0" if name.endswith("_s") else "at least 1"
                msg = f"limit {name} must be {least}, got {value}"
                raise InvalidSpec(msg, limit=name, value=value)
