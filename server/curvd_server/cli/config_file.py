"""A TOML file with options: what it says is judged as if flags had said it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NoReturn

import click

from curvd.cli.options import Size

_NUMBERS = (click.types.IntParamType, click.types.FloatParamType, Size)
_LISTED = {"builders": "builder", "libraries": "library"}
"""Keys that hold all values of an option that a command line repeats."""


def read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Make a TOML file the defaults of a command's options.

    Args:
        ctx: The command's context.
        param: The option that names the file.
        path: The file.

    Raises:
        click.BadParameter: If it cannot be read, is not TOML, names an option that does not
            exist, or gives one a value of a type that is not its own.
    """
    if path is None:
        return
    try:
        found = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        _refuse(f"cannot read {str(path)!r}: {error.strerror}", ctx, param)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        _refuse(f"{path} is no TOML: {error}", ctx, param)
    except RecursionError:
        _refuse(f"{path} nests tables or lists too deeply", ctx, param)
    options = {p.name: p for p in ctx.command.params if p is not param}
    settings: dict[str, Any] = {}
    unknown = []
    for key, value in found.items():
        name = key.replace("-", "_")
        name = _LISTED.get(name, name)
        if name not in options:
            unknown.append(key)
            continue
        if name in settings:
            _refuse(f"{path} sets {name} twice, under two names", ctx, param)
        wanted = _wanted(options[name], value)
        if wanted:
            got = "" if name == "token" else f", got {value!r}"  # which nobody prints
            _refuse(f"{path}: {key} must be {wanted}{got}", ctx, param)
        settings[name] = _as_given(value)
    if unknown:
        named = ", ".join(map(repr, sorted(unknown)))
        _refuse(f"{path} sets what does not exist: {named}", ctx, param)
    ctx.default_map = {**(ctx.default_map or {}), **settings}


def _wanted(option: click.Parameter, value: Any) -> str:
    """Say what a value must be and is not; empty if it is."""
    if getattr(option, "multiple", False):
        if option.name == "builder" and isinstance(value, dict):
            right = all(map(_is_text, value.values())) and all(map(_is_text, value))
        else:
            right = isinstance(value, list) and all(map(_is_text, value))
        table = 'a table NAME = "module:callable", or ' * (option.name == "builder")
        return "" if right else f"{table}a list of strings"
    if isinstance(value, list | dict):
        return "one value"
    if getattr(option, "is_flag", False):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(option.type, _NUMBERS):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return "" if is_number or _is_text(value) else "a number"
    return "" if _is_text(value) else "a string without NUL"


def _is_text(value: Any) -> bool:
    """Tell whether a command line could carry it."""
    return isinstance(value, str) and "\0" not in value


def _as_given(value: Any) -> Any:
    """Write a value as a command line does, so that options read it in one way."""
    if isinstance(value, dict):
        return [f"{name}={place}" for name, place in value.items()]
    return value if isinstance(value, bool | list) else str(value)


def _refuse(message: str, ctx: click.Context, param: click.Parameter) -> NoReturn:
    raise click.BadParameter(message, ctx, param)
