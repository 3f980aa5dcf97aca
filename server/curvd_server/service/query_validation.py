"""What is refused of a query before it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from curvd.contract import (
    QUERIES,
    Dtype,
    EigshOptions,
    OperatorSpec,
    ParameterLayout,
    Solver,
    Stop,
    convert,
)
from curvd.errors import InvalidSpec, InvalidVector, LimitExceeded
from curvd.tensors import Header
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.config import LimitsConfig
from curvd_server.linalg import NystromResult


def between(name: str, value: int, low: int, high: int) -> int:
    """Refuse a number out of range.

    Args:
        name: The name of the field.
        value: The value that a caller gave, not checked yet.
        low: Smallest.
        high: Largest.

    Returns:
        The value.

    Raises:
        InvalidSpec: If it is smaller or larger.
    """
    if not low <= value <= high:
        msg = f"{name} must be in [{low}, {high}], got {value}"
        raise InvalidSpec(msg, **{name: value})
    return value


def operator_of(rpc: str, query: query_pb.Query) -> OperatorSpec | None:
    """Read what a query is about.

    Args:
        rpc: The name of its method.
        query: What the query names.

    Returns:
        The operator; None if it is about data points.

    Raises:
        InvalidSpec: If it is, and names an operator.
    """
    if not QUERIES[rpc].of_session:
        return convert.operator_from_proto(query.operator)
    if query.HasField("operator"):
        kind = convert.operator_from_proto(query.operator).kind
        msg = f"{rpc} is about data points, not about an operator, got {kind}: leave it out"
        raise InvalidSpec(msg, operator=kind)
    return None


def basis_size(value: int, k: int, size: int) -> int:
    """Refuse a basis that holds no more than k.

    Args:
        value: The value that a caller gave, not checked yet; 0 is the default.
        k: Wanted pairs.
        size: P.

    Returns:
        Vectors in the basis, at most P; 0 is still the default.
    """
    if value:
        between("basis_size", value, k + 2, max(size, k + 2))
    return min(size, value)


def solve(
    header: query_pb.SolveHeader, solver: Solver, tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Judge what options of Solve are worth together.

    Args:
        header: The header that a caller gave, not checked yet.
        solver: The solver.
        tensors: What came, or is stored: "b", "x0", and "preconditioner" [P].

    Raises:
        InvalidSpec: If options do not fit each other.
        InvalidVector: If the preconditioner is not positive.
    """
    preconditioner = tensors.get("preconditioner")
    if header.diagonal_samples:
        msg = (
            f"diagonal_samples must be 0, got {header.diagonal_samples}: a diagonal "
            "estimated from products made CG slower, and is not offered any more; leave "
            "it out, or send a diagonal that you know as 'preconditioner'"
        )
        raise InvalidSpec(msg, diagonal_samples=header.diagonal_samples)
    if preconditioner is not None and solver is not Solver.CG:
        msg = (
            f"preconditioners that are a diagonal are for cg, not {solver}; leave it out, "
            "or name what sketch() stored"
        )
        raise InvalidSpec(msg, solver=solver)
    if preconditioner is not None and header.preconditioner:
        msg = (
            f"the stored preconditioner {header.preconditioner!r} and a diagonal exclude "
            "each other: drop one of them"
        )
        raise InvalidSpec(msg, preconditioner=header.preconditioner)
    beside = {"x0": header.x0, "preconditioner": header.preconditioner}
    given = [what for what in beside if beside[what] or what in tensors]
    if header.dampings and (given or header.damping or solver is not Solver.CG):
        msg = (
            "several dampings in one run are for cg, without damping, x0 and "
            f"preconditioner, got {solver}, damping {header.damping} and "
            f"{given or 'neither of the others'}; solve them one by one, or leave that out"
        )
        raise InvalidSpec(msg, dampings=len(header.dampings))
    if preconditioner is not None and not preconditioner.min() > 0:
        msg = f"the preconditioner must be positive; its smallest is {preconditioner.min()}"
        raise InvalidVector(msg, smallest=preconditioner.min())


def one_start(options: EigshOptions) -> None:
    """Refuse a query that is told twice where to begin.

    Args:
        options: The options, with `warm_start`.

    Raises:
        InvalidSpec: If it names stored vectors, too.
    """
    if options.start:
        msg = (
            f"warm_start and start ({options.start!r}) exclude each other: drop one of "
            "them"
        )
        raise InvalidSpec(msg, start=options.start)


