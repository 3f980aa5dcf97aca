"""``curvd eigs``, ``trace``, ``norm`` and so on: a command for each query that names one.

Flags, their defaults and their help are the query's options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any, TypeVar

import click

from curvd.cli.options import check_folder, connection_options, json_option
from curvd.config import ClientConfig
from curvd.contract import (
    QUERIES,
    FisherType,
    OperatorKind,
    OperatorSpec,
    QueryOptions,
    QuerySpec,
    Setting,
    WeightSharing,
    choices_of,
    own_first,
    query_messages,
    settings_of,
)
from curvd.remote import RemoteOperator, Session, check_drawable, connect

F = TypeVar("F", bound=Callable[..., Any])
ReadConfig = Callable[..., ClientConfig]

_KINDS: dict[Any, Any] = {"int": click.INT, "float": click.FLOAT, "bool": click.BOOL}
_CAN_SHOW = importlib.util.find_spec("rich") is not None
"""Whether progress can be drawn; a command does not need it."""
_FAR = 2**28
"""Upper ends that hardly anybody reaches."""
_SHARED = {"damping"}
"""Options that every command has for the operator, where they do the same."""


def add_to(group: click.Group, read_config: ReadConfig) -> None:
    """Add the commands to a group.

    Args:
        group: The command line.
        read_config: Makes a configuration of the connection's options.
    """
    for rpc, query in QUERIES.items():
        if query.command:
            group.add_command(_command(rpc, query, read_config))


def _command(rpc: str, query: QuerySpec, read_config: ReadConfig) -> click.Command:
    flags = list(_flags(rpc, query))

    def ask(picture: Path | None, as_json: bool, **given: Any) -> None:
        if picture is not None:
            _check_drawable(picture)  # before anything is computed
        asked = {name: given.pop(name) for name, _ in flags}
        with _asked(read_config, **given) as asks:
            method = getattr(asks, query.method)
            options = {**query.terminal, **asked}
            found = method(*query.operands, **options, progress=_CAN_SHOW)
        click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found)
        if picture is not None:
            _draw(found, picture)

    decorated = _common_options(ask)
    owner: type[Any] = Session
    if not query.of_session:
        decorated = _operator_options(decorated, query.operator)
        owner = RemoteOperator
    for _, flag in reversed(flags):
        decorated = flag(decorated)
    text = inspect.getdoc(getattr(owner, query.method)) or ""
    return click.command(query.command, help=text.partition("\n\n")[0])(decorated)


def _flags(rpc: str, query: QuerySpec) -> Iterator[tuple[str, Callable[[F], F]]]:
    """Make a flag of each option that travels in the request.

    Yields:
        Name of the option, and what adds its flag to a command.
    """
    message = query_messages.request_type(rpc).DESCRIPTOR
    settings, choices = settings_of(query.options), choices_of(query.options)
    carried = query_messages.carried(query.options, message)
    for name in own_first(query.options):
        if name in _SHARED or name not in carried:
            continue
        field, known = settings[name]
        default = query.terminal.get(name, field.default)
        more: dict[str, Any] = {"type": _KINDS.get(str(field.type).split(" |")[0])}
        if field.type == "bool":
            more = {"is_flag": True}
        elif name in choices:
            more = {"type": click.Choice([member.value for member in choices[name]])}
            default = default.value
        spelled = (known.option or name).replace("_", "-")
        flag = f"-{spelled}" if len(spelled) == 1 else f"--{spelled}"
        yield (
            name,
            click.option(
                flag,
                name,
                default=default,
                show_default=default is not None,
                help=_plain(known.help),
                **more,
            ),
        )


def _plain(text: str) -> str:
    """Take the marks of a docstring off a text."""
    return text.replace("`", "")


def _check_drawable(picture: Path) -> None:
    try:
        check_drawable()
    except ModuleNotFoundError as error:
        msg = str(error).replace("plot()", "--plot", 1)
        raise click.ClickException(msg) from error
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if picture.suffix.removeprefix(".").lower() not in known:
        msg = (
            f"--plot {picture}: no picture is written as {picture.suffix or 'such a file'}; "
            f"end its name in one of .{', .'.join(known)}"
        )
        raise click.BadParameter(msg)
    check_folder("--plot", picture)


def _common_options(command: F) -> F:
    command = json_option(command)
    command = click.option(
        "--plot",
        "picture",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Draw the result into this file.",
    )(command)
    return click.argument("session")(connection_options(command))


def _operator_options(command: F, default: OperatorKind) -> F:
    kinds = [kind.value for kind in OperatorKind]
    for decorate in (
        click.option(
            "--sharing",
            type=click.Choice([kind.value for kind in WeightSharing]),
            help="How factors of kfac and ekfac see shared weights. [default: expand]",
        ),
        click.option(
            "--fisher",
            type=click.Choice([kind.value for kind in FisherType]),
            help="Which gradients kfac and ekfac are made of. [default: mc]",
        ),
        click.option(
            "--damping",
            type=float,
            default=0.0,
            show_default=True,
            help="Added to the diagonal.",
        ),
        click.option(
            "--operator",
            type=click.Choice(kinds),
            default=default.value,
            show_default=True,
            help="Which operator.",
        ),
    ):
        command = decorate(command)
    return command


@contextlib.contextmanager
def _asked(
    read_config: ReadConfig,
    *,
    session: str,
    target: str,
    operator: str | None = None,
    damping: float = 0.0,
    fisher: str | None = None,
    sharing: str | None = None,
    **connection: Any,
) -> Iterator[RemoteOperator | Session]:
    """Find the session, and the operator if the command has one."""
    # A query takes as long as it takes; Ctrl-C stops it on the server, too.
    config = dataclasses.replace(read_config(**connection), deadline_s=None)
    try:
        with connect(target, config=config) as client:
            found = client.session(session)
            if operator is None:
                yield found
                return
            spec = OperatorSpec(
                kind=OperatorKind(operator),
                damping=damping,
                fisher=FisherType(fisher) if fisher else None,
                sharing=WeightSharing(sharing) if sharing else None,
            )
            yield found.operator(spec)
    except KeyboardInterrupt as stopped:
        for note in getattr(stopped, "__notes__", ()):
            click.echo(note, err=True)
        raise


def _draw(found: Any, picture: Path) -> None:
    axes = found.plot()
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(picture, dpi=150)
    click.echo(f"picture: {picture}", err=True)


def table() -> str:
    """Print the table of options in docs/client.md.

    Returns:
        Markdown: what every query takes, then the options of each.
    """
    rows = [
        "| query | option | default | range | what |",
        "| --- | --- | --- | --- | --- |",
    ]
    common = settings_of(QueryOptions)
    rows += _rows("all", common)
    for query in QUERIES.values():
        own = settings_of(query.options)
        rows += _rows(f"`{query.method}`", {n: own[n] for n in own if n not in common})
    return "\n".join(rows)


def _rows(title: str, settings: Mapping[str, tuple[Field[Any], Setting]]) -> list[str]:
    rows = []
    for name, (field, known) in settings.items():
        default = getattr(field.default, "value", field.default)
        text = known.help.replace("``", "`").replace("|", "\\|")
        rows.append(
            f"| {title} | `{name}` | `{default}` | {_range(field, known)} | {text} |"
        )
        title = ""
    return rows


def _range(field: Field[Any], known: Setting) -> str:
    """Write a range down; a far end, which only says what a type holds, is left out."""
    ends = known.range_of(field)
    if ends is None:
        return ""
    if ends[1] < _FAR:
        return f"{ends[0]:g} to {ends[1]:g}"
    if known.positive:
        return "more than 0"
    return "finite" if known.least is None else f"{ends[0]:g} or more"
