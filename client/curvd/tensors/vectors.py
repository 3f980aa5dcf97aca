"""Vectors in the caller's own layout and type <-> rows of length ``P``.

A caller's vectors are one array [P] or [P, K], or a list, tuple or dict with one array
per parameter, each [*shape] or [*shape, K]; NumPy arrays or torch tensors. Inside and on
the wire columns lead: [K, P]. Nothing here imports torch: whoever passes a tensor has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Dtype, ParameterLayout
from curvd.errors import InvalidSpec, InvalidVector
from curvd.tensors.dense import not_dense
from curvd.tensors.finite import first_not_finite
from curvd.tensors.loaded import loaded

Array = NDArray[Any]
Layout = Literal["flat", "list", "dict"]
"""One array, one per parameter in order, or one per parameter by name."""

_VECTOR_DTYPE: Mapping[Dtype, np.dtype[Any]] = {
    Dtype.FLOAT32: np.dtype(np.float32),
    Dtype.FLOAT64: np.dtype(np.float64),
    Dtype.BFLOAT16: np.dtype(np.float32),
}

_PIECE = 1 << 18
"""Elements: one chunk of float64."""


@dataclass(frozen=True, slots=True)
class Operand:
    """What is to be multiplied, checked, and the way back to the caller's layout."""

    layout: ParameterLayout
    dtype: np.dtype[Any]
    leaves: tuple[Array, ...]
    """Views of the caller's memory: one [P] or [K, P], or per parameter."""
    columns: int | None
    """``K``; None for one vector."""
    restore: Callable[[Array], Any]
    """Maps [P] or [K, P] to the caller's layout and type, without copying."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[P] or [K, P]: the shape on the wire."""
        size = self.layout.size
        return (size,) if self.columns is None else (self.columns, size)

    def values(self, first: int = 0) -> Iterator[Array]:
        """Walk through the values in the order of the wire.

        Args:
            first: Columns to leave out.

        Yields:
            One-dimensional arrays that follow one another. What is strided comes in
            short pieces, so that whoever needs it contiguous never copies much.
        """
        for k in range(first, 1 if self.columns is None else self.columns):
            for leaf in self.leaves:
                flat = (leaf if self.columns is None else leaf[k]).reshape(-1)
                step = max(flat.size if flat.flags.c_contiguous else _PIECE, 1)
                for start in range(0, flat.size, step):
                    yield flat[start : start + step]


def vector_dtype(dtype: Dtype) -> np.dtype[Any]:
    """Tell in which type the vectors of a session travel.

    Args:
        dtype: What the session computes in.

    Returns:
        float64 for float64; float32 for float32 and bfloat16.
    """
    return _VECTOR_DTYPE[dtype]


def operand(
    value: Any, layout: ParameterLayout, dtype: Dtype, *, leading: bool = False
) -> Operand:
    """Check vectors against a session, before a byte is sent.

    Args:
        value: In any layout that the module's docstring lists.
        layout: The session's parameters.
        dtype: What the session computes in.
        leading: Whether the column axis comes first, [K, P] and [K, *shape].

    Returns:
        The operand.

    Raises:
        InvalidVector: If a length, shape, element type, name or value is wrong.
    """
    parts, shapes, labels, rebuild = _open(value, layout)
    arrays = [
        _checked_type(part, label, dtype)
        for part, label in zip(parts, labels, strict=True)
    ]
    columns = _columns(arrays, shapes, labels, leading=leading)
    if columns is not None and not leading:
        arrays = [np.moveaxis(array, -1, 0) for array in arrays]
    single = _is_array(value)
    for array, label in zip(arrays, labels, strict=True):
        _check_finite(array, None if single else label, layout, columns)

    def restore(rows: Array) -> Any:
        leaves = [rows] if single else split(rows, layout)
        if columns is not None and not leading:
            leaves = [np.moveaxis(leaf, 0, -1) for leaf in leaves]
        return rebuild([_like(p, leaf) for p, leaf in zip(parts, leaves, strict=True)])

    return Operand(layout, vector_dtype(dtype), tuple(arrays), columns, restore)


def split(rows: Array, layout: ParameterLayout) -> list[Array]:
    """Look at the parameters inside vectors.

    Args:
        rows: [..., P]
        layout: The parameters.

    Returns:
        Views [..., *shape], one per parameter.
    """
    return [
        rows[..., p.offset : p.offset + p.size].reshape((*rows.shape[:-1], *p.shape))
        for p in layout.parameters
    ]


def arrange(vector: Array, layout: ParameterLayout, form: Layout) -> Any:
    """Lay a vector out as the caller wants it.

    Args:
        vector: [P]
        layout: The parameters.
        form: ``flat``, ``list`` or ``dict``.

    Returns:
        The vector itself, or views of it per parameter.

    Raises:
        InvalidSpec: If there is no such form.
    """
    if form == "flat":
        return vector
    if form == "list":
        return split(vector, layout)
    if form == "dict":
        return dict(zip(layout.names, split(vector, layout), strict=True))
    msg = f"unknown layout {form!r}; known: flat, list, dict"
    raise InvalidSpec(msg, layout=form)


