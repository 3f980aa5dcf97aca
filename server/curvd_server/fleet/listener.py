"""Where workers connect: a Unix socket in a folder of the front's own, or TCP if told."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from curvd.errors import Internal
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Connection

HELLO_S = 30.0
"""How long who connects may take to prove that it is a worker, and to say so: torch is
imported before it connects, but its device is first used in between."""

TCP = "tcp:"
"""Begins an address that is no path."""


def connected(address: str, *, connect_s: float, lost_s: float) -> socket.socket:
    """Connect to a listener.

    Args:
        address: Its address.
        connect_s: How long that may take.
        lost_s: How long what is sent may stay unacknowledged, over a network; then the
            other machine counts as lost, and the connection is broken (RFC 5482).

    Returns:
        The socket.

    Raises:
        OSError: If nobody listens there.
    """
    if address.startswith(TCP):
        host, _, port = address.removeprefix(TCP).rpartition(":")
        made = socket.create_connection((host, int(port)), connect_s)
        made.settimeout(None)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lost_ms = round(lost_s * 1000)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, lost_ms)
        return made
    made = socket.socket(socket.AF_UNIX)
    made.connect(address)
    return made


class Listener:
    """Accepts workers.

    Args:
        secret: What they must know.
        arrived: Called with each on a thread of its own, and serves it there; says
            whether it was expected.
        host: Address of this machine that workers elsewhere reach; empty: all workers
            are here.
    """

    def __init__(
        self,
        secret: bytes,
        arrived: Callable[[Connection, messages.Hello], bool],
        host: str = "",
    ) -> None:
        self._secret, self._arrived = secret, arrived
        self._folder = Path(tempfile.mkdtemp(prefix="curvd-fleet-"))  # mode 0700
        if host:
            self._socket = socket.create_server((host, 0))
            self.address = f"{TCP}{host}:{self._socket.getsockname()[1]}"
        else:
            self.address = str(self._folder / "front")
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(self.address)
        self._socket.listen()
        threading.Thread(target=self._accept, name="listen", daemon=True).start()

    def close(self) -> None:
        """Accept nobody any more."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # some systems do not shut down what only listens
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        while True:
            try:
                made, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(made,), daemon=True).start()

    def _greet(self, made: socket.socket) -> None:
        """Hear who it is, and let the fleet have it."""
        if made.family == socket.AF_INET:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(made)
        try:
            connection.prove(self._secret, role=b"front", timeout_s=HELLO_S)
            hello = connection.receive().message
            if isinstance(hello, messages.Hello):
                self._arrived(connection, hello)
        except (EOFError, OSError, Internal):
            pass  # no worker of this fleet, or it died
        connection.close()
