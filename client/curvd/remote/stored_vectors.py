"""Vectors that a session stores: put, fetched, combined and forgotten by each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd._calls import curvature_requests
from curvd._transport import AsyncConnection, Connection
from curvd.contract import SessionInfo, StoredVector
from curvd.errors import VectorNotFound
from curvd.tensors import operand

Vectors = Sequence[StoredVector | str] | StoredVector | str
"""One stored vector or several, or their names."""


class StoredVectors:
    """What a session of the blocking client does with its vectors."""

    _connection: Connection
    _info: SessionInfo

    def put(self, name: str, value: Any, *, wire: str | None = None) -> StoredVector:
        """Store a vector or columns in the session, as operand of later products.

        What is stored is lost when the server restarts.

        Args:
            name: What to call it; one that exists is replaced.
            value: The value, as for ``H @ value``.
            wire: ``BF16`` or ``F16`` send half the bytes, rounded to nearest.

        Returns:
            What stands for it.

        Examples:
            >>> stored = session.put("ones", np.ones(43))
            >>> stored.shape, stored.dtype
            ((43,), 'F64')
            >>> H = session.hessian()
            >>> np.array_equal(H.multiply(stored), H @ np.ones(43))
            True
        """
        call = curvature_requests.put_vector(
            self._info,
            name,
            operand(value, self._info.layout, self._info.dtype),
            wire_type=curvature_requests.check_wire(wire, self._info.dtype),
        )
        return self._connection.run(call)

    def get(self, vector: StoredVector | str, *, wire: str | None = None) -> Any:
        """Fetch a stored vector.

        Args:
            vector: Which, or its name.
            wire: ``BF16`` or ``F16`` fetch half the bytes, rounded to nearest.

        Returns:
            [P], or [P, K].

        Examples:
            >>> stored = session.put("columns", np.eye(43, 2))
            >>> session.get("columns").shape
            (43, 2)
        """
        wire_type = curvature_requests.check_wire(wire, self._info.dtype)
        found = vector
        if isinstance(found, str):
            found = _named(self._info.id, found, self.vectors())
        call = curvature_requests.get_vector(self._info, found, wire_type=wire_type)
        return self._connection.run(call)

    def vectors(self) -> list[StoredVector]:
        """List what the session stores, the oldest name first."""
        return self._connection.run(curvature_requests.list_vectors(self._info.id))

    def combine(
        self, terms: Mapping[StoredVector | str, float], store: str
    ) -> StoredVector:
        """Store a linear combination of stored vectors, where they are.

        Args:
            terms: Coefficients by vector, or by name; all of one shape.
            store: Name of the sum, which may be that of a term.

        Returns:
            What stands for the sum.

        Examples:
            >>> loss, g = session.gradient(store="g")
            >>> _ = session.put("x", np.ones(43))
            >>> stored = session.combine({"x": 1.0, "g": -0.1}, store="x")  # a step
            >>> np.allclose(session.get("x"), 1 - 0.1 * session.get("g"))
            True
        """
        named = {name_of(vector): float(c) for vector, c in terms.items()}
        return self._connection.run(
            curvature_requests.combine_vectors(self._info.id, named, store)
        )

    def inner_products(
        self, left: Vectors, right: Vectors | None = None
    ) -> NDArray[np.float64]:
        """Multiply stored vectors with each other, where they are.

        Args:
            left: A stored vector or several, or their names; their columns, one after the
                other, are the rows of the answer.
            right: The same for its columns; None: `left`, so that it is a Gram matrix,
                whose diagonal has the squared norms.

        Returns:
            [L, R], summed in float64.

        Examples:
            >>> _ = session.put("two", np.eye(43, 2)), session.put("one", np.ones(43))
            >>> session.inner_products(["two", "one"])
            array([[ 1.,  0.,  1.],
                   [ 0.,  1.,  1.],
                   [ 1.,  1., 43.]])
        """
        call = curvature_requests.inner_products(
            self._info.id, names_of(left), () if right is None else names_of(right)
        )
        return self._connection.run(call)

    def orthonormalise(
        self, vectors: Vectors, store: str, *, tolerance: float = 0.0
    ) -> StoredVector:
        """Store an orthonormal basis of what stored vectors span, as columns.

        Args:
            vectors: A stored vector or several, or their names.
            store: Name of the basis.
            tolerance: Directions shorter than this, relative to the longest, are left
                out. 0: what rounding hides of vectors of one length, so that a short
                vector beside a long one stays.

        Returns:
            What stands for the basis [r, P], principal directions first: r is less than
            the number of vectors by those that were left out, as they depend on others.

        Examples:
            >>> _ = session.put("a", np.ones((43, 2)))  # the same column twice
            >>> session.orthonormalise("a", store="basis").shape
            (1, 43)
        """
        return self._connection.run(
            curvature_requests.orthonormalise_vectors(
                self._info.id, names_of(vectors), store, tolerance
            )
        )

    def discard(self, vector: StoredVector | str) -> None:
        """Forget a stored vector and free its memory.

        Args:
            vector: Which, or its name.

        Examples:
            >>> stored = session.put("for a while", np.ones(43))
            >>> session.discard(stored)
            >>> "for a while" in [vector.name for vector in session.vectors()]
            False
        """
        call = curvature_requests.delete_vector(self._info.id, name_of(vector))
        try:
            self._connection.run(call)
        except VectorNotFound:
            if call.attempts == 1:
                raise
            # An earlier attempt discarded it, and its answer was lost.


class AsyncStoredVectors:
    """What a session of the asyncio client does with its vectors."""

    _connection: AsyncConnection
    _info: SessionInfo

    async def put(
        self, name: str, value: Any, *, wire: str | None = None
    ) -> StoredVector:
        """Store a vector or columns in the session; see `curvd.Session`."""
        call = curvature_requests.put_vector(
            self._info,
            name,
            operand(value, self._info.layout, self._info.dtype),
            wire_type=curvature_requests.check_wire(wire, self._info.dtype),
        )
        return await self._connection.run(call)

    async def get(self, vector: StoredVector | str, *, wire: str | None = None) -> Any:
        """Fetch a stored vector; see `curvd.Session`."""
        wire_type = curvature_requests.check_wire(wire, self._info.dtype)
        found = vector
        if isinstance(found, str):
            found = _named(self._info.id, found, await self.vectors())
        call = curvature_requests.get_vector(self._info, found, wire_type=wire_type)
        return await self._connection.run(call)

    async def vectors(self) -> list[StoredVector]:
        """List what the session stores, the oldest name first."""
        return await self._connection.run(
            curvature_requests.list_vectors(self._info.id)
        )

    async def combine(
        self, terms: Mapping[StoredVector | str, float], store: str
    ) -> StoredVector:
        """Store a linear combination of stored vectors; see `curvd.Session`."""
        named = {name_of(vector): float(c) for vector, c in terms.items()}
        call = curvature_requests.combine_vectors(self._info.id, named, store)
        return await self._connection.run(call)

    async def inner_products(
        self, left: Vectors, right: Vectors | None = None
    ) -> NDArray[np.float64]:
        """Multiply stored vectors with each other; see `curvd.Session`."""
        call = curvature_requests.inner_products(
            self._info.id, names_of(left), () if right is None else names_of(right)
        )
        return await self._connection.run(call)

    async def orthonormalise(
        self, vectors: Vectors, store: str, *, tolerance: float = 0.0
    ) -> StoredVector:
        """Store an orthonormal basis of stored vectors; see `curvd.Session`."""
        call = curvature_requests.orthonormalise_vectors(
            self._info.id, names_of(vectors), store, tolerance
        )
        return await self._connection.run(call)

    async def discard(self, vector: StoredVector | str) -> None:
        """Forget a stored vector; see `curvd.Session`."""
        call = curvature_requests.delete_vector(self._info.id, name_of(vector))
        try:
            await self._connection.run(call)
        except VectorNotFound:
            if call.attempts == 1:
                raise


def name_of(vector: StoredVector | str) -> str:
    """Tell the name of a stored vector.

    Args:
        vector: The vector, or its name.

    Returns:
        Its name.
    """
    return vector if isinstance(vector, str) else vector.name


def names_of(vectors: Vectors) -> list[str]:
    """Tell the names of stored vectors.

    Args:
        vectors: One or several of them, or names.

    Returns:
        The names, in order.
    """
    if isinstance(vectors, str | StoredVector):
        return [name_of(vectors)]
    return [name_of(vector) for vector in vectors]


def _named(session_id: str, name: str, vectors: Sequence[StoredVector]) -> StoredVector:
    found = [vector for vector in vectors if vector.name == name]
    if not found:
        known = ", ".join(repr(vector.name) for vector in vectors) or "none"
        msg = f"session {session_id} stores no vector {name!r}; known: {known}"
        raise VectorNotFound(msg, vector=name)
    return found[0]
