"""From an operator's name to the function that computes it, if that is allowed.

The allow-list is the contract's (`curvd.contract.graph_ops`). What is found on it must also
have a schema that is pure and plain, and the arguments must fit that schema.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from curvd.contract import graph_ops
from curvd.errors import InvalidGraph, InvalidSpec
from curvd_server.graph.execution.sizes import SIZES
from curvd_server.graph.execution.work import RECURRENT
from curvd_server.graph.form import (
    Argument,
    ElementType,
    MemoryFormat,
    Node,
    Ref,
)

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
    "C64": torch.complex64,
    "C128": torch.complex128,
})
COMPLEX_OF = {DTYPES[real]: DTYPES[wide] for real, wide in graph_ops.COMPLEX.items()}
"""What numbers of a type become when they turn complex."""
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
# What an operator may do hangs on these, so it must be known beforehand.
_DECISIVE = ("dropout", "dropout_p", "train", "scale_grad_by_freq", "sparse")
_RETURNS = frozenset({"Tensor", "List[Tensor]"})


def resolve(node: Node) -> Callable[..., Any]:
    """Find the function of a node and fit its arguments.

    Args:
        node: The node, from `decode`.

    Returns:
        A function of the node's arguments.

    Raises:
        InvalidGraph: If there is no such operator, it is not pure, or its schema does
            not take these arguments.
    """
    size = graph_ops.SIZE_OPERATOR.fullmatch(node.operator)
    if size is not None:
        if node.options:
            raise _refused(node, "takes no named arguments")
        return SIZES[size[1]]
    overload = _overload(node.operator)
    if overload is None:
        raise _refused(node, "does not exist in this version of torch, or is not pure")
    _fit(node, overload._schema)
    if node.operator == "aten.embedding.default":
        return padded_embedding
    if node.operator == "aten.instance_norm.default":
        return instance_norm
    if node.operator == "aten.lstm.input":
        return lstm
    if node.operator == "aten.view_as_complex.default":
        return complex_of
    function: Callable[..., Any] = overload
    return function


def given_to(
    node: Node, arguments: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Name the arguments of a call.

    Args:
        node: The node whose operator is called.
        arguments: Its positional arguments.
        options: The others.

    Returns:
        All of them by the names of the schema; sizes have none.
    """
    overload = _overload(node.operator)
    if overload is None:
        return {}
    names = [a.name for a in overload._schema.arguments if a.name not in _FILLED]
    return {**dict(zip(names, arguments, strict=False)), **options}


def makes_tensors(operator: str) -> bool:
    """Tell whether an operator needs to be told the device: it takes no tensor."""
    overload = _overload(operator)
    if overload is None:
        return False
    names = {a.name: str(a.type) for a in overload._schema.arguments}
    takes = any("Tensor" in kind for kind in names.values())
    return "device" in names and not takes


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
    some_train: bool,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Normalise with the mini-batch's statistics, or with the running ones.

    The session decides which; running statistics are never written to. Of a graph some of
    whose layers were exported in training mode, the others are frozen and keep theirs.

    Args:
        batch_statistics: What the session decided.
        some_train: Whether a layer of the graph was exported in training mode.
        input: ``[B, C, ...]``.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        running_mean: ``[C]``; None if there is none, then `input` has its own.
        running_var: Likewise.
        training: What the graph says of this layer; passed over where no layer trains.
        momentum: The momentum of running statistics; not used.
        eps: Added to the variance.
        cudnn_enabled: Whether cuDNN may compute it.

    Returns:
        The shape of `input`.

    Raises:
        InvalidSpec: If a channel of a mini-batch has one value only.
    """
    trains = training or not some_train
    own = running_mean is None or (batch_statistics and trains)
    if own:
        running_mean = running_var = None
        if input.dim() > 1 and input.numel() == input.shape[1]:
            raise single_value(input.shape)
    result: Tensor = torch.ops.aten.batch_norm.default(
        *(input, weight, bias, running_mean, running_var),
        *(own, 0.0, eps, cudnn_enabled),
    )
    return result


def single_value(shape: Sequence[int]) -> InvalidSpec:
    """Refuse statistics of one value: its variance is zero, whatever it is.

    Args:
        shape: The shape of BatchNorm's input.

    Returns:
        The error.
    """
    msg = (
        f"BatchNorm has one value per channel in an input of shape {list(shape)}, and "
        "one value has no variance: with the statistics of mini-batches each needs at "
        "least two data points"
    )
    return InvalidSpec(msg, shape=list(shape))


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Normalise each data point; running statistics are never written to.

    Args:
        input: ``[B, C, ...]``.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        running_mean: ``[C]`` or None; used unless `use_input_stats`.
        running_var: Likewise.
        use_input_stats: Whether the data point's own statistics are used.
        momentum: The momentum of running statistics; not used.
        eps: Added to the variance.
        cudnn_enabled: Whether cuDNN may compute it.

    Returns:
        The shape of `input`.
    """
    if use_input_stats:
        running_mean = running_var = None
    result: Tensor = torch.ops.aten.instance_norm.default(
        *(input, weight, bias, running_mean, running_var),
        *(use_input_stats, 0.0, eps, cudnn_enabled),
    )
    return result


def complex_of(parts: Tensor) -> Tensor:
    """Make complex numbers of real and imaginary parts, in memory of their own.

    Those of a file lie where its other tensors leave room, and torch's kernels end the process
    where a complex number is not at a multiple of its size.

    Args:
        parts: ``[..., 2]``.

    Returns:
        ``[...]``.
    """
    return torch.complex(parts.select(-1, 0), parts.select(-1, 1))


def lstm(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Run a recurrent layer by operators that can be differentiated in both AD modes.

    oneDNN's layer, which torch takes on the CPU, has no derivative forwards, and none of
    its gradient's operators can be traced apart.

    Args:
        *args: As for ``aten.lstm.input``.
        **kwargs: The same by name.

    Returns:
        The outputs, and the last states.
    """
    with without_onednn():
        result: tuple[Tensor, ...] = torch.ops.aten.lstm.input(*args, **kwargs)
    return result


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Let torch take its own operators, not oneDNN's.

    The switch is the process's; whoever computes has the device's turn meanwhile.
    """
    onednn: Any = torch.backends.mkldnn
    before, onednn.enabled = onednn.enabled, False
    try:
        yield
    finally:
        onednn.enabled = before


@functools.cache
def _overload(operator: str) -> Any:
    """Look an allowed operator up; None if it is not there, or not pure."""
    match = graph_ops.OPERATOR.fullmatch(operator)
    if match is None or match[2] not in graph_ops.TENSOR_OPERATORS:
        return None
    packet = getattr(torch.ops.aten, match[2], None)
    if packet is None or match[3] not in packet.overloads():
        return None
    if match[3].startswith("prim") or match[3] == "data" or "dimname" in match[3]:
        return None  # of TorchScript; of packed sequences; of named axes
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
    for name in _DECISIVE:
        if isinstance(given.get(name), Ref):
            raise _refused(node, f"needs {name!r} as a literal")
    if given.get("scale_grad_by_freq") is True or given.get("sparse") is True:
        raise _refused(
            node, "has no second derivative with scale_grad_by_freq or sparse"
        )
    train = node.operator.split(".")[1] in RECURRENT
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
