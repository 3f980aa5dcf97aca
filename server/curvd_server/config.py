"""What can be configured about a server: each thing once, units in the names."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from curvd.contract import Limits
from curvd.errors import InvalidSpec
from curvd.tensors import MAX_HEADER_BYTES
from curvd_server.transport import ConnectionLimits

DEFAULT_LISTEN = "127.0.0.1:50551"
MESSAGE_BYTES = 4 << 20
"""Longest message that is accepted. Chunks stay 64 KiB below it."""
_UNIX = ("unix:", "unix-abstract:")
_MAY_BE_ZERO = (
    "default_budget_bytes",
    "idle_bytes",
    "kept_bytes",
    "memory_bytes",
    "stored_bytes",
)
_TRANSPORTS = ("direct", "grpcio")
_LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Encryption, and whom to let in."""

    cert: Path
    """PEM file with the server's certificate chain."""
    key: Path
    """PEM file with its key."""
    client_ca: Path | None = None
    """Only clients with a certificate that these sign may connect (mutual TLS)."""

    def context(self) -> ssl.SSLContext:
        """Read the files, for connections that grpcio does not see.

        Returns:
            What `ssl` wants.

        Raises:
            InvalidSpec: If a file cannot be read, or they do not fit each other.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2"])
        try:
            context.load_cert_chain(self.cert, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except ssl.SSLError as error:
            msg = (
                f"the TLS files do not fit each other, or are no PEM: cert={self.cert}, "
                f"key={self.key}, client_ca={self.client_ca} ({error})"
            )
            raise InvalidSpec(msg, cert=self.cert, key=self.key) from error
        return context

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files.

        Returns:
            What gRPC wants.

        Raises:
            InvalidSpec: If a file cannot be read.
        """
        pair = (_read(self.key, "key"), _read(self.cert, "cert"))
        if self.client_ca is None:
            return grpc.ssl_server_credentials([pair])
        roots = _read(self.client_ca, "client_ca")
        return grpc.ssl_server_credentials([pair], roots, require_client_auth=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What the server refuses to exceed."""

    upload_bytes: int = 64 << 30
    """Largest safetensors file of a model, dataset or update."""
    operand_bytes: int = 64 << 30
    """Largest operand of one MatMat. It is streamed, never held as a whole."""
    columns: int = 1 << 20
    """Columns of one MatMat."""
    pending_columns: int = 4096
    """Columns that may wait for a device, those of all callers together."""
    pending_bytes: int = 8 << 30
    """Memory of operands and results that are under way; one request always fits."""
    block_bytes: int = 64 << 20
    """Memory of one column block of a MatMat, unless one column is larger."""
    idle_bytes: int = 1 << 30
    """Memory of operands that is kept for the next ones while nobody needs it."""
    kept_bytes: int = 1 << 30
    """Memory of results that are kept for callers whose stream broke."""
    kept_s: int = 60
    """Seconds that they are kept."""
    stored_bytes: int = 4 << 30
    """Memory of the vectors that one session stores."""
    memory_bytes: int = 0
    """Memory of the host for datasets, stored vectors, kept results and calls under way
    together; 0: four fifths of what the machine has or the container may use."""
    partial_bytes: int = 128 << 30
    """Disk of all uploads that are not complete."""
    partial_s: int = 24 * 3600
    """Seconds that an upload is kept which nobody goes on with."""
    run_columns: int = 32
    """Columns that are computed together at most."""
    sessions: int = 100
    """Sessions at once."""
    operators: int = 16
    """Operators that one session keeps built; the longest unused one makes room."""
    default_budget_bytes: int = 4 << 30
    """Memory for kept linearisations of one session, unless it asks for another."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value, least = getattr(self, name), int(name not in _MAY_BE_ZERO)
            if value < least:
                msg = f"limit {name} must be at least {least}, got {value}"
                raise InvalidSpec(msg, limit=name, value=value)

    def published(self) -> Limits:
        """Describe the limits to clients.

        Returns:
            Those that a client can run into.
        """
        return Limits(
            upload_bytes=self.upload_bytes,
            operand_bytes=self.operand_bytes,
            header_bytes=MAX_HEADER_BYTES,
            columns=self.columns,
            pending_columns=self.pending_columns,
            sessions=self.sessions,
            default_budget_bytes=self.default_budget_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything about a server.

    Only addresses on this machine are served in plain text, unless `insecure` says
    that the network is trusted.
    """

    listen: str = DEFAULT_LISTEN
    """``host:port``, ``[ipv6]:port`` or ``unix:/path``; port 0 takes a free one."""
    data_dir: Path = Path("curvd-data")
    """Where models, datasets and sessions are kept; made if it is not there."""
    datasets_root: Path | None = None
    """A folder of ``<name>.safetensors`` that clients may use by name; read only."""
    tls: TlsConfig | None = None
    """None: plain text."""
    token: str | None = field(default=None, repr=False)
    """Every call but health checks must carry ``authorization: Bearer <token>``."""
    token_file: Path | None = None
    """A file with the token, instead of `token`."""
    insecure: bool = False
    """Serve other machines without encryption, or without asking who they are."""
    builders: Mapping[str, str] = field(default_factory=dict)
    """Further builders: name to ``module:callable``."""
    libraries: tuple[str, ...] = ()
    """Globs over models of libraries that are allowed: ``timm:vit_*``,
    ``torchvision:*``, ``transformers:gpt2``."""
    device: str = "cpu"
    """Where to compute, for example ``cuda:0``."""
    compile_after_s: float = 60.0
    """Seconds that an operator must have computed before native code is made for it, in
    the background and if there is a C++ compiler; 0: never."""
    limits: LimitsConfig = LimitsConfig()
    transport: str = "direct"
    """Who speaks HTTP/2 with our own clients: ``direct``, the server itself, or ``grpcio``,
    which then has the port and answers everybody."""
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    """What connections may take."""
    drain_s: float = 30.0
    """How long running calls may finish after SIGTERM."""
    log_level: str = "info"
    """``debug``, ``info``, ``warning`` or ``error``; for `curvd_server.app.serve`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", Path(self.data_dir))
        object.__setattr__(self, "libraries", tuple(self.libraries))
        if self.datasets_root is not None:
            object.__setattr__(self, "datasets_root", Path(self.datasets_root))
            if not Path(self.datasets_root).is_dir():
                msg = f"datasets_root {str(self.datasets_root)!r} is no folder"
                raise InvalidSpec(msg, datasets_root=self.datasets_root)
        local = is_local(self.listen)
        if self.token is not None and self.token_file is not None:
            msg = "give the token or token_file, not both"
            raise InvalidSpec(msg)
        if self.token is not None:
            _check_token(self.token, "token")
        for name in ("drain_s", "compile_after_s"):
            if not getattr(self, name) >= 0:
                msg = f"{name} must not be negative, got {getattr(self, name)}"
                raise InvalidSpec(msg, **{name: getattr(self, name)})
        for name, known in (("log_level", _LOG_LEVELS), ("transport", _TRANSPORTS)):
            if getattr(self, name) not in known:
                msg = f"{name} must be one of {known}, got {getattr(self, name)!r}"
                raise InvalidSpec(msg, **{name: getattr(self, name)})
        if local or self.insecure:
            return
        if self.tls is None:
            msg = (
                f"{self.listen} can be reached from other machines, and nothing is "
                "encrypted: configure TLS, listen on 127.0.0.1 or a unix: socket, or "
                "set insecure (--insecure) if the network is trusted"
            )
            raise InvalidSpec(msg, listen=self.listen)
        if not self.has_token and self.tls.client_ca is None:
            msg = (
                f"{self.listen} can be reached from other machines, and anyone may "
                "call: configure a token or a client CA (mutual TLS), or set insecure "
                "(--insecure) if everyone who can connect may"
            )
            raise InvalidSpec(msg, listen=self.listen)

    @property
    def has_token(self) -> bool:
        """Whether calls must carry a token."""
        return self.token is not None or self.token_file is not None

    def bearer_token(self) -> str | None:
        """Find the token.

        Returns:
            What calls must carry; None if they need not.

        Raises:
            InvalidSpec: If its file cannot be read or holds no token.
        """
        if self.token_file is None:
            return self.token
        token = _read(self.token_file, "token_file").decode(errors="replace").strip()
        _check_token(token, f"token_file {self.token_file}")
        return token

    def credentials(self) -> grpc.ServerCredentials | None:
        """Read the TLS files, the only place that does.

        Returns:
            What gRPC wants; None for plain text.
        """
        return None if self.tls is None else self.tls.credentials()

    def tls_context(self) -> ssl.SSLContext | None:
        """Read the TLS files for our own side of the port.

        Returns:
            What `ssl` wants; None for plain text.

        Raises:
            InvalidSpec: If a file cannot be read, or they do not fit each other.
        """
        if self.tls is None:
            return None
        self.tls.credentials()  # names the file that cannot be read
        return self.tls.context()

    def server_options(self) -> list[tuple[str, int]]:
        """Spell the options of the gRPC server, the only place that does.

        Returns:
            Name and value of each.
        """
        return [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            # The pair of ClientConfig.keepalive_s: clients may ping every 30 s.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.max_concurrent_streams", self.connections.streams),
            ("grpc.max_metadata_size", self.connections.header_bytes),
            ("grpc.absolute_max_metadata_size", self.connections.header_bytes),
            (
                "grpc.max_connection_idle_ms",
                round(1e3 * self.connections.idle_connection_s),
            ),
            (
                "grpc.server_handshake_timeout_ms",
                round(1e3 * self.connections.greeting_s),
            ),
            ("grpc.http2.max_frame_size", (1 << 24) - 1),
            ("grpc.http2.lookahead_bytes", 16 << 20),
        ]


def is_local(listen: str) -> bool:
    """Tell whether an address can be reached from this machine only.

    Args:
        listen: ``host:port``, ``[ipv6]:port`` or ``unix:/path``.

    Returns:
        True for Unix sockets and loopback addresses.

    Raises:
        InvalidSpec: If it is no address.
    """
    if listen.startswith(_UNIX):
        return True
    host, _, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or not port.isdecimal() or (":" in host and not bracketed):
        msg = f"listen must be host:port, [ipv6]:port or unix:/path, got {listen!r}"
        raise InvalidSpec(msg, listen=listen)
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _check_token(token: str, where: str) -> None:
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        msg = f"{where} must hold printable ASCII without spaces"
        raise InvalidSpec(msg)


def _read(path: Path, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        msg = f"cannot read {name} {str(path)!r}: {error.strerror}"
        raise InvalidSpec(msg, file=path) from error
