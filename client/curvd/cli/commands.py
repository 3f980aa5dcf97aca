"""The command line: ``curvd serve``, ``info``, ``health``, ``demo``, and queries.

Nothing of the server is imported before a command needs it, so that ``--help`` and the
client's commands work on the base install.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from curvd.cli import bench, query_commands, top
from curvd.cli.interrupts import importing
from curvd.cli.options import check_folder, connection_options, json_option
from curvd.config import VERSION, ClientConfig, RetryConfig, TlsConfig, Transport
from curvd.contract import (
    Activity,
    DatasetInfo,
    ModelInfo,
    ServerInfo,
    SessionInfo,
    WorkerInfo,
)
from curvd.errors import CurvdError, install
from curvd.remote import connect


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


class Deferred(click.Command):
    """A command of another package, imported when it is asked for.

    Args:
        name: The name of the command, and of the object in `module`.
        module: Where it is.
        short_help: One sentence, for the list of commands.
    """

    def __init__(self, name: str, module: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._module = module

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Read the arguments as the real command does."""
        command: click.Command = getattr(_server(self._module), self.name or "")
        return command.make_context(info_name, args, parent, **extra)


main.add_command(
    Deferred("serve", "curvd_server.cli", "Run a server until SIGTERM or Ctrl-C.")
)
main.add_command(
    Deferred("token", "curvd_server.cli", "Make a token for a caller of a server.")
)


@main.command()
@connection_options
@json_option
def info(target: str, as_json: bool, **options: Any) -> None:
    """Describe a server, what it is doing, its sessions and their plans."""
    with connect(target, config=_config(**options)) as client:
        server, sessions = client.server_info(), client.sessions()
    if as_json:
        facts = {
            "server": dataclasses.asdict(server),
            "sessions": [dataclasses.asdict(s) for s in sessions],
        }
        click.echo(_json(facts))
    else:
        lines = [
            *_server_lines(server),
            *_activity_lines(server.activities),
            *_session_lines(sessions),
        ]
        click.echo("\n".join(lines))


@main.command()
@connection_options
@json_option
def sessions(target: str, as_json: bool, **options: Any) -> None:
    """List the sessions that are yours or shared with you, oldest first."""
    with connect(target, config=_config(**options)) as client:
        found = client.sessions()
    _list(found, _session_lines(found), as_json)


@main.command()
@connection_options
@json_option
def models(target: str, as_json: bool, **options: Any) -> None:
    """List the models that are yours or shared with you, and what needs them."""
    with connect(target, config=_config(**options)) as client:
        found = client.models()
    lines = [f"{len(found)} model{'s' * (len(found) != 1)}"]
    for model in found:
        made = repr(model.spec.builder) if model.spec.builder else "graph"
        what = f"{made} of {len(model.tensors)} tensors"
        lines += _resource_lines(model, what, model.state_bytes)
    _list(found, lines, as_json)


@main.command()
@connection_options
@json_option
def datasets(target: str, as_json: bool, **options: Any) -> None:
    """List the datasets that are yours or shared with you, and what needs them."""
    with connect(target, config=_config(**options)) as client:
        found = client.datasets()
    lines = [f"{len(found)} dataset{'s' * (len(found) != 1)}"]
    for dataset in found:
        name = f"{dataset.name!r} " if dataset.name else ""
        what = f"{name}N={dataset.data_points} B={dataset.spec.batch_size}"
        lines += _resource_lines(dataset, what, dataset.total_bytes)
    _list(found, lines, as_json)


