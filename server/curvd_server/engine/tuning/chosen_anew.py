"""Plans that were chosen on a busy machine, and those that were chosen anew since.

Both are remembered: who asked for the last tier keeps the bits of the first choice, also
after a restart, and whoever has tiers gets the better one.
"""

from __future__ import annotations

from curvd_server.engine.tuning.plan import Memory

BUSY = 1.5
"""Seconds per second of computing from which on the choice of a plan is in doubt."""


class Renewed:
    """A memory in which plans that were chosen anew stand before the first choices.

    Args:
        memory: Where both are kept.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def get(self, key: str, default: str, /) -> str:
        """Look one up."""
        return self._memory.get(_anew(key), "") or self._memory.get(key, default)

    def __setitem__(self, key: str, value: str, /) -> None:
        """Keep one where it was found."""
        again = bool(self._memory.get(_anew(key), ""))
        self._memory[_anew(key) if again else key] = value

    def renew(self, key: str, value: str) -> None:
        """Keep one that was chosen anew; the first choice stays."""
        self._memory[_anew(key)] = value


def _anew(key: str) -> str:
    return f"{key}/anew"
