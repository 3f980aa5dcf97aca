"""The command line: ``curvd serve``, ``info``, ``health``, ``demo``, and queries.

Nothing of the server is imported before a command needs it, so that ``--help`` and the
client's commands work on the base install.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from curvd._version import VERSION
from curvd.cli import query_commands
from curvd.cli.options import (
    CONNECTIONS,
    FILE,
    LIMITS,
    connection_options,
    limit_options,
    named_folder,
    option,
    read_config,
    token_options,
)
from curvd.config import ClientConfig, RetryConfig, TlsConfig, Transport
from curvd.contract import ServerInfo, SessionInfo
from curvd.errors import CurvdError
from curvd.remote import connect
from curvd.tensors import tune_allocator


class Commands(click.Group):
    """A group whose commands may raise our exceptions."""

    def invoke(self, ctx: click.Context) -> Any:
        """Turn our exceptions into one line and exit status 1."""
        try:
            return super().invoke(ctx)
        except CurvdError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands)
@click.version_option(VERSION, prog_name="curvd")
def main() -> None:
    """Remote curvature queries on neural networks."""


@main.command()
@click.option(
    "--config",
    type=FILE,
    is_eager=True,
    expose_value=False,
    envvar="CURVD_CONFIG",
    callback=read_config,
    help="TOML file with any of these options; a [builders] table for --builder.",
)
@option("--listen", "HOST:PORT or unix:/path; loopback unless told otherwise.")
@option("--data-dir", "Where what was registered survives.", callback=named_folder)
@option(
    "--datasets-root",
    "A folder of NAME.safetensors that clients may use by name.",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@option("--device", "Where to compute: cpu, cuda:0, …")
@option("--tls-cert", "PEM file with the server's certificate chain.", type=FILE)
@option("--tls-key", "PEM file with its key.", type=FILE)
@option("--tls-client-ca", "Ask clients for a certificate of this CA.", type=FILE)
@token_options
@option("--insecure", "Allow plain text on any address.", is_flag=True, default=None)
@option("--builder", "NAME=module:callable; may be repeated.", multiple=True)
@option(
    "--compile-after-s",
    "Make native code for what has computed so long; 0: never.",
    type=float,
)
@option(
    "--library",
    "Models of a library that clients may build, as a glob: timm:vit_*, "
    "torchvision:*, transformers:gpt2; may be repeated.",
    multiple=True,
)
@limit_options
@option(
    "--transport",
    "Who speaks HTTP/2 with our own clients: the server itself, or grpcio, which then "
    "has the port.",
    type=click.Choice(["direct", "grpcio"]),
)
@option("--drain-s", "How long calls may go on after SIGTERM.", type=float)
@option("--log-level", "debug, info, warning or error.")
def serve(**options: Any) -> None:
    """Run a server until SIGTERM or Ctrl-C."""
    tune_allocator()
    config = _server("curvd_server.config")
    _server(
        "curvd_server.trials.pool"
    ).start()  # it imports torch while the server does
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
        # What JSON cannot say is a graph; its digest names it, if there is one.
        click.echo(json.dumps(facts, indent=2, default=lambda g: g.digest or None))
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
    tls = {
        name: given.pop(f"tls_{name}")
        for name in ("cert", "key", "client_ca")
        if f"tls_{name}" in given
    }
    if tls and not {"cert", "key"} <= tls.keys():
        msg = "TLS needs both --tls-cert and --tls-key"
        raise click.UsageError(msg)
    if tls:
        given["tls"] = config.TlsConfig(**tls)
    limits = {name: given.pop(name) for name in LIMITS if name in given}
    if limits:
        given["limits"] = config.LimitsConfig(**limits)
    allowed = {name: given.pop(name) for name in CONNECTIONS if name in given}
    if allowed:
        given["connections"] = config.ConnectionLimits(**allowed)
    builders = [text.partition("=") for text in given.pop("builder")]
    for name, equals, place in builders:
        if not (name and equals and ":" in place):
            msg = f"--builder {name}{equals}{place}: expected NAME=module:callable"
            raise click.UsageError(msg)
    given["builders"] = {name: place for name, _, place in builders}
    if patterns := given.pop("library"):
        given["libraries"] = patterns
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
    transport: str | None,
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
        transport=Transport(transport or Transport.DIRECT),
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


query_commands.add_to(main, _config)
