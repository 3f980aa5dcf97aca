"""A curvature operator that lives on a server and multiplies like a matrix."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from curvd._calls import Queries, TensorStream, curvature_requests
from curvd._transport import Connection
from curvd.contract import (
    OperatorSpec,
    ParameterLayout,
    Probe,
    ResultInfo,
    SessionInfo,
    StoredVector,
)
from curvd.errors import InvalidSpec, InvalidVector
from curvd.remote.algebra import Algebra, Indices, dense_bytes
from curvd.remote.asking import Asks
from curvd.remote.factored import Functions, function_said
from curvd.remote.operator_sum import OperatorSum
from curvd.remote.queries import OperatorQueries
from curvd.remote.submatrix import Submatrix
from curvd.remote.torch_names import Multiplies
from curvd.tensors import Operand, operand, vector_dtype

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

T = TypeVar("T")


class OperatorBase:
    """What is known about an operator without a call; see `RemoteOperator`.

    Args:
        session: The session whose parameters it acts on.
        spec: The operator.
        expected_version: Refuse to compute at another parameter version.
    """

    # Without it, NumPy would take ``ndarray @ operator`` apart into a loop over entries.
    __array_ufunc__ = None

    def __init__(
        self, session: SessionInfo, spec: OperatorSpec, expected_version: int | None
    ) -> None:
        # As the operator sees it: its vectors consist of the parameters it acts on.
        session = dataclasses.replace(session, layout=session.layout.of_operator(spec))
        self._session = session
        self._queries = Queries(session, spec, expected_version)
        self.spec = spec
        """Kind, blocks, damping and scale."""
        self.expected_version = expected_version
        """The only parameter version that a product may belong to; None: any."""
        self.last: ResultInfo | None = None
        """Where the latest product came from and what it cost."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return (self._session.layout.size, self._session.layout.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of the vectors: float64 for float64 sessions, else float32."""
        return vector_dtype(self._session.dtype)

    @property
    def layout(self) -> ParameterLayout:
        """Names, shapes and order of the parameters that a vector consists of."""
        return self._session.layout

    @property
    def session_id(self) -> str:
        """The session whose parameters it acts on."""
        return self._session.id

    @property
    def family(self) -> str:
        """The same for operators on the same parameters, of one session or several."""
        return self._session.family

    @property
    def said(self) -> str:
        """What it is as a formula, for people."""
        spec = self.spec
        scale = "" if spec.scale == 1 else f"{spec.scale:g} * "
        shift = f" + {spec.damping:g} * I" if spec.damping else ""
        return f"{scale}{function_said(spec)}{shift}"

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.said}, {list(self.shape)} {self.dtype}, "
            f"session {self._session.id!r}>"
        )

    def _parts(self) -> tuple[Any, ...]:
        return (self,)

    def _product(
        self,
        value: T,
        *,
        columns: bool | None = None,
        leading: bool = False,
        block: int = 0,
        wire: str | None = None,
        store: str | None = None,
        verify: bool = False,
    ) -> TensorStream[T]:
        """Check the operand and make the call; `columns` says whether it needs K."""
        v: Operand | Probe | StoredVector
        if isinstance(value, Probe | StoredVector):
            v = value
        else:
            v = operand(value, self.layout, self._session.dtype, leading=leading)
            self._check_columns(v, columns)
        if store is not None and not store:
            msg = "a stored vector needs a name, at least one character"
            raise InvalidSpec(msg, store=store)
        return curvature_requests.product(
            self._session,
            self.spec,
            v,
            expected_version=self.expected_version,
            wire_type=curvature_requests.check_wire(wire, self._session.dtype),
            store=store or "",
            verify=verify,
            block=block,
        )

    def _check_columns(self, v: Operand, columns: bool | None) -> None:
        if columns is not None and columns != (v.columns is not None):
            msg = (
                "matmat needs a column axis, [P, K] or [*shape, K]; for one vector "
                "there is matvec"
                if columns
                else f"matvec takes one vector, not {v.columns} columns; for those "
                "there is matmat"
            )
            raise InvalidVector(msg, columns=v.columns)

    def _taken(self, call: TensorStream[T], result: T) -> T:
        """Take note of where a result came from."""
        self.last = call.info
        if isinstance(result, StoredVector) and call.info is not None:
            stored = dataclasses.replace(result, version=call.info.version)
            return cast("T", stored)
        return result

    def _blocks(self, value: T, columns: int) -> TensorStream[T]:
        whole = isinstance(columns, numbers.Integral) and not isinstance(columns, bool)
        if not whole or columns < 1:
            msg = f"columns must be a whole number, at least 1, got {columns!r}"
            raise InvalidSpec(msg, columns=columns)
        return self._product(value, columns=True, block=int(columns))


