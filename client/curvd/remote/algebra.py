"""Operators as they are written: sums, multiples, shifts, transposes and submatrices.

What is written becomes operators of the server wherever that is possible: a multiple is a
scale, an identity a damping, a principal submatrix by name an operator on fewer parameters.
What remains is a sum, whose terms multiply side by side, or rows and columns by index.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from curvd.contract import OperatorSpec, ParameterLayout, check_patterns, select
from curvd.errors import InvalidSpec, InvalidVector, LimitExceeded
from curvd.tensors import to_numpy

O = TypeVar("O")  # noqa: E741 - operators of a client
S = TypeVar("S")
B = TypeVar("B")
Indices = NDArray[np.int64]

_DENSE_BYTES = 1 << 30
"""Of a dense matrix; whoever wants a larger one multiplies a few columns at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """A multiple of the identity, of whatever size it is added to.

    Examples:
        >>> I = curvd.Identity()
        >>> H = session.hessian()
        >>> shifted = H - 0.5 * I  # on the server, as its damping
        >>> shifted.spec.damping
        -0.5
        >>> np.allclose(shifted @ np.ones(43), H @ np.ones(43) - 0.5)
        True
    """

    factor: float = 1.0

    def __mul__(self, other: Any) -> Identity:
        number = number_of(other)
        return NotImplemented if number is None else Identity(self.factor * number)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Identity:
        number = reciprocal_of(other)
        return NotImplemented if number is None else Identity(self.factor * number)

    def __neg__(self) -> Identity:
        return Identity(-self.factor)

    def __add__(self, other: Any) -> Identity:
        if not isinstance(other, Identity):
            return NotImplemented
        return Identity(self.factor + other.factor)

    def __sub__(self, other: Any) -> Identity:
        return self + -other if isinstance(other, Identity) else NotImplemented

    def __matmul__(self, x: Any) -> Any:
        return self.factor * x


