"""What connections may take, whoever makes them."""

from __future__ import annotations

from dataclasses import dataclass

from curvd.contract import check_settings, setting

_LONGEST_S = 24 * 24 * 3600
"""Seconds that are, in milliseconds, a number that grpcio takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What the port grants to connections, most of it before anybody is known."""

    connections: int = setting(
        4096,
        "Connections at once; fewer if the process may not open as many descriptors. "
        "The oldest without a call makes room for a new one.",
        least=1,
    )
    peer_connections: int = setting(
        1024,
        "Connections of one address at once, likewise. Unix sockets have no addresses.",
        least=1,
    )
    greeting_s: float = setting(
        10.0,
        "Seconds without a call that was let through, encryption included, after which "
        "a new connection is closed.",
        positive=True,
        most=_LONGEST_S,
    )
    idle_connection_s: float = setting(
        600.0,
        "Seconds without a call after which a connection is closed, politely.",
        positive=True,
        most=_LONGEST_S,
    )
    stall_s: float = setting(
        60.0,
        "Seconds for one message of a call, to come or to be taken, before the call "
        "ends.",
        positive=True,
        most=_LONGEST_S,
    )
    streams: int = setting(
        100,
        "Calls at once on one connection of a client that is not ours.",
        least=1,
    )
    header_bytes: int = setting(
        64 << 10, "Bytes of the headers of one call.", least=1024, most=2**31 - 1
    )

    def __post_init__(self) -> None:
        check_settings(self)
