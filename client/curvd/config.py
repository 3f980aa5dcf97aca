"""What can be configured about a client: little, each once, units in the names."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import grpc

from curvd.errors import InvalidSpec

try:
    VERSION = metadata.version("curvd")
    """That of pyproject.toml, as installed."""
except metadata.PackageNotFoundError:  # run from a source tree
    VERSION = "0+source"

DEFAULT_PORT = 50551
"""Where a server listens unless it is told otherwise."""

_SCHEMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:")

_TOKEN = re.compile(r"[!-~]([ -~]*[!-~])?")

Pem = bytes | str | os.PathLike[str]
"""PEM text, or the path of a file with it."""


class Transport(StrEnum):
    """Who speaks HTTP/2 for a client."""

    DIRECT = "direct"
    """Ours: vectors are sent from where they are, and received where they belong."""
    GRPCIO = "grpcio"
    """grpcio: for its name resolvers, and proxies that the environment names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Encryption, and whom to trust.

    Examples:
        >>> curvd.TlsConfig(cert="client.pem")
        Traceback (most recent call last):
            ...
        curvd.errors.InvalidSpec: a client certificate needs both cert and key
    """

    ca: Pem | None = None
    """Certificates that may sign the server's; None: the system's."""
    cert: Pem | None = None
    """The client's certificate chain, for servers that ask for one (mutual TLS)."""
    key: Pem | None = None
    """The key of `cert`."""
    server_name: str | None = None
    """Name that the server's certificate must carry, if it is not the target's."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            msg = "a client certificate needs both cert and key"
            raise InvalidSpec(msg)
        if self.server_name is not None and not self.server_name.strip("."):
            msg = f"server_name must be a name or None, got {self.server_name!r}"
            raise InvalidSpec(msg, server_name=self.server_name)

    def with_files_read(self) -> TlsConfig:
        """Read the files.

        Returns:
            The same with the text in place of the paths.

        Raises:
            InvalidSpec: If a file cannot be read.
        """
        return replace(
            self,
            ca=pem(self.ca, "ca"),
            cert=pem(self.cert, "cert"),
            key=pem(self.key, "key"),
        )

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Returns:
            What gRPC wants.

        Raises:
            InvalidSpec: If a file cannot be read.
        """
        return grpc.ssl_channel_credentials(
            pem(self.ca, "ca"), pem(self.key, "key"), pem(self.cert, "cert")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryConfig:
    """When a call that may be repeated is repeated.

    All calls may: products are pure, uploads are addressed by content, and what
    creates something carries an id. Repeated are ``UNAVAILABLE``, and
    ``RESOURCE_EXHAUSTED`` when the server says when to come back.
    """

    give_up_s: float = 30.0
    """Give up when a call has failed for so long without progress, from its first failure
    on; 0 never repeats."""
    first_s: float = 0.1
    """Upper end of the first random pause; it doubles with each failure."""
    longest_s: float = 5.0
    """Upper end of the longest random pause."""

    def __post_init__(self) -> None:
        if not 0 <= self.first_s <= self.longest_s or self.give_up_s < 0:
            msg = (
                "retry needs 0 <= first_s <= longest_s and give_up_s >= 0, got "
                f"first_s={self.first_s}, longest_s={self.longest_s}, "
                f"give_up_s={self.give_up_s}"
            )
            raise InvalidSpec(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Everything about a client but its target.

    Examples:
        >>> config = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=120.0))
        >>> with curvd.connect(target, config=config, deadline_s=600.0) as client:
        ...     client.healthy()
        True
    """

    tls: TlsConfig | None = None
    """None: plain text."""
    token: str | None = field(default=None, repr=False)
    """Sent with every call as ``authorization: Bearer …``."""
    plaintext_token: bool = False
    """Allow the token to leave this machine without TLS."""
    deadline_s: float | None = None
    """Longest a call may take, its repetitions included; None: no limit."""
    retry: RetryConfig = RetryConfig()
    keepalive_s: float = 30.0
    """Ping a silent connection so often, calls or not; the server allows it."""
    keepalive_timeout_s: float = 10.0
    """Take the connection for dead when a ping stays unanswered so long."""
    transport: Transport = Transport.DIRECT
    """Who speaks HTTP/2; the wire is the same."""
    tracing: bool = False
    """Make a span of each call, of OpenTelemetry's tracer provider in this process, and
    tell the server its trace; needs ``curvd[otel]``."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "transport", Transport(self.transport))
        except ValueError:
            known = ", ".join(Transport)
            msg = f"transport must be one of {known}, got {self.transport!r}"
            raise InvalidSpec(msg, transport=self.transport) from None
        for name in ("deadline_s", "keepalive_s", "keepalive_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                msg = f"{name} must be positive, got {value}"
                raise InvalidSpec(msg, **{name: value})
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            msg = (
                "token must be visible ASCII characters without a space at either end; "
                "was it read from a file with its line break?"
            )
            raise InvalidSpec(msg)

    def channel_options(self) -> list[tuple[str, int | str]]:
        """Spell the options of the channel, the only place that does.

        Returns:
            Name and value of each.
        """
        options: list[tuple[str, int | str]] = [
            ("grpc.primary_user_agent", f"curvd-python/{VERSION}"),
            ("grpc.keepalive_time_ms", round(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            # Without it an unanswered ping counts for a minute, whatever the line above
            # says (grpcio 1.85).
            ("grpc.http2.ping_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # Ours repeat whole calls; gRPC's would hold their bytes in memory.
            ("grpc.enable_retries", 0),
            # As quick as our own pauses, or those would meet a channel that waits.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            # Chunks stay below the default of 4 MiB; a session with very many
            # parameters may not.
            ("grpc.max_receive_message_length", 32 << 20),
            # An error may name very many tensors.
            ("grpc.max_metadata_size", 256 << 10),
            ("grpc.absolute_max_metadata_size", 256 << 10),
            ("grpc.http2.max_frame_size", (1 << 24) - 1),
            ("grpc.http2.lookahead_bytes", 16 << 20),
        ]
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def with_files_read(self) -> ClientConfig:
        """Read the TLS files.

        Returns:
            The same with the text in place of the paths.
        """
        return (
            self if self.tls is None else replace(self, tls=self.tls.with_files_read())
        )

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Read the TLS files.

        Returns:
            What gRPC wants; None for plain text.
        """
        return None if self.tls is None else self.tls.credentials()

    def metadata(self, target: str) -> tuple[tuple[str, str], ...]:
        """Make the metadata that every call carries.

        Args:
            target: Where the calls go.

        Returns:
            Pairs of name and value.

        Raises:
            InvalidSpec: If a token would travel to another machine in plain text.
        """
        if self.token is None:
            return ()
        if self.tls is None and not self.plaintext_token and not is_local(target):
            msg = (
                f"the token would travel to {target} in plain text: pass tls=, or "
                "ClientConfig(plaintext_token=True) if the network is trusted"
            )
            raise InvalidSpec(msg, target=target)
        return (("authorization", f"Bearer {self.token}"),)


def check_target(target: str) -> str:
    """Refuse a target that cannot be meant.

    Args:
        target: ``host:port``, ``[ipv6]:port``, ``unix:/path``, or a gRPC name.

    Returns:
        The target.

    Raises:
        InvalidSpec: If it has no port, or one that cannot be.
    """
    if target.startswith(("unix:", "unix-abstract:")):
        return target
    host, _, port = target.rpartition(":")
    is_named = target.startswith(_SCHEMES)
    if not is_named and (
        not host or not port.isdecimal() or (":" in host and not host.endswith("]"))
    ):
        msg = (
            f"target {target!r} is neither host:port nor unix:/path; "
            f"the usual port is {DEFAULT_PORT}"
        )
        raise InvalidSpec(msg, target=target)
    if port.isdecimal() and not 0 < int(port) < 1 << 16:
        msg = f"the port of target {target!r} must be from 1 to 65535"
        raise InvalidSpec(msg, target=target)
    return target


def is_local(target: str) -> bool:
    """Tell whether a target is on this machine for certain.

    Args:
        target: The target, as for `check_target`.

    Returns:
        True for Unix sockets and loopback addresses.
    """
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")[0]
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def proxy_of(target: str) -> str | None:
    """Find the proxy by which grpcio would reach a target.

    Args:
        target: The target, as for `check_target`.

    Returns:
        What the environment says; None if it names none.
    """
    variables = ("grpc_proxy", "https_proxy", "http_proxy")
    found = next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if found is None or target.startswith(("unix:", "unix-abstract:")):
        return None
    without = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""
    host = target.rpartition("/")[2].removeprefix("dns:").rpartition(":")[0]
    names = [name.strip().lstrip(".") for name in without.split(",")]
    is_direct = any(name and f".{host}".endswith(f".{name}") for name in names)
    return None if is_direct or "*" in names else found


def pem(source: Pem | None, name: str) -> bytes | None:
    """Read PEM text.

    Args:
        source: The text, or the path of a file.
        name: The name of the setting, for the message.

    Returns:
        The text; None if there is none.

    Raises:
        InvalidSpec: If the file cannot be read.
    """
    if source is None or isinstance(source, bytes):
        return source
    if isinstance(source, str) and source.lstrip().startswith("-----BEGIN"):
        return source.encode()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        msg = f"cannot read the TLS file {name}={os.fspath(source)!r}: {error.strerror}"
        raise InvalidSpec(msg, file=os.fspath(source)) from error