@main.command()
@connection_options
@click.option("--session", "session_ids", multiple=True, help="A session to end.")
@click.option("--model", "model_ids", multiple=True, help="A model to delete.")
@click.option("--dataset", "dataset_ids", multiple=True, help="A dataset to delete.")
@json_option
def delete(
    target: str,
    session_ids: tuple[str, ...],
    model_ids: tuple[str, ...],
    dataset_ids: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """End sessions, then delete models and datasets, by their ids."""
    if not (session_ids or model_ids or dataset_ids):
        msg = "name what to delete: --session, --model or --dataset, with an id"
        raise click.UsageError(msg)
    gone: dict[str, list[str]] = {"sessions": [], "models": [], "datasets": []}
    with connect(target, config=_config(**options)) as client:
        ways: dict[str, tuple[tuple[str, ...], Callable[[str], None]]] = {
            "sessions": (session_ids, lambda name: client.session(name).delete()),
            "models": (model_ids, client.delete_model),
            "datasets": (dataset_ids, client.delete_dataset),
        }
        try:
            for kind, (ids, end) in ways.items():
                for name in dict.fromkeys(ids):  # named twice, it is one
                    end(name)
                    gone[kind].append(name)
        except CurvdError as error:
            done = ", ".join(itertools.chain.from_iterable(gone.values()))
            msg = f"{error}; deleted before that: {done}" if done else f"{error}"
            raise click.ClickException(msg) from error
    lines = [f"deleted {kind}: {', '.join(ids)}" for kind, ids in gone.items() if ids]
    click.echo(json.dumps(gone) if as_json else "\n".join(lines))


@main.command()
@connection_options
@click.option(
    "--timeout-s",
    type=float,
    default=5.0,
    show_default=True,
    help="Seconds after which to give up.",
)
@json_option
def health(target: str, timeout_s: float, as_json: bool, **options: Any) -> None:
    """Exit with 0 if a server is serving, else with 1."""
    config = dataclasses.replace(_config(**options), deadline_s=timeout_s)
    with connect(target, config=config) as client:
        serving = client.healthy()
    if as_json:
        click.echo(json.dumps({"target": target, "serving": serving}))
    if not serving:
        msg = f"the server at {target} is not serving"
        raise click.ClickException(msg)
    if not as_json:
        click.echo("serving")


@main.command()
@click.argument("session")
@connection_options
@click.option(
    "--checkpoint",
    metavar="NAME",
    help="What the server reads itself: a path from its --checkpoints-root.",
)
@click.option("--prefix", help="What stands before the names in it; none: found out.")
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A safetensors file of yours, in place of a checkpoint.",
)
@json_option
def update(
    target: str,
    session: str,
    checkpoint: str | None,
    prefix: str | None,
    file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Bring a session to the parameters of a checkpoint or a file."""
    if (file is None) == (checkpoint is None):
        given = "neither" if file is None else "both"
        msg = f"say where the parameters are: --file or --checkpoint, got {given}"
        raise click.UsageError(msg)
    config = dataclasses.replace(_config(**options), deadline_s=None)
    with connect(target, config=config) as client:
        found = client.session(session)
        found.update_parameters(
            file, checkpoint=checkpoint, prefix=prefix or "", progress=not as_json
        )
    info = found.info
    facts = {"version": info.version, "parameters_digest": info.parameters_digest}
    shown = f"version {info.version}, parameters {info.parameters_digest[:12]}…"
    click.echo(json.dumps(facts) if as_json else shown)


@main.command()
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("demo-spectrum.png"),
    show_default=True,
    help="Where the picture of the spectrum goes.",
)
@json_option
def demo(picture: Path, as_json: bool) -> None:
    """Train a small net on real digits, serve it, and check its curvature."""
    check_folder("--picture", picture)
    run = _server("curvd_server.demo", extra="demo").main
    raise SystemExit(run(picture, as_json=as_json))


def _server(module: str, extra: str = "server") -> ModuleType:
    try:
        with importing():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        msg = f"{error.name} is missing: {install(extra)}"
        raise click.ClickException(msg) from error


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
    if file is None:
        return token
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        msg = f"cannot read --token-file {str(file)!r}: {problem}"
        raise click.UsageError(msg) from error


def _server_lines(info: ServerInfo) -> list[str]:
    return [
        f"curvd {info.version}, torch {info.torch_version}",
        *(
            f"  device   {d.name}: {d.description}, "
            f"{d.free_bytes / 2**30:.1f} of {d.total_bytes / 2**30:.1f} GiB free"
            for d in info.devices
        ),
        *map(_worker_line, info.workers),
        f"  builders {', '.join(info.builders)}",
    ]


def _worker_line(worker: WorkerInfo) -> str:
    where = f"{worker.host}, process {worker.pid}" if worker.pid else "being started"
    lost = f", last because {worker.lost}" if worker.lost else ""
    slices = (
        f", slices of parameters {worker.parameter_bytes / 2**20:.1f} MiB, whole ones "
        f"{worker.whole_bytes / 2**20:.1f} MiB at once"
    )
    return (
        f"  worker {worker.rank} {worker.device}: {where}, {worker.shards} shards, "
        f"{'ready' if worker.ready else 'not ready'}, {worker.restarts} restarts"
        f"{slices if worker.parameter_bytes else ''}{lost}"
    )


def _activity_lines(activities: Sequence[Activity]) -> list[str]:
    lines = [f"{len(activities)} at work"] if activities else []
    for a in activities:
        session = a.session_id or repr(a.session_name)
        subject = f" {a.subject}" if a.subject else ""
        lines.append(
            f"  {a.work}{subject} of {session}: {a.progress}, {a.elapsed_s:.1f} s"
        )
    return lines


def _list(found: Sequence[Any], lines: Sequence[str], as_json: bool) -> None:
    if as_json:
        click.echo(_json([dataclasses.asdict(one) for one in found]))
    else:
        click.echo("\n".join(lines))


def _json(facts: Any) -> str:
    # What JSON cannot say is a graph; its digest names it, if there is one.
    return json.dumps(facts, indent=2, default=lambda graph: graph.digest or None)


def _resource_lines(
    info: ModelInfo | DatasetInfo, what: str, size_bytes: int
) -> list[str]:
    age = "of unknown age"
    if info.create_time_s is not None:
        age = f"{_duration(time.time() - info.create_time_s)} old"
    whose = f", of {info.owner}" if info.owner else ""
    users = [*info.session_ids]
    users += [f"{info.other_sessions} of others"] if info.other_sessions else []
    return [
        f"  {info.id}",
        f"    {what}, {size_bytes / 2**20:.3f} MiB, {age}{whose}, "
        f"needed by {', '.join(users) or 'no session'}",
    ]


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"


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
top.add_to(main, _config)
bench.add_to(main, _config)
