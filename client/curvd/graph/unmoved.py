"""A run of a module that leaves nothing behind, or is none to conclude from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_CONTAINERS = (list, dict, set)
_FOLLOWING = ("_flat_weights", "_flat_weight_refs")
"""Lists of a recurrent layer, which lag behind its parameters and decide nothing."""


class Unsure(Exception):
    """It cannot be told what a module does."""


@contextlib.contextmanager
def unmoved(wrapper: nn.Module) -> Iterator[None]:
    """Put back what a module keeps of a run.

    Args:
        wrapper: The module, with its layers.

    Raises:
        Unsure: If it kept something: a next run may do something else.
    """
    before = [
        (module, dict(vars(module)), _contents(module)) for module in wrapper.modules()
    ]
    moved = False
    try:
        yield
    finally:
        for module, held, contents in before:
            moved = moved or not _is_as_before(module, held, contents)
            for name, content in contents.items():
                _refill(held[name], content)
            vars(module).clear()
            vars(module).update(held)
    if moved:
        raise Unsure


def _contents(module: nn.Module) -> dict[str, Any]:
    """Copy the lists, dicts and sets that a module holds."""
    return {n: type(c)(c) for n, c in vars(module).items() if type(c) in _CONTAINERS}


def _is_as_before(
    module: nn.Module, held: Mapping[str, Any], contents: Mapping[str, Any]
) -> bool:
    """Compare attributes by identity, and containers by that of what they contain."""
    now = vars(module)
    following = _FOLLOWING if isinstance(module, nn.RNNBase) else ()
    return list(now) == list(held) and all(
        _same(now[name], contents[name]) if name in contents else now[name] is value
        for name, value in held.items()
        if name not in following
    )


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or len(a) != len(b):
        return False
    pairs = zip(_parts(a), _parts(b), strict=True)
    return all(x is y for x, y in pairs)


def _parts(container: Any) -> Iterator[Any]:
    yield from container
    if isinstance(container, dict):
        yield from container.values()


def _refill(container: Any, content: Any) -> None:
    if not _same(container, content):
        container.clear()
        getattr(container, "extend" if type(container) is list else "update")(content)
