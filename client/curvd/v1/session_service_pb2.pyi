from curvd.v1 import graph_pb2 as _graph_pb2
from curvd.v1 import types_pb2 as _types_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_STATE_UNSPECIFIED: _ClassVar[SessionState]
    SESSION_STATE_READY: _ClassVar[SessionState]
    SESSION_STATE_COLD: _ClassVar[SessionState]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_WAITING: _ClassVar[Stage]
    STAGE_CHECKING: _ClassVar[Stage]
    STAGE_VERIFYING: _ClassVar[Stage]
    STAGE_TUNING: _ClassVar[Stage]
    STAGE_WARMING: _ClassVar[Stage]
    STAGE_COMPILING: _ClassVar[Stage]
    STAGE_MULTIPLYING: _ClassVar[Stage]

class Work(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORK_UNSPECIFIED: _ClassVar[Work]
    WORK_OPENING: _ClassVar[Work]
    WORK_BUILDING: _ClassVar[Work]
    WORK_IMPROVING: _ClassVar[Work]
    WORK_QUERY: _ClassVar[Work]
SESSION_STATE_UNSPECIFIED: SessionState
SESSION_STATE_READY: SessionState
SESSION_STATE_COLD: SessionState
STAGE_UNSPECIFIED: Stage
STAGE_WAITING: Stage
STAGE_CHECKING: Stage
STAGE_VERIFYING: Stage
STAGE_TUNING: Stage
STAGE_WARMING: Stage
STAGE_COMPILING: Stage
STAGE_MULTIPLYING: Stage
WORK_UNSPECIFIED: Work
WORK_OPENING: Work
WORK_BUILDING: Work
WORK_IMPROVING: Work
WORK_QUERY: Work

class Upload(_message.Message):
    __slots__ = ("digest", "total_bytes", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    total_bytes: int
    offset: int
    def __init__(self, digest: _Optional[str] = ..., total_bytes: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class UploadNeeded(_message.Message):
    __slots__ = ("committed_bytes",)
    COMMITTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    committed_bytes: int
    def __init__(self, committed_bytes: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "builder", "config_json", "tensors", "state_bytes", "graph_digest", "owner", "shared_with", "create_time", "session_ids", "other_sessions")
    ID_FIELD_NUMBER: _ClassVar[int]
    BUILDER_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GRAPH_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SHARED_WITH_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    OTHER_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    builder: str
    config_json: str
    tensors: _containers.RepeatedCompositeFieldContainer[_types_pb2.TensorInfo]
    state_bytes: int
    graph_digest: str
    owner: str
    shared_with: _containers.RepeatedScalarFieldContainer[str]
    create_time: _timestamp_pb2.Timestamp
    session_ids: _containers.RepeatedScalarFieldContainer[str]
    other_sessions: int
    def __init__(self, id: _Optional[str] = ..., builder: _Optional[str] = ..., config_json: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_types_pb2.TensorInfo, _Mapping]]] = ..., state_bytes: _Optional[int] = ..., graph_digest: _Optional[str] = ..., owner: _Optional[str] = ..., shared_with: _Optional[_Iterable[str]] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., session_ids: _Optional[_Iterable[str]] = ..., other_sessions: _Optional[int] = ...) -> None: ...

