"""Calls of the curvature service: products, gradients, and vectors that sessions store."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from curvd._calls.base import Unary
from curvd._calls.column_stream import ColumnStream
from curvd._calls.tensor_stream import (
    OWN_TYPE,
    PutVector,
    SmallProduct,
    TensorStream,
    Wanted,
)
from curvd.contract import (
    RPCS,
    OperatorSpec,
    Probe,
    ResultInfo,
    SessionInfo,
    StoredVector,
    convert,
    enums,
)
from curvd.errors import Internal, InvalidSpec
from curvd.tensors import NARROW, Array, Layout, Operand, arrange, vector_dtype
from curvd.v1 import curvature_service_pb2 as curvature_pb

SMALL_BYTES = 1 << 20
"""Up to here one message each way is two to three times quicker than a stream."""


def product(
    session: SessionInfo,
    spec: OperatorSpec,
    operand: Operand | Probe | StoredVector,
    *,
    expected_version: int | None,
    wire_type: str = "",
    store: str = "",
    verify: bool = False,
    block: int = 0,
) -> TensorStream[Any]:
    """Multiply an operator onto vectors.

    Args:
        session: Where.
        spec: Which operator.
        operand: What to multiply.
        expected_version: Refuse to compute at another parameter version.
        wire_type: safetensors element type on the wire; empty: the session's own.
        store: Keep the result in the session under this name.
        verify: Check the result's checksum.
        block: Columns to hand out together; 0: all at the end.

    Returns:
        The call; its result is in the operand's layout, or a stored vector.
    """
    header = curvature_pb.ProductHeader(
        session_id=session.id,
        operator=convert.operator_to_proto(spec),
        expected_version=expected_version,
        request_id=uuid.uuid4().hex,
        result_type=wire_type,
        store_as=store,
    )
    sent: Operand | None = None
    finish: Callable[[Array], Any] = _columns_last
    if isinstance(operand, Operand):
        sent, finish, shape = operand, operand.restore, operand.shape
    elif isinstance(operand, Probe):
        header.operand.probe.CopyFrom(convert.probe_to_proto(operand))
        shape = operand.shape(session.layout.size)
    else:
        header.operand.stored = operand.name
        shape = operand.shape
    dtype = vector_dtype(session.dtype)
    if store:
        finish = _stored_as(store, shape, dtype)
    wanted: Wanted[Any] = Wanted(
        shape=None if store else shape,
        dtype=dtype,
        finish=finish,
        wire_type=wire_type,
        verify=verify,
    )
    travelling = wanted.bytes_of(shape)
    if block:
        return ColumnStream(RPCS["MatMat"], header, sent, wanted, block=block)
    if travelling <= SMALL_BYTES or (store and sent is None):
        return SmallProduct(RPCS["Multiply"], header, sent, wanted)
    if len(shape) == 1 or store:
        rpc = RPCS["MatVec" if len(shape) == 1 else "MatMat"]
        return TensorStream(rpc, header, sent, wanted)
    return ColumnStream(RPCS["MatMat"], header, sent, wanted)


def gradient(
    session: SessionInfo,
    *,
    layout: Layout,
    expected_version: int | None,
    store: str | None = None,
) -> TensorStream[Any]:
    """Compute the objective's gradient, laid out as the caller wants it, or stored."""
    if store == "":
        msg = "a stored vector needs a name, at least one character"
        raise InvalidSpec(msg, store=store)
    arrange(np.empty(session.layout.size), session.layout, layout)  # refuse it early
    request = curvature_pb.GradientRequest(
        session_id=session.id,
        expected_version=expected_version,
        request_id=uuid.uuid4().hex,
        store_as=store or "",
    )
    shape, dtype = (session.layout.size,), vector_dtype(session.dtype)
    finish: Callable[[Array], Any] = lambda vector: arrange(  # noqa: E731
        vector, session.layout, layout
    )
    if store is not None:
        finish = _stored_as(store, shape, dtype)
    wanted: Wanted[Any] = Wanted(
        shape=None if store else shape, dtype=dtype, finish=finish
    )
    return TensorStream(RPCS["Gradient"], request, None, wanted)


def put_vector(
    session: SessionInfo, name: str, operand: Operand, *, wire_type: str
) -> PutVector[StoredVector]:
    """Store a vector in a session."""
    header = curvature_pb.PutVectorHeader(
        session_id=session.id, name=name, request_id=uuid.uuid4().hex
    )
    own = wire_type or OWN_TYPE[vector_dtype(session.dtype)]
    return PutVector(
        RPCS["PutVector"],
        header,
        operand,
        own,
        lambda response: convert.vector_from_proto(response.vector),
    )


