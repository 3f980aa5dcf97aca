from curvd.v1 import graph_pb2 as _graph_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_FLOAT64: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_EVAL: _ClassVar[Mode]
    MODE_BATCH_STATISTICS: _ClassVar[Mode]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_FIRST: _ClassVar[Tier]
    TIER_FINAL: _ClassVar[Tier]

class InputStyle(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INPUT_STYLE_UNSPECIFIED: _ClassVar[InputStyle]
    INPUT_STYLE_POSITIONAL: _ClassVar[InputStyle]
    INPUT_STYLE_KEYWORDS: _ClassVar[InputStyle]
    INPUT_STYLE_MAPPING: _ClassVar[InputStyle]

class LossName(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_NAME_UNSPECIFIED: _ClassVar[LossName]
    LOSS_NAME_CROSS_ENTROPY: _ClassVar[LossName]
    LOSS_NAME_MSE: _ClassVar[LossName]
    LOSS_NAME_BCE_WITH_LOGITS: _ClassVar[LossName]
    LOSS_NAME_NLL: _ClassVar[LossName]
    LOSS_NAME_SMOOTH_L1: _ClassVar[LossName]
    LOSS_NAME_CUSTOM: _ClassVar[LossName]

class Reduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REDUCTION_UNSPECIFIED: _ClassVar[Reduction]
    REDUCTION_MEAN: _ClassVar[Reduction]
    REDUCTION_SUM: _ClassVar[Reduction]

class Distribution(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISTRIBUTION_UNSPECIFIED: _ClassVar[Distribution]
    DISTRIBUTION_RADEMACHER: _ClassVar[Distribution]
    DISTRIBUTION_NORMAL: _ClassVar[Distribution]

class OperatorKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATOR_KIND_UNSPECIFIED: _ClassVar[OperatorKind]
    OPERATOR_KIND_HESSIAN: _ClassVar[OperatorKind]
    OPERATOR_KIND_GGN: _ClassVar[OperatorKind]
    OPERATOR_KIND_FISHER: _ClassVar[OperatorKind]
    OPERATOR_KIND_EMPIRICAL_FISHER: _ClassVar[OperatorKind]
    OPERATOR_KIND_JACOBIAN_GRAM: _ClassVar[OperatorKind]
    OPERATOR_KIND_KFAC: _ClassVar[OperatorKind]
    OPERATOR_KIND_EKFAC: _ClassVar[OperatorKind]

class FisherType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FISHER_TYPE_UNSPECIFIED: _ClassVar[FisherType]
    FISHER_TYPE_MC: _ClassVar[FisherType]
    FISHER_TYPE_TYPE2: _ClassVar[FisherType]
    FISHER_TYPE_EMPIRICAL: _ClassVar[FisherType]

class WeightSharing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHT_SHARING_UNSPECIFIED: _ClassVar[WeightSharing]
    WEIGHT_SHARING_EXPAND: _ClassVar[WeightSharing]
    WEIGHT_SHARING_REDUCE: _ClassVar[WeightSharing]

class OperatorFunction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATOR_FUNCTION_UNSPECIFIED: _ClassVar[OperatorFunction]
    OPERATOR_FUNCTION_INVERSE: _ClassVar[OperatorFunction]
    OPERATOR_FUNCTION_INVERSE_ROOT: _ClassVar[OperatorFunction]

class FactorBlockKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FACTOR_BLOCK_KIND_UNSPECIFIED: _ClassVar[FactorBlockKind]
    FACTOR_BLOCK_KIND_KRONECKER: _ClassVar[FactorBlockKind]
    FACTOR_BLOCK_KIND_DENSE: _ClassVar[FactorBlockKind]
    FACTOR_BLOCK_KIND_DIAGONAL: _ClassVar[FactorBlockKind]
    FACTOR_BLOCK_KIND_ZERO: _ClassVar[FactorBlockKind]
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_FLOAT64: Dtype
DTYPE_BFLOAT16: Dtype
MODE_UNSPECIFIED: Mode
MODE_EVAL: Mode
MODE_BATCH_STATISTICS: Mode
TIER_UNSPECIFIED: Tier
TIER_FIRST: Tier
TIER_FINAL: Tier
INPUT_STYLE_UNSPECIFIED: InputStyle
INPUT_STYLE_POSITIONAL: InputStyle
INPUT_STYLE_KEYWORDS: InputStyle
INPUT_STYLE_MAPPING: InputStyle
LOSS_NAME_UNSPECIFIED: LossName
LOSS_NAME_CROSS_ENTROPY: LossName
LOSS_NAME_MSE: LossName
LOSS_NAME_BCE_WITH_LOGITS: LossName
LOSS_NAME_NLL: LossName
LOSS_NAME_SMOOTH_L1: LossName
LOSS_NAME_CUSTOM: LossName
REDUCTION_UNSPECIFIED: Reduction
REDUCTION_MEAN: Reduction
REDUCTION_SUM: Reduction
DISTRIBUTION_UNSPECIFIED: Distribution
DISTRIBUTION_RADEMACHER: Distribution
DISTRIBUTION_NORMAL: Distribution
OPERATOR_KIND_UNSPECIFIED: OperatorKind
OPERATOR_KIND_HESSIAN: OperatorKind
OPERATOR_KIND_GGN: OperatorKind
OPERATOR_KIND_FISHER: OperatorKind
OPERATOR_KIND_EMPIRICAL_FISHER: OperatorKind
OPERATOR_KIND_JACOBIAN_GRAM: OperatorKind
OPERATOR_KIND_KFAC: OperatorKind
OPERATOR_KIND_EKFAC: OperatorKind
FISHER_TYPE_UNSPECIFIED: FisherType
FISHER_TYPE_MC: FisherType
FISHER_TYPE_TYPE2: FisherType
FISHER_TYPE_EMPIRICAL: FisherType
WEIGHT_SHARING_UNSPECIFIED: WeightSharing
WEIGHT_SHARING_EXPAND: WeightSharing
WEIGHT_SHARING_REDUCE: WeightSharing
OPERATOR_FUNCTION_UNSPECIFIED: OperatorFunction
OPERATOR_FUNCTION_INVERSE: OperatorFunction
OPERATOR_FUNCTION_INVERSE_ROOT: OperatorFunction
FACTOR_BLOCK_KIND_UNSPECIFIED: FactorBlockKind
FACTOR_BLOCK_KIND_KRONECKER: FactorBlockKind
FACTOR_BLOCK_KIND_DENSE: FactorBlockKind
FACTOR_BLOCK_KIND_DIAGONAL: FactorBlockKind
FACTOR_BLOCK_KIND_ZERO: FactorBlockKind

class Loss(_message.Message):
    __slots__ = ("name", "reduction", "ignore_index", "class_weights", "label_smoothing", "shift", "beta", "graph", "weight_decay")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    IGNORE_INDEX_FIELD_NUMBER: _ClassVar[int]
    CLASS_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    name: LossName
    reduction: Reduction
    ignore_index: int
    class_weights: _containers.RepeatedScalarFieldContainer[float]
    label_smoothing: float
    shift: bool
    beta: float
    graph: _graph_pb2.Graph
    weight_decay: _containers.RepeatedCompositeFieldContainer[WeightDecay]
    def __init__(self, name: _Optional[_Union[LossName, str]] = ..., reduction: _Optional[_Union[Reduction, str]] = ..., ignore_index: _Optional[int] = ..., class_weights: _Optional[_Iterable[float]] = ..., label_smoothing: _Optional[float] = ..., shift: bool = ..., beta: _Optional[float] = ..., graph: _Optional[_Union[_graph_pb2.Graph, _Mapping]] = ..., weight_decay: _Optional[_Iterable[_Union[WeightDecay, _Mapping]]] = ...) -> None: ...

class WeightDecay(_message.Message):
    __slots__ = ("pattern", "coefficient")
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    pattern: str
    coefficient: float
    def __init__(self, pattern: _Optional[str] = ..., coefficient: _Optional[float] = ...) -> None: ...

class Operator(_message.Message):
    __slots__ = ("kind", "block_sizes", "damping", "scale", "mc_samples", "seed", "parameters", "fisher", "sharing", "function", "shift")
    KIND_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZES_FIELD_NUMBER: _ClassVar[int]
    DAMPING_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    MC_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FISHER_FIELD_NUMBER: _ClassVar[int]
    SHARING_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    kind: OperatorKind
    block_sizes: _containers.RepeatedScalarFieldContainer[int]
    damping: float
    scale: float
    mc_samples: int
    seed: int
    parameters: _containers.RepeatedScalarFieldContainer[str]
    fisher: FisherType
    sharing: WeightSharing
    function: OperatorFunction
    shift: float
    def __init__(self, kind: _Optional[_Union[OperatorKind, str]] = ..., block_sizes: _Optional[_Iterable[int]] = ..., damping: _Optional[float] = ..., scale: _Optional[float] = ..., mc_samples: _Optional[int] = ..., seed: _Optional[int] = ..., parameters: _Optional[_Iterable[str]] = ..., fisher: _Optional[_Union[FisherType, str]] = ..., sharing: _Optional[_Union[WeightSharing, str]] = ..., function: _Optional[_Union[OperatorFunction, str]] = ..., shift: _Optional[float] = ...) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("name", "shape", "offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("mode", "columns_at_once", "batches", "kept_batches", "kept_bytes", "compiled", "symmetry_gap", "difference_gap", "seconds_per_product", "peak_bytes", "tier", "busy", "revision")
    MODE_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BATCHES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPILED_FIELD_NUMBER: _ClassVar[int]
    SYMMETRY_GAP_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_GAP_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_PRODUCT_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    mode: str
    columns_at_once: int
    batches: int
    kept_batches: int
    kept_bytes: int
    compiled: bool
    symmetry_gap: float
    difference_gap: float
    seconds_per_product: float
    peak_bytes: int
    tier: Tier
    busy: float
    revision: int
    def __init__(self, mode: _Optional[str] = ..., columns_at_once: _Optional[int] = ..., batches: _Optional[int] = ..., kept_batches: _Optional[int] = ..., kept_bytes: _Optional[int] = ..., compiled: bool = ..., symmetry_gap: _Optional[float] = ..., difference_gap: _Optional[float] = ..., seconds_per_product: _Optional[float] = ..., peak_bytes: _Optional[int] = ..., tier: _Optional[_Union[Tier, str]] = ..., busy: _Optional[float] = ..., revision: _Optional[int] = ...) -> None: ...

class BuiltOperator(_message.Message):
    __slots__ = ("operator", "plan", "blocks")
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    operator: Operator
    plan: Plan
    blocks: _containers.RepeatedCompositeFieldContainer[FactorBlock]
    def __init__(self, operator: _Optional[_Union[Operator, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[FactorBlock, _Mapping]]] = ...) -> None: ...

class FactorBlock(_message.Message):
    __slots__ = ("parameters", "kind", "reason", "groups", "inputs", "outputs", "diagonal_inputs", "diagonal_outputs", "whole_gradients")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DIAGONAL_INPUTS_FIELD_NUMBER: _ClassVar[int]
    DIAGONAL_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    WHOLE_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedScalarFieldContainer[str]
    kind: FactorBlockKind
    reason: str
    groups: int
    inputs: int
    outputs: int
    diagonal_inputs: bool
    diagonal_outputs: bool
    whole_gradients: bool
    def __init__(self, parameters: _Optional[_Iterable[str]] = ..., kind: _Optional[_Union[FactorBlockKind, str]] = ..., reason: _Optional[str] = ..., groups: _Optional[int] = ..., inputs: _Optional[int] = ..., outputs: _Optional[int] = ..., diagonal_inputs: bool = ..., diagonal_outputs: bool = ..., whole_gradients: bool = ...) -> None: ...

class TensorInfo(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...
