"""Calls of the session service: models, datasets, sessions and the server, but uploads."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf import wrappers_pb2
from google.protobuf.message import Message

from curvd._calls.base import Unary
from curvd._calls.opening import CreateSession
from curvd.contract import (
    RPCS,
    Codec,
    DatasetInfo,
    LossSpec,
    ModelInfo,
    OperatorSpec,
    Rpc,
    ServerInfo,
    SessionInfo,
    convert,
    convert_enums,
    convert_server,
    convert_sessions,
    enums,
)
from curvd.errors import InvalidSpec
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
        dtype=convert_enums.dtype_to_proto(enums.element_type(dtype)),
        mode=convert_enums.mode_to_proto(enums.member(enums.Mode, mode, "mode")),
        operators=[convert.operator_to_proto(_operator(o)) for o in operators or ()],
        params=[params] if isinstance(params, str) else params,
        budget_bytes=budget_bytes,
        name=name,
        request_id=uuid.uuid4().hex,
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
        request_id=uuid.uuid4().hex,
        plan=None if tier is None else convert_enums.tier_to_proto(tier),
        build_later=operators is None,
    )
    _set_lease(request, lease_s)
    return CreateSession(request)


def get_session(session_id: str) -> Unary[SessionInfo]:
    """Describe a session."""
    if not isinstance(session_id, str):
        kind = type(session_id).__name__
        remedy = ": pass session.id" if hasattr(session_id, "id") else ""
        msg = f"a session is found by its id, a string, got a {kind}{remedy}"
        raise InvalidSpec(msg, type=kind)
    request = session_pb.GetSessionRequest(session_id=session_id)
    return Unary(RPCS["GetSession"], request, _session)


def list_sessions(page_token: str) -> Unary[Page[SessionInfo]]:
    """List one page of sessions."""
    request = session_pb.ListSessionsRequest(page_token=page_token, page_size=1000)
    return _page(
        "ListSessions", request, "sessions", convert_sessions.session_from_proto
    )


def list_models(page_token: str) -> Unary[Page[ModelInfo]]:
    """List one page of models."""
    request = session_pb.ListModelsRequest(page_token=page_token, page_size=1000)
    return _page("ListModels", request, "models", convert_sessions.model_from_proto)


def list_datasets(page_token: str) -> Unary[Page[DatasetInfo]]:
    """List one page of datasets."""
    request = session_pb.ListDatasetsRequest(page_token=page_token, page_size=1000)
    return _page(
        "ListDatasets", request, "datasets", convert_sessions.dataset_from_proto
    )


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


def server_info() -> Unary[ServerInfo]:
    """Describe the server."""
    request = session_pb.GetServerInfoRequest()
    return Unary(RPCS["GetServerInfo"], request, convert_server.server_info_from_proto)


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
    return convert_sessions.session_from_proto(response.session)


def _set_lease(request: Any, lease_s: float | None) -> None:
    if lease_s is not None:
        if not lease_s > 0:
            msg = f"lease_s must be positive, got {lease_s}"
            raise InvalidSpec(msg, lease_s=lease_s)
        request.lease.FromNanoseconds(round(lease_s * 1e9))


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
