"""An operator of the asyncio client; see `curvd.remote.operator`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import numpy as np

from curvd._calls import (
    TensorStream,
)
from curvd._transport import AsyncConnection
from curvd.contract import (
    OperatorSpec,
    SessionInfo,
)
from curvd.remote import (
    Algebra,
    AsyncAsks,
    AsyncMultiplies,
    AsyncOperatorSum,
    AsyncSubmatrix,
    Functions,
    Indices,
    OperatorBase,
    OperatorQueries,
    dense_bytes,
)

T = TypeVar("T")


class AsyncOperator(
    OperatorQueries,
    AsyncAsks,
    OperatorBase,
    AsyncMultiplies,
    Algebra["AsyncOperator", AsyncOperatorSum, AsyncSubmatrix],
    Functions["AsyncOperator"],
):
    """``scale * A + damping * I`` on a session's parameters; see `curvd.RemoteOperator`.

    ``H @ x`` and ``x @ H`` check the operand at once and return what is to be awaited.

    Args:
        connection: To the server.
        session: The session whose parameters it acts on.
        spec: Which operator.
        expected_version: Refuse to compute at another parameter version.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        session: SessionInfo,
        spec: OperatorSpec,
        expected_version: int | None = None,
    ) -> None:
        super().__init__(session, spec, expected_version)
        self._connection = connection

    def __matmul__(self, x: T) -> Awaitable[T]:
        return self._run(self._product(x))

    def __rmatmul__(self, x: T) -> Awaitable[T]:
        return self._run(self._product(x, leading=True))

    async def multiply(
        self,
        x: Any,
        /,
        *,
        wire: str | None = None,
        store: str | None = None,
        verify: bool = False,
    ) -> Any:
        """Multiply, and say how vectors travel; see `curvd.RemoteOperator`."""
        call = self._product(x, wire=wire, store=store, verify=verify)
        return await self._run(call)

    async def matvec(self, v: T, /) -> T:
        """Multiply one vector; see `curvd.RemoteOperator`."""
        return await self._run(self._product(v, columns=False))

    async def matmat(self, V: T, /) -> T:
        """Multiply K columns; see `curvd.RemoteOperator`."""
        return await self._run(self._product(V, columns=True))

    async def iter_matmat(
        self, V: T, /, *, columns: int = 1
    ) -> AsyncGenerator[T, None]:
        """Multiply K columns and hand out blocks; see `curvd.RemoteOperator`."""
        call = self._blocks(V, columns)
        async with contextlib.aclosing(self._connection.blocks(call)) as blocks:
            async for block in blocks:
                yield call.wanted.finish(block)
        self.last = call.info

    async def to_dense(self) -> np.ndarray[Any, Any]:
        """Multiply it out; see `curvd.RemoteOperator`."""
        dense_bytes(self.shape, self.dtype)
        return await self.matmat(np.eye(self.shape[0], dtype=self.dtype))

    @property
    def _place(self) -> tuple[Any, ...]:
        return self._connection.target, self._session.id, self.expected_version

    def _like(self, spec: OperatorSpec) -> AsyncOperator:
        version = self.expected_version
        return AsyncOperator(self._connection, self._session, spec, version)

    def _sum_of(self, terms: tuple[Any, ...]) -> AsyncOperatorSum:
        return AsyncOperatorSum(terms)

    def _submatrix_of(
        self, operator: Any, rows: Indices, columns: Indices
    ) -> AsyncSubmatrix:
        return AsyncSubmatrix(operator, rows, columns)

    async def _run(self, call: TensorStream[T]) -> T:
        return self._taken(call, await self._connection.run(call))
