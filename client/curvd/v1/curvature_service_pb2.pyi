from curvd.v1 import types_pb2 as _types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProductHeader(_message.Message):
    __slots__ = ("session_id", "operator", "expected_version", "request_id", "operand")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OPERAND_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    operator: _types_pb2.Operator
    expected_version: int
    request_id: str
    operand: Operand
    def __init__(self, session_id: _Optional[str] = ..., operator: _Optional[_Union[_types_pb2.Operator, _Mapping]] = ..., expected_version: _Optional[int] = ..., request_id: _Optional[str] = ..., operand: _Optional[_Union[Operand, _Mapping]] = ...) -> None: ...

class Operand(_message.Message):
    __slots__ = ("inline",)
    INLINE_FIELD_NUMBER: _ClassVar[int]
    inline: InlineOperand
    def __init__(self, inline: _Optional[_Union[InlineOperand, _Mapping]] = ...) -> None: ...

class InlineOperand(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MatVecRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ProductHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[ProductHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class MatVecResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    header: ResultHeader
    chunk: bytes
    summary: ResultSummary
    def __init__(self, header: _Optional[_Union[ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[ResultSummary, _Mapping]] = ...) -> None: ...

class MatMatRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ProductHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[ProductHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class MatMatResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    header: ResultHeader
    chunk: bytes
    summary: ResultSummary
    def __init__(self, header: _Optional[_Union[ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[ResultSummary, _Mapping]] = ...) -> None: ...

class GradientRequest(_message.Message):
    __slots__ = ("session_id", "expected_version", "request_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    expected_version: int
    request_id: str
    def __init__(self, session_id: _Optional[str] = ..., expected_version: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class GradientResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    header: ResultHeader
    chunk: bytes
    summary: ResultSummary
    def __init__(self, header: _Optional[_Union[ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[ResultSummary, _Mapping]] = ...) -> None: ...

class ResultHeader(_message.Message):
    __slots__ = ("version", "parameters_digest", "model_id", "dataset_id", "plan", "loss")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    version: int
    parameters_digest: str
    model_id: str
    dataset_id: str
    plan: _types_pb2.Plan
    loss: float
    def __init__(self, version: _Optional[int] = ..., parameters_digest: _Optional[str] = ..., model_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., plan: _Optional[_Union[_types_pb2.Plan, _Mapping]] = ..., loss: _Optional[float] = ...) -> None: ...

class ResultSummary(_message.Message):
    __slots__ = ("queue_s", "compute_s", "runs", "run_columns")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    RUN_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    compute_s: float
    runs: int
    run_columns: int
    def __init__(self, queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., runs: _Optional[int] = ..., run_columns: _Optional[int] = ...) -> None: ...
