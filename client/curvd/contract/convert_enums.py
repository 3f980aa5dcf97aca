"""Enumerations <-> numbers of the contract, by name: ``Dtype.FLOAT32`` is ``DTYPE_FLOAT32``.

An enumeration that is unset converts to our default, as the contract's comments say.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from curvd.contract import enums, infos
from curvd.errors import InvalidSpec
from curvd.v1 import query_service_pb2 as query_pb
from curvd.v1 import session_service_pb2 as session_pb
from curvd.v1 import types_pb2 as types_pb

E = TypeVar("E", bound=enum.Enum)


def _enum_to(prefix: str) -> Callable[[enum.Enum], str]:
    # protobuf's constructors take the names of enumeration values.
    return lambda member: f"{prefix}_{member.name}"


def enum_from(
    wrapper: EnumTypeWrapper, prefix: str, kind: type[E], default: E | None = None
) -> Callable[[int], E]:
    """Make a conversion from numbers of the contract.

    Args:
        wrapper: The enumeration of the contract.
        prefix: Of the names of its values.
        kind: Ours.
        default: What 0 stands for; None: nothing.

    Returns:
        Takes the number, and raises `InvalidSpec` for one that has no name.
    """

    def convert(number: int) -> E:
        if number == 0 and default is not None:
            return default
        try:
            return kind[wrapper.Name(number).removeprefix(f"{prefix}_")]
        except (ValueError, KeyError):
            known = ", ".join(f"{prefix}_{m.name}" for m in kind)
            msg = f"{prefix.lower()} must be one of {known}; got {number}"
            raise InvalidSpec(msg, value=number) from None

    return convert


dtype_to_proto = _enum_to("DTYPE")
dtype_from_proto = enum_from(types_pb.Dtype, "DTYPE", enums.Dtype)
mode_to_proto = _enum_to("MODE")
mode_from_proto = enum_from(types_pb.Mode, "MODE", enums.Mode, enums.Mode.EVAL)
input_style_to_proto = _enum_to("INPUT_STYLE")
input_style_from_proto = enum_from(
    types_pb.InputStyle,
    "INPUT_STYLE",
    enums.InputStyle,
    enums.InputStyle.POSITIONAL,
)
state_to_proto = _enum_to("SESSION_STATE")
state_from_proto = enum_from(
    session_pb.SessionState, "SESSION_STATE", infos.SessionState
)
loss_name_to_proto = _enum_to("LOSS_NAME")
loss_name_from_proto = enum_from(types_pb.LossName, "LOSS_NAME", enums.LossName)
reduction_to_proto = _enum_to("REDUCTION")
reduction_from_proto = enum_from(
    types_pb.Reduction, "REDUCTION", enums.Reduction, enums.Reduction.MEAN
)
kind_to_proto = _enum_to("OPERATOR_KIND")
kind_from_proto = enum_from(
    types_pb.OperatorKind,
    "OPERATOR_KIND",
    enums.OperatorKind,
    enums.OperatorKind.HESSIAN,
)
fisher_to_proto = _enum_to("FISHER_TYPE")
fisher_from_proto = enum_from(
    types_pb.FisherType, "FISHER_TYPE", enums.FisherType, enums.FisherType.MC
)
sharing_to_proto = _enum_to("WEIGHT_SHARING")
sharing_from_proto = enum_from(
    types_pb.WeightSharing,
    "WEIGHT_SHARING",
    enums.WeightSharing,
    enums.WeightSharing.EXPAND,
)
function_to_proto = _enum_to("OPERATOR_FUNCTION")
function_from_proto = enum_from(
    types_pb.OperatorFunction,
    "OPERATOR_FUNCTION",
    enums.OperatorFunction,
    enums.OperatorFunction.NONE,
)
block_kind_to_proto = _enum_to("FACTOR_BLOCK_KIND")
block_kind_from_proto = enum_from(
    types_pb.FactorBlockKind, "FACTOR_BLOCK_KIND", enums.FactorBlockKind
)
tier_to_proto = _enum_to("TIER")
tier_from_proto = enum_from(types_pb.Tier, "TIER", enums.Tier, enums.Tier.FIRST)
stage_to_proto = _enum_to("STAGE")
stage_from_proto = enum_from(session_pb.Stage, "STAGE", enums.Stage)
work_to_proto = _enum_to("WORK")
work_from_proto = enum_from(session_pb.Work, "WORK", enums.Work)
distribution_to_proto = _enum_to("DISTRIBUTION")
distribution_from_proto = enum_from(
    types_pb.Distribution,
    "DISTRIBUTION",
    enums.Distribution,
    enums.Distribution.RADEMACHER,
)
which_to_proto = _enum_to("WHICH")
which_from_proto = enum_from(query_pb.Which, "WHICH", enums.Which, enums.Which.LARGEST)
estimator_to_proto = _enum_to("ESTIMATOR")
estimator_from_proto = enum_from(
    query_pb.Estimator, "ESTIMATOR", enums.Estimator, enums.Estimator.EXCHANGEABLE
)
solver_to_proto = _enum_to("SOLVER")
solver_from_proto = enum_from(query_pb.Solver, "SOLVER", enums.Solver, enums.Solver.CG)
stop_to_proto = _enum_to("STOP")
stop_from_proto = enum_from(query_pb.Stop, "STOP", enums.Stop)
