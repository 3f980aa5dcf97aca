"""Types <-> protobuf messages: each pair side by side, each the other's inverse.

Messages that are unset or at their default convert to our defaults, as the contract's
comments say. Enumerations: `curvd.contract.convert_enums`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache, wraps
from typing import Any, TypeVar

from google.protobuf import timestamp_pb2
from google.protobuf.message import Message

from curvd.contract import convert_enums, enums, infos, specs
from curvd.contract.convert_activities import activities_from_proto, activity_to_proto
from curvd.contract.convert_status import status_from_proto, status_to_proto
from curvd.contract.layout import ParameterLayout, ParameterSpec
from curvd.errors import InvalidSpec
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import graph_pb2 as graph_pb
from curvd.v1 import session_service_pb2 as session_pb
from curvd.v1 import types_pb2 as types_pb

_REMEMBERED_BYTES = 1 << 10
"""A stranger may send what is long, and each time something else."""

D = TypeVar("D")


def _remembering(convert: Callable[[Any], D]) -> Callable[[Any], D]:
    """Remember what small messages were converted to: every product repeats some."""

    @lru_cache(maxsize=256)
    def converted(data: bytes, kind: type[Message]) -> D:
        return convert(kind.FromString(data))

    @wraps(convert)
    def remembering(message: Message) -> D:
        data = message.SerializeToString()
        if len(data) > _REMEMBERED_BYTES:
            return convert(message)
        return converted(data, type(message))  # type: ignore[arg-type]

    return remembering


def loss_to_proto(loss: specs.LossSpec) -> types_pb.Loss:
    """Convert a loss."""
    return types_pb.Loss(
        name=convert_enums.loss_name_to_proto(loss.name),
        reduction=convert_enums.reduction_to_proto(loss.reduction),
        ignore_index=loss.ignore_index,
        class_weights=loss.class_weights,
        label_smoothing=loss.label_smoothing,
        shift=loss.shift,
        beta=loss.beta,
        graph=graph_pb.Graph.FromString(loss.graph) if loss.graph else None,
        weight_decay=[
            types_pb.WeightDecay(pattern=glob, coefficient=coefficient)
            for glob, coefficient in loss.weight_decay
        ],
    )


def loss_from_proto(message: types_pb.Loss) -> specs.LossSpec:
    """Convert a loss.

    Raises:
        InvalidSpec: If its name is unset or an option is out of range.
    """
    return specs.LossSpec(
        name=convert_enums.loss_name_from_proto(message.name),
        reduction=convert_enums.reduction_from_proto(message.reduction),
        ignore_index=_optional(message, "ignore_index"),
        class_weights=tuple(message.class_weights) or None,
        label_smoothing=message.label_smoothing,
        shift=message.shift,
        beta=message.beta if message.HasField("beta") else 1.0,
        graph=specs.SerializedGraph(
            message.graph.SerializeToString(deterministic=True)
            if message.HasField("graph")
            else b""
        ),
        weight_decay=tuple((d.pattern, d.coefficient) for d in message.weight_decay),
    )


@lru_cache(maxsize=64)
def operator_to_proto(spec: specs.OperatorSpec) -> types_pb.Operator:
    """Convert an operator; every product carries one, so do not write to the message."""
    return types_pb.Operator(
        kind=convert_enums.kind_to_proto(spec.kind),
        block_sizes=spec.block_sizes,
        damping=spec.damping,
        scale=spec.scale,
        mc_samples=spec.mc_samples,
        seed=spec.seed,
        parameters=spec.parameters,
        **_factors_to_proto(spec),
    )


def _factors_to_proto(spec: specs.OperatorSpec) -> dict[str, Any]:
    """Name what only operators with Kronecker factors have."""
    if not spec.kind.is_factored:
        return {}
    assert spec.fisher is not None
    assert spec.sharing is not None
    whole = spec.function is enums.OperatorFunction.NONE
    return {
        "fisher": convert_enums.fisher_to_proto(spec.fisher),
        "sharing": convert_enums.sharing_to_proto(spec.sharing),
        "function": None if whole else convert_enums.function_to_proto(spec.function),
        "shift": spec.shift,
    }


@_remembering
def operator_from_proto(message: types_pb.Operator) -> specs.OperatorSpec:
    """Convert an operator; an empty message is the Hessian.

    Raises:
        InvalidSpec: If an option is out of range.
    """
    kind = convert_enums.kind_from_proto(message.kind)
    factored = kind.is_factored
    return specs.OperatorSpec(
        kind=kind,
        block_sizes=tuple(message.block_sizes) or None,
        damping=message.damping,
        scale=message.scale if message.HasField("scale") else 1.0,
        mc_samples=message.mc_samples,
        seed=message.seed,
        parameters=tuple(message.parameters) or None,
        fisher=convert_enums.fisher_from_proto(message.fisher)
        if factored or message.fisher
        else None,
        sharing=convert_enums.sharing_from_proto(message.sharing)
        if factored or message.sharing
        else None,
        function=convert_enums.function_from_proto(message.function),
        shift=message.shift,
    )


def layout_to_proto(layout: ParameterLayout) -> list[types_pb.Parameter]:
    """Convert a layout."""
    return [
        types_pb.Parameter(name=p.name, shape=p.shape, offset=p.offset)
        for p in layout.parameters
    ]


def layout_from_proto(messages: Sequence[types_pb.Parameter]) -> ParameterLayout:
    """Convert a layout."""
    return ParameterLayout(
        tuple(ParameterSpec(m.name, tuple(m.shape), m.offset) for m in messages)
    )


@lru_cache(maxsize=64)
def plan_to_proto(plan: infos.PlanReport) -> types_pb.Plan:
    """Convert a plan; every result carries one, so do not write to the message.

    The blocks of a factored operator are said where operators are listed.
    """
    values = asdict(replace(plan, blocks=()))
    del values["blocks"]
    tier = convert_enums.tier_to_proto(plan.tier)
    return types_pb.Plan(**(values | {"tier": tier}))


@_remembering
def plan_from_proto(message: types_pb.Plan) -> infos.PlanReport:
    """Convert a plan; those of older servers are all final."""
    names = [f.name for f in fields(infos.PlanReport) if f.name != "blocks"]
    plan = infos.PlanReport(**{name: getattr(message, name) for name in names})
    tier = message.tier or types_pb.TIER_FINAL
    return replace(plan, tier=convert_enums.tier_from_proto(tier))


def _block_to_proto(block: infos.FactorBlock) -> types_pb.FactorBlock:
    kind = convert_enums.block_kind_to_proto(block.kind)
    return types_pb.FactorBlock(**(asdict(block) | {"kind": kind}))


def _block_from_proto(message: types_pb.FactorBlock) -> infos.FactorBlock:
    return replace(
        _same_names(infos.FactorBlock, message),
        parameters=tuple(message.parameters),
        kind=convert_enums.block_kind_from_proto(message.kind),
    )


def tensors_to_proto(
    tensors: Sequence[infos.TensorInfo],
) -> list[types_pb.TensorInfo]:
    """Convert tensor descriptions."""
    return [
        types_pb.TensorInfo(name=t.name, dtype=t.dtype, shape=t.shape) for t in tensors
    ]


def tensors_from_proto(
    messages: Sequence[types_pb.TensorInfo],
) -> tuple[infos.TensorInfo, ...]:
    """Convert tensor descriptions."""
    return tuple(infos.TensorInfo(m.name, m.dtype, tuple(m.shape)) for m in messages)


def config_to_json(config: Mapping[str, object]) -> str:
    """Write a builder's configuration as canonical JSON.

    Raises:
        InvalidSpec: If a value is not JSON.
    """
    try:
        return json.dumps(
            dict(config), sort_keys=True, separators=(",", ":"), allow_nan=False
        )
    except (TypeError, ValueError) as error:
        msg = f"the builder's config must be JSON: {error}"
        raise InvalidSpec(msg) from None


def config_from_json(text: str) -> dict[str, object]:
    """Read a builder's configuration.

    Raises:
        InvalidSpec: If it is not a JSON object.
    """
    try:
        config = json.loads(text or "{}", parse_constant=_no_number)
        json.dumps(config, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError) as error:
        msg = f"config_json is not JSON: {error}"
        raise InvalidSpec(msg) from None
    if not isinstance(config, dict):
        msg = f"config_json must be a JSON object, got {type(config).__name__}"
        raise InvalidSpec(msg)
    return config


def _no_number(name: str) -> None:
    msg = f"{name} is no number of JSON's"
    raise ValueError(msg)


def model_to_proto(model: infos.ModelInfo) -> session_pb.Model:
    """Convert a registered model; its graph does not travel back."""
    return session_pb.Model(
        id=model.id,
        builder=model.spec.builder,
        config_json=config_to_json(model.spec.config),
        tensors=tensors_to_proto(model.tensors),
        state_bytes=model.state_bytes,
        graph_digest=model.graph_digest,
        owner=model.owner,
        shared_with=model.shared_with,
        create_time=(
            None if model.create_time_s is None else _timestamp(model.create_time_s)
        ),
        session_ids=model.session_ids,
        other_sessions=model.other_sessions,
    )


def model_from_proto(message: session_pb.Model) -> infos.ModelInfo:
    """Convert a registered model."""
    return infos.ModelInfo(
        id=message.id,
        spec=specs.ModelSpec(
            builder=message.builder, config=config_from_json(message.config_json)
        ),
        tensors=tensors_from_proto(message.tensors),
        state_bytes=message.state_bytes,
        graph_digest=message.graph_digest,
        owner=message.owner,
        shared_with=tuple(message.shared_with),
        create_time_s=_seconds(message, "create_time"),
        session_ids=tuple(message.session_ids),
        other_sessions=message.other_sessions,
    )


def dataset_to_proto(dataset: infos.DatasetInfo) -> session_pb.Dataset:
    """Convert a registered dataset."""
    return session_pb.Dataset(
        id=dataset.id,
        tensors=tensors_to_proto(dataset.tensors),
        inputs=dataset.spec.inputs,
        target=dataset.spec.target,
        batch_size=dataset.spec.batch_size,
        input_style=convert_enums.input_style_to_proto(dataset.spec.input_style),
        data_points=dataset.data_points,
        total_bytes=dataset.total_bytes,
        name=dataset.name,
        owner=dataset.owner,
        shared_with=dataset.shared_with,
        create_time=(
            None if dataset.create_time_s is None else _timestamp(dataset.create_time_s)
        ),
        session_ids=dataset.session_ids,
        other_sessions=dataset.other_sessions,
    )


def dataset_from_proto(message: session_pb.Dataset) -> infos.DatasetInfo:
    """Convert a registered dataset."""
    return infos.DatasetInfo(
        id=message.id,
        spec=dataset_spec_from_proto(message),
        tensors=tensors_from_proto(message.tensors),
        data_points=message.data_points,
        total_bytes=message.total_bytes,
        name=message.name,
        owner=message.owner,
        shared_with=tuple(message.shared_with),
        create_time_s=_seconds(message, "create_time"),
        session_ids=tuple(message.session_ids),
        other_sessions=message.other_sessions,
    )


def dataset_spec_from_proto(
    message: session_pb.Dataset | session_pb.RegisterDatasetHeader,
) -> specs.DatasetSpec:
    """Read how tensors become mini-batches.

    Raises:
        InvalidSpec: If names repeat or the batch size is not positive.
    """
    return specs.DatasetSpec(
        inputs=tuple(message.inputs),
        target=message.target,
        batch_size=message.batch_size,
        input_style=convert_enums.input_style_from_proto(message.input_style),
    )


def session_to_proto(info: infos.SessionInfo) -> session_pb.Session:
    """Convert a session."""
    return session_pb.Session(
        id=info.id,
        name=info.name,
        model_id=info.model_id,
        dataset_id=info.dataset_id,
        loss=loss_to_proto(info.loss),
        dtype=convert_enums.dtype_to_proto(info.dtype),
        mode=convert_enums.mode_to_proto(info.mode),
        version=info.version,
        parameters_digest=info.parameters_digest,
        parameters=layout_to_proto(info.layout),
        parameter_count=info.layout.size,
        data_points=info.data_points,
        batches=info.batches,
        device=info.device,
        budget_bytes=info.budget_bytes,
        operators=[
            types_pb.BuiltOperator(
                operator=operator_to_proto(spec),
                plan=plan_to_proto(plan),
                blocks=map(_block_to_proto, plan.blocks),
            )
            for spec, plan in info.operators
        ],
        state=convert_enums.state_to_proto(info.state),
        create_time=_timestamp(info.create_time_s),
        expire_time=(
            None if info.expire_time_s is None else _timestamp(info.expire_time_s)
        ),
        params=info.params,
        plan=convert_enums.tier_to_proto(info.plan),
        parameters_of=info.parameters_of,
        owner=info.owner,
        shared_with=info.shared_with,
    )


def session_from_proto(message: session_pb.Session) -> infos.SessionInfo:
    """Convert a session."""
    return infos.SessionInfo(
        id=message.id,
        name=message.name,
        model_id=message.model_id,
        dataset_id=message.dataset_id,
        loss=loss_from_proto(message.loss),
        dtype=convert_enums.dtype_from_proto(message.dtype),
        mode=convert_enums.mode_from_proto(message.mode),
        version=message.version,
        parameters_digest=message.parameters_digest,
        layout=layout_from_proto(message.parameters),
        data_points=message.data_points,
        batches=message.batches,
        device=message.device,
        budget_bytes=message.budget_bytes,
        operators=tuple(
            (
                operator_from_proto(m.operator),
                replace(
                    plan_from_proto(m.plan),
                    blocks=tuple(map(_block_from_proto, m.blocks)),
                ),
            )
            for m in message.operators
        ),
        state=convert_enums.state_from_proto(message.state),
        create_time_s=message.create_time.ToNanoseconds() / 1e9,
        expire_time_s=_seconds(message, "expire_time"),
        params=tuple(message.params),
        plan=convert_enums.tier_from_proto(message.plan),
        parameters_of=message.parameters_of,
        owner=message.owner,
        shared_with=tuple(message.shared_with),
    )


def server_info_to_proto(info: infos.ServerInfo) -> session_pb.GetServerInfoResponse:
    """Convert a server's description."""
    return session_pb.GetServerInfoResponse(
        version=info.version,
        torch_version=info.torch_version,
        limits=session_pb.Limits(**asdict(info.limits)),
        devices=[session_pb.Device(**asdict(d)) for d in info.devices],
        builders=info.builders,
        capabilities=info.capabilities,
        datasets=info.datasets,
        activities=map(activity_to_proto, info.activities),
        workers=[session_pb.Worker(**asdict(w)) for w in info.workers],
        generation=info.generation,
        status=status_to_proto(info.status),
    )


