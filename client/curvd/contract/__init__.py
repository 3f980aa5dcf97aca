"""What client and server agree on: values, RPCs, and their form in protobuf.

Enumerations, specifications and reports as frozen values, the layout of vectors, the table
of RPCs, and conversions to and from `curvd.v1`. Imports nothing of curvd but `curvd.errors`
and the generated code; knows no connection, no array and no torch.
"""

from __future__ import annotations

from curvd.contract.enums import (
    Distribution,
    Dtype,
    Estimator,
    InputStyle,
    LossName,
    Mode,
    OperatorKind,
    Output,
    Reduction,
    Solver,
    Stop,
    Which,
    member,
)
from curvd.contract.graph_ops import COMPLEX, MAX_INLINE_BYTES
from curvd.contract.infos import (
    DatasetInfo,
    DeviceInfo,
    Limits,
    ModelInfo,
    PlanReport,
    ResultInfo,
    ServerInfo,
    SessionInfo,
    SessionState,
    StoredVector,
    TensorInfo,
)
from curvd.contract.layout import ParameterLayout, ParameterSpec
from curvd.contract.rpcs import (
    BY_PATH,
    BYTES_TAG,
    RPCS,
    Codec,
    Framed,
    Part,
    Rpc,
    read_varint,
)
from curvd.contract.selection import (
    LONGEST_PATTERN,
    MOST_PATTERNS,
    check_patterns,
    select,
)
from curvd.contract.specs import (
    DatasetSpec,
    LossSpec,
    ModelSpec,
    Normaliser,
    OperatorSpec,
    Probe,
    SerializedGraph,
)
from curvd.contract.statuses import CODES, DETAILS_KEY, RpcError, translated

__all__ = [
    "BYTES_TAG",
    "BY_PATH",
    "CODES",
    "COMPLEX",
    "DETAILS_KEY",
    "LONGEST_PATTERN",
    "MAX_INLINE_BYTES",
    "MOST_PATTERNS",
    "RPCS",
    "Codec",
    "DatasetInfo",
    "DatasetSpec",
    "DeviceInfo",
    "Distribution",
    "Dtype",
    "Estimator",
    "Framed",
    "InputStyle",
    "Limits",
    "LossName",
    "LossSpec",
    "Mode",
    "ModelInfo",
    "ModelSpec",
    "Normaliser",
    "OperatorKind",
    "OperatorSpec",
    "Output",
    "ParameterLayout",
    "ParameterSpec",
    "Part",
    "PlanReport",
    "Probe",
    "Reduction",
    "ResultInfo",
    "Rpc",
    "RpcError",
    "SerializedGraph",
    "ServerInfo",
    "SessionInfo",
    "SessionState",
    "Solver",
    "Stop",
    "StoredVector",
    "TensorInfo",
    "Which",
    "check_patterns",
    "member",
    "read_varint",
    "select",
    "translated",
]
