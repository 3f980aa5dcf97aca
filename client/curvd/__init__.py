"""curvd: remote curvature queries on neural networks.

    with curvd.connect("127.0.0.1:50551") as client:
        model = client.register_model("mlp", {"widths": [8, 3]}, state)
        dataset = client.register_dataset(data, inputs=["x"], target="y", batch_size=32)
        session = client.create_session(model, dataset, loss="cross_entropy")
        product = session.hessian() @ v

This module is the door: what it does not name may change without notice. `curvd.aio` is
the same client for asyncio, `curvd.errors` draws the tree of exceptions.
"""

from __future__ import annotations

from curvd import aio, errors
from curvd._version import VERSION as __version__
from curvd.aio import AsyncClient, AsyncOperator, AsyncSession
from curvd.allocator import tune_allocator
from curvd.choices import (
    Distribution,
    Dtype,
    Estimator,
    InputStyle,
    LossName,
    Mode,
    OperatorKind,
    Reduction,
    Solver,
    Stop,
    Which,
)
from curvd.client import Client, connect
from curvd.config import ClientConfig, RetryConfig, TlsConfig
from curvd.errors import (
    BuilderNotFound,
    Cancelled,
    CannotConnect,
    CurvatureUnverified,
    CurvdError,
    DataLoss,
    DatasetNotFound,
    DeadlineExceeded,
    DiskFull,
    FailedPrecondition,
    GradientMismatch,
    Internal,
    InvalidArgument,
    InvalidGraph,
    InvalidSpec,
    InvalidTensors,
    InvalidVector,
    LimitExceeded,
    ModelNotFound,
    NotDeterministic,
    NotFinite,
    NotFound,
    OutOfMemory,
    Overloaded,
    PermissionDenied,
    RequestIdReused,
    ResourceExhausted,
    ResultNotKept,
    SessionNotFound,
    StateMismatch,
    StillInUse,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    VectorNotFound,
    VersionMismatch,
)
from curvd.exported import ExportedModel, export, export_loss
from curvd.layout import ParameterLayout, ParameterSpec
from curvd.operator import RemoteOperator
from curvd.reports import (
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
from curvd.results import (
    Density,
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    LogDeterminant,
    QueryInfo,
    QueryProgress,
    Solution,
)
from curvd.session import Session
from curvd.types import DatasetSpec, LossSpec, ModelSpec, OperatorSpec, Probe

__all__ = [  # noqa: RUF022 - grouped, not sorted
    # the client
    "connect",
    "Client",
    "Session",
    "RemoteOperator",
    "ClientConfig",
    "RetryConfig",
    "TlsConfig",
    "tune_allocator",
    # any module as a graph
    "export",
    "export_loss",
    "ExportedModel",
    # the same for asyncio
    "aio",
    "AsyncClient",
    "AsyncSession",
    "AsyncOperator",
    # words of the domain
    "DatasetInfo",
    "DatasetSpec",
    "DeviceInfo",
    "Dtype",
    "InputStyle",
    "Limits",
    "LossName",
    "LossSpec",
    "Mode",
    "ModelInfo",
    "ModelSpec",
    "OperatorKind",
    "OperatorSpec",
    "ParameterLayout",
    "ParameterSpec",
    "PlanReport",
    "Probe",
    "Reduction",
    "ResultInfo",
    "ServerInfo",
    "SessionInfo",
    "SessionState",
    "StoredVector",
    "TensorInfo",
    # queries
    "Density",
    "DiagonalEstimate",
    "Distribution",
    "Eigenpairs",
    "Estimate",
    "Estimator",
    "LogDeterminant",
    "QueryInfo",
    "QueryProgress",
    "Solution",
    "Solver",
    "Stop",
    "Which",
    # errors
    "errors",
    "BuilderNotFound",
    "Cancelled",
    "CannotConnect",
    "CurvatureUnverified",
    "CurvdError",
    "DataLoss",
    "DatasetNotFound",
    "DeadlineExceeded",
    "DiskFull",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "InvalidGraph",
    "GradientMismatch",
    "InvalidSpec",
    "InvalidTensors",
    "InvalidVector",
    "LimitExceeded",
    "ModelNotFound",
    "NotDeterministic",
    "NotFinite",
    "NotFound",
    "OutOfMemory",
    "Overloaded",
    "PermissionDenied",
    "RequestIdReused",
    "ResourceExhausted",
    "ResultNotKept",
    "SessionNotFound",
    "StateMismatch",
    "StillInUse",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "VectorNotFound",
    "VersionMismatch",
    # this package
    "__version__",
]
