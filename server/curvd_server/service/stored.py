"""Receiving a vector that a session stores."""

from __future__ import annotations

import asyncio

import numpy as np

from curvd.errors import InvalidSpec
from curvd.tensors import Buffer, half_precision, safetensors_header
from curvd.tensors import chunks as wire
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.service import validation
from curvd_server.service.handlers import Chunks
from curvd_server.service.product_stream import Columns, Tools
from curvd_server.service.result_encoding import OWN_TYPE
from curvd_server.sessions import Lease, Vector


async def receive(
    request: curvature_pb.PutVectorHeader,
    chunks: Chunks,
    lease: Lease,
    tools: Tools,
) -> Vector:
    """Receive and store a vector, checked like an operand.

    Args:
        request: Its header.
        chunks: Its safetensors file.
        lease: Of the session.
        tools: Limits.

    Returns:
        What is stored now.

    Raises:
        InvalidSpec: If it has no name.
    """
    name, layout = request.name, lease.info.layout
    if not name:
        msg = "a stored vector needs a name, at least one character"
        raise InvalidSpec(msg, field="name")
    dtype = validation.vector_dtype(lease.info.dtype)

    def accept(header: safetensors_header.Header) -> int:
        validation.check_operand(
            header,
            matrix=None,
            layout=layout,
            dtype=lease.info.dtype,
            limits=tools.limits,
        )
        count = int(np.prod(header["v"].shape))
        lease.vectors.check_room(name, count * dtype.itemsize)
        return 0

    def checked(raw: Buffer, tensor: safetensors_header.TensorHeader) -> Columns:
        if tensor.dtype in half_precision.NARROW:
            array = np.empty(tensor.shape, dtype)
            half_precision.widen(raw, tensor.dtype, array.reshape(-1))
        else:
            array = raw.view(dtype).reshape(tensor.shape)
        validation.check_finite(array, layout=layout)
        return array

    assembler = wire.Assembler(accept, max_bytes=tools.limits.operand_bytes)
    chunks.come_to(assembler.room)
    raw = np.empty(0, np.uint8)
    async for chunk in chunks:
        for piece in assembler.feed(chunk):
            raw = piece
    tensor = assembler.finish()["v"]
    array = await asyncio.to_thread(checked, raw, tensor)
    vector = Vector(array, lease.info.version)
    lease.vectors.put(name, vector)
    return vector


def described(name: str, vector: Vector) -> curvature_pb.StoredVector:
    """Describe a stored vector.

    Args:
        name: Its name.
        vector: The vector.

    Returns:
        The message.
    """
    return curvature_pb.StoredVector(
        name=name,
        shape=vector.array.shape,
        dtype=OWN_TYPE[vector.array.dtype],
        version=vector.version,
    )
