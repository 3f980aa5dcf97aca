"""Which parameters an operator acts on: globs over their names, in the order given.

Both sides read it: the server for a session, the client for an operator.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

from curvd.errors import InvalidSpec, LimitExceeded

LONGEST_PATTERN, MOST_PATTERNS = 256, 1_000


def check_patterns(patterns: Sequence[str], what: str = "params") -> tuple[str, ...]:
    """Refuse what no glob over names can be.

    Args:
        patterns: The patterns that a caller gave, not checked yet.
        what: The option that they belong to, for messages.

    Returns:
        The patterns.

    Raises:
        LimitExceeded: If there are too many, or one is too long.
        InvalidSpec: If one is empty.
    """
    if len(patterns) > MOST_PATTERNS:
        msg = (
            f"{what} has {len(patterns)} patterns; the limit is {MOST_PATTERNS}. "
            "Use wildcards"
        )
        raise LimitExceeded(msg, patterns=len(patterns), limit=MOST_PATTERNS)
    for pattern in patterns:
        if len(pattern) > LONGEST_PATTERN:
            msg = (
                f"a pattern of {what} has {len(pattern)} characters; the limit is "
                f"{LONGEST_PATTERN}"
            )
            raise LimitExceeded(msg, length=len(pattern), limit=LONGEST_PATTERN)
        if not pattern:
            msg = f"a pattern of {what} is empty; leave it out, or write '*' for all"
            raise InvalidSpec(msg)
    return tuple(patterns)


def select(
    names: Sequence[str],
    patterns: Sequence[str],
    *,
    aliases: Mapping[str, str],
    frozen: Sequence[str] = (),
    what: str = "params",
) -> tuple[str, ...]:
    """Choose parameters.

    Args:
        names: Those that may be chosen, in the model's order.
        patterns: Globs over whole names (``*`` crosses dots); none choose all.
        aliases: Further name of a tied parameter -> the name that it goes by.
        frozen: Parameters that the model itself keeps fixed, for the message.
        what: The option that the patterns belong to, for messages.

    Returns:
        The names in the order of the patterns, and in the model's order within one;
        each once, where it is matched first.

    Raises:
        InvalidSpec: If a pattern matches nothing; the message names what is near.
    """
    if not patterns:
        return tuple(names)
    known = {name: name for name in names} | {
        alias: home for alias, home in aliases.items() if home in names
    }
    position = {name: index for index, name in enumerate(names)}
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matched = {known[n] for n in known if fnmatch.fnmatchcase(n, pattern)}
        if not matched:
            raise _nothing(pattern, list(known), frozen, what)
        chosen.update(dict.fromkeys(sorted(matched, key=position.__getitem__)))
    return tuple(chosen)


def _nothing(
    pattern: str, known: list[str], frozen: Sequence[str], what: str
) -> InvalidSpec:
    """Say which names come near a pattern that matches none."""
    fixed = [name for name in frozen if fnmatch.fnmatchcase(name, pattern)]
    if fixed:
        msg = (
            f"{what}: {pattern!r} matches only parameters that the model keeps fixed "
            f"(requires_grad=False), such as {fixed[0]!r}"
        )
        return InvalidSpec(msg, pattern=pattern, frozen=len(fixed))
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
    msg = (
        f"{what}: {pattern!r} matches none of the {len(known)} parameter names; near "
        f"it are {', '.join(map(repr, near))}. Globs match whole names"
    )
    return InvalidSpec(msg, pattern=pattern, near=", ".join(near))
