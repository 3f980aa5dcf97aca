from curvd.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProductHeader(_message.Message):
    __slots__ = ("session_id", "operator", "expected_version", "request_id", "operand", "result_type", "store_as", "resume", "checksum")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OPERAND_FIELD_NUMBER: _ClassVar[int]
    RESULT_TYPE_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    operator: _types_pb2.Operator
    expected_version: int
    request_id: str
    operand: Operand
    result_type: str
    store_as: str
    resume: Resume
    checksum: bool
    def __init__(self, session_id: _Optional[str] = ..., operator: _Optional[_Union[_types_pb2.Operator, _Mapping]] = ..., expected_version: _Optional[int] = ..., request_id: _Optional[str] = ..., operand: _Optional[_Union[Operand, _Mapping]] = ..., result_type: _Optional[str] = ..., store_as: _Optional[str] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., checksum: bool = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("offset", "sha256")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    offset: int
    sha256: bytes
    def __init__(self, offset: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class Operand(_message.Message):
    __slots__ = ("inline", "probe", "stored")
    INLINE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    inline: InlineOperand
    probe: ProbeOperand
    stored: str
    def __init__(self, inline: _Optional[_Union[InlineOperand, _Mapping]] = ..., probe: _Optional[_Union[ProbeOperand, _Mapping]] = ..., stored: _Optional[str] = ...) -> None: ...

class ProbeOperand(_message.Message):
    __slots__ = ("distribution", "seed", "first_index", "columns")
    DISTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    distribution: _types_pb2.Distribution
    seed: int
    first_index: int
    columns: int
    def __init__(self, distribution: _Optional[_Union[_types_pb2.Distribution, str]] = ..., seed: _Optional[int] = ..., first_index: _Optional[int] = ..., columns: _Optional[int] = ...) -> None: ...

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

class MultiplyRequest(_message.Message):
    __slots__ = ("header", "tensors")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    header: ProductHeader
    tensors: bytes
    def __init__(self, header: _Optional[_Union[ProductHeader, _Mapping]] = ..., tensors: _Optional[bytes] = ...) -> None: ...

class MultiplyResponse(_message.Message):
    __slots__ = ("header", "tensors", "summary")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    header: ResultHeader
    tensors: bytes
    summary: ResultSummary
    def __init__(self, header: _Optional[_Union[ResultHeader, _Mapping]] = ..., tensors: _Optional[bytes] = ..., summary: _Optional[_Union[ResultSummary, _Mapping]] = ...) -> None: ...

class GradientRequest(_message.Message):
    __slots__ = ("session_id", "expected_version", "request_id", "resume", "checksum", "store_as")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    expected_version: int
    request_id: str
    resume: Resume
    checksum: bool
    store_as: str
    def __init__(self, session_id: _Optional[str] = ..., expected_version: _Optional[int] = ..., request_id: _Optional[str] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., checksum: bool = ..., store_as: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("version", "parameters_digest", "model_id", "dataset_id", "plan", "loss", "offset")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    version: int
    parameters_digest: str
    model_id: str
    dataset_id: str
    plan: _types_pb2.Plan
    loss: float
    offset: int
    def __init__(self, version: _Optional[int] = ..., parameters_digest: _Optional[str] = ..., model_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., plan: _Optional[_Union[_types_pb2.Plan, _Mapping]] = ..., loss: _Optional[float] = ..., offset: _Optional[int] = ...) -> None: ...

class ResultSummary(_message.Message):
    __slots__ = ("queue_s", "compute_s", "runs", "run_columns", "crc32")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    RUN_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    compute_s: float
    runs: int
    run_columns: int
    crc32: int
    def __init__(self, queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., runs: _Optional[int] = ..., run_columns: _Optional[int] = ..., crc32: _Optional[int] = ...) -> None: ...

class StoredVector(_message.Message):
    __slots__ = ("name", "shape", "dtype", "version", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    version: int
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., version: _Optional[int] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class PutVectorHeader(_message.Message):
    __slots__ = ("session_id", "name", "request_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    name: str
    request_id: str
    def __init__(self, session_id: _Optional[str] = ..., name: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class PutVectorRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PutVectorHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[PutVectorHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class PutVectorResponse(_message.Message):
    __slots__ = ("vector",)
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    vector: StoredVector
    def __init__(self, vector: _Optional[_Union[StoredVector, _Mapping]] = ...) -> None: ...

class GetVectorRequest(_message.Message):
    __slots__ = ("session_id", "name", "request_id", "result_type", "resume", "checksum")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_TYPE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    name: str
    request_id: str
    result_type: str
    resume: Resume
    checksum: bool
    def __init__(self, session_id: _Optional[str] = ..., name: _Optional[str] = ..., request_id: _Optional[str] = ..., result_type: _Optional[str] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., checksum: bool = ...) -> None: ...

class GetVectorResponse(_message.Message):
    __slots__ = ("header", "chunk", "summary")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    header: ResultHeader
    chunk: bytes
    summary: ResultSummary
    def __init__(self, header: _Optional[_Union[ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., summary: _Optional[_Union[ResultSummary, _Mapping]] = ...) -> None: ...

class ListVectorsRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class ListVectorsResponse(_message.Message):
    __slots__ = ("vectors",)
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    vectors: _containers.RepeatedCompositeFieldContainer[StoredVector]
    def __init__(self, vectors: _Optional[_Iterable[_Union[StoredVector, _Mapping]]] = ...) -> None: ...

class DeleteVectorRequest(_message.Message):
    __slots__ = ("session_id", "name")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    name: str
    def __init__(self, session_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class DeleteVectorResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VectorTerm(_message.Message):
    __slots__ = ("name", "coefficient")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    coefficient: float
    def __init__(self, name: _Optional[str] = ..., coefficient: _Optional[float] = ...) -> None: ...

class CombineVectorsRequest(_message.Message):
    __slots__ = ("session_id", "terms", "store_as", "request_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    terms: _containers.RepeatedCompositeFieldContainer[VectorTerm]
    store_as: str
    request_id: str
    def __init__(self, session_id: _Optional[str] = ..., terms: _Optional[_Iterable[_Union[VectorTerm, _Mapping]]] = ..., store_as: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class CombineVectorsResponse(_message.Message):
    __slots__ = ("vector",)
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    vector: StoredVector
    def __init__(self, vector: _Optional[_Union[StoredVector, _Mapping]] = ...) -> None: ...

class InnerProductsRequest(_message.Message):
    __slots__ = ("session_id", "left", "right")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    left: _containers.RepeatedScalarFieldContainer[str]
    right: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_id: _Optional[str] = ..., left: _Optional[_Iterable[str]] = ..., right: _Optional[_Iterable[str]] = ...) -> None: ...

class InnerProductsResponse(_message.Message):
    __slots__ = ("rows", "columns", "values")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    rows: int
    columns: int
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, rows: _Optional[int] = ..., columns: _Optional[int] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class OrthonormaliseVectorsRequest(_message.Message):
    __slots__ = ("session_id", "names", "tolerance", "store_as", "request_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    names: _containers.RepeatedScalarFieldContainer[str]
    tolerance: float
    store_as: str
    request_id: str
    def __init__(self, session_id: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., tolerance: _Optional[float] = ..., store_as: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class OrthonormaliseVectorsResponse(_message.Message):
    __slots__ = ("vector", "singular_values")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    SINGULAR_VALUES_FIELD_NUMBER: _ClassVar[int]
    vector: StoredVector
    singular_values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, vector: _Optional[_Union[StoredVector, _Mapping]] = ..., singular_values: _Optional[_Iterable[float]] = ...) -> None: ...
