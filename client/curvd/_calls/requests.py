"""What a caller asks for, in the words of the contract: one function per call."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from google.protobuf import wrappers_pb2
from google.protobuf.message import Message

from curvd._calls.base import Unary
from curvd._calls.column_stream import ColumnStream
from curvd._calls.opening import CreateSession
from curvd._calls.tensor_stream import (
    OWN_TYPE,
    PutVector,
    SmallProduct,
    TensorStream,
    Wanted,
)
from curvd.contract import (
    RPCS,
    Codec,
    DatasetInfo,
    LossSpec,
    ModelInfo,
    OperatorSpec,
    Probe,
    ResultInfo,
    Rpc,
    SessionInfo,
    StoredVector,
    convert,
    convert_enums,
    enums,
    infos,
)
from curvd.errors import Internal, InvalidSpec
from curvd.tensors import NARROW, Array, Layout, Operand, arrange, vector_dtype
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import session_service_pb2 as session_pb

T = TypeVar("T")

Page = tuple[list[T], str]
"""What a list names, and the token of the next page; empty on the last."""

# grpc.health.v1 in terms of messages that protobuf ships: on the wire its request is
# a string in field 1 and its response a small number in field 1.
_HEALTH = Rpc(
    service="grpc.health.v1.Health",
    name="Check",
    client_streams=False,
    server_streams=False,
    request=Codec(wrappers_pb2.StringValue, bulk=False),
    response=Codec(wrappers_pb2.UInt32Value, bulk=False),
)
_SERVING = 1

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
        request_id=_new_id(),
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
        request_id=_new_id(),
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
        session_id=session.id, name=name, request_id=_new_id()
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
        request_id=_new_id(),
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


def create_session(
    model: ModelInfo | str,
    dataset: DatasetInfo | str,
    *,
    loss: LossSpec | Mapping[str, Any] | str,
    weight_decay: float | Mapping[str, float] | None,
    dtype: Any,
    mode: enums.Mode | str,
    operators: Sequence[OperatorSpec | str] | None,
    params: Sequence[str] | str,
    budget_bytes: int | None,
    lease_s: float | None,
    name: str,
    validate_only: bool,
    plan: enums.Tier | str | None,
    share_with: Sequence[str],
) -> CreateSession:
    """Bring model, dataset and loss together."""
    if isinstance(operators, str):
        operators = [operators]
    chosen = _loss(loss)
    if weight_decay is not None:
        chosen = dataclasses.replace(chosen, weight_decay=weight_decay)  # type: ignore[arg-type]
    tier = None if plan is None else enums.member(enums.Tier, plan, "plan")
    request = session_pb.CreateSessionRequest(
        model_id=model if isinstance(model, str) else model.id,
        dataset_id=dataset if isinstance(dataset, str) else dataset.id,
        loss=convert.loss_to_proto(chosen),
        dtype=convert_enums.dtype_to_proto(_dtype(dtype)),
        mode=convert_enums.mode_to_proto(enums.member(enums.Mode, mode, "mode")),
        operators=[convert.operator_to_proto(_operator(o)) for o in operators or ()],
        params=[params] if isinstance(params, str) else params,
        budget_bytes=budget_bytes,
        name=name,
        request_id=_new_id(),
        validate_only=validate_only,
        plan=None if tier is None else convert_enums.tier_to_proto(tier),
        build_later=operators is None,
        share_with=[share_with] if isinstance(share_with, str) else share_with,
    )
    _set_lease(request, lease_s)
    return CreateSession(request)


def share_session(
    session: SessionInfo,
    dataset: DatasetInfo | str,
    *,
    operators: Sequence[OperatorSpec | str] | None,
    budget_bytes: int | None,
    lease_s: float | None,
    name: str,
    plan: enums.Tier | str | None,
) -> CreateSession:
    """Bring a session's model and loss together with other data."""
    if isinstance(operators, str):
        operators = [operators]
    tier = None if plan is None else enums.member(enums.Tier, plan, "plan")
    request = session_pb.CreateSessionRequest(
        shares_with=session.id,
        dataset_id=dataset if isinstance(dataset, str) else dataset.id,
        operators=[convert.operator_to_proto(_operator(o)) for o in operators or ()],
        budget_bytes=budget_bytes,
        name=name,
        request_id=_new_id(),
        plan=None if tier is None else convert_enums.tier_to_proto(tier),
        build_later=operators is None,
    )
    _set_lease(request, lease_s)
    return CreateSession(request)


def get_session(session_id: str) -> Unary[SessionInfo]:
    """Describe a session."""
    request = session_pb.GetSessionRequest(session_id=session_id)
    return Unary(RPCS["GetSession"], request, _session)


