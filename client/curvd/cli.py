"""The command line: ``curvd serve``, ``info``, ``health`` and ``demo``.

Nothing of the server is imported before a command needs it, so that ``--help`` and the
client's commands work on the base install.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click

from curvd._version import VERSION
from curvd.allocator import tune_allocator
from curvd.client import connect
from curvd.config import DEFAULT_PORT, ClientConfig, RetryConfig, TlsConfig
from curvd.errors import CurvdError
from curvd.types import ServerInfo, SessionInfo

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_PORT}"
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes, as a number or with a unit: ``4GiB``."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Read a size; an int is one already."""
        match = re.fullmatch(r"(\d+) ?([KMGT]iB)?", str(value))
        if match is None:
            self.fail(f"{value!r} is not a size such as 1048576 or 4GiB", param, ctx)
        return int(match[1]) * _UNITS[match[2] or ""]


class Commands(click.Group):
    """A group whose commands may raise our exceptions."""

    def invoke(self, ctx: click.Context) -> Any:
        """Turn our exceptions into one line and exit status 1."""
        try:
            return super().invoke(ctx)
        except CurvdError as error:
            raise click.ClickException(str(error)) from error


def option(name: str, help: str, **settings: Any) -> Callable[[F], F]:
    """Declare an option that the environment may set, too.

    Args:
        name: Spelled ``--such-as``; the variable is ``CURVD_SUCH_AS``.
        help: One sentence.
        **settings: As for `click.option`.

    Returns:
        The decorator.
    """
    envvar = "CURVD_" + name.strip("-").replace("-", "_").upper()
    return click.option(name, envvar=envvar, show_envvar=True, help=help, **settings)


def connection_options(command: F) -> F:
    """Add the target and what it takes to reach it to a command.

    Args:
        command: Takes ``target`` and what `_config` takes.

    Returns:
        The command.
    """
    for decorate in (
        option("--tls-server-name", "Name that the server's certificate carries."),
        option("--tls-client-key", "The key of --tls-client-cert.", type=_FILE),
        option("--tls-client-cert", "This client's own (mutual TLS).", type=_FILE),
        option("--tls-ca", "Certificates that may sign the server's.", type=_FILE),
        option("--tls", "Encrypt; implied by --tls-ca.", is_flag=True),
        option("--token-file", "A file with the token.", type=_FILE),
        option("--token", "The server's token; others can see a command line."),
        click.argument("target", envvar="CURVD_TARGET", default=DEFAULT_TARGET),
    ):
        command = decorate(command)
    return command


