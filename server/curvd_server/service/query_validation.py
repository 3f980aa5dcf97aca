"""What is refused of a query before it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from curvd.contract import Dtype, Estimator, ParameterLayout, Solver, convert_enums
from curvd.errors import InvalidSpec, InvalidVector, LimitExceeded
from curvd.tensors import Header
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.config import LimitsConfig
from curvd_server.linalg import Target

_PRODUCTS = 10_000


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """What a query may use."""

    max_products: int
    time_limit_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Density:
    """Options of SpectralDensity, defaults filled in."""

    samples: int
    steps: int
    points: int
    width: float | None
    logarithmic: bool
    floor: float | None
    seed: int


@dataclass(frozen=True, slots=True)
class Systems:
    """Options of Solve, defaults filled in."""

    damping: float
    tolerance: float


def between(name: str, value: int, low: int, high: int) -> int:
    """Refuse a number out of range.

    Args:
        name: The name of the field.
        value: From a stranger.
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


def finite(name: str, value: float) -> float:
    """Refuse NaN and infinity; return the value."""
    if not math.isfinite(value):
        msg = f"{name} must be finite, got {value}"
        raise InvalidSpec(msg, **{name: value})
    return value


def positive(name: str, value: float) -> float:
    """Refuse what is not positive and finite; return the value."""
    if not (value > 0 and math.isfinite(value)):
        msg = f"{name} must be positive and finite, got {value}"
        raise InvalidSpec(msg, **{name: value})
    return value


def tolerance(value: float) -> float:
    """Fill in the default tolerance, and refuse what makes no sense."""
    return positive("tolerance", value or 1e-6)


def seed(value: int) -> int:
    """Refuse a seed of 64 bits; return it."""
    return between("seed", value, 0, 2**63 - 1)


def limits(query: query_pb.Query) -> QueryLimits:
    """Read what a query may use.

    Args:
        query: From a stranger.

    Returns:
        Its limits, defaults filled in.
    """
    products = query.max_products if query.HasField("max_products") else _PRODUCTS
    time_limit_s = None
    if query.HasField("time_limit_s"):
        time_limit_s = positive("time_limit_s", query.time_limit_s)
    return QueryLimits(between("max_products", products, 1, 2**62), time_limit_s)


def basis_size(value: int, k: int, size: int) -> int:
    """Refuse a basis that holds no more than k.

    Args:
        value: From a stranger; 0 is the default.
        k: Wanted pairs.
        size: P.

    Returns:
        Vectors in the basis, at most P; 0 is still the default.
    """
    if value:
        between("basis_size", value, k + 2, max(size, k + 2))
    return min(size, value)


def accuracy(message: query_pb.Accuracy) -> tuple[Target, int]:
    """Read when to stop.

    Args:
        message: From a stranger.

    Returns:
        The target, and the seed.
    """
    for name in ("relative_error", "absolute_error"):
        value = getattr(message, name)
        if not (value >= 0 and math.isfinite(value)):
            msg = f"{name} must be finite and not negative, got {value}"
            raise InvalidSpec(msg, **{name: value})
    target = Target(
        relative=message.relative_error,
        absolute=message.absolute_error,
        samples=between("samples", message.samples or 100, 1, 100_000),
    )
    return target, seed(message.seed)


def diagonal_estimator(value: int) -> Estimator:
    """Refuse Hutch++ for a diagonal.

    Args:
        value: From a stranger.

    Returns:
        The estimator.

    Raises:
        InvalidSpec: If it estimates traces only.
    """
    estimator = convert_enums.estimator_from_proto(value)
    if estimator is Estimator.HUTCHPP:
        msg = "hutch++ estimates traces only; use hutchinson or exchangeable (XDiag)"
        raise InvalidSpec(msg, estimator=estimator)
    return estimator