def get_vector(
    session: SessionInfo, vector: StoredVector, *, wire_type: str
) -> TensorStream[Any]:
    """Fetch a stored vector, columns last."""
    request = curvature_pb.GetVectorRequest(
        session_id=session.id,
        name=vector.name,
        request_id=uuid.uuid4().hex,
        result_type=wire_type,
    )
    wanted = Wanted(
        shape=vector.shape,
        dtype=vector_dtype(session.dtype),
        finish=_columns_last,
        wire_type=wire_type,
    )
    return TensorStream(RPCS["GetVector"], request, None, wanted)


def list_vectors(session_id: str) -> Unary[list[StoredVector]]:
    """Name what is stored in a session."""
    request = curvature_pb.ListVectorsRequest(session_id=session_id)
    return Unary(
        RPCS["ListVectors"],
        request,
        lambda response: [convert.vector_from_proto(v) for v in response.vectors],
    )


def delete_vector(session_id: str, name: str) -> Unary[None]:
    """Forget a stored vector."""
    request = curvature_pb.DeleteVectorRequest(session_id=session_id, name=name)
    return Unary(RPCS["DeleteVector"], request, lambda response: None)


def combine_vectors(
    session_id: str, terms: Mapping[str, float], store: str
) -> Unary[StoredVector]:
    """Store a linear combination of stored vectors."""
    request = curvature_pb.CombineVectorsRequest(
        session_id=session_id, store_as=store, request_id=uuid.uuid4().hex
    )
    for name, coefficient in terms.items():
        request.terms.add(name=name, coefficient=coefficient)
    return Unary(
        RPCS["CombineVectors"], request, lambda r: convert.vector_from_proto(r.vector)
    )


def inner_products(
    session_id: str, left: Sequence[str], right: Sequence[str]
) -> Unary[np.ndarray[Any, np.dtype[np.float64]]]:
    """Multiply stored vectors with each other: [L, R]."""
    request = curvature_pb.InnerProductsRequest(
        session_id=session_id, left=left, right=right
    )
    return Unary(
        RPCS["InnerProducts"],
        request,
        lambda r: np.array(r.values).reshape(r.rows, r.columns),
    )


def orthonormalise_vectors(
    session_id: str, names: Sequence[str], store: str, tolerance: float
) -> Unary[StoredVector]:
    """Store an orthonormal basis of what stored vectors span."""
    request = curvature_pb.OrthonormaliseVectorsRequest(
        session_id=session_id,
        names=names,
        store_as=store,
        tolerance=tolerance,
        request_id=uuid.uuid4().hex,
    )
    return Unary(
        RPCS["OrthonormaliseVectors"],
        request,
        lambda r: convert.vector_from_proto(r.vector),
    )


def check_wire(wire: str | None, dtype: enums.Dtype) -> str:
    """Check the element type for the wire.

    Args:
        wire: ``BF16``, ``F16``, the session's own, or None.
        dtype: The element type of the session.

    Returns:
        Its name in the contract; empty for the session's own.

    Raises:
        InvalidSpec: If it is another.
    """
    own = OWN_TYPE[vector_dtype(dtype)]
    if wire is not None and wire not in (own, *NARROW):
        msg = f"wire={wire!r} is not offered; known: {', '.join((own, *NARROW))}"
        raise InvalidSpec(msg, wire=wire)
    return "" if wire in (None, own) else wire


def _columns_last(rows: Array) -> Array:
    return rows.T


def _stored_as(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Callable[[Array], StoredVector]:
    return lambda nothing: StoredVector(
        name=name, shape=shape, dtype=OWN_TYPE[dtype], version=0
    )


def at_version(stored: StoredVector, info: ResultInfo | None) -> StoredVector:
    """Add the version that a result belongs to, to what stands for it."""
    return stored if info is None else dataclasses.replace(stored, version=info.version)


def loss_of(info: ResultInfo | None) -> float:
    """Read the objective off a gradient's result.

    Raises:
        Internal: If the server did not say it.
    """
    if info is None or info.loss is None:
        msg = "the server's answer to Gradient breaks the contract: it has no loss"
        raise Internal(msg)
    return info.loss