class RemoteOperator(
    OperatorQueries,
    Asks,
    OperatorBase,
    Multiplies,
    Algebra["RemoteOperator", OperatorSum, Submatrix],
    Functions["RemoteOperator"],
):
    """``scale * A + damping * I`` on the parameters of a session.

    ``H @ x`` takes one vector or K columns, as one array [P] or [P, K], or as a list,
    tuple or dict with one array per parameter, [*shape] or [*shape, K], and answers in
    the same layout: NumPy for NumPy, torch for torch (on the same device). ``x @ H``
    has columns leading: [P], [K, P], [*shape] or [K, *shape]. Operators are symmetric.

    Operators are written as matrices are: ``H + G``, ``2 * H``, ``H - s * I`` with
    ``I = curvd.Identity()``, ``H.T``, and ``H[rows, columns]`` by names of parameters or by
    index. Nothing is computed before such an expression is multiplied.

    Shapes, element types, names and values are checked before a byte is sent. An
    operator costs nothing to make; give each thread its own if `last` matters.

    Args:
        connection: To the server.
        session: The session whose parameters it acts on.
        spec: The operator.
        expected_version: Refuse to compute at another parameter version.

    Examples:
        >>> H = session.hessian()
        >>> (H @ np.ones(43)).shape, (H @ np.ones((43, 2))).shape
        ((43,), (43, 2))
        >>> v = {name: np.ones(shape) for name, shape in zip(H.layout.names, H.layout.shapes)}
        >>> product = H @ v
        >>> product["1.weight"].shape
        (5, 4)
        >>> H.last.version, H.last.plan.symmetry_gap < 1e-9
        (1, True)
    """

    def __init__(
        self,
        connection: Connection,
        session: SessionInfo,
        spec: OperatorSpec,
        expected_version: int | None = None,
    ) -> None:
        super().__init__(session, spec, expected_version)
        self._connection = connection

    def __matmul__(self, x: T) -> T:
        return self._run(self._product(x))

    def __rmatmul__(self, x: T) -> T:
        return self._run(self._product(x, leading=True))

    def multiply(
        self,
        x: Any,
        /,
        *,
        wire: str | None = None,
        store: str | None = None,
        verify: bool = False,
    ) -> Any:
        """Multiply, and say how vectors travel, if they do.

        Args:
            x: The operand, as for ``H @ x``; or a `Probe` or a `StoredVector`, which do not travel.
            wire: ``BF16`` or ``F16`` halve the bytes of float32 in both directions:
                operand and result are rounded to nearest, the product is computed in
                the session's own type. None: the session's own type.
            store: Keep the product in the session under this name, and fetch nothing.
            verify: Check the product's CRC-32, beside what TCP and TLS do.

        Returns:
            The product, laid out like `x`; [P] or [P, K] for what does not travel; a
            `StoredVector` if it stays in the session.

        Examples:
            >>> H = session.hessian()
            >>> stored = H.multiply(np.ones(43), store="H1")  # nothing comes back
            >>> np.allclose(H.multiply(stored), H @ (H @ np.ones(43)))
            True
        """
        return self._run(self._product(x, wire=wire, store=store, verify=verify))

    def matvec(self, v: T, /) -> T:
        """Multiply one vector.

        Args:
            v: [P], or one array [*shape] per parameter.

        Returns:
            The product, laid out like `v`.

        Examples:
            >>> session.hessian().matvec(np.ones(43)).shape
            (43,)
            >>> session.hessian().matvec(np.ones((43, 2)))
            Traceback (most recent call last):
                ...
            curvd.errors.InvalidVector: matvec takes one vector, not 2 columns; ...
        """
        return self._run(self._product(v, columns=False))

    def matmat(self, V: T, /) -> T:
        """Multiply K columns.

        Args:
            V: [P, K], or one array [*shape, K] per parameter.

        Returns:
            The products, laid out like `V`.

        Examples:
            >>> session.hessian().matmat(np.ones((43, 2))).shape
            (43, 2)
        """
        return self._run(self._product(V, columns=True))

    def iter_matmat(self, V: T, /, *, columns: int = 1) -> Iterator[T]:
        """Multiply K columns, and hand out results while later ones are computed.

        All belong to one parameter version.

        Args:
            V: [P, K], or one array [*shape, K] per parameter.
            columns: Columns per block; the last block may have fewer.

        Yields:
            Blocks of products in order, each laid out like `V`.

        Examples:
            >>> blocks = session.hessian().iter_matmat(np.eye(43), columns=20)
            >>> [block.shape for block in blocks]
            [(43, 20), (43, 20), (43, 3)]
        """
        call = self._blocks(V, columns)
        for block in self._connection.blocks(call):
            yield call.wanted.finish(block)
        self.last = call.info

    def to_dense(self) -> np.ndarray[Any, Any]:
        """Multiply it out.

        Returns:
            [P, P], up to 1 GiB, by P products.

        Raises:
            LimitExceeded: If it is larger.

        Examples:
            >>> np.allclose(session.hessian().to_dense(), session.hessian() @ np.eye(43))
            True
        """
        dense_bytes(self.shape, self.dtype)
        return self.matmat(np.eye(self.shape[0], dtype=self.dtype))

    def to_scipy(self, dtype: Any = np.float64) -> LinearOperator:
        """Make a SciPy operator of it, for `eigsh`, `cg` and the like.

        Args:
            dtype: What SciPy computes in. Operands are cast to what the session takes,
                and products to ``np.result_type(dtype, operand.dtype)``.

        Returns:
            A symmetric [P, P] linear operator.

        Examples:
            >>> from scipy.sparse.linalg import eigsh
            >>> values = eigsh(session.hessian().to_scipy(), k=2, return_eigenvectors=False)
            >>> values.round(4)
            array([0.6971, 1.3995])
        """
        from curvd.integrations.scipy import linear_operator  # needs curvd[scipy]

        return linear_operator(self, dtype)

    @property
    def _place(self) -> tuple[Any, ...]:
        return self._connection.target, self._session.id, self.expected_version

    def _like(self, spec: OperatorSpec) -> RemoteOperator:
        version = self.expected_version
        return RemoteOperator(self._connection, self._session, spec, version)

    def _sum_of(self, terms: tuple[Any, ...]) -> OperatorSum:
        return OperatorSum(terms)

    def _submatrix_of(
        self, operator: Any, rows: Indices, columns: Indices
    ) -> Submatrix:
        return Submatrix(operator, rows, columns)

    def _run(self, call: TensorStream[T]) -> T:
        return self._taken(call, self._connection.run(call))
