"""Who calls, and whose things are: what everything that belongs to somebody is asked with.

What enters the server as a call runs as one identity from its beginning to its end; tasks
and threads that it starts inherit it. Whoever finds a thing by its name asks here whether
the caller may have it, and if not, the thing does not exist.
"""

from __future__ import annotations

from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass

from curvd.errors import InvalidSpec

USER, OPERATOR = "user", "operator"
ROLES = (USER, OPERATOR)
GROUP_MARK = "@"
"""Begins the name of a group, where a thing is shared with one."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller."""

    name: str = ""
    """Empty: nobody in particular, who owns what was made before anybody had a name."""
    roles: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    is_alone: bool = False
    """Whether this server tells nobody apart, so that everything is this caller's."""

    @property
    def is_operator(self) -> bool:
        """Whether the caller sees and ends what belongs to others."""
        return self.is_alone or OPERATOR in self.roles

    def owns(self, owner: str) -> bool:
        """Tell whether a thing is the caller's own; what has no owner is an operator's.

        Args:
            owner: Name of its owner; empty if it has none.
        """
        return self.is_alone or owner == self.name or (not owner and self.is_operator)

    def uses(self, owner: str, shared_with: Collection[str]) -> bool:
        """Tell whether the caller may use a thing.

        Args:
            owner: Name of its owner.
            shared_with: Names, and groups behind an "@", that its owner shares it with.
        """
        if self.owns(owner) or (self.name and self.name in shared_with):
            return True
        return any(f"{GROUP_MARK}{group}" in shared_with for group in self.groups)

    def sees(self, owner: str, shared_with: Collection[str]) -> bool:
        """Tell whether a thing exists for the caller; as for `uses`."""
        return self.is_operator or self.uses(owner, shared_with)


def check_share(names: Collection[str]) -> tuple[str, ...]:
    """Refuse what nobody can be called with whom a thing is to be shared.

    Args:
        names: Names, and groups behind an "@".

    Returns:
        The names.

    Raises:
        InvalidSpec: If one is empty or not printable.
    """
    for name in names:
        bare = name.removeprefix(GROUP_MARK)
        if not bare or not bare.isprintable() or bare[0] in (GROUP_MARK, "*"):
            msg = (
                "share_with takes names of callers, and groups behind one "
                f"{GROUP_MARK!r}; none means everybody; got {name[:80]!r}"
            )
            raise InvalidSpec(msg, share_with=name[:80])
    return tuple(names)


EVERYBODY = Identity(is_alone=True)
"""Whoever calls a server that tells nobody apart."""
_NOBODY = Identity()
CALLING: ContextVar[Identity] = ContextVar("calling", default=_NOBODY)
"""Who makes the call under way. Without a call nobody in particular, who is no operator."""


def calling() -> Identity:
    """Say who makes the call under way."""
    return CALLING.get()