class Algebra(Generic[O, S, B]):
    """What may be written with an operator; a base of all that multiply.

    All operators are symmetric, so that `T` and its relatives are the operator itself.
    """

    __iter__ = None
    shape: Any
    dtype: Any
    layout: Any

    def _parts(self) -> tuple[Any, ...]:
        """List the operators of the server that add up to it."""
        raise NotImplementedError

    def _sum_of(self, terms: tuple[Any, ...]) -> S:
        """Make a sum of operators of this client."""
        raise NotImplementedError

    def _submatrix_of(self, operator: Any, rows: Indices, columns: Indices) -> B:
        """Make a submatrix of an operator of this client."""
        raise NotImplementedError

    def __mul__(self, other: Any) -> O | S:
        number = number_of(other)
        if number is None:
            return NotImplemented
        return self._added([scaled(part, number) for part in self._parts()])

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> O | S:
        number = reciprocal_of(other)
        return NotImplemented if number is None else self * number

    def __neg__(self) -> O | S:
        return self * -1.0

    def __add__(self, other: Any) -> O | S:
        if isinstance(other, Identity):
            first, *rest = self._parts()
            return self._added([shifted(first, other.factor), *rest])
        if isinstance(other, Algebra):
            return self._added([*self._parts(), *other._parts()])
        number = number_of(other)
        if number == 0:  # where sum() begins
            return self._added([*self._parts()])
        if number is not None:
            msg = (
                f"a number is no operator: add {number:g} * curvd.Identity() to shift "
                "the eigenvalues"
            )
            raise InvalidSpec(msg, number=number)
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> O | S:
        if isinstance(other, Identity | Algebra):
            return self + -other
        number = number_of(other)
        return NotImplemented if number is None else self + -number

    def __rsub__(self, other: Any) -> O | S:
        negative: Any = -self
        found: O | S = negative + other
        return found

    def __getitem__(self, key: Any) -> O | S | B:
        """Choose rows and columns, by parameters' names or by index.

        Args:
            key: Rows and columns; all columns if there are only rows. Each is a glob over
                names or a list of such, or a slice, indices, or a mask [P].

        Returns:
            For the same names twice, the operator on these parameters; else a
            submatrix [R, C], which multiplies [C] and [C, K].

        Raises:
            InvalidSpec: If there are no such parameters or indices.
        """
        axes = key if isinstance(key, tuple) else (key,)
        if not 1 <= len(axes) <= 2:
            msg = (
                f"an operator has rows and columns, got {len(axes)} axes: for several names "
                "or indices write a list, H[[…]]"
            )
            raise InvalidSpec(msg, axes=len(axes))
        rows, columns = (*axes, slice(None))[:2]
        names = [_names(part, self.layout) for part in (rows, columns)]
        whole: Any = self
        # Of the parameters alone, these have other blocks than the whole one.
        blocked = any(
            part.spec.block_sizes or part.spec.kind.is_factored
            for part in self._parts()
        )
        if None not in names and not blocked:
            chosen = [name for part in names for name in part or ()]
            whole = self._on(tuple(dict.fromkeys(chosen)))
            if names[0] == names[1]:
                principal: O | S = whole
                return principal
        places = [
            _indices(part, whole.layout) if named is None else _of(named, whole.layout)
            for part, named in zip((rows, columns), names, strict=True)
        ]
        return self._submatrix_of(whole, *places)

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        """Refuse to be multiplied out by accident."""
        rows, columns = self.shape
        msg = (
            f"an operator [{rows}, {columns}] becomes an array by {columns} products, "
            "which nobody makes by accident: call to_dense(), or multiply the columns "
            "that you need, H @ V"
        )
        raise TypeError(msg)

    @property
    def ndim(self) -> int:
        """How many axes it has: 2."""
        return 2

    @property
    def T(self) -> Any:
        """The transpose: itself."""
        return self

    @property
    def mT(self) -> Any:
        """The transpose, as torch calls it: itself."""
        return self.T

    @property
    def mH(self) -> Any:
        """The adjoint, as torch calls it: itself."""
        return self.T

    @property
    def H(self) -> Any:
        """The adjoint, as SciPy calls it: itself."""
        return self.T

    def adjoint(self) -> Any:
        """Return the adjoint: itself."""
        return self.T

    def _on(self, names: tuple[str, ...]) -> Any:
        """Restrict it to some of its parameters."""
        return self._added([
            part._like(dataclasses.replace(part.spec, parameters=names))
            for part in self._parts()
        ])

    def _added(self, parts: list[Any]) -> O | S:
        """Add operators up, those that differ in scale and damping into one."""
        merged: dict[Any, Any] = {}
        for part in parts:
            key = part._place, dataclasses.replace(part.spec, scale=1.0, damping=0.0)
            known = merged.get(key)
            if known is not None:
                scale = known.spec.scale + part.spec.scale
                damping = known.spec.damping + part.spec.damping
                spec = dataclasses.replace(part.spec, scale=scale, damping=damping)
                part = part._like(spec)
            merged[key] = part
        terms = tuple(merged.values())
        if len(terms) == 1:
            single: O = terms[0]
            return single
        _check_alike(terms)
        return self._sum_of(terms)


def scaled(part: Any, number: float) -> Any:
    """Multiply an operator of the server by a number.

    Args:
        part: The operator.
        number: The number.

    Returns:
        The operator with another scale and damping.
    """
    spec: OperatorSpec = part.spec
    changed = dataclasses.replace(
        spec, scale=spec.scale * number, damping=spec.damping * number
    )
    return part._like(changed)


def shifted(part: Any, number: float) -> Any:
    """Add a multiple of the identity to an operator of the server.

    Args:
        part: The operator.
        number: The multiple.

    Returns:
        The operator with another damping.
    """
    damping = part.spec.damping + number
    return part._like(dataclasses.replace(part.spec, damping=damping))


def number_of(value: Any) -> float | None:
    """Read a real number, or an array of NumPy or torch that is one.

    Args:
        value: Anything.

    Returns:
        The number; None if it is none.

    Raises:
        InvalidSpec: If it is not finite.
        InvalidVector: If it is an array of several.
    """
    if isinstance(value, numbers.Real):
        return _finite(float(value))
    array = to_numpy(value)
    if array is None:
        return None
    if array.shape:
        msg = (
            f"operators are scaled by numbers, got an array {list(array.shape)}: write "
            "H @ x for a product"
        )
        raise InvalidVector(msg, shape=array.shape)
    return _finite(float(array))


