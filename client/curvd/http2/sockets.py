"""Settings of sockets that both ends make."""

from __future__ import annotations

import socket
import ssl
import sys


def tune(sock: socket.socket, silent_s: float = 30, answer_s: float = 10) -> None:
    """Let small messages go at once, and a dead peer be noticed.

    Args:
        sock: Connected.
        silent_s: Silence after which the kernel asks.
        answer_s: How long it waits, also for what was sent to be received.
    """
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in (
            (socket.TCP_KEEPIDLE, silent_s),
            (socket.TCP_KEEPINTVL, answer_s),
            (socket.TCP_USER_TIMEOUT, 1000 * (silent_s + answer_s)),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, max(1, round(value)))


def counts_bytes(sock: socket.socket) -> bool:
    """Whether `wake_after` works: on Linux, for TCP whose bytes nobody decrypts.

    Args:
        sock: Any.
    """
    families = (socket.AF_INET, socket.AF_INET6)
    plain = isinstance(sock, socket.socket) and not isinstance(sock, ssl.SSLSocket)
    return sys.platform == "linux" and plain and sock.family in families


def wake_after(sock: socket.socket, nbytes: int) -> None:
    """Let a poll show a socket as readable only when so many bytes are there.

    The end of the connection, an error and a full buffer show at once, as ever (tcp(7)
    and socket(7), SO_RCVLOWAT).

    Args:
        sock: One that `counts_bytes`.
        nbytes: Bytes that are certain to come, at least 1.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
