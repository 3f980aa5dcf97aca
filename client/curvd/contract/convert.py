"""Types <-> protobuf messages: each pair side by side, each the other's inverse.

Messages that are unset or at their default convert to our defaults, as the contract's
comments say. Here is what products carry, and what several services share;
`convert_sessions` has what sessions are made of, `convert_server` what a server says about
itself, `convert_enums` the enumerations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache, wraps
from typing import Any, TypeVar

from google.protobuf.message import Message

from curvd.contract import convert_enums, enums, infos, specs
from curvd.contract.convert_fields import optional, same_names
from curvd.contract.layout import ParameterLayout, ParameterSpec
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import graph_pb2 as graph_pb
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
        ignore_index=optional(message, "ignore_index"),
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


def block_to_proto(block: infos.FactorBlock) -> types_pb.FactorBlock:
    """Convert a block of a factored operator."""
    kind = convert_enums.block_kind_to_proto(block.kind)
    return types_pb.FactorBlock(**(asdict(block) | {"kind": kind}))


def block_from_proto(message: types_pb.FactorBlock) -> infos.FactorBlock:
    """Convert a block of a factored operator."""
    return replace(
        same_names(infos.FactorBlock, message),
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
        loss=optional(header, "loss"),
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