def read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Make a TOML file the defaults of a command's options.

    Args:
        ctx: Of the command.
        param: The option that names the file.
        path: The file.

    Raises:
        click.BadParameter: If it is not TOML or names an option that does not exist.
    """
    if path is None:
        return
    try:
        settings = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path}: {error}"
        raise click.BadParameter(msg, ctx, param) from error
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    if "builders" in settings:
        pairs = settings.pop("builders").items()
        settings["builder"] = [f"{name}={place}" for name, place in pairs]
    known = {p.name for p in ctx.command.params} - {param.name}
    if unknown := sorted(settings.keys() - known):
        msg = f"{path} sets what does not exist: {', '.join(unknown)}"
        raise click.BadParameter(msg, ctx, param)
    ctx.default_map = {**(ctx.default_map or {}), **settings}


@click.group(cls=Commands)
@click.version_option(VERSION, prog_name="curvd")
def main() -> None:
    """Remote curvature queries on neural networks."""


@main.command()
@click.option(
    "--config",
    type=_FILE,
    is_eager=True,
    expose_value=False,
    envvar="CURVD_CONFIG",
    callback=read_config,
    help="TOML file with any of these options; a [builders] table for --builder.",
)
@option("--listen", "HOST:PORT or unix:/path; loopback unless told otherwise.")
@option("--data-dir", "Where what was registered survives.", type=click.Path())
@option("--device", "cpu, cuda:0, …; auto takes the first GPU if there is one.")
@option("--tls-cert", "PEM file with the server's certificate chain.", type=_FILE)
@option("--tls-key", "PEM file with its key.", type=_FILE)
@option("--tls-client-ca", "Ask clients for a certificate of this CA.", type=_FILE)
@option("--token", "What clients must present; rather use --token-file.")
@option("--token-file", "A file with the token.", type=_FILE)
@option("--insecure", "Allow plain text on any address.", is_flag=True, default=None)
@option("--builder", "NAME=module:callable; may be repeated.", multiple=True)
@option("--upload-bytes", "Largest model, dataset or update.", type=Size())
@option("--operand-bytes", "Largest operand of one MatMat.", type=Size())
@option("--columns", "Columns of one MatMat.", type=int)
@option("--run-columns", "Columns that one device run takes together.", type=int)
@option("--run-bytes", "Bytes of the columns of one device run.", type=Size())
@option("--pending-columns", "Columns that may wait for the device.", type=int)
@option("--sessions", "Sessions at once.", type=int)
@option("--budget-bytes", "Memory for one session's linearisations.", type=Size())
@option("--drain-s", "How long calls may go on after SIGTERM.", type=float)
@option(
    "--log-level",
    "How much is logged.",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
)
def serve(log_level: str, **options: Any) -> None:
    """Run a server until SIGTERM or Ctrl-C."""
    tune_allocator()
    config = _server("curvd_server.config")
    app = _server("curvd_server.app")
    app.serve(config.ServerConfig(**_server_settings(config, options)))


@main.command()
@connection_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(target: str, as_json: bool, **options: Any) -> None:
    """Describe a server, its sessions and their plans."""
    with connect(target, config=_config(**options)) as client:
        server, sessions = client.server_info(), client.sessions()
    if as_json:
        facts = {
            "server": dataclasses.asdict(server),
            "sessions": [dataclasses.asdict(s) for s in sessions],
        }
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo("\n".join([*_server_lines(server), *_session_lines(sessions)]))


@main.command()
@connection_options
@click.option("--timeout-s", type=float, default=5.0, help="When to give up.")
def health(target: str, timeout_s: float, **options: Any) -> None:
    """Exit with 0 if a server is serving, else with 1."""
    config = dataclasses.replace(_config(**options), deadline_s=timeout_s)
    with connect(target, config=config) as client:
        if not client.healthy():
            msg = f"the server at {target} is not serving"
            raise click.ClickException(msg)
    click.echo("serving")


@main.command()
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("demo-output/spectrum.png"),
    show_default=True,
    help="Where the picture of the spectrum goes.",
)
def demo(picture: Path) -> None:
    """Train a small net on real digits, serve it, and check its curvature."""
    raise SystemExit(_server("curvd_server.demo", extra="demo").main(picture))


def _server(module: str, extra: str = "server") -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        msg = f"{error.name} is missing: pip install 'curvd[{extra}]'"
        raise click.ClickException(msg) from error


def _server_settings(config: ModuleType, options: dict[str, Any]) -> dict[str, Any]:
    """Turn options into keyword arguments of `ServerConfig`; unset ones are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    certificate, key, client_ca = (
        given.pop(name, None) for name in ("tls_cert", "tls_key", "tls_client_ca")
    )
    if (certificate is None) != (key is None) or (client_ca and certificate is None):
        msg = "TLS needs both --tls-cert and --tls-key"
        raise click.UsageError(msg)
    if certificate is not None:
        given["tls"] = config.TlsFiles(
            certificate=certificate, key=key, client_ca=client_ca
        )
    given["token"] = _token(given.pop("token", None), given.pop("token_file", None))
    if "data_dir" in given:
        given["data_dir"] = Path(given["data_dir"])
    builders = [text.partition("=") for text in given.pop("builder")]
    for name, equals, place in builders:
        if not (name and equals and ":" in place):
            msg = f"--builder {name}{equals}{place}: expected NAME=module:callable"
            raise click.UsageError(msg)
    given["builders"] = {name: place for name, _, place in builders}
    return given


def _config(
    *,
    token: str | None,
    token_file: Path | None,
    tls: bool,
    tls_ca: Path | None,
    tls_client_cert: Path | None,
    tls_client_key: Path | None,
    tls_server_name: str | None,
) -> ClientConfig:
    encrypt = tls or tls_ca or tls_client_cert or tls_client_key or tls_server_name
    return ClientConfig(
        token=_token(token, token_file),
        tls=TlsConfig(
            ca=tls_ca,
            cert=tls_client_cert,
            key=tls_client_key,
            server_name=tls_server_name,
        )
        if encrypt
        else None,
        # Whoever asks at a prompt wants to know now.
        retry=RetryConfig(give_up_s=0.0),
        deadline_s=30.0,
    )


def _token(token: str | None, file: Path | None) -> str | None:
    if token is not None and file is not None:
        msg = "give --token or --token-file, not both"
        raise click.UsageError(msg)
    return token if file is None else file.read_text().strip()


def _server_lines(info: ServerInfo) -> list[str]:
    return [
        f"curvd {info.version}, torch {info.torch_version}",
        *(
            f"  device   {d.name}: {d.description}, "
            f"{d.free_bytes / 2**30:.1f} of {d.total_bytes / 2**30:.1f} GiB free"
            for d in info.devices
        ),
        f"  builders {', '.join(info.builders)}",
    ]


def _session_lines(sessions: list[SessionInfo]) -> list[str]:
    lines = [f"{len(sessions)} session{'s' * (len(sessions) != 1)}"]
    for s in sessions:
        lines.append(
            f"  {s.id} {s.name!r}: P={s.layout.size} N={s.data_points} {s.dtype} "
            f"{s.loss.name} on {s.device}, version {s.version}, {s.state}"
        )
        lines += [
            f"    {spec.kind}: {plan.mode}, {plan.seconds_per_product:.2e} s per product, "
            f"{plan.kept_batches} of {plan.batches} batches kept, "
            f"differences {plan.difference_gap:.0e}, symmetry {plan.symmetry_gap:.0e}"
            for spec, plan in s.operators
        ]
    return lines


if __name__ == "__main__":
    main()
