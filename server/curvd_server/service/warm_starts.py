"""Eigenvectors that the next query of the same kind may begin with."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from curvd.contract import OperatorSpec, Which
from curvd_server.sessions import SessionStore

Kind: TypeAlias = tuple[str, str, OperatorSpec, Which]
"""Session, caller, operator, and end of the spectrum."""

_REMEMBERED = 16


class WarmStarts:
    """The latest vectors of each kind, on the device; the oldest make room.

    Args:
        sessions: The sessions of the server; what belongs to none of them is forgotten.
        limit_bytes: Memory of all together.
    """

    def __init__(self, sessions: SessionStore, limit_bytes: int) -> None:
        self._sessions, self._limit_bytes = sessions, limit_bytes
        self._found: dict[Kind, Tensor] = {}

    def get(self, kind: Kind) -> Tensor | None:
        """Find vectors.

        Args:
            kind: The kind of the query.

        Returns:
            [k, P], at whatever version; None if there are none.
        """
        return self._found.get(kind)

    def put(self, kind: Kind, vectors: Tensor) -> None:
        """Remember vectors, if there is room.

        Args:
            kind: The kind of the query.
            vectors: [k, P].
        """
        self._found.pop(kind, None)
        self._found[kind] = vectors
        for old in list(self._found):
            held = sum(found.nbytes for found in self._found.values())
            full = len(self._found) > _REMEMBERED or held > self._limit_bytes
            if full or old[0] not in self._sessions:
                del self._found[old]