class Dataset(_message.Message):
    __slots__ = ("id", "tensors", "inputs", "target", "batch_size", "input_style", "data_points", "total_bytes", "name", "owner", "shared_with", "create_time", "session_ids", "other_sessions")
    ID_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    INPUT_STYLE_FIELD_NUMBER: _ClassVar[int]
    DATA_POINTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SHARED_WITH_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    OTHER_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    tensors: _containers.RepeatedCompositeFieldContainer[_types_pb2.TensorInfo]
    inputs: _containers.RepeatedScalarFieldContainer[str]
    target: str
    batch_size: int
    input_style: _types_pb2.InputStyle
    data_points: int
    total_bytes: int
    name: str
    owner: str
    shared_with: _containers.RepeatedScalarFieldContainer[str]
    create_time: _timestamp_pb2.Timestamp
    session_ids: _containers.RepeatedScalarFieldContainer[str]
    other_sessions: int
    def __init__(self, id: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_types_pb2.TensorInfo, _Mapping]]] = ..., inputs: _Optional[_Iterable[str]] = ..., target: _Optional[str] = ..., batch_size: _Optional[int] = ..., input_style: _Optional[_Union[_types_pb2.InputStyle, str]] = ..., data_points: _Optional[int] = ..., total_bytes: _Optional[int] = ..., name: _Optional[str] = ..., owner: _Optional[str] = ..., shared_with: _Optional[_Iterable[str]] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., session_ids: _Optional[_Iterable[str]] = ..., other_sessions: _Optional[int] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("id", "name", "model_id", "dataset_id", "loss", "dtype", "mode", "version", "parameters_digest", "parameters", "parameter_count", "data_points", "batches", "device", "budget_bytes", "operators", "state", "create_time", "expire_time", "params", "plan", "parameters_of", "owner", "shared_with")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    DATA_POINTS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_OF_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SHARED_WITH_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    model_id: str
    dataset_id: str
    loss: _types_pb2.Loss
    dtype: _types_pb2.Dtype
    mode: _types_pb2.Mode
    version: int
    parameters_digest: str
    parameters: _containers.RepeatedCompositeFieldContainer[_types_pb2.Parameter]
    parameter_count: int
    data_points: int
    batches: int
    device: str
    budget_bytes: int
    operators: _containers.RepeatedCompositeFieldContainer[_types_pb2.BuiltOperator]
    state: SessionState
    create_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    params: _containers.RepeatedScalarFieldContainer[str]
    plan: _types_pb2.Tier
    parameters_of: str
    owner: str
    shared_with: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., model_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., loss: _Optional[_Union[_types_pb2.Loss, _Mapping]] = ..., dtype: _Optional[_Union[_types_pb2.Dtype, str]] = ..., mode: _Optional[_Union[_types_pb2.Mode, str]] = ..., version: _Optional[int] = ..., parameters_digest: _Optional[str] = ..., parameters: _Optional[_Iterable[_Union[_types_pb2.Parameter, _Mapping]]] = ..., parameter_count: _Optional[int] = ..., data_points: _Optional[int] = ..., batches: _Optional[int] = ..., device: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., operators: _Optional[_Iterable[_Union[_types_pb2.BuiltOperator, _Mapping]]] = ..., state: _Optional[_Union[SessionState, str]] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., params: _Optional[_Iterable[str]] = ..., plan: _Optional[_Union[_types_pb2.Tier, str]] = ..., parameters_of: _Optional[str] = ..., owner: _Optional[str] = ..., shared_with: _Optional[_Iterable[str]] = ...) -> None: ...

class RegisterModelHeader(_message.Message):
    __slots__ = ("builder", "config_json", "state", "graph", "share_with")
    BUILDER_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    SHARE_WITH_FIELD_NUMBER: _ClassVar[int]
    builder: str
    config_json: str
    state: Upload
    graph: _graph_pb2.Graph
    share_with: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, builder: _Optional[str] = ..., config_json: _Optional[str] = ..., state: _Optional[_Union[Upload, _Mapping]] = ..., graph: _Optional[_Union[_graph_pb2.Graph, _Mapping]] = ..., share_with: _Optional[_Iterable[str]] = ...) -> None: ...

class RegisterModelRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: RegisterModelHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[RegisterModelHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class RegisterModelResponse(_message.Message):
    __slots__ = ("model", "upload_needed")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_NEEDED_FIELD_NUMBER: _ClassVar[int]
    model: Model
    upload_needed: UploadNeeded
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., upload_needed: _Optional[_Union[UploadNeeded, _Mapping]] = ...) -> None: ...

class RegisterDatasetHeader(_message.Message):
    __slots__ = ("inputs", "target", "batch_size", "input_style", "tensors", "name", "share_with")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    INPUT_STYLE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHARE_WITH_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedScalarFieldContainer[str]
    target: str
    batch_size: int
    input_style: _types_pb2.InputStyle
    tensors: Upload
    name: str
    share_with: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, inputs: _Optional[_Iterable[str]] = ..., target: _Optional[str] = ..., batch_size: _Optional[int] = ..., input_style: _Optional[_Union[_types_pb2.InputStyle, str]] = ..., tensors: _Optional[_Union[Upload, _Mapping]] = ..., name: _Optional[str] = ..., share_with: _Optional[_Iterable[str]] = ...) -> None: ...

class RegisterDatasetRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: RegisterDatasetHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[RegisterDatasetHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class RegisterDatasetResponse(_message.Message):
    __slots__ = ("dataset", "upload_needed")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_NEEDED_FIELD_NUMBER: _ClassVar[int]
    dataset: Dataset
    upload_needed: UploadNeeded
    def __init__(self, dataset: _Optional[_Union[Dataset, _Mapping]] = ..., upload_needed: _Optional[_Union[UploadNeeded, _Mapping]] = ...) -> None: ...

class CreateSessionRequest(_message.Message):
    __slots__ = ("model_id", "dataset_id", "loss", "dtype", "mode", "operators", "budget_bytes", "lease", "name", "request_id", "validate_only", "params", "plan", "build_later", "shares_with", "share_with")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    BUILD_LATER_FIELD_NUMBER: _ClassVar[int]
    SHARES_WITH_FIELD_NUMBER: _ClassVar[int]
    SHARE_WITH_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    dataset_id: str
    loss: _types_pb2.Loss
    dtype: _types_pb2.Dtype
    mode: _types_pb2.Mode
    operators: _containers.RepeatedCompositeFieldContainer[_types_pb2.Operator]
    budget_bytes: int
    lease: _duration_pb2.Duration
    name: str
    request_id: str
    validate_only: bool
    params: _containers.RepeatedScalarFieldContainer[str]
    plan: _types_pb2.Tier
    build_later: bool
    shares_with: str
    share_with: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., loss: _Optional[_Union[_types_pb2.Loss, _Mapping]] = ..., dtype: _Optional[_Union[_types_pb2.Dtype, str]] = ..., mode: _Optional[_Union[_types_pb2.Mode, str]] = ..., operators: _Optional[_Iterable[_Union[_types_pb2.Operator, _Mapping]]] = ..., budget_bytes: _Optional[int] = ..., lease: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., name: _Optional[str] = ..., request_id: _Optional[str] = ..., validate_only: bool = ..., params: _Optional[_Iterable[str]] = ..., plan: _Optional[_Union[_types_pb2.Tier, str]] = ..., build_later: bool = ..., shares_with: _Optional[str] = ..., share_with: _Optional[_Iterable[str]] = ...) -> None: ...

class CreateSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class StageProgress(_message.Message):
    __slots__ = ("stage", "detail", "done", "total", "elapsed_s")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    stage: Stage
    detail: str
    done: int
    total: int
    elapsed_s: float
    def __init__(self, stage: _Optional[_Union[Stage, str]] = ..., detail: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., elapsed_s: _Optional[float] = ...) -> None: ...

