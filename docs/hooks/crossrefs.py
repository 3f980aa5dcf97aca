"""Links between docstrings: a public name in backticks leads to its place on the site.

Docstrings are written to be read in an editor, so they say `Client.session_for` and no
more. This extension of griffe looks each such name up among what `curvd.__all__` names,
and in the class whose docstring it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_NAME = re.compile(r"(?<![`\w])`([A-Za-z_][\w.]*)`(?![`\w])")


class CrossReferences(griffe.Extension):
    """Turns names in backticks into references that mkdocstrings resolves."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of a package.

        Args:
            pkg: Loaded; its aliases resolve.
        """
        if pkg.name != "curvd":
            return
        public = [name for name in pkg.exports or [] if isinstance(name, str)]
        classes = {
            f"curvd.{name}": pkg[name]
            for name in public
            if name in pkg.members and pkg[name].is_class
        }
        for item in _objects(pkg):
            if item.docstring is not None:
                item.docstring.value = _linked(item, public, classes, pkg)


def _linked(
    item: griffe.Object,
    public: list[str],
    classes: dict[str, griffe.Object],
    pkg: griffe.Module,
) -> str:
    owner = item if item.is_class else item.parent
    # The first public class that has the docstring's class, itself or by inheritance.
    homes = [path for path, c in classes.items() if owner and _is_of(c, owner)]

    def replace(match: re.Match[str]) -> str:
        name = match[1].removeprefix("curvd.")
        first, _, rest = name.partition(".")
        if first in public and (not rest or rest in pkg[first].all_members):
            return f"[`{match[1]}`][curvd.{name}]"
        if homes and name in classes[homes[0]].all_members and name != item.name:
            return f"[`{match[1]}`][{homes[0]}.{name}]"
        return match[0]

    return _NAME.sub(replace, item.docstring.value)


def _is_of(public: griffe.Object, owner: griffe.Object) -> bool:
    return owner.is_class and owner.canonical_path in {
        public.canonical_path,
        *(base.canonical_path for base in public.mro()),
    }


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    for member in parent.members.values():
        if not member.is_alias:
            yield member
            yield from _objects(member)
