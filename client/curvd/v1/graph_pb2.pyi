from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GraphTensorRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRAPH_TENSOR_ROLE_UNSPECIFIED: _ClassVar[GraphTensorRole]
    GRAPH_TENSOR_ROLE_PARAMETER: _ClassVar[GraphTensorRole]
    GRAPH_TENSOR_ROLE_FROZEN: _ClassVar[GraphTensorRole]
    GRAPH_TENSOR_ROLE_BUFFER: _ClassVar[GraphTensorRole]
GRAPH_TENSOR_ROLE_UNSPECIFIED: GraphTensorRole
GRAPH_TENSOR_ROLE_PARAMETER: GraphTensorRole
GRAPH_TENSOR_ROLE_FROZEN: GraphTensorRole
GRAPH_TENSOR_ROLE_BUFFER: GraphTensorRole

class Graph(_message.Message):
    __slots__ = ("version", "inputs", "tensors", "nodes", "outputs", "sources", "dtype")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    version: int
    inputs: _containers.RepeatedCompositeFieldContainer[GraphInput]
    tensors: _containers.RepeatedCompositeFieldContainer[GraphTensor]
    nodes: _containers.RepeatedCompositeFieldContainer[GraphNode]
    outputs: _containers.RepeatedScalarFieldContainer[int]
    sources: _containers.RepeatedScalarFieldContainer[str]
    dtype: str
    def __init__(self, version: _Optional[int] = ..., inputs: _Optional[_Iterable[_Union[GraphInput, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[GraphTensor, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[GraphNode, _Mapping]]] = ..., outputs: _Optional[_Iterable[int]] = ..., sources: _Optional[_Iterable[str]] = ..., dtype: _Optional[str] = ...) -> None: ...

class GraphInput(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class GraphTensor(_message.Message):
    __slots__ = ("names", "role", "dtype", "shape", "data")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    role: GraphTensorRole
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, names: _Optional[_Iterable[str]] = ..., role: _Optional[_Union[GraphTensorRole, str]] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class GraphNode(_message.Message):
    __slots__ = ("operator", "arguments", "source")
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    operator: str
    arguments: _containers.RepeatedCompositeFieldContainer[GraphArgument]
    source: int
    def __init__(self, operator: _Optional[str] = ..., arguments: _Optional[_Iterable[_Union[GraphArgument, _Mapping]]] = ..., source: _Optional[int] = ...) -> None: ...

class GraphArgument(_message.Message):
    __slots__ = ("name", "literal", "literals")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LITERAL_FIELD_NUMBER: _ClassVar[int]
    LITERALS_FIELD_NUMBER: _ClassVar[int]
    name: str
    literal: GraphLiteral
    literals: GraphLiterals
    def __init__(self, name: _Optional[str] = ..., literal: _Optional[_Union[GraphLiteral, _Mapping]] = ..., literals: _Optional[_Union[GraphLiterals, _Mapping]] = ...) -> None: ...

class GraphLiterals(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[GraphLiteral]
    def __init__(self, items: _Optional[_Iterable[_Union[GraphLiteral, _Mapping]]] = ...) -> None: ...

class GraphLiteral(_message.Message):
    __slots__ = ("value", "boolean", "integer", "number", "text", "dtype", "memory_format")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    value: int
    boolean: bool
    integer: int
    number: float
    text: str
    dtype: str
    memory_format: str
    def __init__(self, value: _Optional[int] = ..., boolean: bool = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., text: _Optional[str] = ..., dtype: _Optional[str] = ..., memory_format: _Optional[str] = ...) -> None: ...
