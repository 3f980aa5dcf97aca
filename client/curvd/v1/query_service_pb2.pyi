from curvd.v1 import curvature_service_pb2 as _curvature_service_pb2
from curvd.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JacobianOf(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JACOBIAN_OF_UNSPECIFIED: _ClassVar[JacobianOf]
    JACOBIAN_OF_LOSSES: _ClassVar[JacobianOf]
    JACOBIAN_OF_OUTPUTS: _ClassVar[JacobianOf]

class Which(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WHICH_UNSPECIFIED: _ClassVar[Which]
    WHICH_LARGEST: _ClassVar[Which]
    WHICH_SMALLEST: _ClassVar[Which]
    WHICH_BOTH: _ClassVar[Which]
    WHICH_LARGEST_MAGNITUDE: _ClassVar[Which]

class Estimator(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ESTIMATOR_UNSPECIFIED: _ClassVar[Estimator]
    ESTIMATOR_HUTCHINSON: _ClassVar[Estimator]
    ESTIMATOR_HUTCHPP: _ClassVar[Estimator]
    ESTIMATOR_EXCHANGEABLE: _ClassVar[Estimator]

class Solver(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOLVER_UNSPECIFIED: _ClassVar[Solver]
    SOLVER_CG: _ClassVar[Solver]
    SOLVER_MINRES: _ClassVar[Solver]

class Stop(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_UNSPECIFIED: _ClassVar[Stop]
    STOP_CONVERGED: _ClassVar[Stop]
    STOP_PRODUCTS: _ClassVar[Stop]
    STOP_TIME: _ClassVar[Stop]
    STOP_STAGNATED: _ClassVar[Stop]
    STOP_NEGATIVE_CURVATURE: _ClassVar[Stop]
JACOBIAN_OF_UNSPECIFIED: JacobianOf
JACOBIAN_OF_LOSSES: JacobianOf
JACOBIAN_OF_OUTPUTS: JacobianOf
WHICH_UNSPECIFIED: Which
WHICH_LARGEST: Which
WHICH_SMALLEST: Which
WHICH_BOTH: Which
WHICH_LARGEST_MAGNITUDE: Which
ESTIMATOR_UNSPECIFIED: Estimator
ESTIMATOR_HUTCHINSON: Estimator
ESTIMATOR_HUTCHPP: Estimator
ESTIMATOR_EXCHANGEABLE: Estimator
SOLVER_UNSPECIFIED: Solver
SOLVER_CG: Solver
SOLVER_MINRES: Solver
STOP_UNSPECIFIED: Stop
STOP_CONVERGED: Stop
STOP_PRODUCTS: Stop
STOP_TIME: Stop
STOP_STAGNATED: Stop
STOP_NEGATIVE_CURVATURE: Stop

class Query(_message.Message):
    __slots__ = ("session_id", "operator", "expected_version", "request_id", "max_products", "time_limit_s")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_PRODUCTS_FIELD_NUMBER: _ClassVar[int]
    TIME_LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    operator: _types_pb2.Operator
    expected_version: int
    request_id: str
    max_products: int
    time_limit_s: float
    def __init__(self, session_id: _Optional[str] = ..., operator: _Optional[_Union[_types_pb2.Operator, _Mapping]] = ..., expected_version: _Optional[int] = ..., request_id: _Optional[str] = ..., max_products: _Optional[int] = ..., time_limit_s: _Optional[float] = ...) -> None: ...

class QueryProgress(_message.Message):
    __slots__ = ("iteration", "products", "estimates", "residuals", "elapsed_s", "share")
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    PRODUCTS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATES_FIELD_NUMBER: _ClassVar[int]
    RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    iteration: int
    products: int
    estimates: _containers.RepeatedScalarFieldContainer[float]
    residuals: _containers.RepeatedScalarFieldContainer[float]
    elapsed_s: float
    share: float
    def __init__(self, iteration: _Optional[int] = ..., products: _Optional[int] = ..., estimates: _Optional[_Iterable[float]] = ..., residuals: _Optional[_Iterable[float]] = ..., elapsed_s: _Optional[float] = ..., share: _Optional[float] = ...) -> None: ...

class QuerySummary(_message.Message):
    __slots__ = ("stopped", "products", "elapsed_s", "queue_s", "compute_s", "plans")
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    PRODUCTS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    stopped: Stop
    products: int
    elapsed_s: float
    queue_s: float
    compute_s: float
    plans: _containers.RepeatedCompositeFieldContainer[_types_pb2.Plan]
    def __init__(self, stopped: _Optional[_Union[Stop, str]] = ..., products: _Optional[int] = ..., elapsed_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., plans: _Optional[_Iterable[_Union[_types_pb2.Plan, _Mapping]]] = ...) -> None: ...

class Accuracy(_message.Message):
    __slots__ = ("relative_error", "absolute_error", "samples", "seed")
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    ABSOLUTE_ERROR_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    relative_error: float
    absolute_error: float
    samples: int
    seed: int
    def __init__(self, relative_error: _Optional[float] = ..., absolute_error: _Optional[float] = ..., samples: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class EstimateSummary(_message.Message):
    __slots__ = ("query", "value", "standard_error", "half_width", "samples")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    STANDARD_ERROR_FIELD_NUMBER: _ClassVar[int]
    HALF_WIDTH_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    value: float
    standard_error: float
    half_width: float
    samples: int
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., value: _Optional[float] = ..., standard_error: _Optional[float] = ..., half_width: _Optional[float] = ..., samples: _Optional[int] = ...) -> None: ...

class EigshRequest(_message.Message):
    __slots__ = ("query", "k", "which", "tolerance", "basis_size", "seed", "warm_start", "values_only", "store_as", "start")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    WHICH_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    BASIS_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WARM_START_FIELD_NUMBER: _ClassVar[int]
    VALUES_ONLY_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    query: Query
    k: int
    which: Which
    tolerance: float
    basis_size: int
    seed: int
    warm_start: bool
    values_only: bool
    store_as: str
    start: str
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., k: _Optional[int] = ..., which: _Optional[_Union[Which, str]] = ..., tolerance: _Optional[float] = ..., basis_size: _Optional[int] = ..., seed: _Optional[int] = ..., warm_start: bool = ..., values_only: bool = ..., store_as: _Optional[str] = ..., start: _Optional[str] = ...) -> None: ...

class EigshResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: EigshSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[EigshSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class EigshSummary(_message.Message):
    __slots__ = ("query", "values", "residuals", "tolerances", "asymmetry", "restarts", "warm")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    TOLERANCES_FIELD_NUMBER: _ClassVar[int]
    ASYMMETRY_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    WARM_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    values: _containers.RepeatedScalarFieldContainer[float]
    residuals: _containers.RepeatedScalarFieldContainer[float]
    tolerances: _containers.RepeatedScalarFieldContainer[float]
    asymmetry: float
    restarts: int
    warm: bool
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., values: _Optional[_Iterable[float]] = ..., residuals: _Optional[_Iterable[float]] = ..., tolerances: _Optional[_Iterable[float]] = ..., asymmetry: _Optional[float] = ..., restarts: _Optional[int] = ..., warm: bool = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("query", "estimator", "accuracy")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    query: Query
    estimator: Estimator
    accuracy: Accuracy
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., estimator: _Optional[_Union[Estimator, str]] = ..., accuracy: _Optional[_Union[Accuracy, _Mapping]] = ...) -> None: ...

class TraceResponse(_message.Message):
    __slots__ = ("header", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    summary: EstimateSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., summary: _Optional[_Union[EstimateSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class DiagonalRequest(_message.Message):
    __slots__ = ("query", "estimator", "accuracy")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    query: Query
    estimator: Estimator
    accuracy: Accuracy
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., estimator: _Optional[_Union[Estimator, str]] = ..., accuracy: _Optional[_Union[Accuracy, _Mapping]] = ...) -> None: ...

class DiagonalResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: DiagonalSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[DiagonalSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class DiagonalSummary(_message.Message):
    __slots__ = ("query", "samples", "quantile")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    QUANTILE_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    samples: int
    quantile: float
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., samples: _Optional[int] = ..., quantile: _Optional[float] = ...) -> None: ...

class FrobeniusNormRequest(_message.Message):
    __slots__ = ("query", "accuracy")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    query: Query
    accuracy: Accuracy
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., accuracy: _Optional[_Union[Accuracy, _Mapping]] = ...) -> None: ...

class FrobeniusNormResponse(_message.Message):
    __slots__ = ("header", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    summary: EstimateSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., summary: _Optional[_Union[EstimateSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class SpectralDensityRequest(_message.Message):
    __slots__ = ("query", "probes", "steps", "points", "width", "logarithmic", "floor", "seed")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    LOGARITHMIC_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    query: Query
    probes: int
    steps: int
    points: int
    width: float
    logarithmic: bool
    floor: float
    seed: int
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., probes: _Optional[int] = ..., steps: _Optional[int] = ..., points: _Optional[int] = ..., width: _Optional[float] = ..., logarithmic: bool = ..., floor: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class SpectralDensityResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: SpectralDensitySummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[SpectralDensitySummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class SpectralDensitySummary(_message.Message):
    __slots__ = ("query", "width")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    width: float
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., width: _Optional[float] = ...) -> None: ...

class SolveHeader(_message.Message):
    __slots__ = ("query", "solver", "damping", "tolerance", "diagonal_samples", "seed", "b", "x0", "preconditioner", "store_as", "block", "dampings")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    DAMPING_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    DIAGONAL_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    X0_FIELD_NUMBER: _ClassVar[int]
    PRECONDITIONER_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    DAMPINGS_FIELD_NUMBER: _ClassVar[int]
    query: Query
    solver: Solver
    damping: float
    tolerance: float
    diagonal_samples: int
    seed: int
    b: str
    x0: str
    preconditioner: str
    store_as: str
    block: int
    dampings: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., solver: _Optional[_Union[Solver, str]] = ..., damping: _Optional[float] = ..., tolerance: _Optional[float] = ..., diagonal_samples: _Optional[int] = ..., seed: _Optional[int] = ..., b: _Optional[str] = ..., x0: _Optional[str] = ..., preconditioner: _Optional[str] = ..., store_as: _Optional[str] = ..., block: _Optional[int] = ..., dampings: _Optional[_Iterable[float]] = ...) -> None: ...

class SolveRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: SolveHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[SolveHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SolveResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: SolveSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[SolveSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class SolveSummary(_message.Message):
    __slots__ = ("query", "residuals", "relative_residuals", "curvatures", "indefinite", "column_stops", "iterations")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    CURVATURES_FIELD_NUMBER: _ClassVar[int]
    INDEFINITE_FIELD_NUMBER: _ClassVar[int]
    COLUMN_STOPS_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    residuals: _containers.RepeatedScalarFieldContainer[float]
    relative_residuals: _containers.RepeatedScalarFieldContainer[float]
    curvatures: _containers.RepeatedScalarFieldContainer[float]
    indefinite: _containers.RepeatedScalarFieldContainer[bool]
    column_stops: _containers.RepeatedScalarFieldContainer[Stop]
    iterations: int
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., residuals: _Optional[_Iterable[float]] = ..., relative_residuals: _Optional[_Iterable[float]] = ..., curvatures: _Optional[_Iterable[float]] = ..., indefinite: _Optional[_Iterable[bool]] = ..., column_stops: _Optional[_Iterable[_Union[Stop, str]]] = ..., iterations: _Optional[int] = ...) -> None: ...

class SketchRequest(_message.Message):
    __slots__ = ("query", "rank", "damping", "columns", "tolerance", "seed", "store_as")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DAMPING_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    query: Query
    rank: int
    damping: float
    columns: int
    tolerance: float
    seed: int
    store_as: str
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., rank: _Optional[int] = ..., damping: _Optional[float] = ..., columns: _Optional[int] = ..., tolerance: _Optional[float] = ..., seed: _Optional[int] = ..., store_as: _Optional[str] = ...) -> None: ...

class SketchResponse(_message.Message):
    __slots__ = ("header", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    summary: SketchSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., summary: _Optional[_Union[SketchSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class SketchSummary(_message.Message):
    __slots__ = ("query", "values")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class LogDetRequest(_message.Message):
    __slots__ = ("query", "damping", "steps", "accuracy", "preconditioner")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    DAMPING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    PRECONDITIONER_FIELD_NUMBER: _ClassVar[int]
    query: Query
    damping: float
    steps: int
    accuracy: Accuracy
    preconditioner: str
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., damping: _Optional[float] = ..., steps: _Optional[int] = ..., accuracy: _Optional[_Union[Accuracy, _Mapping]] = ..., preconditioner: _Optional[str] = ...) -> None: ...

class LogDetResponse(_message.Message):
    __slots__ = ("header", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    summary: LogDetSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., summary: _Optional[_Union[LogDetSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class LogDetSummary(_message.Message):
    __slots__ = ("estimate", "smallest")
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    SMALLEST_FIELD_NUMBER: _ClassVar[int]
    estimate: EstimateSummary
    smallest: float
    def __init__(self, estimate: _Optional[_Union[EstimateSummary, _Mapping]] = ..., smallest: _Optional[float] = ...) -> None: ...

class GradientNormsRequest(_message.Message):
    __slots__ = ("query", "by_parameter")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    BY_PARAMETER_FIELD_NUMBER: _ClassVar[int]
    query: Query
    by_parameter: bool
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., by_parameter: bool = ...) -> None: ...

class GradientNormsResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: GradientNormsSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[GradientNormsSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class GradientNormsSummary(_message.Message):
    __slots__ = ("query",)
    QUERY_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ...) -> None: ...

class GradientGramRequest(_message.Message):
    __slots__ = ("query",)
    QUERY_FIELD_NUMBER: _ClassVar[int]
    query: Query
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ...) -> None: ...

class GradientGramResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: GradientGramSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[GradientGramSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class GradientGramSummary(_message.Message):
    __slots__ = ("query",)
    QUERY_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ...) -> None: ...

class GradientSquaresRequest(_message.Message):
    __slots__ = ("query",)
    QUERY_FIELD_NUMBER: _ClassVar[int]
    query: Query
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ...) -> None: ...

class GradientSquaresResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: GradientSquaresSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[GradientSquaresSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class GradientSquaresSummary(_message.Message):
    __slots__ = ("query", "data_points", "normaliser")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    DATA_POINTS_FIELD_NUMBER: _ClassVar[int]
    NORMALISER_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    data_points: int
    normaliser: float
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., data_points: _Optional[int] = ..., normaliser: _Optional[float] = ...) -> None: ...

class JacobianProductHeader(_message.Message):
    __slots__ = ("query", "of", "transposed", "parameters", "operand", "store_as")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    TRANSPOSED_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    OPERAND_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    query: Query
    of: JacobianOf
    transposed: bool
    parameters: _containers.RepeatedScalarFieldContainer[str]
    operand: str
    store_as: str
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., of: _Optional[_Union[JacobianOf, str]] = ..., transposed: bool = ..., parameters: _Optional[_Iterable[str]] = ..., operand: _Optional[str] = ..., store_as: _Optional[str] = ...) -> None: ...

class JacobianProductRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: JacobianProductHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[JacobianProductHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class JacobianProductResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: JacobianProductSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[JacobianProductSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class JacobianProductSummary(_message.Message):
    __slots__ = ("query", "row_shape", "plan")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ROW_SHAPE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    row_shape: _containers.RepeatedScalarFieldContainer[int]
    plan: str
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., row_shape: _Optional[_Iterable[int]] = ..., plan: _Optional[str] = ...) -> None: ...

class InfluenceHeader(_message.Message):
    __slots__ = ("query", "damping", "tolerance", "top", "preconditioner", "block", "self_only", "part", "part_seed", "rows", "all_rows", "stored", "other_session_id")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    DAMPING_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    PRECONDITIONER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    SELF_ONLY_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PART_SEED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ALL_ROWS_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    OTHER_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    query: Query
    damping: float
    tolerance: float
    top: int
    preconditioner: str
    block: int
    self_only: bool
    part: int
    part_seed: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    all_rows: bool
    stored: str
    other_session_id: str
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., damping: _Optional[float] = ..., tolerance: _Optional[float] = ..., top: _Optional[int] = ..., preconditioner: _Optional[str] = ..., block: _Optional[int] = ..., self_only: bool = ..., part: _Optional[int] = ..., part_seed: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., all_rows: bool = ..., stored: _Optional[str] = ..., other_session_id: _Optional[str] = ...) -> None: ...

class InfluenceRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: InfluenceHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[InfluenceHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class InfluenceResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: InfluenceSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[InfluenceSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class InfluenceSummary(_message.Message):
    __slots__ = ("query", "residuals", "relative_residuals", "self_influence", "column_stops", "normaliser", "data_points")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    SELF_INFLUENCE_FIELD_NUMBER: _ClassVar[int]
    COLUMN_STOPS_FIELD_NUMBER: _ClassVar[int]
    NORMALISER_FIELD_NUMBER: _ClassVar[int]
    DATA_POINTS_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    residuals: _containers.RepeatedScalarFieldContainer[float]
    relative_residuals: _containers.RepeatedScalarFieldContainer[float]
    self_influence: _containers.RepeatedScalarFieldContainer[float]
    column_stops: _containers.RepeatedScalarFieldContainer[Stop]
    normaliser: float
    data_points: int
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., residuals: _Optional[_Iterable[float]] = ..., relative_residuals: _Optional[_Iterable[float]] = ..., self_influence: _Optional[_Iterable[float]] = ..., column_stops: _Optional[_Iterable[_Union[Stop, str]]] = ..., normaliser: _Optional[float] = ..., data_points: _Optional[int] = ...) -> None: ...

class ParameterPriors(_message.Message):
    __slots__ = ("by_parameter", "stored")
    BY_PARAMETER_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    by_parameter: _containers.RepeatedScalarFieldContainer[float]
    stored: str
    def __init__(self, by_parameter: _Optional[_Iterable[float]] = ..., stored: _Optional[str] = ...) -> None: ...

class PredictiveHeader(_message.Message):
    __slots__ = ("query", "prior", "noise", "covariance", "tolerance", "preconditioner", "block", "priors")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    PRIOR_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    COVARIANCE_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    PRECONDITIONER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    PRIORS_FIELD_NUMBER: _ClassVar[int]
    query: Query
    prior: float
    noise: float
    covariance: bool
    tolerance: float
    preconditioner: str
    block: int
    priors: ParameterPriors
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., prior: _Optional[float] = ..., noise: _Optional[float] = ..., covariance: bool = ..., tolerance: _Optional[float] = ..., preconditioner: _Optional[str] = ..., block: _Optional[int] = ..., priors: _Optional[_Union[ParameterPriors, _Mapping]] = ...) -> None: ...

class PredictiveRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PredictiveHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[PredictiveHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class PredictiveResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: PredictiveSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[PredictiveSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class PredictiveSummary(_message.Message):
    __slots__ = ("query", "relative_residuals", "scale", "class_axis")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    CLASS_AXIS_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    relative_residuals: _containers.RepeatedScalarFieldContainer[float]
    scale: float
    class_axis: int
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., relative_residuals: _Optional[_Iterable[float]] = ..., scale: _Optional[float] = ..., class_axis: _Optional[int] = ...) -> None: ...

class PosteriorSamplesRequest(_message.Message):
    __slots__ = ("query", "k", "prior", "noise", "seed", "tolerance", "preconditioner", "store_as", "priors")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    PRIOR_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    PRECONDITIONER_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    PRIORS_FIELD_NUMBER: _ClassVar[int]
    query: Query
    k: int
    prior: float
    noise: float
    seed: int
    tolerance: float
    preconditioner: str
    store_as: str
    priors: ParameterPriors
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., k: _Optional[int] = ..., prior: _Optional[float] = ..., noise: _Optional[float] = ..., seed: _Optional[int] = ..., tolerance: _Optional[float] = ..., preconditioner: _Optional[str] = ..., store_as: _Optional[str] = ..., priors: _Optional[_Union[ParameterPriors, _Mapping]] = ...) -> None: ...

class PosteriorSamplesResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    chunk: bytes
    summary: PosteriorSamplesSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[PosteriorSamplesSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class PosteriorSamplesSummary(_message.Message):
    __slots__ = ("query", "relative_residuals", "scale")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    relative_residuals: _containers.RepeatedScalarFieldContainer[float]
    scale: float
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., relative_residuals: _Optional[_Iterable[float]] = ..., scale: _Optional[float] = ...) -> None: ...

class MarginalLikelihoodRequest(_message.Message):
    __slots__ = ("query", "priors", "noise", "steps", "probes", "seed", "parameter_priors", "search")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    PRIORS_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_PRIORS_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    query: Query
    priors: _containers.RepeatedScalarFieldContainer[float]
    noise: float
    steps: int
    probes: int
    seed: int
    parameter_priors: _containers.RepeatedCompositeFieldContainer[ParameterPriors]
    search: int
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., priors: _Optional[_Iterable[float]] = ..., noise: _Optional[float] = ..., steps: _Optional[int] = ..., probes: _Optional[int] = ..., seed: _Optional[int] = ..., parameter_priors: _Optional[_Iterable[_Union[ParameterPriors, _Mapping]]] = ..., search: _Optional[int] = ...) -> None: ...

class MarginalLikelihoodResponse(_message.Message):
    __slots__ = ("header", "summary", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: _curvature_service_pb2.ResultHeader
    summary: MarginalLikelihoodSummary
    progress: QueryProgress
    def __init__(self, header: _Optional[_Union[_curvature_service_pb2.ResultHeader, _Mapping]] = ..., summary: _Optional[_Union[MarginalLikelihoodSummary, _Mapping]] = ..., progress: _Optional[_Union[QueryProgress, _Mapping]] = ...) -> None: ...

class MarginalLikelihoodSummary(_message.Message):
    __slots__ = ("query", "values", "standard_errors", "log_determinants", "log_likelihood", "squared_norm", "scale", "exact", "found")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    STANDARD_ERRORS_FIELD_NUMBER: _ClassVar[int]
    LOG_DETERMINANTS_FIELD_NUMBER: _ClassVar[int]
    LOG_LIKELIHOOD_FIELD_NUMBER: _ClassVar[int]
    SQUARED_NORM_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    query: QuerySummary
    values: _containers.RepeatedScalarFieldContainer[float]
    standard_errors: _containers.RepeatedScalarFieldContainer[float]
    log_determinants: _containers.RepeatedScalarFieldContainer[float]
    log_likelihood: float
    squared_norm: float
    scale: float
    exact: bool
    found: _containers.RepeatedCompositeFieldContainer[ParameterPriors]
    def __init__(self, query: _Optional[_Union[QuerySummary, _Mapping]] = ..., values: _Optional[_Iterable[float]] = ..., standard_errors: _Optional[_Iterable[float]] = ..., log_determinants: _Optional[_Iterable[float]] = ..., log_likelihood: _Optional[float] = ..., squared_norm: _Optional[float] = ..., scale: _Optional[float] = ..., exact: bool = ..., found: _Optional[_Iterable[_Union[ParameterPriors, _Mapping]]] = ...) -> None: ...