def vectors_of(estimator: Estimator, samples: int, block: int) -> int:
    """Count the vectors that an estimator holds.

    Args:
        estimator: Which.
        samples: Products at most.
        block: Probes at once.

    Returns:
        How many: two blocks, and for a sketch the probes, their products, an
        orthonormal basis and its products.
    """
    if estimator is Estimator.HUTCHINSON:
        return 2 * block + 2
    return 2 * block + 4 * (samples // 2)


def density(message: query_pb.SpectralDensityRequest) -> Density:
    """Read the options of SpectralDensity.

    Args:
        message: From a stranger.

    Returns:
        The options.
    """
    return Density(
        samples=between("probes", message.probes or 8, 1, 1000),
        steps=between("steps", message.steps or 64, 1, 1000),
        points=between("points", message.points or 512, 2, 100_000),
        width=positive("width", message.width) if message.HasField("width") else None,
        logarithmic=message.logarithmic,
        floor=positive("floor", message.floor) if message.HasField("floor") else None,
        seed=seed(message.seed),
    )


def solve(
    header: query_pb.SolveHeader, solver: Solver, preconditioner: NDArray[Any] | None
) -> Systems:
    """Read the options of Solve.

    Args:
        header: From a stranger.
        solver: Which.
        preconditioner: [P] or None.

    Returns:
        The options.

    Raises:
        InvalidSpec: If options do not fit each other.
        InvalidVector: If the preconditioner is not positive.
    """
    if header.diagonal_samples:
        msg = (
            f"diagonal_samples must be 0, got {header.diagonal_samples}: a diagonal "
            "estimated from products made CG slower, and is not offered any more; leave "
            "it out, or send a diagonal that you know as 'preconditioner'"
        )
        raise InvalidSpec(msg, diagonal_samples=header.diagonal_samples)
    if preconditioner is not None and solver is not Solver.CG:
        msg = f"preconditioners are for cg, not {solver}; leave them out"
        raise InvalidSpec(msg, solver=solver)
    if preconditioner is not None and not preconditioner.min() > 0:
        msg = f"the preconditioner must be positive; its smallest is {preconditioner.min()}"
        raise InvalidVector(msg, smallest=preconditioner.min())
    return Systems(finite("damping", header.damping), tolerance(header.tolerance))


def one_start(request: query_pb.EigshRequest) -> None:
    """Refuse a query that is told twice where to begin.

    Args:
        request: With `warm_start`.

    Raises:
        InvalidSpec: If it names stored vectors, too.
    """
    if request.start:
        msg = (
            f"warm_start and start ({request.start!r}) exclude each other: drop one of "
            "them"
        )
        raise InvalidSpec(msg, start=request.start)


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


def systems(
    header: Header, *, layout: ParameterLayout, dtype: Dtype, limits: LimitsConfig
) -> int:
    """Judge the tensors of Solve by their header.

    Args:
        header: The header of the safetensors file that was announced.
        layout: The layout of the session.
        dtype: The element type of the session.
        limits: The limits of the server.

    Returns:
        K.

    Raises:
        InvalidVector: If a tensor is missing, unknown, or of the wrong type or shape.
        LimitExceeded: If there are too many columns.
    """
    if "b" not in header or set(header) - {"b", "x0", "preconditioner"}:
        names = ", ".join(map(repr, header)) or "none"
        msg = (
            "Solve takes a tensor 'b' and, optionally, 'x0' and 'preconditioner'; the "
            f"tensors sent are {names}"
        )
        raise InvalidVector(msg, tensors=names)
    columns = header["b"].shape[0] if header["b"].shape else 0
    name = "F64" if dtype is Dtype.FLOAT64 else "F32"
    shapes = {
        "b": (columns, layout.size),
        "x0": (columns, layout.size),
        "preconditioner": (layout.size,),
    }
    for what, tensor in header.items():
        if (tensor.dtype, tensor.shape) != (name, shapes[what]):
            msg = (
                f"tensor {what!r} is {tensor.dtype} {list(tensor.shape)}; it must be "
                f"{name} {list(shapes[what])}"
            )
            raise InvalidVector(msg, tensor=what, parameter_count=layout.size)
    if columns > limits.columns or header["b"].nbytes > limits.operand_bytes:
        msg = (
            f"{columns} right-hand sides exceed the limits of {limits.columns} columns "
            f"and {limits.operand_bytes} bytes; send fewer per call"
        )
        raise LimitExceeded(msg, columns=columns, limit=limits.columns)
    return columns
