"""Settings of sockets that both ends make."""

from __future__ import annotations

import socket
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
