"""JacobianProduct: operands and results whose length is not that of the parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray

from curvd.contract import (
    Dtype,
    JacobianOf,
    JacobianProductOptions,
    OperatorSpec,
    ParameterLayout,
    Stop,
)
from curvd.errors import InvalidSpec, InvalidVector, LimitExceeded
from curvd.tensors import safetensors_header
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.config import LimitsConfig
from curvd_server.engine.data_points.jacobian_products import (
    JacobianProductResult,
    Rows,
    jacobian_product,
    rows_of_points,
    together,
)
from curvd_server.service.query_call import QueryCall, to_numpy
from curvd_server.service.streams import Chunks
from curvd_server.service.validation import check_finite

_STORED = "a product with the transpose in all parameters"


async def answer(
    call: QueryCall,
    header: query_pb.JacobianProductHeader,
    options: JacobianProductOptions,
    chunks: Chunks,
) -> None:
    """Multiply with a Jacobian of the session's data points.

    Args:
        call: The call, about data points.
        header: What is to be multiplied.
        options: The options in it.
        chunks: The operand, if it travels.

    Raises:
        InvalidSpec: If a name is unknown, or what is not of the session's vectors is to
            be stored, or a sum that products or time ran out for.
        InvalidVector: If the operand is of another shape or type.
        LimitExceeded: If it has too many columns or bytes.
    """
    layout = chosen(call.lease.info.layout, header.parameters)
    whole = layout == call.lease.info.layout
    if options.store and not (options.transposed and whole):
        msg = f"only {_STORED} can be stored; leave store out"
        raise InvalidSpec(msg, store=options.store)
    of = JacobianOf(options.of)
    names = layout.names if header.parameters else None
    which: Rows = await call.drive(rows_of_points(call.points, of, names))
    count = call.data_points * which.each
    own = ParameterLayout.of({"rows": (count,)}) if options.transposed else layout

    def make_room(columns: int, itemsize: int) -> None:
        """Reserve what operand, product and a part of the rows take."""
        call.reserve(2 * together(call))
        call.reserve_bytes(2 * itemsize * columns * (count + layout.size))
        if options.store:
            nbytes = itemsize * columns * layout.size
            call.lease.vectors.check_room(options.store, nbytes)

    given = await _operand(call, header.operand, chunks, own, make_room)
    columns = torch.from_numpy(given.reshape(-1, own.size))
    result: JacobianProductResult = await call.drive(
        jacobian_product(
            call.points,
            which,
            columns.to(which.problem.device),
            transposed=options.transposed,
            rows=together(call),
        )
    )
    product = to_numpy(result.result)
    if given.ndim == 1:
        product = product[0]
    if options.store:
        if result.stopped is not Stop.CONVERGED:
            msg = (
                f"products or time ran out before all {call.data_points} data points were "
                f"added up, so {options.store!r} is not stored: raise max_products or "
                "time_limit_s"
            )
            raise InvalidSpec(msg, store=options.store, data_points=call.data_points)
        call.put(options.store, product)
    await call.answer(result, {} if options.store else {"result": product})


def chosen(layout: ParameterLayout, names: Any) -> ParameterLayout:
    """Take the layout of some parameters.

    Args:
        layout: Of all.
        names: Which, in order; none: all.

    Returns:
        Their layout.

    Raises:
        InvalidSpec: If a name is unknown or comes twice.
    """
    return layout.of_operator(OperatorSpec(parameters=tuple(names) or None))


async def _operand(
    call: QueryCall,
    name: str,
    chunks: Chunks,
    layout: ParameterLayout,
    make_room: Callable[[int, int], None],
) -> NDArray[Any]:
    """Receive the operand, or find it among what is stored: [L] or [K, L]."""
    limits, dtype = call.limits, call.lease.info.dtype
    if name:
        if not await chunks.is_empty():
            await call.received(chunks, functools.partial(_check_absent, name))
        found = call.lease.vectors.get(name).array
        columns = _check_shape(found.shape, layout.size, found.dtype.itemsize, limits)
        make_room(columns, found.dtype.itemsize)
        return found

    def accept(header: safetensors_header.Header) -> int:
        make_room(*_check_header(header, layout.size, dtype, limits))
        return 0

    tensors = await call.received(chunks, accept)
    check_finite(tensors["v"].reshape(-1, layout.size), layout=layout)
    return tensors["v"]


def _check_absent(name: str, header: safetensors_header.Header) -> int:
    """Refuse a tensor beside an operand that is stored."""
    if header:
        msg = f"the operand is stored as {name!r}; send no tensor beside it"
        raise InvalidVector(msg, operand=name)
    return 0


def _check_header(
    header: safetensors_header.Header, size: int, dtype: Dtype, limits: LimitsConfig
) -> tuple[int, int]:
    """Judge an operand by its header; return its columns, and the bytes of an element."""
    if set(header) != {"v"}:
        given = ", ".join(map(repr, header)) or "none"
        msg = (
            f"JacobianProduct takes one tensor named 'v'; the tensors sent are {given}"
        )
        raise InvalidVector(msg, tensors=given)
    tensor, name = header["v"], "F64" if dtype is Dtype.FLOAT64 else "F32"
    if tensor.dtype != name:
        msg = f"the operand has element type {tensor.dtype}; this session's is {name}"
        raise InvalidVector(msg, dtype=tensor.dtype, expected=name)
    itemsize = 8 if name == "F64" else 4
    return _check_shape(tensor.shape, size, itemsize, limits), itemsize


def _check_shape(
    shape: tuple[int, ...], size: int, itemsize: int, limits: LimitsConfig
) -> int:
    """Judge an operand by its shape; return its columns."""
    if len(shape) not in (1, 2) or shape[-1] != size:
        msg = (
            f"the operand has shape {list(shape)}; in this direction the Jacobian takes "
            f"[{size}] or [K, {size}]"
        )
        raise InvalidVector(msg, shape=shape, length=size)
    columns = shape[0] if len(shape) == 2 else 1
    nbytes = columns * size * itemsize
    if columns > limits.columns or nbytes > limits.operand_bytes:
        msg = (
            f"{columns} columns of {nbytes} bytes exceed the limits of {limits.columns} "
            f"columns and {limits.operand_bytes} bytes; send fewer per call"
        )
        raise LimitExceeded(msg, columns=columns, limit=limits.columns)
    return columns
