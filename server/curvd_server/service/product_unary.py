"""A product in one message each way, in one go.

It does what `products` does, for an operand that came whole and a result that leaves
whole: nothing is received or sent meanwhile, so there is nothing to wait for but the
device. At this size a task, a queue or a copy takes as long as the computation.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Framed, OperatorSpec
from curvd.tensors import chunks, half_precision
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.service import validation
from curvd_server.service.handlers import CALLER
from curvd_server.service.outcomes import (
    Kept,
    content_of,
    header_of,
    shifted,
    summary_of,
)
from curvd_server.service.product_stream import Tools
from curvd_server.service.result_cache import Content, fingerprint
from curvd_server.service.result_encoding import Format
from curvd_server.sessions import Lease


@dataclass(frozen=True, slots=True)
class Operand:
    """What is to be multiplied, checked."""

    columns: NDArray[Any]
    """[K, P]; its memory is ours."""
    shape: tuple[int, ...]
    """[P] or [K, P], as the caller sees it."""


def operand(
    request: curvature_pb.ProductHeader, file: memoryview, lease: Lease, tools: Tools
) -> Operand | None:
    """Read and check an operand that came whole.

    Args:
        request: The header.
        file: The operand's safetensors file.
        lease: Of the session, with the operator.
        tools: What products work with.

    Returns:
        The operand; None if this is a case for `products.Product`: it does not travel,
        is not whole, has no columns or more than run together, or its result stays.

    Raises:
        InvalidVector: If it is no operand of this session.
        LimitExceeded: If its result does not fit into a message.
    """
    inline = request.operand.WhichOneof("source") in (None, "inline")
    found = chunks.whole(file) if inline and not request.store_as else None
    if found is None:
        return None
    info, limits = lease.info, tools.limits
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
        values = tools.pool.take(nbytes).view(dtype)
        half_precision.widen(np.frombuffer(payload, np.uint8), tensor.dtype, values)
    else:
        values = chunks.values_of(payload, dtype, tools.pool.take)
    validation.check_finite(values, layout=info.layout)
    return Operand(values.reshape(columns, info.layout.size), tensor.shape)


async def multiply(
    request: curvature_pb.ProductHeader,
    operand: Operand,
    lease: Lease,
    spec: OperatorSpec,
    tools: Tools,
    format_: Format,
) -> Framed:
    """Multiply an operand that came whole.

    Args:
        request: The header.
        operand: From `operand`.
        lease: Of the session, with the operator.
        spec: The operator, with scale and damping.
        tools: What products work with.
        format_: How the result travels.

    Returns:
        The answer.
    """
    assert lease.operator is not None
    key, columns = (lease.info.id, request.request_id), operand.columns
    if key in tools.kept:
        kept = tools.kept.get(key, _content(request, operand))
        if kept is not None and kept.header.version == lease.info.version:
            return _answer(kept, format_)
    with tools.batcher.reserve(len(columns), 2 * columns.nbytes):
        done = tools.batcher.multiply_now(lease.operator, columns)
        if done is None:
            ticket = tools.batcher.multiply(lease.operator, columns)
            done = await asyncio.wrap_future(ticket)
    rows = shifted(done.value, columns, spec).reshape(operand.shape)
    kept = Kept(header_of(lease, plan=True), rows, summary_of([done]))
    caller = CALLER.get()

    def keep() -> None:
        content = _content(request, operand)
        tools.kept.put(key, content, kept, rows.nbytes, caller)

    if request.request_id:
        # After the answer has left: nobody asks for it again before.
        asyncio.get_running_loop().call_soon(keep)
    return _answer(kept, format_)


def _content(request: curvature_pb.ProductHeader, operand: Operand) -> Content:
    return Content(content_of(request).header, fingerprint(operand.columns))


def _answer(kept: Kept, format_: Format) -> Framed:
    payload, summary = tuple(format_.payload(kept.rows)), kept.summary
    if format_.checksum:
        summary = curvature_pb.ResultSummary()
        summary.CopyFrom(kept.summary)
        crc = 0
        for chunk in payload:
            crc = zlib.crc32(chunk, crc)
        summary.crc32 = crc
    message = format_.message(header=kept.header, summary=summary)
    return Framed(message, (format_.safetensors_header(kept.rows.shape), *payload))