def to_numpy(value: Any) -> Array | None:
    """See an array or tensor as NumPy; bfloat16 tensors become float32.

    Args:
        value: Anything.

    Returns:
        Its values, sharing memory where possible; None if it is neither.
    """
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    torch = loaded("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        return np.asarray(tensor.numpy())
    return None


def _is_array(value: Any) -> bool:
    torch = loaded("torch")
    return isinstance(value, np.ndarray) or (
        torch is not None and isinstance(value, torch.Tensor)
    )


def _like(model: Any, array: Array) -> Any:
    """Turn a result into what the caller passed: NumPy, or torch on its device."""
    if isinstance(model, np.ndarray):
        return array
    tensor = loaded("torch").from_numpy(array)
    return tensor.to(device=model.device, dtype=model.dtype)


def _open(
    value: Any, layout: ParameterLayout
) -> tuple[list[Any], list[tuple[int, ...]], list[str], Callable[[list[Any]], Any]]:
    """Take the container apart: parts, expected shapes, labels and the way back."""
    if _is_array(value):
        return [value], [(layout.size,)], ["the vector"], lambda parts: parts[0]
    if isinstance(value, Mapping):
        _check_names(value, layout)
        keys = tuple(value)  # the caller's order

        def by_name(parts: list[Any]) -> dict[str, Any]:
            found = dict(zip(layout.names, parts, strict=True))
            return {key: found[key] for key in keys}

        labels = [f"parameter {name!r}" for name in layout.names]
        return [value[n] for n in layout.names], list(layout.shapes), labels, by_name
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) != len(layout.parameters):
            msg = (
                f"got a {type(value).__name__} of {len(value)} arrays; the session has "
                f"{len(layout.parameters)} parameters: {', '.join(layout.names)}"
            )
            raise InvalidVector(msg, given=len(value), expected=len(layout.parameters))
        labels = [f"item {i} (parameter {n!r})" for i, n in enumerate(layout.names)]
        back = tuple if isinstance(value, tuple) else list
        return list(value), list(layout.shapes), labels, back
    msg = (
        "a vector is a NumPy array or torch tensor, or a list, tuple or dict with one "
        f"per parameter; got {type(value).__name__}"
    )
    raise InvalidVector(msg, type=type(value).__name__)


def _check_names(value: Mapping[str, Any], layout: ParameterLayout) -> None:
    missing = [name for name in layout.names if name not in value]
    extra = [str(name) for name in value if name not in layout.names]
    if missing or extra:
        said = [
            f"{what}: {', '.join(names)}"
            for what, names in (("missing", missing), ("unknown", extra))
            if names
        ]
        msg = f"the dict must have one array per parameter; {'; '.join(said)}"
        raise InvalidVector(msg, missing=missing, unknown=extra)


def _check_dense(part: Any, label: str) -> None:
    """Refuse what looks like an array, and does not have all its numbers in memory."""
    if remedy := not_dense(part):
        msg = f"{label} is {remedy}"
        raise InvalidVector(msg, type=type(part).__name__)


def _checked_type(part: Any, label: str, dtype: Dtype) -> Array:
    _check_dense(part, label)
    array = to_numpy(part) if _is_array(part) else None
    if array is None:
        msg = f"{label} is a {type(part).__name__}, not a NumPy array or torch tensor"
        raise InvalidVector(msg, type=type(part).__name__)
    wanted = vector_dtype(dtype)
    if part.dtype == wanted:
        return array
    given = str(part.dtype).removeprefix("torch.")
    # A bfloat16 tensor has become float32, which only a bfloat16 session may accept.
    exact = given != "bfloat16" or dtype is Dtype.BFLOAT16
    if array.dtype.newbyteorder("=") != wanted or not exact:
        if array.dtype.kind == "c":
            remedy = "multiply .real and .imag by themselves"
        elif array.dtype.kind not in "biuf":
            remedy = "pass an array of numbers"
        elif isinstance(part, np.ndarray):
            remedy = f"pass it with .astype(np.{wanted})"
        else:
            remedy = f"pass it with .to(torch.{wanted})"
        msg = (
            f"{label} is {given}, but the session computes in {dtype.name.lower()} and "
            f"takes {wanted}: {remedy}"
        )
        raise InvalidVector(msg, given=given, expected=wanted)
    return array


def _columns(
    arrays: Sequence[Array],
    shapes: Sequence[tuple[int, ...]],
    labels: Sequence[str],
    *,
    leading: bool,
) -> int | None:
    """Find K, and refuse shapes that do not fit or do not agree."""
    found: list[int | None] = []
    for array, shape, label in zip(arrays, shapes, labels, strict=True):
        rest, k = (array.shape[1:], 0) if leading else (array.shape[:-1], -1)
        if array.shape == shape:
            found.append(None)
        elif array.ndim and rest == shape:
            found.append(array.shape[k])
        else:
            wanted = ("K", *shape) if leading else (*shape, "K")
            msg = (
                f"{label} has shape {_show(array.shape)}; "
                f"expected {_show(shape)} or {_show(wanted)}"
            )
            if not leading and array.ndim and array.shape[1:] == shape:
                msg += ", columns last"
            raise InvalidVector(msg, given=array.shape, expected=shape)
    for columns, label in zip(found, labels, strict=True):
        if columns != found[0]:
            msg = (
                f"{labels[0]} has {_count(found[0])}, but {label} has {_count(columns)}"
            )
            raise InvalidVector(msg, given=columns, expected=found[0])
    return found[0] if found else None


def _check_finite(
    array: Array, label: str | None, layout: ParameterLayout, columns: int | None
) -> None:
    if array.flags.c_contiguous:
        if first_not_finite(array.reshape(-1)) is None:
            return
    # The extremes of an array with a NaN are NaN: two passes, nothing allocated.
    elif not array.size or (np.isfinite(array.min()) and np.isfinite(array.max())):
        return
    index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    value = array[index]
    column = f" in column {index[0]}" if columns is not None else ""
    if label is None:
        parameter = next(
            p for p in layout.parameters if p.offset <= index[-1] < p.offset + p.size
        )
        label = f"the vector at index {index[-1]} (parameter {parameter.name!r})"
    msg = f"{label} is {value}{column}; every value must be finite"
    raise InvalidVector(msg, value=value)


def _show(shape: Sequence[object]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _count(columns: int | None) -> str:
    return "no column axis" if columns is None else f"{columns} columns"