def list_sessions(page_token: str) -> Unary[Page[SessionInfo]]:
    """List one page of sessions."""
    request = session_pb.ListSessionsRequest(page_token=page_token, page_size=1000)
    return _page("ListSessions", request, "sessions", convert.session_from_proto)


def list_models(page_token: str) -> Unary[Page[ModelInfo]]:
    """List one page of models."""
    request = session_pb.ListModelsRequest(page_token=page_token, page_size=1000)
    return _page("ListModels", request, "models", convert.model_from_proto)


def list_datasets(page_token: str) -> Unary[Page[DatasetInfo]]:
    """List one page of datasets."""
    request = session_pb.ListDatasetsRequest(page_token=page_token, page_size=1000)
    return _page("ListDatasets", request, "datasets", convert.dataset_from_proto)


def renew_session(session_id: str, lease_s: float | None) -> Unary[SessionInfo]:
    """Put off the end of a lease."""
    request = session_pb.RenewSessionRequest(session_id=session_id)
    _set_lease(request, lease_s)
    return Unary(RPCS["RenewSession"], request, _session)


def delete_session(session_id: str) -> Unary[None]:
    """End a session."""
    request = session_pb.DeleteSessionRequest(session_id=session_id)
    return Unary(RPCS["DeleteSession"], request, lambda response: None)


def delete_model(model: ModelInfo | str) -> Unary[None]:
    """Delete a model."""
    request = session_pb.DeleteModelRequest(
        model_id=model if isinstance(model, str) else model.id
    )
    return Unary(RPCS["DeleteModel"], request, lambda response: None)


def delete_dataset(dataset: DatasetInfo | str) -> Unary[None]:
    """Delete a dataset."""
    request = session_pb.DeleteDatasetRequest(
        dataset_id=dataset if isinstance(dataset, str) else dataset.id
    )
    return Unary(RPCS["DeleteDataset"], request, lambda response: None)


def server_info() -> Unary[infos.ServerInfo]:
    """Describe the server."""
    request = session_pb.GetServerInfoRequest()
    return Unary(RPCS["GetServerInfo"], request, convert.server_info_from_proto)


def healthy() -> Unary[bool]:
    """Ask the server's health service."""
    return Unary(_HEALTH, wrappers_pb2.StringValue(), lambda r: r.value == _SERVING)


def _page(
    rpc: str, request: Message, field: str, read: Callable[[Any], T]
) -> Unary[Page[T]]:
    return Unary(
        RPCS[rpc],
        request,
        lambda r: ([read(one) for one in getattr(r, field)], r.next_page_token),
    )


def _session(response: Any) -> SessionInfo:
    return convert.session_from_proto(response.session)


def _set_lease(request: Any, lease_s: float | None) -> None:
    if lease_s is not None:
        if not lease_s > 0:
            msg = f"lease_s must be positive, got {lease_s}"
            raise InvalidSpec(msg, lease_s=lease_s)
        request.lease.FromNanoseconds(round(lease_s * 1e9))


def _new_id() -> str:
    return uuid.uuid4().hex


def _loss(loss: LossSpec | Mapping[str, Any] | str) -> LossSpec:
    if isinstance(loss, Mapping):
        return _from_keywords(LossSpec, loss)
    if not isinstance(loss, str | LossSpec):
        named = getattr(loss, "__name__", type(loss).__name__)
        msg = (
            f"create_session takes a loss by name, as a dict or as a LossSpec, got "
            f"{named}: pass it to session_for, or what curvd.export_loss makes of it"
        )
        raise InvalidSpec(msg, loss=named)
    return loss if isinstance(loss, LossSpec) else LossSpec(name=loss)  # type: ignore[arg-type]


def _operator(operator: OperatorSpec | str) -> OperatorSpec:
    if isinstance(operator, OperatorSpec):
        return operator
    return OperatorSpec(kind=operator)  # type: ignore[arg-type]


def _from_keywords(
    kind: Callable[..., LossSpec], keywords: Mapping[str, Any]
) -> LossSpec:
    try:
        return kind(**keywords)
    except TypeError as error:
        msg = f"loss {dict(keywords)!r}: {error}"
        raise InvalidSpec(msg) from None


def _dtype(value: Any) -> enums.Dtype:
    # "F32", "float32", np.float32, np.dtype("float32") and torch.float32 are one thing.
    name = str(getattr(value, "__name__", value)).removeprefix("torch.")
    named = enums.Dtype.__members__.get(name.upper(), name)
    return enums.member(enums.Dtype, named, "dtype")
