"""Models, datasets and sessions <-> messages; see `curvd.contract.convert`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from google.protobuf import timestamp_pb2
from google.protobuf.message import Message

from curvd.contract import convert, convert_enums, infos, specs
from curvd.contract.convert_fields import optional
from curvd.errors import InvalidSpec
from curvd.v1 import session_service_pb2 as session_pb
from curvd.v1 import types_pb2 as types_pb


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
        tensors=convert.tensors_to_proto(model.tensors),
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
        tensors=convert.tensors_from_proto(message.tensors),
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
        tensors=convert.tensors_to_proto(dataset.tensors),
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
        tensors=convert.tensors_from_proto(message.tensors),
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
        loss=convert.loss_to_proto(info.loss),
        dtype=convert_enums.dtype_to_proto(info.dtype),
        mode=convert_enums.mode_to_proto(info.mode),
        version=info.version,
        parameters_digest=info.parameters_digest,
        parameters=convert.layout_to_proto(info.layout),
        parameter_count=info.layout.size,
        data_points=info.data_points,
        batches=info.batches,
        device=info.device,
        budget_bytes=info.budget_bytes,
        operators=[
            types_pb.BuiltOperator(
                operator=convert.operator_to_proto(spec),
                plan=convert.plan_to_proto(plan),
                blocks=map(convert.block_to_proto, plan.blocks),
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
        loss=convert.loss_from_proto(message.loss),
        dtype=convert_enums.dtype_from_proto(message.dtype),
        mode=convert_enums.mode_from_proto(message.mode),
        version=message.version,
        parameters_digest=message.parameters_digest,
        layout=convert.layout_from_proto(message.parameters),
        data_points=message.data_points,
        batches=message.batches,
        device=message.device,
        budget_bytes=message.budget_bytes,
        operators=tuple(
            (
                convert.operator_from_proto(m.operator),
                replace(
                    convert.plan_from_proto(m.plan),
                    blocks=tuple(map(convert.block_from_proto, m.blocks)),
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


def _timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromNanoseconds(round(seconds * 1e9))
    return stamp


def _seconds(message: Message, name: str) -> float | None:
    stamp = optional(message, name)
    return None if stamp is None else stamp.ToNanoseconds() / 1e9
