"""curvd: remote curvature queries on neural networks.

    with curvd.connect("127.0.0.1:50551") as client:
        session = client.session_for(net, nn.CrossEntropyLoss(), (x, y), batch_size=32)
        H = session.hessian()
        product = H @ v
        print(H.eigsh(k=3), H.trace(relative_error=0.01))
        session.update_parameters(net.state_dict())

Each of these has a help of its own, such as ``help(curvd.Session)``:

    connect, Client                  to a server: models, datasets, sessions
    Session                          a model, data and a loss: gradients, operators, updates
    RemoteOperator                   a Hessian or one of its relatives: products and queries
    OperatorSum, Submatrix, Identity what H + G, H[rows, columns] and H - s * I are
    Jacobian                         of losses or outputs: J @ v and J.T @ w
    export, export_loss              any nn.Module, any loss; ExportedModel
    watch, Watch, Reading            a training's curvature, without holding it up
    aio                              the same for asyncio: AsyncClient, AsyncSession,
                                     AsyncOperator
    errors                           every exception, as a tree; all are CurvdError

    ClientConfig, RetryConfig, TlsConfig, tune_allocator       how to reach a server
    ModelSpec, DatasetSpec, LossSpec, OperatorSpec, Probe      what is asked for
    Dtype, Mode, LossName, Reduction, InputStyle, OperatorKind, Which, Estimator, Solver,
    Distribution, Tier, FisherType, WeightSharing, OperatorFunction,
    FactorBlockKind                                            choices; their values will do
    ServerInfo, ModelInfo, DatasetInfo, SessionInfo, SessionState, TensorInfo, DeviceInfo,
    Limits, PlanReport, FactorBlock, ResultInfo, StoredVector, ParameterLayout,
    ParameterSpec, Activity, Work, StageProgress, Stage, WorkerInfo,
    ServerStatus                                               what a server says
    queries: Eigenpairs, Estimate, DiagonalEstimate, Density, Solution, Sketch,
    LogDeterminant, QueryInfo, QueryProgress, Stop             what queries return

What is not named here may change without notice.
"""

from __future__ import annotations

from curvd import aio, errors
from curvd.aio import AsyncClient, AsyncOperator, AsyncSession
from curvd.config import VERSION as __version__
from curvd.config import ClientConfig, RetryConfig, TlsConfig
from curvd.contract import (
    Activity,
    DatasetInfo,
    DatasetSpec,
    DeviceInfo,
    Distribution,
    Dtype,
    Estimator,
    FactorBlock,
    FactorBlockKind,
    FisherType,
    InputStyle,
    Limits,
    LossName,
    LossSpec,
    Mode,
    ModelInfo,
    ModelSpec,
    OperatorFunction,
    OperatorKind,
    OperatorSpec,
    ParameterLayout,
    ParameterSpec,
    PlanReport,
    Probe,
    QueryInfo,
    QueryProgress,
    Reduction,
    ResultInfo,
    ServerInfo,
    ServerStatus,
    SessionInfo,
    SessionState,
    Solver,
    Stage,
    StageProgress,
    Stop,
    StoredVector,
    TensorInfo,
    Tier,
    WeightSharing,
    Which,
    Work,
    WorkerInfo,
)
from curvd.errors import (
    BuilderNotFound,
    Cancelled,
    CannotConnect,
    CheckpointNotFound,
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
    ScaleOutOfRange,
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
from curvd.remote import (
    Client,
    Identity,
    Jacobian,
    OperatorSum,
    RemoteOperator,
    Session,
    Submatrix,
    connect,
    queries,
)
from curvd.remote.queries import (
    Density,
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    LogDeterminant,
    Sketch,
    Solution,
)
from curvd.tensors import tune_allocator
from curvd.watching import Reading, Watch, watch

__all__ = [  # noqa: RUF022 - grouped, not sorted
    # the client
    "connect",
    "Client",
    "Session",
    "RemoteOperator",
    "Identity",
    "Jacobian",
    "OperatorSum",
    "Submatrix",
    "ClientConfig",
    "RetryConfig",
    "TlsConfig",
    "tune_allocator",
    # any module as a graph
    "export",
    "export_loss",
    "ExportedModel",
    # a training's curvature
    "watch",
    "Watch",
    "Reading",
    # the same for asyncio
    "aio",
    "AsyncClient",
    "AsyncSession",
    "AsyncOperator",
    # words of the domain
    "Activity",
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
    "OperatorFunction",
    "OperatorKind",
    "OperatorSpec",
    "ParameterLayout",
    "ParameterSpec",
    "PlanReport",
    "Probe",
    "Reduction",
    "ResultInfo",
    "ServerInfo",
    "ServerStatus",
    "SessionInfo",
    "SessionState",
    "Stage",
    "StageProgress",
    "StoredVector",
    "TensorInfo",
    # queries
    "queries",
    "Density",
    "DiagonalEstimate",
    "Distribution",
    "Eigenpairs",
    "Estimate",
    "Estimator",
    "FactorBlock",
    "FactorBlockKind",
    "FisherType",
    "LogDeterminant",
    "QueryInfo",
    "QueryProgress",
    "Sketch",
    "Solution",
    "Solver",
    "Stop",
    "Tier",
    "WeightSharing",
    "Which",
    "Work",
    "WorkerInfo",
    # errors
    "errors",
    "BuilderNotFound",
    "CheckpointNotFound",
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
    "ScaleOutOfRange",
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

_public = tuple(__all__)
# For readers of the source `__all__` is what is public. At run time pydoc would take it for
# a wish to read every class in full: help(curvd) had 13,000 lines.
del __all__