def server_info_from_proto(
    message: session_pb.GetServerInfoResponse,
) -> infos.ServerInfo:
    """Convert a server's description."""
    return infos.ServerInfo(
        version=message.version,
        torch_version=message.torch_version,
        limits=_same_names(infos.Limits, message.limits),
        devices=tuple(_same_names(infos.DeviceInfo, d) for d in message.devices),
        builders=tuple(message.builders),
        capabilities=tuple(message.capabilities),
        datasets=tuple(message.datasets),
        activities=activities_from_proto(message.activities),
        workers=tuple(_same_names(infos.WorkerInfo, w) for w in message.workers),
        generation=message.generation,
        status=status_from_proto(message),
    )


def result_from_proto(
    header: curvature_pb.ResultHeader, summary: curvature_pb.ResultSummary
) -> infos.ResultInfo:
    """Read where a result comes from, and what it cost."""
    return infos.ResultInfo(
        version=header.version,
        parameters_digest=header.parameters_digest,
        model_id=header.model_id,
        dataset_id=header.dataset_id,
        plan=plan_from_proto(header.plan) if header.HasField("plan") else None,
        loss=_optional(header, "loss"),
        queue_s=summary.queue_s,
        compute_s=summary.compute_s,
        runs=summary.runs,
        run_columns=summary.run_columns,
    )


def probe_to_proto(probe: specs.Probe) -> curvature_pb.ProbeOperand:
    """Describe random columns."""
    return curvature_pb.ProbeOperand(
        distribution=convert_enums.distribution_to_proto(probe.distribution),
        seed=probe.seed,
        first_index=probe.first,
        columns=probe.columns or 0,
    )


def vector_from_proto(message: curvature_pb.StoredVector) -> infos.StoredVector:
    """Read what is known of a stored vector."""
    return infos.StoredVector(
        name=message.name,
        shape=tuple(message.shape),
        dtype=message.dtype,
        version=message.version,
        values=tuple(message.values),
    )


def _same_names(kind: type[D], message: Message) -> D:
    """Read a dataclass whose fields are scalars named as the message's."""
    return kind(**{f.name: getattr(message, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def _optional(message: Message, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromNanoseconds(round(seconds * 1e9))
    return stamp


def _seconds(message: Message, name: str) -> float | None:
    stamp = _optional(message, name)
    return None if stamp is None else stamp.ToNanoseconds() / 1e9
