"""Vectors that a session stores: received, and described."""

from __future__ import annotations

import math

import numpy as np

from curvd.errors import InvalidSpec
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.config import LimitsConfig
from curvd_server.service.result_encoding import OWN_TYPE
from curvd_server.service.sources import Columns, Expected, Inline
from curvd_server.service.streams import Chunks
from curvd_server.sessions import Lease, Vector


async def receive(
    request: curvature_pb.PutVectorHeader,
    chunks: Chunks,
    lease: Lease,
    limits: LimitsConfig,
) -> Vector:
    """Receive and store a vector, checked like an operand.

    Args:
        request: Its header.
        chunks: Its safetensors file.
        lease: The lease of the session.
        limits: The server's limits.

    Returns:
        What is stored now.

    Raises:
        InvalidSpec: If it has no name.
    """
    if not request.name:
        msg = "a stored vector needs a name, at least one character"
        raise InvalidSpec(msg, field="name")
    info = lease.info
    shape: tuple[int, ...] = ()
    expected = Expected(None, info.layout, info.dtype, limits)
    dtype = expected.vector_dtype

    def announce(given: tuple[int, ...]) -> int:
        nonlocal shape
        shape = given
        lease.vectors.check_room(request.name, math.prod(shape) * dtype.itemsize)
        return math.prod(shape[:-1])  # all columns in one block, which stays

    array: Columns = np.empty(0, dtype)
    source = Inline(chunks, expected, lambda nbytes: np.empty(nbytes, np.uint8))
    async for block in source.blocks(announce):
        array = block
    vector = Vector(array.reshape(shape), info.version)
    lease.vectors.put(request.name, vector)
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
        values=vector.values,
    )