class Activity(_message.Message):
    __slots__ = ("work", "session_id", "session_name", "subject", "progress", "elapsed_s")
    WORK_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_NAME_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    work: Work
    session_id: str
    session_name: str
    subject: str
    progress: StageProgress
    elapsed_s: float
    def __init__(self, work: _Optional[_Union[Work, str]] = ..., session_id: _Optional[str] = ..., session_name: _Optional[str] = ..., subject: _Optional[str] = ..., progress: _Optional[_Union[StageProgress, _Mapping]] = ..., elapsed_s: _Optional[float] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: CreateSessionRequest
    def __init__(self, session: _Optional[_Union[CreateSessionRequest, _Mapping]] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("progress", "session")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    progress: StageProgress
    session: Session
    def __init__(self, progress: _Optional[_Union[StageProgress, _Mapping]] = ..., session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    next_page_token: str
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RenewSessionRequest(_message.Message):
    __slots__ = ("session_id", "lease")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    lease: _duration_pb2.Duration
    def __init__(self, session_id: _Optional[str] = ..., lease: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RenewSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class DeleteSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    next_page_token: str
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListDatasetsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDatasetsResponse(_message.Message):
    __slots__ = ("datasets", "next_page_token")
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    datasets: _containers.RepeatedCompositeFieldContainer[Dataset]
    next_page_token: str
    def __init__(self, datasets: _Optional[_Iterable[_Union[Dataset, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteModelRequest(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class DeleteModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteDatasetRequest(_message.Message):
    __slots__ = ("dataset_id",)
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    def __init__(self, dataset_id: _Optional[str] = ...) -> None: ...

class DeleteDatasetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UpdateParametersHeader(_message.Message):
    __slots__ = ("session_id", "values", "expected_version", "request_id", "as_part", "parts", "checkpoint")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    AS_PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    values: Upload
    expected_version: int
    request_id: str
    as_part: bool
    parts: _containers.RepeatedScalarFieldContainer[str]
    checkpoint: Checkpoint
    def __init__(self, session_id: _Optional[str] = ..., values: _Optional[_Union[Upload, _Mapping]] = ..., expected_version: _Optional[int] = ..., request_id: _Optional[str] = ..., as_part: bool = ..., parts: _Optional[_Iterable[str]] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("name", "prefix")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    name: str
    prefix: str
    def __init__(self, name: _Optional[str] = ..., prefix: _Optional[str] = ...) -> None: ...

class UpdateParametersRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UpdateParametersHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[UpdateParametersHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ParameterVersion(_message.Message):
    __slots__ = ("version", "parameters_digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    parameters_digest: str
    def __init__(self, version: _Optional[int] = ..., parameters_digest: _Optional[str] = ...) -> None: ...

class UpdatePart(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class UpdateParametersResponse(_message.Message):
    __slots__ = ("version", "upload_needed", "part")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_NEEDED_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    version: ParameterVersion
    upload_needed: UploadNeeded
    part: UpdatePart
    def __init__(self, version: _Optional[_Union[ParameterVersion, _Mapping]] = ..., upload_needed: _Optional[_Union[UploadNeeded, _Mapping]] = ..., part: _Optional[_Union[UpdatePart, _Mapping]] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Limits(_message.Message):
    __slots__ = ("upload_bytes", "operand_bytes", "header_bytes", "columns", "pending_columns", "sessions", "default_budget_bytes")
    UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPERAND_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEADER_BYTES_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    PENDING_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    upload_bytes: int
    operand_bytes: int
    header_bytes: int
    columns: int
    pending_columns: int
    sessions: int
    default_budget_bytes: int
    def __init__(self, upload_bytes: _Optional[int] = ..., operand_bytes: _Optional[int] = ..., header_bytes: _Optional[int] = ..., columns: _Optional[int] = ..., pending_columns: _Optional[int] = ..., sessions: _Optional[int] = ..., default_budget_bytes: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("name", "description", "total_bytes", "free_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    total_bytes: int
    free_bytes: int
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., total_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("rank", "device", "host", "pid", "shards", "ready", "restarts", "lost", "parameter_bytes", "whole_bytes")
    RANK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    WHOLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    device: str
    host: str
    pid: int
    shards: int
    ready: bool
    restarts: int
    lost: str
    parameter_bytes: int
    whole_bytes: int
    def __init__(self, rank: _Optional[int] = ..., device: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., shards: _Optional[int] = ..., ready: bool = ..., restarts: _Optional[int] = ..., lost: _Optional[str] = ..., parameter_bytes: _Optional[int] = ..., whole_bytes: _Optional[int] = ...) -> None: ...

class ServerStatus(_message.Message):
    __slots__ = ("uptime_s", "calls", "failed_calls", "calls_under_way", "products", "columns", "query_columns", "queue_requests", "queue_columns", "queue_bytes", "ready_sessions", "cold_sessions", "operators", "memory_bytes", "memory_limit_bytes", "connections")
    class OperatorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MemoryBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    FAILED_CALLS_FIELD_NUMBER: _ClassVar[int]
    CALLS_UNDER_WAY_FIELD_NUMBER: _ClassVar[int]
    PRODUCTS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    QUERY_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    COLD_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    uptime_s: float
    calls: int
    failed_calls: int
    calls_under_way: int
    products: int
    columns: int
    query_columns: int
    queue_requests: int
    queue_columns: int
    queue_bytes: int
    ready_sessions: int
    cold_sessions: int
    operators: _containers.ScalarMap[str, int]
    memory_bytes: _containers.ScalarMap[str, int]
    memory_limit_bytes: int
    connections: int
    def __init__(self, uptime_s: _Optional[float] = ..., calls: _Optional[int] = ..., failed_calls: _Optional[int] = ..., calls_under_way: _Optional[int] = ..., products: _Optional[int] = ..., columns: _Optional[int] = ..., query_columns: _Optional[int] = ..., queue_requests: _Optional[int] = ..., queue_columns: _Optional[int] = ..., queue_bytes: _Optional[int] = ..., ready_sessions: _Optional[int] = ..., cold_sessions: _Optional[int] = ..., operators: _Optional[_Mapping[str, int]] = ..., memory_bytes: _Optional[_Mapping[str, int]] = ..., memory_limit_bytes: _Optional[int] = ..., connections: _Optional[int] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "torch_version", "limits", "devices", "builders", "capabilities", "datasets", "activities", "workers", "generation", "status")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    BUILDERS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    ACTIVITIES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    version: str
    torch_version: str
    limits: Limits
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    builders: _containers.RepeatedScalarFieldContainer[str]
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    datasets: _containers.RepeatedScalarFieldContainer[str]
    activities: _containers.RepeatedCompositeFieldContainer[Activity]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    generation: int
    status: ServerStatus
    def __init__(self, version: _Optional[str] = ..., torch_version: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., builders: _Optional[_Iterable[str]] = ..., capabilities: _Optional[_Iterable[str]] = ..., datasets: _Optional[_Iterable[str]] = ..., activities: _Optional[_Iterable[_Union[Activity, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., generation: _Optional[int] = ..., status: _Optional[_Union[ServerStatus, _Mapping]] = ...) -> None: ...
