"""Sums of operators: each term is multiplied by its server, all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from curvd.contract import ParameterLayout, ResultInfo
from curvd.errors import VersionMismatch
from curvd.remote.algebra import Algebra, Indices, dense_bytes
from curvd.remote.submatrix import AsyncSubmatrix, Submatrix
from curvd.remote.torch_names import AsyncMultiplies, Multiplies

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

T = TypeVar("T")

_ROUNDS = 3
"""How often terms are multiplied anew because parameters changed meanwhile."""


class SumBase:
    """What is known about a sum without a call; see `OperatorSum`.

    Args:
        terms: Operators on the same parameters.
    """

    __array_ufunc__ = None

    def __init__(self, terms: Sequence[Any]) -> None:
        # Its own: `last` of the caller's operators stays what it was.
        self.terms: tuple[Any, ...] = tuple(term._like(term.spec) for term in terms)
        """The operators that add up to it."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        shape: tuple[int, int] = self.terms[0].shape
        return shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of the vectors."""
        dtype: np.dtype[Any] = self.terms[0].dtype
        return dtype

    @property
    def layout(self) -> ParameterLayout:
        """Names, shapes and order of the parameters that a vector consists of."""
        layout: ParameterLayout = self.terms[0].layout
        return layout

    @property
    def last(self) -> tuple[ResultInfo | None, ...]:
        """Where the products of the latest sum came from, term by term."""
        return tuple(term.last for term in self.terms)

    def __repr__(self) -> str:
        terms = " + ".join(term.said for term in self.terms)
        return f"<{type(self).__name__} {terms}, {list(self.shape)} {self.dtype}>"

    def _parts(self) -> tuple[Any, ...]:
        return self.terms

    def _stale(self, round_: int) -> list[int]:
        """List the terms whose product belongs to parameters that are gone."""
        newest: dict[str, int] = {}
        versions = [
            (t.family, 0 if t.last is None else t.last.version) for t in self.terms
        ]
        for family, version in versions:
            newest[family] = max(version, newest.get(family, 0))
        stale = [n for n, (family, v) in enumerate(versions) if v < newest[family]]
        if stale and round_ == _ROUNDS:
            msg = (
                f"the parameters changed {_ROUNDS} times while the terms of a sum were "
                "multiplied: update less often, or build the terms with "
                "expected_version="
            )
            raise VersionMismatch(msg)
        return stale


class OperatorSum(SumBase, Multiplies, Algebra[Any, "OperatorSum", Submatrix]):
    """A sum of operators, such as ``H + 2 * G``; it multiplies like each of them.

    The terms are multiplied side by side, each by its server, and belong to one version of
    the parameters that their sessions share (`Session.on`). Terms of several sessions, for
    example of a training and a test set, may be added if they have the same parameters.
    Queries such as ``eigsh`` are for single operators: for a sum there is `to_scipy`.

    Args:
        terms: Operators on the same parameters.

    Examples:
        >>> H, G = session.hessian(), session.ggn()
        >>> rest = H - G  # what the Gauss-Newton matrix leaves out
        >>> rest.shape
        (43, 43)
        >>> v = np.ones(43)
        >>> np.allclose(rest @ v, H @ v - G @ v)
        True
        >>> (H + H).spec.scale  # one operator of the server
        2.0
    """

    def __matmul__(self, x: T) -> T:
        product: T = self._multiplied(lambda term: term @ x)
        return product

    def __rmatmul__(self, x: T) -> T:
        product: T = self._multiplied(lambda term: x @ term)
        return product

    def multiply(
        self, x: Any, /, *, wire: str | None = None, verify: bool = False
    ) -> Any:
        """Multiply, and say how vectors travel; see `RemoteOperator.multiply`."""
        return self._multiplied(lambda term: term.multiply(x, wire=wire, verify=verify))

    def matvec(self, v: T, /) -> T:
        """Multiply one vector, [P] or one array [*shape] per parameter."""
        product: T = self._multiplied(lambda term: term.matvec(v))
        return product

    def matmat(self, V: T, /) -> T:
        """Multiply K columns, [P, K] or one array [*shape, K] per parameter."""
        product: T = self._multiplied(lambda term: term.matmat(V))
        return product

    def to_dense(self) -> np.ndarray[Any, Any]:
        """Multiply it out, [P, P]; up to 1 GiB."""
        dense_bytes(self.shape, self.dtype)
        return self.matmat(np.eye(self.shape[0], dtype=self.dtype))

    def to_scipy(self, dtype: Any = np.float64) -> LinearOperator:
        """Make a SciPy operator of it; see `RemoteOperator.to_scipy`."""
        from curvd.integrations.scipy import linear_operator  # needs curvd[scipy]

        return linear_operator(self, dtype)

    def _sum_of(self, terms: tuple[Any, ...]) -> OperatorSum:
        return OperatorSum(terms)

    def _submatrix_of(
        self, operator: Any, rows: Indices, columns: Indices
    ) -> Submatrix:
        return Submatrix(operator, rows, columns)

    def _multiplied(self, multiply: Callable[[Any], Any]) -> Any:
        products = _at_once(multiply, self.terms)
        round_ = 0
        while stale := self._stale(round_):
            again = _at_once(multiply, [self.terms[n] for n in stale])
            for n, product in zip(stale, again, strict=True):
                products[n] = product
            round_ += 1
        return added(products)


class AsyncOperatorSum(
    SumBase, AsyncMultiplies, Algebra[Any, "AsyncOperatorSum", AsyncSubmatrix]
):
    """The same for asyncio: ``await ((H + G) @ x)``.

    Args:
        terms: Operators on the same parameters.
    """

    def __matmul__(self, x: T) -> Awaitable[T]:
        return self._multiplied(lambda term: term @ x)

    def __rmatmul__(self, x: T) -> Awaitable[T]:
        return self._multiplied(lambda term: x @ term)

    async def multiply(
        self, x: Any, /, *, wire: str | None = None, verify: bool = False
    ) -> Any:
        """Multiply, and say how vectors travel; see `OperatorSum`."""
        return await self._multiplied(
            lambda term: term.multiply(x, wire=wire, verify=verify)
        )

    async def matvec(self, v: T, /) -> T:
        """Multiply one vector; see `OperatorSum`."""
        product: T = await self._multiplied(lambda term: term.matvec(v))
        return product

    async def matmat(self, V: T, /) -> T:
        """Multiply K columns; see `OperatorSum`."""
        product: T = await self._multiplied(lambda term: term.matmat(V))
        return product

    async def to_dense(self) -> np.ndarray[Any, Any]:
        """Multiply it out; see `OperatorSum`."""
        dense_bytes(self.shape, self.dtype)
        return await self.matmat(np.eye(self.shape[0], dtype=self.dtype))

    def _sum_of(self, terms: tuple[Any, ...]) -> AsyncOperatorSum:
        return AsyncOperatorSum(terms)

    def _submatrix_of(
        self, operator: Any, rows: Indices, columns: Indices
    ) -> AsyncSubmatrix:
        return AsyncSubmatrix(operator, rows, columns)

    async def _multiplied(self, multiply: Callable[[Any], Awaitable[Any]]) -> Any:
        products = list(await asyncio.gather(*map(multiply, self.terms)))
        round_ = 0
        while stale := self._stale(round_):
            again = await asyncio.gather(*(multiply(self.terms[n]) for n in stale))
            for n, product in zip(stale, again, strict=True):
                products[n] = product
            round_ += 1
        return added(products)


def added(products: Sequence[Any]) -> Any:
    """Add products up, in the layout that all of them have.

    Args:
        products: Arrays, or lists, tuples or dicts of them; the first is written to.

    Returns:
        The sum.
    """
    first = products[0]
    if isinstance(first, Mapping):
        return {name: added([product[name] for product in products]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(map(added, zip(*products, strict=True)))
    for product in products[1:]:
        first += product
    return first


def _at_once(multiply: Callable[[Any], T], terms: Sequence[Any]) -> list[T]:
    """Multiply terms in threads, the first in this one, whose end ends the sum."""
    first, *rest = terms
    if not rest:
        return [multiply(first)]
    pool = ThreadPoolExecutor(len(rest), "curvd-sum")
    try:
        others = [pool.submit(multiply, term) for term in rest]
        return [multiply(first), *(other.result() for other in others)]
    finally:
        # Who leaves early, by Ctrl-C or an error, does not wait for the others.
        pool.shutdown(wait=False, cancel_futures=True)
