"""From a target to a connected socket."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from curvd.config import TlsConfig, pem
from curvd.errors import InvalidSpec
from curvd.http2 import RECOGNISED


@dataclass(frozen=True, slots=True)
class Address:
    """Where a target is."""

    host: str
    """Name or number; empty for Unix sockets."""
    port: int
    path: str = ""
    """The path of a Unix socket; abstract ones begin with NUL."""

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
        try:
            sock = socket.create_connection((address.host, address.port), timeout)
        except UnicodeError as error:  # not even the form of a name
            raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
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
        InvalidSpec: If a file cannot be read, or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca = pem(config.ca, "ca")
    if ca is None:
        context.load_default_certs()
    else:
        with _usable("ca", "certificates in PEM"):
            # Not `cadata`: what is no certificate would be skipped without a word.
            with _file(ca) as path:
                context.load_verify_locations(path)
    context.set_alpn_protocols([RECOGNISED, "h2"])
    cert, key = pem(config.cert, "cert"), pem(config.key, "key")
    if cert is not None and key is not None:
        wanted = "a chain of certificates and its own key without a password, in PEM"
        with _usable("cert/key", wanted), _file(cert) as chain, _file(key) as own:
            context.load_cert_chain(chain, own, password=_no_password)
    return context


def _no_password() -> str:
    msg = "the key is encrypted"
    raise ValueError(msg)  # asking on the terminal would wait for ever


@contextlib.contextmanager
def _usable(name: str, wanted: str) -> Iterator[None]:
    """Say of which setting TLS complains."""
    try:
        yield
    except (ssl.SSLError, ValueError) as error:
        said = getattr(error, "reason", None) or str(error)
        msg = f"TlsConfig({name}=…) is not {wanted}: {said}"
        raise InvalidSpec(msg, setting=name) from error


@contextlib.contextmanager
def _file(text: bytes) -> Iterator[str]:
    """Write PEM text to a file, which is all that `ssl` reads keys from."""
    with tempfile.NamedTemporaryFile() as file:  # readable by this user only
        file.write(text)
        file.flush()
        yield os.fspath(file.name)
