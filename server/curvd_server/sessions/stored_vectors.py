"""Vectors that a session stores between products, so that they need not travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from curvd.contract import ParameterLayout
from curvd.errors import LimitExceeded, RequestIdReused, VectorNotFound
from curvd_server.system import VECTORS, HostMemory, Quotas, calling
from curvd_server.system.quotas import VECTOR_BYTES


@dataclass(frozen=True, slots=True)
class Vector:
    """A stored vector. Nobody writes to it: products and readers share its memory."""

    array: NDArray[Any]
    """[P] or [K, P], in the session's vector type."""
    version: int
    """The parameter version that was current."""
    request_id: str = ""
    """The id of the request that made it; a retry of it must not multiply once more."""
    content: str = ""
    """What that product was asked for."""
    values: tuple[float, ...] = ()
    """[K] Eigenvalues that belong to the vectors: of the operator without its scale and
    damping. Empty: they are just vectors."""
    layout: ParameterLayout | None = None
    """What their elements belong to; None: known by their number alone."""


class Vectors:
    """What one session stores; it is lost with the process.

    Args:
        session_id: The session's id, for messages.
        budget_bytes: Memory of all together.
        memory: The host's memory, which all sessions share; None: no limit.
        quotas: What the caller whose vectors they are may store in all sessions.
    """

    def __init__(
        self,
        session_id: str,
        budget_bytes: int,
        memory: HostMemory | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self._session_id, self._budget = session_id, budget_bytes
        self._memory, self._quotas = memory or HostMemory(), quotas or Quotas()
        self._owner = calling().name
        self._vectors: dict[str, Vector] = {}

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return sum(v.array.nbytes for v in self._vectors.values())

    def check_room(self, name: str, nbytes: int) -> None:
        """Refuse a vector before it is received or computed.

        Args:
            name: The name of the vector; what has it now makes room.
            nbytes: Its memory.

        Raises:
            LimitExceeded: If the session would store too much.
        """
        rest = self.nbytes + self._more(name, 0)
        if rest + nbytes > self._budget:
            msg = (
                f"session {self._session_id} stores {rest} bytes of vectors; {nbytes} "
                f"more would exceed the limit of {self._budget} (stored_bytes). Delete "
                "some"
            )
            raise LimitExceeded(msg, stored_bytes=rest, limit=self._budget)
        more = self._more(name, nbytes)
        self._take(more)
        self._give(more)

    def put(self, name: str, vector: Vector) -> None:
        """Store a vector in place of what had its name.

        Args:
            name: The name of the vector.
            vector: The vector.

        Raises:
            LimitExceeded: If the session would store too much.
        """
        self.check_room(name, vector.array.nbytes)
        self._take(self._more(name, vector.array.nbytes))
        self._vectors[name] = vector

    def get(self, name: str) -> Vector:
        """Find a vector.

        Args:
            name: The name of the vector.

        Returns:
            The vector.

        Raises:
            VectorNotFound: If there is none.
        """
        if name not in self._vectors:
            msg = (
                f"session {self._session_id} stores no vector {name!r}; a restart of "
                "the server loses them: put it again"
            )
            raise VectorNotFound(msg, vector=name)
        return self._vectors[name]

    def made_by(self, name: str, request_id: str, content: str) -> Vector | None:
        """Find a vector that the same request made before.

        Args:
            name: The name of the vector.
            request_id: The id of the request; empty ones are never the same.
            content: What it asks for.

        Returns:
            The vector; None if it is still to be made.

        Raises:
            RequestIdReused: If the same id asked for something else.
        """
        vector = self._vectors.get(name)
        if not request_id or vector is None or vector.request_id != request_id:
            return None
        check_same(vector.content, content, request_id)
        return vector

    def delete(self, name: str) -> None:
        """Forget a vector.

        Args:
            name: The name of the vector.

        Raises:
            VectorNotFound: If there is none.
        """
        self._give(self.get(name).array.nbytes)
        del self._vectors[name]

    def items(self) -> list[tuple[str, Vector]]:
        """List what is stored, the oldest name first."""
        return list(self._vectors.items())

    def clear(self) -> None:
        """Forget everything."""
        self._give(self.nbytes)
        self._vectors.clear()

    def _take(self, nbytes: int) -> None:
        """Hold memory, within the caller's quota and the host's; less if negative."""
        if nbytes <= 0:
            self._give(-nbytes)
            return
        self._quotas.take(VECTOR_BYTES, nbytes)
        try:
            self._memory.take(VECTORS, nbytes)
        except BaseException:
            self._quotas.give(VECTOR_BYTES, nbytes, self._owner)
            raise

    def _give(self, nbytes: int) -> None:
        self._quotas.give(VECTOR_BYTES, nbytes, self._owner)
        self._memory.give(VECTORS, nbytes)

    def _more(self, name: str, nbytes: int) -> int:
        """Say how much more is held with a vector in place of what has its name."""
        old = self._vectors.get(name)
        return nbytes - (0 if old is None else old.array.nbytes)


def check_same(known: str, given: str, request_id: str) -> None:
    """Refuse a request id that came before with other content.

    Args:
        known: Fingerprint of the request that had it first.
        given: Fingerprint of this one.
        request_id: The id that both have.

    Raises:
        RequestIdReused: If they differ.
    """
    if known != given:
        msg = (
            f"request_id {request_id!r} came before with other content; use a new one "
            "for another request"
        )
        raise RequestIdReused(msg, request_id=request_id)
