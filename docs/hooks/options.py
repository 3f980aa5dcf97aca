"""Methods whose arguments are the options of a query or an operator, shown as callers see them.

`curvd.remote.asking` makes signature and documentation of the options when the module is
imported; griffe reads the source. This extension asks the module.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import griffe

_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
}


class QueryOptions(griffe.Extension):
    """Gives the methods that ask queries or make operators the arguments that they take."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the methods of a package.

        Args:
            pkg: The package, loaded.
        """
        if pkg.name != "curvd":
            return
        for method in _asking(pkg):
            owner = importlib.import_module(method.parent.parent.path)
            made = getattr(getattr(owner, method.parent.name), method.name)
            signature = inspect.signature(made)
            method.docstring.value = inspect.cleandoc(made.__doc__)
            method.returns = signature.return_annotation
            method.parameters = griffe.Parameters(
                *map(_parameter, signature.parameters.values())
            )


def _asking(parent: griffe.Object) -> Iterator[griffe.Function]:
    for member in parent.members.values():
        if member.is_alias:
            continue
        if member.is_function and any(
            str(decorator.value).startswith(("asks", "makes"))
            for decorator in member.decorators
        ):
            yield member
        yield from _asking(member)


def _parameter(given: inspect.Parameter) -> griffe.Parameter:
    has_default = given.default is not given.empty
    default = getattr(
        given.default, "value", given.default
    )  # a choice, as people give it
    return griffe.Parameter(
        given.name,
        kind=_KINDS[given.kind],
        annotation=None if given.annotation is given.empty else given.annotation,
        default=repr(default) if has_default else None,
    )
