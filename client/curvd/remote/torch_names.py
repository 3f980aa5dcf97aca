"""torch's names for what operators do, so that code that was written for a matrix reads on."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

T = TypeVar("T")

_INSTEAD = MappingProxyType({
    "eigvalsh": "eigsh(k, vectors=False).values has the k largest",
    "eigh": "eigsh(k) has the k largest",
    "lobpcg": "eigsh(k) has the k largest",
    "svd": "eigsh(k, which='largest_magnitude'): operators are symmetric",
    "inverse": "solve(b) multiplies by it",
    "inv": "solve(b) multiplies by it",
    "pinv": "solve(b, damping=…) comes near to it",
    "cholesky": "solve(b) and logdet() need none",
    "det": "logdet() is its logarithm",
    "slogdet": "logdet() has sign and logarithm in one: NaN if it is not positive definite",
    "diag": "diagonal()",
    "numpy": "to_dense(), up to 1 GiB",
    "tolist": "to_dense(), up to 1 GiB",
    "numel": "shape; nothing of that size exists",
    "t": "T: the operator itself, or a submatrix's transpose",
})
"""What torch has of a matrix and a server has not, and what is there instead."""


class TorchNames:
    """A base of all that multiply: torch's names for what needs no call.

    Examples:
        >>> H = session.hessian()
        >>> H.dim(), H.size(), H.size(0)
        (2, (43, 43), 43)
        >>> H.eigvalsh
        Traceback (most recent call last):
            ...
        AttributeError: 'RemoteOperator' has no 'eigvalsh': eigsh(k, ...
    """

    shape: Any

    def dim(self) -> int:
        """Tell how many axes it has: 2."""
        return 2

    def size(self, dim: int | None = None) -> Any:
        """Tell its shape, or how long one axis is.

        Args:
            dim: Which axis; None: all.

        Returns:
            ``(P, P)``, or one of the two.
        """
        return self.shape if dim is None else self.shape[dim]

    if not TYPE_CHECKING:  # or any name would do for a type checker

        def __getattr__(self, name: str) -> NoReturn:
            """Say what is there instead of a name that torch has."""
            msg = f"{type(self).__name__!r} has no {name!r}"
            if name in _INSTEAD:
                msg += f": {_INSTEAD[name]}"
            raise AttributeError(msg, name=name, obj=self)


class Multiplies(TorchNames):
    """torch's names for products, of the blocking client."""

    matvec: Any
    matmat: Any

    def mv(self, v: T, /) -> T:
        """Multiply one vector, as torch calls it; see `matvec`."""
        product: T = self.matvec(v)
        return product

    def mm(self, V: T, /) -> T:
        """Multiply K columns, as torch calls it; see `matmat`."""
        product: T = self.matmat(V)
        return product

    def matmul(self, x: T, /) -> T:
        """Multiply a vector or columns, as torch calls it: ``H @ x``."""
        product: T = self @ x  # type: ignore[operator]
        return product


class AsyncMultiplies(TorchNames):
    """torch's names for products, awaited."""

    matvec: Any
    matmat: Any

    async def mv(self, v: T, /) -> T:
        """Multiply one vector, as torch calls it; see `matvec`."""
        product: T = await self.matvec(v)
        return product

    async def mm(self, V: T, /) -> T:
        """Multiply K columns, as torch calls it; see `matmat`."""
        product: T = await self.matmat(V)
        return product

    async def matmul(self, x: T, /) -> T:
        """Multiply a vector or columns, as torch calls it: ``H @ x``."""
        product: T = await (self @ x)  # type: ignore[operator]
        return product