def stored(name: str, array: NDArray[Any], size: int) -> None:
    """Refuse stored vectors that do not fit an operator.

    Args:
        name: The name of the vectors.
        array: [P] or [s, P].
        size: Length of the operator's vectors.

    Raises:
        InvalidVector: If they have another length.
    """
    if array.shape[-1] != size:
        msg = (
            f"stored vector {name!r} has {array.shape[-1]} elements per column; the "
            f"operator's vectors have {size}"
        )
        raise InvalidVector(msg, vector=name, parameter_count=size)


def semidefinite(result: NystromResult, spec: OperatorSpec | None) -> None:
    """Refuse a sketch of an operator that has negative eigenvalues.

    Args:
        result: What was found of it.
        spec: The operator.

    Raises:
        InvalidSpec: If it has.
    """
    assert spec is not None
    if result.stopped is Stop.NEGATIVE_CURVATURE:
        msg = (
            f"the {spec.kind} has an eigenvalue of {result.smallest:.3g} or less, and a sketch "
            "needs an operator without negative ones: sketch the ggn, which serves "
            "systems of the hessian, too"
        )
        raise InvalidSpec(msg, smallest=result.smallest)


def with_values(name: str, values: Sequence[float]) -> None:
    """Refuse stored vectors of which no eigenvalues are known.

    Args:
        name: The name of the vectors.
        values: What is stored with them.

    Raises:
        InvalidSpec: If that is nothing.
    """
    if not values:
        msg = (
            f"stored vectors {name!r} have no eigenvalues, so they precondition nothing; "
            "make some with sketch() or eigsh(store=...)"
        )
        raise InvalidSpec(msg, vector=name)


def of_layout(
    name: str, layout: ParameterLayout | None, wanted: ParameterLayout
) -> None:
    """Refuse vectors in other parameters than the operator's, though as many.

    Args:
        name: The name of the vectors.
        layout: What their elements belong to; None: nobody knows.
        wanted: What the operator acts on.

    Raises:
        InvalidVector: If these differ.
    """
    if layout is not None and layout != wanted:
        own, ours = (", ".join(given.names[:3]) for given in (layout, wanted))
        msg = (
            f"stored vectors {name!r} are in {len(layout.names)} parameters ({own}, …), the "
            f"operator is in {len(wanted.names)} ({ours}, …): make them by an operator with "
            "the same params"
        )
        raise InvalidVector(msg, vector=name)


def systems(
    header: Header,
    stored: Mapping[str, NDArray[Any]],
    *,
    layout: ParameterLayout,
    dtype: Dtype,
    limits: LimitsConfig,
) -> int:
    """Judge the tensors of Solve by their header.

    Args:
        header: The header of the safetensors file that was announced.
        stored: What the session stores of them, by name.
        layout: The layout of the session.
        dtype: The element type of the session.
        limits: The limits of the server.

    Returns:
        K.

    Raises:
        InvalidVector: If a tensor is missing, unknown, or of the wrong type or shape.
        LimitExceeded: If there are too many columns.
    """
    names = [*header, *stored]
    known = {"b", "x0", "preconditioner"}
    if "b" not in names or len(names) > len(set(names)) or set(names) - known:
        given = ", ".join(map(repr, names)) or "none"
        msg = (
            "Solve takes a tensor 'b' and, optionally, 'x0' and 'preconditioner', each "
            f"sent or stored; the tensors given are {given}"
        )
        raise InvalidVector(msg, tensors=given)
    shape = stored["b"].shape if "b" in stored else header["b"].shape
    columns = math.prod(shape[:-1]) if len(shape) < 3 else 0
    name = "F64" if dtype is Dtype.FLOAT64 else "F32"
    whole = (layout.size,) if len(shape) == 1 else (columns, layout.size)
    shapes = {"b": whole, "x0": whole, "preconditioner": (layout.size,)}
    for what, tensor in header.items():
        if (tensor.dtype, tensor.shape) != (name, shapes[what]):
            msg = (
                f"tensor {what!r} is {tensor.dtype} {list(tensor.shape)}; it must be "
                f"{name} {list(shapes[what])}"
            )
            raise InvalidVector(msg, tensor=what, parameter_count=layout.size)
    for what, array in stored.items():
        if array.shape != shapes[what]:
            msg = (
                f"stored {what!r} is {list(array.shape)}; it must be "
                f"{list(shapes[what])}"
            )
            raise InvalidVector(msg, tensor=what, parameter_count=layout.size)
    nbytes = columns * layout.size * (8 if dtype is Dtype.FLOAT64 else 4)
    if columns > limits.columns or nbytes > limits.operand_bytes:
        msg = (
            f"{columns} right-hand sides exceed the limits of {limits.columns} columns "
            f"and {limits.operand_bytes} bytes; send fewer per call"
        )
        raise LimitExceeded(msg, columns=columns, limit=limits.columns)
    return columns
