"""``curvd serve`` and ``curvd token``; an option for each setting, and the documents' table.

`preflight` judges a configuration before torch is imported, and `config_file` reads options of a
TOML file. Nothing imports this but the client's command line, which starts it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from curvd.cli.interrupts import importing
from curvd.cli.options import (
    FILE,
    Place,
    Size,
    json_option,
    option,
    token_options,
)
from curvd.contract import Setting, settings_of
from curvd.tensors import tune_allocator
from curvd_server.cli import preflight
from curvd_server.cli.config_file import read_config
from curvd_server.config import LimitsConfig, ServerConfig, TlsConfig
from curvd_server.system import ROLES
from curvd_server.transport import ConnectionLimits, token_file

_NESTED: dict[str, tuple[type[Any], str]] = {
    "tls": (TlsConfig, "tls_"),
    "limits": (LimitsConfig, ""),
    "connections": (ConnectionLimits, ""),
}
"""Fields of `ServerConfig` that hold settings of their own, and the prefix of these."""
_KINDS: dict[Any, Any] = {int: click.INT, float: click.FLOAT, str: click.STRING}
_PATH = Place(path_type=Path)
_TOKEN = ("token", "token_file")
"""Options that every command has, see `token_options`."""
_SIZES = ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB"))


@dataclass(frozen=True, slots=True)
class Option:
    """A setting as it is given from outside."""

    name: str
    """``data_dir``: the flag is ``--data-dir``, the variable ``CURVD_DATA_DIR``."""
    group: str
    """Field of `ServerConfig` that holds it; empty: `ServerConfig` itself."""
    field: Field[Any]
    setting: Setting
    type: Any

    @property
    def flag(self) -> str:
        """The flag."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_repeated(self) -> bool:
        """Whether it may be given more than once."""
        return self.field.default_factory is dict or self.field.default == ()

    @property
    def default(self) -> str:
        """The default as people read it."""
        value = self.field.default
        if self.setting.shown:
            return self.setting.shown
        if value is MISSING or value is None or value == ():
            return "none"
        if value is False:
            return "off"
        if self.name.endswith("_bytes"):
            return size(value)
        return f"{value:g}" if isinstance(value, float) else f"{value}"

    def decorate(self, command: Callable[..., Any]) -> Callable[..., Any]:
        """Add it to a command."""
        more: dict[str, Any] = {"type": self._kind(), "multiple": self.is_repeated}
        if self.type is bool:
            more = {"is_flag": True, "default": None}
        elif self.setting.metavar:
            more["metavar"] = self.setting.metavar
        text = f"{self.setting.help}  [default: {self.default}]"
        return option(self.flag, text, **more)(command)

    def _kind(self) -> Any:
        if self.setting.choices:
            return click.Choice(self.setting.choices)
        if self.name.endswith("_bytes"):
            return Size()
        if "Path" in str(self.type):
            return FILE if self.group == "tls" else _PATH
        kinds = [kind for kind in get_args(self.type) if kind is not type(None)]
        return _KINDS.get(kinds[0] if kinds else self.type, click.STRING)


def size(nbytes: int) -> str:
    """Write a size with the largest unit that fits: ``64 GiB``.

    Args:
        nbytes: The size.

    Returns:
        The text; options understand it, without the blank too.
    """
    for shift, unit in _SIZES:
        if nbytes and nbytes % (1 << shift) == 0:
            return f"{nbytes >> shift} {unit}"
    return str(nbytes)


def options() -> Iterator[Option]:
    """List the options, as the settings are declared, groups where they stand.

    Yields:
        One for each setting.
    """
    for name in ServerConfig.__dataclass_fields__:
        if name in _NESTED:
            cls, prefix = _NESTED[name]
            yield from _options(cls, name, prefix)
        else:
            yield from (
                o for o in _options(ServerConfig, "", "") if o.field.name == name
            )


def _options(cls: type[Any], group: str, prefix: str) -> Iterator[Option]:
    types = get_type_hints(cls)
    for name, (field, known) in settings_of(cls).items():
        yield Option(known.option or prefix + name, group, field, known, types[name])


