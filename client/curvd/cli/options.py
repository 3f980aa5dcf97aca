"""Options of the command line: from flags or the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from curvd.config import DEFAULT_PORT, Transport

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_PORT}"
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class _File(click.Path):
    """A file that is there; one of another user's is refused with who may not read it."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Read a path."""
        if os.path.isfile(value) and not os.access(value, os.R_OK):
            msg = (
                f"user {os.geteuid()}, as whom this runs, may not read {str(value)!r}: "
                "give it to that user (chown), or let others read it (chmod)"
            )
            self.fail(msg, param, ctx)
        return super().convert(value, param, ctx)


FILE = _File(exists=True, dir_okay=False, path_type=Path)


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


def option(name: str, help_text: str, **settings: Any) -> Callable[[F], F]:
    """Declare an option that the environment may set, too.

    Args:
        name: Spelled ``--such-as``; the variable is ``CURVD_SUCH_AS``.
        help_text: One sentence.
        **settings: As for `click.option`.

    Returns:
        The decorator.
    """
    envvar = "CURVD_" + name.strip("-").replace("-", "_").upper()
    return click.option(
        name, envvar=envvar, show_envvar=True, help=help_text, **settings
    )


class Place(click.Path):
    """A path; an empty one comes of a variable that is not set, and is refused."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Read a path."""
        if value == "":
            self.fail("is empty: name a folder, or leave the option out", param, ctx)
        return super().convert(value, param, ctx)


def token_options(command: F) -> F:
    """Add the ways to give a token to a command: a file, or the environment.

    Args:
        command: Takes ``token`` and ``token_file``.

    Returns:
        The command.
    """
    help_text = "Refused: others can see a command line. Use $CURVD_TOKEN or a file."
    command = option("--token", help_text, callback=_not_on_the_command_line)(command)
    return option("--token-file", "A file with the token.", type=FILE)(command)


def _not_on_the_command_line(
    ctx: click.Context, param: click.Parameter, token: str | None
) -> str | None:
    source = ctx.get_parameter_source(param.name or "")
    if source is ParameterSource.COMMANDLINE:
        msg = (
            "every user of this machine can see a command line (ps): put the token into "
            "a file (--token-file) or the environment (CURVD_TOKEN)"
        )
        raise click.BadParameter(msg, ctx, param)
    return token


def json_option(command: F) -> F:
    """Add the choice to print JSON to a command.

    Args:
        command: Takes ``as_json``.

    Returns:
        The command.
    """
    text = "Print one JSON object, for programs."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def connection_options(command: F) -> F:
    """Add the target and what it takes to reach it to a command.

    Args:
        command: Takes ``target`` and what `_config` takes.

    Returns:
        The command.
    """
    for decorate in (
        option(
            "--transport",
            "Who speaks HTTP/2: curvd itself, or grpcio with its resolvers and proxies.",
            type=click.Choice([member.value for member in Transport]),
            default=Transport.DIRECT.value,
            show_default=True,
        ),
        option("--tls-server-name", "Name that the server's certificate carries."),
        option("--tls-client-key", "The key of --tls-client-cert.", type=FILE),
        option("--tls-client-cert", "This client's own (mutual TLS).", type=FILE),
        option("--tls-ca", "Certificates that may sign the server's.", type=FILE),
        option("--tls", "Encrypt; implied by --tls-ca.", is_flag=True),
        token_options,
        click.argument("target", envvar="CURVD_TARGET", default=DEFAULT_TARGET),
    ):
        command = decorate(command)
    return command


def check_folder(flag: str, file: Path) -> None:
    """Refuse a file whose folder is not there, before anything is computed for it.

    Args:
        flag: The option that names it.
        file: The file that is to be written.

    Raises:
        click.BadParameter: If nothing can be written there.
    """
    folder = file.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        msg = f"{flag} {file}: {folder} is no folder that can be written to; make it first"
        raise click.BadParameter(msg)
