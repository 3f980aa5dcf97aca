"""Which tensors of a checkpoint are a model's, whatever stands before their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from curvd.contract import without_wrappers
from curvd.errors import InvalidSpec, StateMismatch
from curvd_server.storage.assembly import Piece
from curvd_server.storage.registry import Architecture

_SHOWN = 8


def chosen(
    pieces: Iterable[Piece], model: Architecture, prefix: str = ""
) -> list[Piece]:
    """Pick the tensors of a model, under its own names.

    Args:
        pieces: All of a checkpoint.
        model: What the model has. Its parameters must all be there, tied ones under one
            of their names; buffers are taken where they are.
        prefix: What stands before the model's names; empty: found out.

    Returns:
        The pieces of the model's tensors.

    Raises:
        InvalidSpec: If several prefixes would do.
        StateMismatch: If a parameter is missing.
    """
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[without_wrappers(piece.name)].append(piece)
    homes: dict[str, list[str]] = defaultdict(list)
    for name in model.tensors:
        homes[model.ties.get(name, name)].append(name)
    if not prefix:
        prefix = _prefix(by_name, homes, model)
    missing = _missing(by_name, homes, model, prefix)
    if missing:
        before = f" with {prefix!r} before their names" if prefix else ""
        msg = (
            f"the checkpoint lacks {len(missing)} parameters of the model{before}: "
            f"{', '.join(missing[:_SHOWN])}{', …' if len(missing) > _SHOWN else ''}; it "
            f"has {', '.join(sorted(by_name)[:_SHOWN])}"
            f"{', …' if len(by_name) > _SHOWN else ''}"
        )
        raise StateMismatch(msg, missing=len(missing))
    names = (name for known in homes.values() for name in known)
    return [
        replace(piece, name=name)
        for name in names
        for piece in by_name.get(prefix + name, ())
    ]


def _prefix(
    given: Mapping[str, Sequence[Piece]],
    homes: Mapping[str, Sequence[str]],
    model: Architecture,
) -> str:
    """Find what stands before the names; the model's own names win."""
    parameters = [home for home in homes if home not in model.buffers]
    if not parameters or not _missing(given, homes, model, ""):
        return ""
    ends = homes[parameters[0]]
    found = {
        name.removesuffix(end)
        for name in given
        for end in ends
        if name.endswith(f".{end}")
    }
    fitting = sorted(p for p in found if not _missing(given, homes, model, p))
    if len(fitting) > 1:
        msg = (
            f"the checkpoint has the model {len(fitting)} times, with "
            f"{', '.join(map(repr, fitting[:_SHOWN]))} before its names: say which with "
            "prefix="
        )
        raise InvalidSpec(msg, prefixes=", ".join(fitting))
    return fitting[0] if fitting else ""


def _missing(
    given: Mapping[str, Sequence[Piece]],
    homes: Mapping[str, Sequence[str]],
    model: Architecture,
    prefix: str,
) -> list[str]:
    return [
        home
        for home, names in homes.items()
        if home not in model.buffers and not any(prefix + n in given for n in names)
    ]
