"""From a target to a connected socket."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from curvd.config import Pem, TlsConfig, pem
from curvd.http2.frames import RECOGNISED


@dataclass(frozen=True, slots=True)
class Address:
    """Where a target is."""

    host: str
    """Name or number; empty for Unix sockets."""
    port: int
    path: str = ""
    """Of a Unix socket; abstract ones begin with NUL."""

    @classmethod
    def of(cls, target: str) -> Address:
        """Take a target apart.

        Args:
            target: As `curvd.config.check_target` accepts it.

        Returns:
            The address.
        """
        if target.startswith("unix-abstract:"):
            return cls("", 0, "\0" + target.removeprefix("unix-abstract:"))
        if target.startswith("unix:"):
            path = target.removeprefix("unix:")
            return cls("", 0, path.removeprefix("//"))
        for scheme in ("dns:", "ipv4:", "ipv6:"):
            target = target.removeprefix(scheme)
        host, _, port = target.rpartition("/")[2].rpartition(":")
        if not host:  # as grpcio reads a name alone
            host, port = port, "443"
        return cls(host.strip("[]"), int(port))

    @property
    def authority(self) -> str:
        """What requests name as their server."""
        if self.path:
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def dial(address: Address, timeout: float | None) -> socket.socket:
    """Connect, and wait for it.

    Args:
        address: Where to.
        timeout: Seconds.

    Returns:
        A blocking socket.

    Raises:
        OSError: If nobody is there.
    """
    if not address.path:
        sock = socket.create_connection((address.host, address.port), timeout)
    else:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout)
            sock.connect(address.path)
        except OSError:
            sock.close()
            raise
    return sock


def client_context(config: TlsConfig) -> ssl.SSLContext:
    """Make the settings of TLS.

    Args:
        config: Whom to trust.

    Returns:
        The settings.

    Raises:
        ssl.SSLError: If a file is malformed.
    """
    ca = pem(config.ca, "ca")
    context = ssl.create_default_context(cadata=None if ca is None else ca.decode())
    context.set_alpn_protocols([RECOGNISED, "h2"])
    if config.cert is not None and config.key is not None:
        with _file(config.cert, "cert") as cert, _file(config.key, "key") as key:
            context.load_cert_chain(cert, key)
    return context


@contextlib.contextmanager
def _file(source: Pem, name: str) -> Iterator[str]:
    """Have PEM text in a file, which is all that `ssl` reads keys from."""
    text = pem(source, name) or b""
    with tempfile.NamedTemporaryFile() as file:  # readable by this user only
        file.write(text)
        file.flush()
        yield os.fspath(file.name)
