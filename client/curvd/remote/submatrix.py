"""Rows and columns of an operator, as a matrix of their own."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import numpy as np

from curvd.errors import InvalidSpec, InvalidVector
from curvd.remote.algebra import (
    Identity,
    Indices,
    dense_bytes,
    number_of,
    reciprocal_of,
)
from curvd.remote.torch_names import AsyncMultiplies, Multiplies
from curvd.tensors import to_numpy

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class SubmatrixBase:
    """What is known about a submatrix without a call; see `Submatrix`.

    Args:
        operator: A symmetric operator, [P, P].
        rows: [R] indices.
        columns: [C] indices.
    """

    __array_ufunc__ = None
    __iter__ = None

    def __init__(self, operator: Any, rows: Indices, columns: Indices) -> None:
        self.operator = operator
        """Whose rows and columns they are."""
        self.rows, self.columns = rows, columns

    @property
    def shape(self) -> tuple[int, int]:
        """``(R, C)``."""
        return len(self.rows), len(self.columns)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of the vectors."""
        dtype: np.dtype[Any] = self.operator.dtype
        return dtype

    @property
    def ndim(self) -> int:
        """How many axes it has: 2."""
        return 2

    @property
    def T(self) -> Any:
        """The transpose, [C, R]."""
        return type(self)(self.operator, self.columns, self.rows)

    mT = mH = H = T

    def adjoint(self) -> Any:
        """Return the transpose."""
        return self.T

    def __mul__(self, other: Any) -> Any:
        number = number_of(other)
        return NotImplemented if number is None else self._of(self.operator * number)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        number = reciprocal_of(other)
        return NotImplemented if number is None else self * number

    def __neg__(self) -> Any:
        return self * -1.0

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Identity):
            if not np.array_equal(self.rows, self.columns):
                msg = (
                    "an identity is added to a submatrix with the same rows and "
                    f"columns; this one is {list(self.shape)} of others"
                )
                raise InvalidSpec(msg, shape=self.shape)
            return self._of(self.operator + other)
        if not isinstance(other, SubmatrixBase):
            return NotImplemented
        if not (
            np.array_equal(self.rows, other.rows)
            and np.array_equal(self.columns, other.columns)
        ):
            msg = "submatrices that are added have the same rows and columns"
            raise InvalidSpec(msg, given=other.shape, expected=self.shape)
        return self._of(self.operator + other.operator)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, Identity | SubmatrixBase):
            return NotImplemented
        return self + -other

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __getitem__(self, key: Any) -> Any:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        return type(self)(self.operator, self.rows[rows], self.columns[columns])

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Refuse to be multiplied out by accident."""
        msg = f"a submatrix {list(self.shape)} becomes an array by products: call to_dense()"
        raise TypeError(msg)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {list(self.shape)} of {self.operator!r}>"

    def _of(self, operator: Any) -> Any:
        return type(self)(operator, self.rows, self.columns)

    def _spread(self, x: Any) -> Any:
        """Put values where they belong in a vector of the operator.

        Args:
            x: [C] or [C, K], of NumPy or torch.

        Returns:
            [P] or [P, K], zero elsewhere.

        Raises:
            InvalidVector: If it has another shape.
        """
        array = to_numpy(x)
        size = len(self.columns)
        if array is None or array.ndim not in (1, 2) or array.shape[0] != size:
            got = type(x).__name__ if array is None else f"shape {list(array.shape)}"
            msg = (
                f"a submatrix {list(self.shape)} multiplies an array [{size}] or "
                f"[{size}, K], got {got}"
            )
            raise InvalidVector(msg, expected=size)
        shape = (self.operator.shape[0], *array.shape[1:])
        whole = np.zeros(shape, x.dtype) if array is x else x.new_zeros(shape)
        whole[self.columns] = x
        return whole

    def _identity(self) -> tuple[bool, Any]:
        """Choose the shorter side, to multiply out.

        Returns:
            Whether it is that of the rows; and the columns to multiply.
        """
        dense_bytes(self.shape, self.dtype)
        flat = self.shape[0] < self.shape[1]
        return flat, np.eye(min(self.shape), dtype=self.dtype)


class Submatrix(Multiplies, SubmatrixBase):
    """Rows and columns of an operator, [R, C]; ``H[rows, columns]`` makes it.

    It multiplies arrays [C] and [C, K] of NumPy or torch; vectors of the operator travel,
    with zeros where no column is. Parameters chosen by name restrict the operator itself,
    so that no others travel.

    Args:
        operator: A symmetric operator, [P, P].
        rows: [R] indices.
        columns: [C] indices.

    Examples:
        >>> H = session.hessian()
        >>> dense = H.to_dense()
        >>> block = H[10:20, [0, 3, 5]]
        >>> np.allclose(block @ np.ones(3), dense[10:20, [0, 3, 5]].sum(1))
        True
        >>> cross = H["1.weight", "3.*"]  # between two layers
        >>> cross.shape, np.allclose(cross.to_dense(), dense[:20, 25:])
        ((20, 18), True)
        >>> H["3.*", "3.*"].layout.names  # an operator of the server
        ('3.weight', '3.bias')
    """

    def __matmul__(self, x: Any) -> Any:
        return (self.operator @ self._spread(x))[self.rows]

    def __rmatmul__(self, x: Any) -> Any:
        return (self.T @ x.T).T if getattr(x, "ndim", 1) == 2 else self.T @ x

    def matvec(self, v: Any, /) -> Any:
        """Multiply one vector, [C]."""
        return self.operator.matvec(self._spread(v))[self.rows]

    def matmat(self, V: Any, /) -> Any:
        """Multiply K columns, [C, K]."""
        return self.operator.matmat(self._spread(V))[self.rows]

    def to_dense(self) -> np.ndarray[Any, Any]:
        """Multiply it out, [R, C], by as many products as its shorter side is long."""
        flat, columns = self._identity()
        found: np.ndarray[Any, Any] = self.T @ columns if flat else self @ columns
        return found.T if flat else found

    def to_scipy(self, dtype: Any = np.float64) -> LinearOperator:
        """Make a SciPy operator of it; see `RemoteOperator.to_scipy`."""
        from curvd.integrations.scipy import linear_operator  # needs curvd[scipy]

        return linear_operator(self, dtype)


class AsyncSubmatrix(AsyncMultiplies, SubmatrixBase):
    """The same for asyncio: ``await (H[rows, columns] @ x)``.

    Args:
        operator: A symmetric operator, [P, P].
        rows: [R] indices.
        columns: [C] indices.
    """

    def __matmul__(self, x: Any) -> Awaitable[Any]:
        return self._rows(self.operator @ self._spread(x))

    async def __rmatmul__(self, x: Any) -> Any:
        if getattr(x, "ndim", 1) == 2:
            return (await (self.T @ x.T)).T
        return await (self.T @ x)

    async def matvec(self, v: Any, /) -> Any:
        """Multiply one vector; see `Submatrix`."""
        return await self._rows(self.operator.matvec(self._spread(v)))

    async def matmat(self, V: Any, /) -> Any:
        """Multiply K columns; see `Submatrix`."""
        return await self._rows(self.operator.matmat(self._spread(V)))

    async def to_dense(self) -> np.ndarray[Any, Any]:
        """Multiply it out; see `Submatrix`."""
        flat, columns = self._identity()
        found: np.ndarray[Any, Any] = await ((self.T if flat else self) @ columns)
        return found.T if flat else found

    async def _rows(self, product: Awaitable[Any]) -> Any:
        return (await product)[self.rows]