def _finite(number: float) -> float:
    """Refuse what makes no operator."""
    if not math.isfinite(number):
        msg = f"operators are scaled and shifted by finite numbers, got {number}"
        raise InvalidSpec(msg, number=number)
    return number


def reciprocal_of(value: Any) -> float | None:
    """Read what an operator is divided by.

    Args:
        value: Anything.

    Returns:
        One over the number; None if it is none.

    Raises:
        InvalidSpec: If it is zero, or not finite.
        InvalidVector: If it is an array of several.
    """
    number = number_of(value)
    if number is None:
        return None
    if number == 0:
        msg = "operators are divided by numbers other than 0"
        raise InvalidSpec(msg, number=number)
    return _finite(1.0 / number)


def dense_bytes(shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    """Refuse a dense matrix that is too large.

    Args:
        shape: [R, C]
        dtype: Its element type.

    Raises:
        LimitExceeded: If it is.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    if size > _DENSE_BYTES:
        msg = (
            f"a dense matrix {list(shape)} has {size} bytes; the limit is {_DENSE_BYTES}: "
            "multiply a few columns at a time, or ask eigsh, diagonal or trace"
        )
        raise LimitExceeded(msg, bytes=size, limit=_DENSE_BYTES)


def _check_alike(terms: Sequence[Any]) -> None:
    """Refuse a sum of operators on vectors that differ."""
    first = terms[0]
    for other in terms[1:]:
        if other.layout != first.layout:
            msg = (
                "operators that are added act on the same parameters in the same order; "
                f"one acts on {_said(first.layout)}, another on {_said(other.layout)}: "
                "choose them with params="
            )
            raise InvalidSpec(msg)
        if other.dtype != first.dtype:
            msg = (
                f"operators that are added take vectors of one type, got {first.dtype} "
                f"and {other.dtype}: create both sessions with one dtype="
            )
            raise InvalidSpec(msg, given=other.dtype, expected=first.dtype)


def _said(layout: ParameterLayout) -> str:
    names = ", ".join(layout.names[:3]) + ", …" * (len(layout.names) > 3)
    return f"{names} (P = {layout.size})"


def _names(part: Any, layout: ParameterLayout) -> tuple[str, ...] | None:
    """Find the parameters that globs name; None if it is no glob."""
    patterns = [part] if isinstance(part, str) else part
    texts = isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)
    if not texts or not len(patterns):
        return None
    return select(layout.names, check_patterns(patterns, "names"), aliases={})


def _of(names: tuple[str, ...], layout: ParameterLayout) -> Indices:
    """List the indices of parameters, in the order of the names."""
    places: Mapping[str, Any] = {p.name: p for p in layout.parameters}
    found = [
        np.arange(places[n].offset, places[n].offset + places[n].size) for n in names
    ]
    return np.concatenate(found).astype(np.int64)


def _indices(part: Any, layout: ParameterLayout) -> Indices:
    """Read a slice, a mask or indices."""
    every: Indices = np.arange(layout.size, dtype=np.int64)
    if part is ...:
        return every
    if isinstance(part, slice):
        return every[part]
    held = to_numpy(part)
    array = np.asarray(part) if held is None else held
    if array.ndim == 1 and not len(array):
        msg = "no rows or columns of an operator are chosen by an empty list: give one"
        raise InvalidSpec(msg)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        msg = (
            "rows and columns of an operator are names of parameters, slices, masks or "
            f"lists of indices, got {part!r}: for one entry write H[[i], [j]]"
        )
        raise InvalidSpec(msg)
    if array.dtype.kind == "b":
        if len(array) != layout.size:
            msg = f"a mask has {len(array)} entries; the operator has {layout.size}"
            raise InvalidSpec(msg, given=len(array), expected=layout.size)
        chosen: Indices = every[array]
        return chosen
    wrong = (array >= layout.size) | (array < -layout.size)
    if wrong.any():
        msg = (
            f"index {array[wrong][0]} is out of range: the operator has {layout.size} rows "
            f"and columns, 0 to {layout.size - 1}"
        )
        raise InvalidSpec(msg, index=array[wrong][0], size=layout.size)
    found: Indices = every[array]
    if len(np.unique(found)) < len(found):
        msg = "indices name a row or column twice; each may stand there once"
        raise InvalidSpec(msg)
    return found
