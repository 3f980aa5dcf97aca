"""A product in one message each way, in one go.

It does what `product_stream` does, for an operand that came whole and a result that leaves
whole: nothing is received or sent meanwhile, so there is nothing to wait for but the
device. At this size a task, a queue or a copy takes as long as the computation.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Framed, OperatorSpec
from curvd.tensors import chunks, half_precision
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.service import validation
from curvd_server.service.dependencies import ProductDependencies
from curvd_server.service.outcomes import header_of, scaled_and_damped, summary_of
from curvd_server.service.result_cache import CachedResult, Content, fingerprint
from curvd_server.service.result_encoding import Format
from curvd_server.service.sources import name_of
from curvd_server.service.streams import CALLER
from curvd_server.sessions import Lease
from curvd_server.system import TRACED, calling


@dataclass(frozen=True, slots=True)
class Operand:
    """What is to be multiplied, checked."""

    columns: NDArray[Any]
    """[K, P]; its memory is ours."""
    shape: tuple[int, ...]
    """[P] or [K, P], as the caller sees it."""


def operand(
    request: curvature_pb.ProductHeader,
    file: memoryview,
    lease: Lease,
    dependencies: ProductDependencies,
) -> Operand | None:
    """Read and check an operand that came whole.

    Args:
        request: The header.
        file: The operand's safetensors file.
        lease: The lease of the session, with the operator.
        dependencies: What products work with.

    Returns:
        The operand; None if this is a case for `product_stream`: it does not travel,
        is not whole, has no columns or more than run together, or its result stays.

    Raises:
        InvalidVector: If it is no operand of this session.
        LimitExceeded: If its result does not fit into a message.
    """
    inline = name_of(request) == "inline"
    found = chunks.whole(file) if inline and not request.store_as else None
    if found is None:
        return None
    info, limits = lease.info, dependencies.limits
    columns = validation.check_operand(
        found[0], matrix=None, layout=info.layout, dtype=info.dtype, limits=limits
    )
    if not 1 <= columns <= limits.run_columns:
        return None
    (tensor,), payload = found[0].values(), found[1]
    dtype = validation.vector_dtype(info.dtype)
    nbytes = columns * info.layout.size * dtype.itemsize
    validation.check_message(nbytes)
    if tensor.dtype in half_precision.NARROW:
        values = dependencies.pool.take(nbytes).view(dtype)
        half_precision.widen(np.frombuffer(payload, np.uint8), tensor.dtype, values)
    else:
        values = chunks.values_of(payload, dtype, dependencies.pool.take)
    validation.check_finite(values, layout=info.layout)
    return Operand(values.reshape(columns, info.layout.size), tensor.shape)


async def multiply(
    request: curvature_pb.ProductHeader,
    operand: Operand,
    lease: Lease,
    spec: OperatorSpec,
    dependencies: ProductDependencies,
    format_: Format,
) -> Framed:
    """Multiply an operand that came whole.

    Args:
        request: The header.
        operand: The operand, from `operand`.
        lease: The lease of the session, with the operator.
        spec: The operator, with scale and damping.
        dependencies: What products work with.
        format_: How the result travels.

    Returns:
        The answer.
    """
    assert lease.operator is not None
    key = (lease.info.id, request.request_id, calling().name)
    columns = operand.columns
    if key in dependencies.results:
        kept = dependencies.results.get(key, _content(request, operand))
        if kept is not None and kept.header.version == lease.info.version:
            return _answer(kept, format_)
    with dependencies.batcher.reserve(len(columns), 2 * columns.nbytes):
        done = dependencies.batcher.multiply_now(lease.operator, columns)
        if done is None:
            ticket = dependencies.batcher.multiply(lease.operator, columns)
            done = await asyncio.wrap_future(ticket)
        elif (traced := TRACED.get()) is not None:
            now_s = time.monotonic()
            traced.add(
                "compute",
                now_s - done.compute_s,
                now_s,
                device_s=done.compute_s,
                columns=len(columns),
                run_columns=done.run_columns,
            )
    rows = scaled_and_damped(done.value, columns, spec).reshape(operand.shape)
    result = CachedResult(header_of(lease, plan=True), rows, summary_of([done]))
    caller = CALLER.get()

    def keep() -> None:
        content = _content(request, operand)
        dependencies.results.put(key, content, result, rows.nbytes, caller)

    if request.request_id:
        # After the answer has left: nobody asks for it again before.
        asyncio.get_running_loop().call_soon(keep)
    return _answer(result, format_)


def _content(request: curvature_pb.ProductHeader, operand: Operand) -> Content:
    return Content(Content.of(request).header, fingerprint(operand.columns))


def _answer(result: CachedResult, format_: Format) -> Framed:
    payload, crc = tuple(format_.payload(result.rows)), 0
    if format_.checksum:
        for chunk in payload:
            crc = zlib.crc32(chunk, crc)
    message = format_.summary(result.summary, crc)
    message.header.CopyFrom(result.header)
    return Framed(message, (format_.safetensors_header(result.rows.shape), *payload))
