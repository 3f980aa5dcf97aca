"""From an operator's name to the function that computes it, if that is allowed.

The allow-list is the contract's (`curvd.vocabulary`). What is found on it must also
have a schema that is pure and plain, and the arguments must fit that schema.
"""

from __future__ import annotations

import functools
import math
import operator as python
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from curvd import vocabulary
from curvd.errors import InvalidGraph, LimitExceeded
from curvd_server.graph.decode import (
    Argument,
    ElementType,
    MemoryFormat,
    Node,
)

MAX_PIECES = 65_536
"""Tensors that one operator may return."""
MAX_STEPS = 8_192
"""Steps in time, over all layers, that one recurrent operator may walk."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
})
MEMORY_FORMATS: Mapping[str, torch.memory_format] = MappingProxyType({
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
})

_PLAIN = ("Tensor", "int", "SymInt", "float", "bool", "number", "Scalar")
_TYPES = frozenset(
    wrapped
    for plain in _PLAIN
    for wrapped in (
        plain,
        f"Optional[{plain}]",
        f"List[{plain}]",
        f"List[Optional[{plain}]]",
        f"Optional[List[{plain}]]",
    )
) | {"str", "Optional[str]"}
# The server fills in the device; the others say where and how memory is laid out.
_FILLED = frozenset({"device", "layout", "pin_memory"})
_RETURNS = frozenset({"Tensor", "List[Tensor]"})
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
# They split a tensor: how many pieces is a number that a client chooses.
_SPLITTING = frozenset({"unbind", "split", "chunk", "tensor_split", "meshgrid"})


def resolve(node: Node) -> Callable[..., Any]:
    """Find the function of a node and fit its arguments.

    Args:
        node: From `decode`.

    Returns:
        A function of the node's arguments.

    Raises:
        InvalidGraph: If there is no such operator, it is not pure, or its schema does
            not take these arguments.
    """
    size = vocabulary.SIZE_OPERATOR.fullmatch(node.operator)
    if size is not None:
        if node.options:
            raise _refused(node, "takes no named arguments")
        return _SIZES[size[1]]
    overload = _overload(node.operator)
    if overload is None:
        raise _refused(node, "does not exist in this version of torch, or is not pure")
    _fit(node, overload._schema)
    if node.operator == "aten.embedding.default":
        return padded_embedding
    function: Callable[..., Any] = overload
    return function


def makes_tensors(operator: str) -> bool:
    """Tell whether an operator needs to be told the device: it takes no tensor."""
    overload = _overload(operator)
    if overload is None:
        return False
    names = {a.name: str(a.type) for a in overload._schema.arguments}
    takes = any("Tensor" in kind for kind in names.values())
    return "device" in names and not takes


def pieces(node: Node, arguments: Sequence[Any]) -> int:
    """Predict how many tensors a node returns, before it does.

    Args:
        node: The node.
        arguments: What it is about to be called with.

    Returns:
        Their number; 1 for operators that return a fixed number.
    """
    name = node.operator.split(".")[1] if node.operator.startswith("aten.") else ""
    if name not in _SPLITTING or not arguments or not isinstance(arguments[0], Tensor):
        return 1
    tensor, *rest = arguments
    numbers = [*rest, *node.options.values()]
    sizes = [n for n in numbers if isinstance(n, int)]
    if name == "unbind":
        axis = sizes[0] if sizes else 0
        return int(tensor.shape[axis]) if -tensor.ndim <= axis < tensor.ndim else 1
    if not sizes:
        return 1  # a list of sizes, which has its own limit
    if name == "split":
        axis = sizes[1] if len(sizes) > 1 else 0
        length = tensor.shape[axis] if -tensor.ndim <= axis < tensor.ndim else 1
        return -(-int(length) // max(sizes[0], 1))
    return sizes[0]


def steps(node: Node, arguments: Sequence[Any]) -> int:
    """Predict how many steps a recurrent node walks, one after the other.

    Args:
        node: The node.
        arguments: What it is about to be called with.

    Returns:
        Their number, over all layers; 1 for other operators.
    """
    name = node.operator.split(".")[1]
    if name not in _RECURRENT or not isinstance(arguments[0], Tensor):
        return 1
    layers, _, _, bidirectional, batch_first = arguments[4:9]
    axis = 1 if batch_first else 0
    length = arguments[0].shape[axis] if arguments[0].ndim > axis else 1
    return int(length) * int(layers) * (2 if bidirectional else 1)


def check_work(node: Node, arguments: Sequence[Any]) -> None:
    """Refuse a node that would take forever even without memory.

    Args:
        node: The node.
        arguments: What it is about to be called with.

    Raises:
        LimitExceeded: If it would return more than `MAX_PIECES` tensors, or walk more
            than `MAX_STEPS` steps.
    """
    count = pieces(node, arguments)
    if count > MAX_PIECES:
        msg = f"{node} would return {count} tensors; the limit is {MAX_PIECES}"
        raise LimitExceeded(msg, count=count, limit=MAX_PIECES)
    walked = steps(node, arguments)
    if walked > MAX_STEPS:
        msg = f"{node} would walk {walked} steps; the limit is {MAX_STEPS}"
        raise LimitExceeded(msg, steps=walked, limit=MAX_STEPS)


def padded_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look rows up; the padding row is a constant in every AD mode.

    ``aten.embedding`` drops the padding row in reverse mode only. `rewrites` has the
    same definition for modules.

    Args:
        weight: ``[V, D]``.
        indices: Any shape.
        padding_idx: Row without derivative; -1: none.
        scale_grad_by_freq: Always false; `resolve` refuses anything else.
        sparse: Likewise.

    Returns:
        ``[*indices, D]``.
    """
    rows: Tensor = torch.ops.aten.embedding.default(weight, indices)
    if padding_idx < 0:
        return rows
    padded = torch.eq(indices, padding_idx).unsqueeze(-1)
    return torch.where(padded, rows.detach(), rows)


