"""All that can be set about a server: what fits together, and what follows from it."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from curvd.contract import check_settings, setting
from curvd.errors import InvalidSpec, install
from curvd_server.config.addresses import address_of, is_local
from curvd_server.config.files import content
from curvd_server.config.limits import LimitsConfig
from curvd_server.config.tls import TlsConfig
from curvd_server.transport import USUAL_LINES, Callers, ConnectionLimits, TokenFile

if TYPE_CHECKING:  # of an extra, which few have
    from curvd_server.transport.issuer import Issuer
    from curvd_server.transport.tracing import Tracing

DEFAULT_LISTEN = "127.0.0.1:50551"
MESSAGE_BYTES = 4 << 20
"""Longest message that is accepted. Chunks stay 64 KiB below it."""
_COLLECTOR = re.compile(r"https?://[^/\s]+:\d+/?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything about a server.

    Only addresses on this machine are served in plain text, unless `insecure` says
    that the network is trusted.
    """

    listen: str = setting(
        DEFAULT_LISTEN,
        "Where to listen: host:port, [ipv6]:port or unix:/path; port 0 takes a free one.",
        metavar="ADDRESS",
    )
    data_dir: Path = setting(
        Path("curvd-data"),
        "Folder in which models, datasets and sessions survive a restart; made if it is "
        "not there.",
    )
    datasets_root: Path | None = setting(
        None, "A folder of NAME.safetensors that clients may use by name; read only."
    )
    checkpoints_root: Path | None = setting(
        None,
        "A folder of checkpoints that clients may name in updates of parameters; read only.",
    )
    device: str = setting("cpu", "Where to compute, for example cuda:0.")
    devices: str = setting(
        "",
        "Where to compute with several workers, a process for each, in place of --device: "
        "cuda:0,cuda:1, or cpu:0,cpu:1.",
        metavar="DEVICE,DEVICE",
        shown="none",
    )
    shards: int = setting(
        0,
        "Into how many parts workers cut data; bits of results depend on it, and not on how "
        "many workers there are. 0: as many as workers.",
        least=0,
        most=1 << 16,
        shown="as workers",
    )
    shard_parameters: bool = setting(
        False,
        "Have the workers of --devices share the parameters of every model, a slice each, for "
        "models that are too large for one.",
    )
    worker_patience_s: float = setting(
        10.0,
        "Seconds after which a worker that says nothing is ended, and started anew.",
        least=1,
    )
    worker_start_s: float = setting(
        300.0,
        "Seconds that a worker may take until it is there; calls that wait longer for one end "
        "with UNAVAILABLE.",
        least=1,
    )
    ray: str = setting(
        "",
        "Address of a Ray cluster on which --ray-workers compute, each on --device, in place "
        "of processes here.",
        metavar="ADDRESS",
        shown="none",
    )
    ray_workers: int = setting(
        1, "Workers on the cluster of --ray.", least=1, most=4096
    )
    worker_listen: str = setting(
        "127.0.0.1",
        "Address of this machine at which workers on the cluster of --ray connect; they "
        "prove that they know a secret, and nothing is encrypted.",
        metavar="HOST",
    )
    tls: TlsConfig | None = None
    """None: plain text."""
    token: str | None = setting(
        None,
        "What every call but health checks must carry (authorization: Bearer); never a "
        "flag, which others can see.",
        secret=True,
    )
    token_file: Path | None = setting(
        None, "A file with the token, in place of CURVD_TOKEN."
    )
    tokens: Path | None = setting(
        None,
        "A file with a line for each token, so that callers have names and each has its "
        "own (curvd token NAME makes one); in place of the one token.",
    )
    issuer: Path | None = setting(
        None,
        "A TOML file about who signs the tokens of callers (JWT), and with which keys; in "
        "place of tokens of our own; needs curvd[jwt].",
    )
    quotas: Path | None = setting(
        None,
        "A TOML file that says what single callers may hold: tables [default], "
        "[roles.NAME] and [callers.NAME].",
    )
    insecure: bool = setting(
        False,
        "Serve other machines without encryption, or without asking who they are.",
    )
    builders: Mapping[str, str] = setting(
        dict,
        "A builder of your own; may be repeated. In a TOML file: a [builders] table.",
        option="builder",
        metavar="NAME=module:callable",
    )
    libraries: tuple[str, ...] = setting(
        (),
        "Models of a library that clients may build, as a glob: timm:vit_*, "
        "torchvision:*, transformers:gpt2; may be repeated.",
        option="library",
        metavar="LIBRARY:GLOB",
    )
    threads: int | None = setting(
        None,
        "Threads that compute one product at most; none: as many as cores may be used "
        "(affinity, cgroup quota, OMP_NUM_THREADS). Small nets are computed by one.",
        least=1,
    )
    plan: str = setting(
        "first",
        "Which tier the first answer of an operator waits for, in sessions that do not "
        "say: first, the quickest to build, or final, the fastest, which nothing replaces.",
        choices=("first", "final"),
    )
    compile_after_s: float = setting(
        60.0,
        "Seconds that an operator that takes columns one by one, in one block, must have "
        "computed before native code is made for it, in the background and if there is a C++ "
        "compiler; 0: never.",
        least=0,
    )
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    transport: str = setting(
        "direct",
        "Who speaks HTTP/2 with our own clients: direct, the server itself, or grpcio, "
        "which then has the port and answers everybody.",
        choices=("direct", "grpcio"),
    )
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    """What connections may take."""
    metrics: str = setting(
        "",
        "Where Prometheus may scrape: host:port, in plain text and without a token, so an "
        "address that others do not reach; port 0 takes a free one.",
        metavar="ADDRESS",
        shown="none",
    )
    traces: str = setting(
        "",
        "Where to send traces of calls, by OTLP over gRPC: http://host:port or "
        "https://host:port, of an OpenTelemetry collector; needs curvd[otel].",
        metavar="URL",
        shown="none",
    )
    trace_share: float = setting(
        1.0,
        "Share of the calls that are traced, of those whose callers do not say whether "
        "they are.",
        least=0,
        most=1,
    )
    drain_s: float = setting(
        30.0, "Seconds that running calls may go on after SIGTERM.", least=0
    )
    log_level: str = setting(
        "info",
        "How much is logged.",
        choices=("debug", "info", "warning", "error"),
    )
    log_calls: int = setting(
        USUAL_LINES,
        "Lines of calls that went well, for each method and second; the log says how many "
        "`more` there were. What failed always has a line.",
        least=0,
    )
    log_style: str = setting(
        "auto",
        "How lines look: `text` for people, `json` for programs; `auto` is text on a "
        "terminal and JSON in a pipe.",
        choices=("auto", "text", "json"),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "data_dir", Path(self.data_dir))
        object.__setattr__(self, "libraries", tuple(self.libraries))
        for name in ("datasets_root", "checkpoints_root"):
            folder = getattr(self, name)
            if folder is not None:
                object.__setattr__(self, name, Path(folder))
                if not Path(folder).is_dir():
                    msg = f"{name} {str(folder)!r} is no folder"
                    raise InvalidSpec(msg, **{name: folder})
        if self.metrics:
            address_of(self.metrics, "metrics")
        if self.traces and not _COLLECTOR.fullmatch(self.traces):
            msg = (
                "traces must be where a collector takes OTLP over gRPC, such as "
                f"http://127.0.0.1:4317, got {self.traces!r}"
            )
            raise InvalidSpec(msg, traces=self.traces)
        if self.ray and self.devices:
            msg = (
                f"workers are processes here (devices={self.devices!r}) or on Ray "
                f"(ray={self.ray!r}): give one of them"
            )
            raise InvalidSpec(msg, devices=self.devices, ray=self.ray)
        if self.shard_parameters and len(self.workers) < 2:
            msg = (
                "shard_parameters shares parameters between workers, of which devices="
                f"{self.devices!r} names {len(self.workers)}: name two at least, such as "
                "cpu:0,cpu:1"
            )
            raise InvalidSpec(msg, devices=self.devices)
        if self.shard_parameters and self.ray:
            msg = (
                f"shard_parameters is for workers of this machine, and ray={self.ray!r} "
                "places them elsewhere: use devices in its place"
            )
            raise InvalidSpec(msg, ray=self.ray)
        if self.shard_parameters and self.shards not in (0, len(self.workers)):
            msg = (
                f"shards={self.shards} cuts data for {len(self.workers)} workers that share "
                "parameters, of which each has one part: leave shards out"
            )
            raise InvalidSpec(msg, shards=self.shards)
        local = is_local(self.listen)
        ways = {
            "the token": self.token,
            "token_file": self.token_file,
            "tokens": self.tokens,
            "issuer": self.issuer,
        }
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            msg = f"give {' or '.join(given)}, not both"
            raise InvalidSpec(msg)
        if self.token is not None:
            _check_token(self.token, "token")
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
    def workers(self) -> tuple[str, ...]:
        """Where each worker computes; none: the server computes itself."""
        if self.ray:
            return (self.device,) * self.ray_workers
        return tuple(name.strip() for name in self.devices.split(",") if name.strip())

    @property
    def has_token(self) -> bool:
        """Whether calls must carry a token."""
        ways = (self.token, self.token_file, self.tokens, self.issuer)
        return any(way is not None for way in ways)

    def bearer_token(self) -> str | None:
        """Find the token.

        Returns:
            What calls must carry; None if they need not.

        Raises:
            InvalidSpec: If its file cannot be read or holds no token.
        """
        if self.token_file is None:
            return self.token
        token = content(self.token_file, "token_file").decode(errors="replace").strip()
        _check_token(token, f"token_file {self.token_file}")
        return token

    def callers(self) -> Callers:
        """Find out who may call.

        Returns:
            Tells callers apart, if they have tokens of their own or certificates.

        Raises:
            InvalidSpec: If a file cannot be read or holds no token.
        """
        certificates = self.tls is not None and self.tls.client_ca is not None
        tokens = None if self.tokens is None else TokenFile(Path(self.tokens))
        return Callers(
            self.bearer_token(),
            tokens,
            certificates=certificates,
            issuer=None if self.issuer is None else _issuer(Path(self.issuer)),
        )

    def tracing(self, version: str) -> AbstractAsyncContextManager[Tracing]:
        """Find what sends spans of calls to `traces`.

        Args:
            version: Of the server.

        Returns:
            A context that sends them while it is open; nothing is begun before.

        Raises:
            InvalidSpec: If OpenTelemetry is not installed.
        """
        try:
            from curvd_server.transport import tracing
        except ModuleNotFoundError as error:
            msg = (
                f"--traces needs OpenTelemetry ({error.name} is missing): "
                f"{install('otel')}"
            )
            raise InvalidSpec(msg, traces=self.traces) from error
        return tracing.exporting(self.traces, self.trace_share, version)

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


def _issuer(path: Path) -> Issuer:
    """Read whose tokens let callers in.

    Raises:
        InvalidSpec: If a file of it cannot be used, or PyJWT is not installed.
    """
    try:
        from curvd_server.transport.issuer import Issuer
    except ModuleNotFoundError as error:
        msg = f"--issuer needs PyJWT ({error.name} is missing): {install('jwt')}"
        raise InvalidSpec(msg, issuer=path) from error
    return Issuer(path)


def _check_token(token: str, where: str) -> None:
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        msg = f"{where} must hold printable ASCII without spaces"
        raise InvalidSpec(msg)
