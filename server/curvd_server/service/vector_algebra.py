"""Arithmetic on the vectors that a session stores, so that they need not travel for it.

Sums of products are accumulated in float64, whatever the vectors are in.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.errors import (
    InvalidSpec,
    InvalidVector,
    LimitExceeded,
    NotFinite,
    ScaleOutOfRange,
)
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.linalg import (
    Space,
    factors,
    in_units,
    multiply_by_powers,
    sized_products,
)
from curvd_server.sessions import Vector, Vectors

_MOST_PRODUCTS = 250_000
"""Float64 in a message, half of what peers take by default."""


async def combine(
    request: curvature_pb.CombineVectorsRequest, vectors: Vectors
) -> Vector:
    """Store a linear combination.

    Args:
        request: Terms, and the name of the sum.
        vectors: What the session stores.

    Returns:
        The sum.

    Raises:
        InvalidSpec: If there are no terms, or there is no name.
        InvalidVector: If shapes differ.
        NotFinite: If the sum overflows.
        ScaleOutOfRange: If all terms are so small that nothing is left of them.
    """
    content = _content(request)
    made = _made(vectors, request, content)
    if made is not None:
        return made
    if not request.terms:
        msg = "a linear combination needs at least one term"
        raise InvalidSpec(msg, terms=0)
    parts = [vectors.get(term.name) for term in request.terms]
    shapes = {part.array.shape for part in parts}
    if len(shapes) > 1:
        told = {
            t.name: list(p.array.shape)
            for t, p in zip(request.terms, parts, strict=True)
        }
        msg = f"a linear combination is of vectors of one shape, got {told}"
        raise InvalidVector(msg, shapes=str(told))
    vectors.check_room(request.store_as, parts[0].array.nbytes)
    pairs = [
        (t.coefficient, p.array) for t, p in zip(request.terms, parts, strict=True)
    ]
    _check_seen(pairs, request.store_as)
    total = await asyncio.to_thread(_sum, pairs)
    if not np.isfinite(total).all():
        msg = f"the linear combination {request.store_as!r} overflows its type"
        raise NotFinite(msg, vector=request.store_as)
    version = min(part.version for part in parts)
    found = Vector(total, version, request.request_id, content, layout=parts[0].layout)
    vectors.put(request.store_as, found)
    return found


async def inner_products(
    request: curvature_pb.InnerProductsRequest, vectors: Vectors
) -> curvature_pb.InnerProductsResponse:
    """Multiply stored vectors with each other.

    Args:
        request: Their names.
        vectors: What the session stores.

    Returns:
        The products.

    Raises:
        InvalidSpec: If nothing is named.
        InvalidVector: If vectors differ in length.
        LimitExceeded: If there are too many products.
        ScaleOutOfRange: If a product is no number of float64.
    """
    left = _columns(vectors, request.left)
    right = _columns(vectors, request.right) if request.right else left
    _check_lengths([*left, *right])
    rows, columns = (sum(map(len, side)) for side in (left, right))
    if rows * columns > _MOST_PRODUCTS:
        msg = (
            f"{rows} times {columns} inner products are more than {_MOST_PRODUCTS}: name "
            "fewer vectors per call"
        )
        raise LimitExceeded(msg, products=rows * columns, limit=_MOST_PRODUCTS)
    found = await asyncio.to_thread(_products, left, right)
    return curvature_pb.InnerProductsResponse(
        rows=rows, columns=columns, values=found.reshape(-1).tolist()
    )


async def orthonormalise(
    request: curvature_pb.OrthonormaliseVectorsRequest, vectors: Vectors
) -> tuple[Vector, Sequence[float]]:
    """Store an orthonormal basis of what vectors span.

    Args:
        request: Their names, and the name of the basis.
        vectors: What the session stores.

    Returns:
        The basis, and the singular values of the columns, descending.

    Raises:
        InvalidSpec: If nothing is named.
        InvalidVector: If vectors differ in length, or all are zero.
        ScaleOutOfRange: If a singular value is no number of float64.
    """
    content = _content(request)
    made = _made(vectors, request, content)
    if made is not None:
        return made, ()
    parts = _columns(vectors, request.names)
    _check_lengths(parts)
    nbytes = sum(part.numel() * part.element_size() for part in parts)
    vectors.check_room(request.store_as, nbytes)
    basis, values = await asyncio.to_thread(_basis, parts, request.tolerance)
    if not len(basis):
        msg = f"the vectors {', '.join(request.names)} are zero and span nothing"
        raise InvalidVector(msg, vectors=", ".join(request.names))
    sources = [vectors.get(name) for name in request.names]
    found = Vector(
        basis.numpy(),
        min(source.version for source in sources),
        request.request_id,
        content,
        layout=sources[0].layout,
    )
    vectors.put(request.store_as, found)
    return found, values


def _content(request: Any) -> str:
    """Fingerprint what a request asks for, but for its id."""
    same = type(request)()
    same.CopyFrom(request)
    same.request_id = ""
    return hashlib.sha256(same.SerializeToString(deterministic=True)).hexdigest()


def _made(vectors: Vectors, request: Any, content: str) -> Vector | None:
    """Find what an earlier attempt of the same request stored."""
    if not request.store_as:
        msg = "a stored vector needs a name, at least one character"
        raise InvalidSpec(msg, field="store_as")
    return vectors.made_by(request.store_as, request.request_id, content)


def _columns(vectors: Vectors, names: Sequence[str]) -> list[Tensor]:
    """Look at stored vectors, each [K, P]."""
    if not names:
        msg = "name at least one stored vector"
        raise InvalidSpec(msg, names=0)
    arrays = (vectors.get(name).array for name in names)
    return [torch.from_numpy(a.reshape(-1, a.shape[-1])) for a in arrays]


def _check_lengths(parts: Sequence[Tensor]) -> None:
    lengths = sorted({part.shape[1] for part in parts})
    if len(lengths) > 1:
        msg = f"vectors of one length are needed, got {lengths}: the operators differ"
        raise InvalidVector(msg, lengths=str(lengths))


def _sum(pairs: Sequence[tuple[float, NDArray[Any]]]) -> NDArray[Any]:
    first = pairs[0][1]
    total = np.zeros(first.shape, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for coefficient, array in pairs:
            total += np.multiply(array, coefficient, dtype=np.float64)
        found: NDArray[Any] = total.astype(first.dtype)
    return found


def _check_seen(pairs: Sequence[tuple[float, NDArray[Any]]], name: str) -> None:
    """Refuse terms that all are smaller than their type has numbers, but not zero."""
    least = math.frexp(float(np.finfo(pairs[0][1].dtype).tiny))[1]
    found = [
        math.frexp(coefficient)[1] + math.frexp(float(np.abs(array).max()))[1]
        for coefficient, array in pairs
        if coefficient and array.any()
    ]
    if found and max(found) < least:
        msg = (
            f"all terms of {name!r} are below 2**{max(found)}, where {pairs[0][1].dtype} has "
            "no digits left: take larger coefficients, or make the session in 'F64'"
        )
        raise ScaleOutOfRange(msg, vector=name, exponent=max(found))


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> NDArray[np.float64]:
    sized = [in_units(b) for b in right]
    what, remedy = "the largest inner product", "scale the vectors first, by combine()"
    rows = []
    for a in map(in_units, left):
        found = [sized_products(a, b, what=what, remedy=remedy) for b in sized]
        rows.append(torch.cat(found, 1))
    products: NDArray[np.float64] = torch.cat(rows).numpy()
    return products


def _basis(parts: Sequence[Tensor], tolerance: float) -> tuple[Tensor, list[float]]:
    """Orthonormalise rows, each of which is seen at its own length.

    Args:
        parts: Of [K, P] in all.
        tolerance: Directions shorter than this, relative to the longest, are left out, and
            those that are roundings of rows of length one.

    Returns:
        [r, P], principal directions first, and the singular values [K], descending.
    """
    V, powers = in_units(torch.cat(list(parts)))
    space = Space.of(V)
    norms = space.norms(V)
    V /= torch.where(norms > 0, norms, 1.0)[:, None].to(V)
    Q, _, T = factors(space, V, V)
    if not len(Q):
        return Q, []
    # Singular values of the rows as they are stored, but for the longest one's power of two.
    exponents = torch.frexp(powers).exponent
    top = exponents.amax()
    turn, values, _ = torch.linalg.svd(
        T * torch.ldexp(norms, exponents - top), full_matrices=False
    )
    used = (values > tolerance * values[0]) | (tolerance == 0)
    Q = space.combine(turn[:, used].T, Q)
    # Newton's step to the nearest orthonormal rows: they stay where they are.
    gram = space.cross(Q, Q)
    Q = space.combine(1.5 * torch.eye(len(gram)).to(gram) - gram / 2, Q)
    unit = torch.ldexp(torch.ones_like(values[0]), top - 1)
    multiply_by_powers(
        values[:1],
        unit[None],
        values[:1],
        what="the largest singular value",
        remedy="take vectors of another size",
    )
    hidden = [0.0] * (len(V) - len(values))
    return Q, [values[0].item(), *(values[1:] * unit).tolist(), *hidden]