def batch_norm(
    batch_statistics: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Normalise with the mini-batch's statistics, or with the running ones.

    The session decides which; running statistics are never written to.

    Args:
        batch_statistics: What the session decided.
        x: ``[B, C, ...]``.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        mean: Running mean ``[C]``; None if there is none, then `x` has its own.
        variance: Likewise.
        training: What the graph says; passed over.
        momentum: Of running statistics; not used.
        eps: Added to the variance.
        cudnn_enabled: Whether cuDNN may compute it.

    Returns:
        The shape of `x`.
    """
    own = batch_statistics or mean is None
    if own:
        mean = variance = None
    result: Tensor = torch.ops.aten.batch_norm.default(
        x, weight, bias, mean, variance, own, 0.0, eps, cudnn_enabled
    )
    return result


@functools.cache
def _overload(operator: str) -> Any:
    """Look an allowed operator up; None if it is not there, or not pure."""
    match = vocabulary.OPERATOR.fullmatch(operator)
    if match is None or match[2] not in vocabulary.TENSOR_OPERATORS:
        return None
    packet = getattr(torch.ops.aten, match[2], None)
    if packet is None or match[3] not in packet.overloads():
        return None
    if match[3].startswith("prim") or match[3] == "data":
        return None  # of TorchScript; of packed sequences
    overload = getattr(packet, match[3])
    schema = overload._schema
    plain = all(
        str(a.type) in _TYPES or a.name in (*_FILLED, "memory_format", "dtype")
        for a in schema.arguments
    )
    writes = schema.is_mutable or any(
        a.is_out or (a.alias_info is not None and a.alias_info.is_write)
        for a in schema.arguments
    )
    returns = [str(r.type) for r in schema.returns]
    pure = plain and not writes and returns and all(r in _RETURNS for r in returns)
    return overload if pure else None


def _fit(node: Node, schema: Any) -> None:
    """Check literal arguments against a schema."""
    known = [a for a in schema.arguments if a.name not in _FILLED]
    positional = [a for a in known if not a.kwarg_only]
    if len(node.arguments) > len(positional):
        raise _refused(node, f"takes {len(positional)} positional arguments")
    given: dict[str, Argument] = {}
    for argument, value in zip(positional, node.arguments, strict=False):
        given[argument.name] = value
    for name, value in node.options.items():
        if name in given or name not in {a.name for a in known}:
            raise _refused(node, f"takes no argument {name!r}, or takes it once")
        given[name] = value
    for argument in known:
        if argument.name in given:
            _fit_one(node, argument, given[argument.name])
        elif not argument.has_default_value():
            raise _refused(node, f"needs argument {argument.name!r}")
    if given.get("scale_grad_by_freq") is True or given.get("sparse") is True:
        raise _refused(
            node, "has no second derivative with scale_grad_by_freq or sparse"
        )
    train = node.operator.split(".")[1] in _RECURRENT
    if given.get("dropout_p") not in (None, 0, 0.0) or (
        train and given.get("train") is True and given.get("dropout") not in (0, 0.0)
    ):
        raise _refused(node, "draws random numbers with dropout")


def _fit_one(node: Node, argument: Any, value: Argument) -> None:
    kind = str(argument.type)
    if argument.name == "dtype":
        fits = value is None or isinstance(value, ElementType)
    elif argument.name == "memory_format":
        fits = value is None or isinstance(value, MemoryFormat)
    else:
        items = value if isinstance(value, tuple) else (value,)
        texts = any(isinstance(item, str) for item in items)
        fits = texts == (kind in ("str", "Optional[str]") and value is not None)
        fits &= not any(isinstance(i, ElementType | MemoryFormat) for i in items)
    if not fits:
        raise _refused(node, f"argument {argument.name!r} must be {kind}")


def _refused(node: Node, why: str) -> InvalidGraph:
    msg = f"operator {node} {why}"
    return InvalidGraph(msg, operator=node.operator, source=node.source)


def _number(function: Callable[..., Any]) -> Callable[..., Any]:
    """Restrict a function of Python's to numbers of ordinary size."""

    def compute(*numbers: Any) -> Any:
        if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            if not all(isinstance(n, bool) for n in numbers):
                msg = (
                    f"sizes must be numbers, got {[type(n).__name__ for n in numbers]}"
                )
                raise TypeError(msg)
        result = function(*numbers)
        if not isinstance(result, bool) and not -(2**63) <= result < 2**63:
            msg = f"a size is {result:.3g}"
            raise OverflowError(msg)
        return result

    return compute


def _size(tensor: Tensor, axis: int) -> int:
    if not isinstance(tensor, Tensor) or type(axis) is not int:
        msg = "sym.size takes a tensor and an axis"
        raise TypeError(msg)
    return int(tensor.shape[axis])


def _numel(tensor: Any) -> int:
    if not isinstance(tensor, Tensor):
        msg = "sym.numel takes a tensor"
        raise TypeError(msg)
    return tensor.numel()


def _item(sequence: Any, index: Any) -> Any:
    if not isinstance(sequence, tuple | list) or type(index) is not int:
        msg = "sym.item takes a sequence and an index"
        raise TypeError(msg)
    return sequence[index]


_SIZES: Mapping[str, Callable[..., Any]] = MappingProxyType({
    "size": _size,
    "numel": _numel,
    "item": _item,
    "add": _number(python.add),
    "sub": _number(python.sub),
    "mul": _number(python.mul),
    "floordiv": _number(python.floordiv),
    "mod": _number(python.mod),
    "truediv": _number(python.truediv),
    "neg": _number(python.neg),
    "min": _number(min),
    "max": _number(max),
    "int": _number(math.trunc),
    "float": _number(float),
    "eq": _number(python.eq),
    "ne": _number(python.ne),
    "lt": _number(python.lt),
    "le": _number(python.le),
    "gt": _number(python.gt),
    "ge": _number(python.ge),
    "and": _number(python.and_),
    "or": _number(python.or_),
    "not": _number(python.not_),
})
assert _SIZES.keys() == vocabulary.SIZE_OPERATORS