def table() -> str:
    """Print the table of docs/server.md.

    Returns:
        Markdown.
    """
    rows = ["| option | default | what |", "| --- | --- | --- |"]
    for o in options():
        flag = o.flag + (f" {o.setting.metavar}" if o.is_repeated else "")
        name = "`CURVD_TOKEN`" if o.name == "token" else f"`{flag}`"
        default = o.default if o.default in ("none", "off") else f"`{o.default}`"
        rows.append(f"| {name} | {default} | {o.setting.help} |")
    return "\n".join(rows)


def _with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    for o in reversed([o for o in options() if o.name not in _TOKEN]):
        command = o.decorate(command)
    return token_options(command)


def silence_grpcio() -> None:
    """Begin anew with grpcio's own log and fork handlers turned off, unless they are set.

    The log repeats what strangers say, 100 MB in a second if they like. The handlers end
    one forked child in some hundreds, such as a worker of a data loader of a builder's.
    Both variables are read only when grpcio is imported, which `import curvd` does. A
    process whose own command line is another one, and calls the command as a function, is
    left alone.
    """
    if sys.argv[1:2] == ["serve"] and "GRPC_VERBOSITY" not in os.environ:
        os.environ["GRPC_VERBOSITY"] = "NONE"
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@click.command()
@click.option(
    "--config",
    type=FILE,
    is_eager=True,
    expose_value=False,
    envvar="CURVD_CONFIG",
    callback=read_config,
    help="TOML file with any of these options; a [builders] table for --builder.",
)
@_with_settings
def serve(**given: Any) -> None:
    """Run a server until SIGTERM or Ctrl-C."""
    # Who asks for files to be read again must not end what has not read them yet.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    silence_grpcio()
    tune_allocator()
    config = configured(given)
    preflight.check(config)
    # Before torch is imported: its threads wait for each other asleep, so that they take
    # no core from those that compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with importing():
        from curvd_server.trials import start

        start()  # it imports torch while the server does
        from curvd_server.app import serve as run

    run(config)


@click.command()
@click.argument("name")
@click.option(
    "--file",
    required=True,
    type=_PATH,
    help="The server's --tokens, which gets a line with the token's hash; it is made if it "
    "is not there.",
)
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice(ROLES),
    help="What the caller may do: user (also without this), or operator, who sees and "
    "ends what belongs to others; may be repeated.",
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    help="A group that things may be shared with, as @GROUP; may be repeated.",
)
@click.option("--expires", help="How long it is good: 12h, 90d.  [default: for ever]")
@json_option
def token(
    name: str,
    file: Path,
    roles: tuple[str, ...],
    groups: tuple[str, ...],
    expires: str | None,
    as_json: bool,
) -> None:
    """Make a token for the caller NAME, and print it: it is kept nowhere else."""
    made = token_file.new_token()
    until_s = None
    if expires is not None:
        until_s = time.time() + token_file.seconds_of(expires)
    line = token_file.line_of(name, made, roles=roles, groups=groups, expires_s=until_s)
    token_file.append(file, line)
    click.echo(json.dumps({"name": name, "token": made}) if as_json else made)


def configured(given: Mapping[str, Any]) -> ServerConfig:
    """Make a configuration of options.

    Args:
        given: Values by option; None or nothing for those that nobody gave.

    Returns:
        The configuration.

    Raises:
        InvalidSpec: If a value is out of its range, or values contradict each other.
        click.UsageError: If options do not fit together.
    """
    values: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in _NESTED}}
    for o in options():
        value = given.get(o.name)
        if value is not None and value != ():
            values[o.group][o.field.name] = value
    top = values.pop("")
    if values["tls"] and not {"cert", "key"} <= values["tls"].keys():
        msg = "TLS needs both --tls-cert and --tls-key"
        raise click.UsageError(msg)
    if "builders" in top:
        top["builders"] = dict(map(_builder, top["builders"]))
    groups = {
        name: _NESTED[name][0](**found) for name, found in values.items() if found
    }
    return ServerConfig(**top, **groups)


def _builder(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and ":" in place):
        msg = f"--builder {text}: expected NAME=module:callable"
        raise click.UsageError(msg)
    return name, place
