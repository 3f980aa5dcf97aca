"""Operators that are replaced by others, and those that are refused with advice.

Replaced are operators whose higher derivatives torch gets wrong or lacks, and those
that do nothing in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from curvd.errors import InvalidGraph
from curvd.graph.aliases import Alias
from curvd.graph.tape import Tape, Value

Arguments = Mapping[str, Any]
"""Of an operator by the names of its schema, defaults included."""

_RANDOM = frozenset(
    """
    bernoulli cauchy exponential geometric log_normal multinomial normal poisson rand
    rand_like randint randint_like randn randn_like randperm random rrelu
    rrelu_with_noise uniform
    """.split()
)
_DROPOUT = frozenset(
    """
    dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout
    """.split()
)
_SHAPELESS = frozenset({"nonzero", "masked_select", "unique", "_unique2", "item"})
"""What depends on values is the shape of the result; ``where`` of a condition alone is one, too."""
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_EVAL = "call module.eval() before exporting: a Hessian needs a function without chance"
_REDUCTIONS = {0: None, 1: "aten.mean.default", 2: "aten.sum.default"}


def refuse(tape: Tape, operator: str, arguments: Arguments) -> None:
    """Refuse an operator that no rewriting can help.

    Args:
        tape: Knows where the operator comes from.
        operator: As the contract names it.
        arguments: Its arguments.

    Raises:
        InvalidGraph: With the operator, its place and what to do.
    """
    name = operator.split(".")[1].rstrip("_")
    why = ""
    chance = arguments.get("train") is True and arguments.get("dropout")
    if name.startswith("rrelu") and arguments.get("training") is False:
        return
    if name in _RANDOM or (
        name in _DROPOUT and arguments.get("train", True) and arguments.get("p")
    ):
        why = f"draws random numbers: {_EVAL}; or pass them in, as an input or a buffer"
    elif (name in _RECURRENT and chance) or arguments.get("dropout_p"):
        why = f"draws random numbers with dropout: {_EVAL}"
    elif arguments.get("scale_grad_by_freq") is True:
        why = "with scale_grad_by_freq=True has no second derivative: leave it out"
    elif name in ("as_strided", "set", "resize"):
        why = "reaches behind a tensor's memory: use slices and reshape"
    elif name in _SHAPELESS or operator == "aten.where.default":
        why = "makes shapes or numbers from values: use torch.where with masks"
    elif (
        name == "repeat_interleave"
        and arguments.get("output_size") is None
        and (isinstance(arguments.get("repeats"), Alias))
    ):
        why = "makes a shape from repeats: pass output_size=, or index with a list"
    elif name == "_local_scalar_dense":
        why = "makes a number from a tensor (.item()): keep it a tensor"
    if why:
        msg = f"operator {operator}{tape.where} {why}"
        raise InvalidGraph(msg, operator=operator, source=tape.source)


def is_nothing(operator: str, arguments: Arguments) -> bool:
    """Tell whether an operator returns its first argument as it is.

    Args:
        operator: As the contract names it.
        arguments: Its arguments.

    Returns:
        Whether it can be left out.
    """
    name = operator.split(".")[1].rstrip("_")
    if name in _DROPOUT:
        return not arguments.get("train", True) or not arguments.get("p")
    if name == "to":
        return arguments.get("dtype") is None and "other" not in arguments
    return name in ("lift_fresh", "requires_grad")


def is_rewritten(operator: str) -> bool:
    """Tell whether an operator is always emitted in another way.

    Args:
        operator: As the contract names it.

    Returns:
        Whether `rewritten` knows it.
    """
    return operator in _REWRITES


def rewritten(tape: Tape, operator: str, a: Arguments) -> Value | None:
    """Emit an operator in another way, if there is a better one.

    Args:
        tape: Where to.
        operator: As the contract names it.
        a: Its arguments, tensors as values.

    Returns:
        What it returns; None if it is fine as it is.
    """
    rewrite = _REWRITES.get(operator)
    return None if rewrite is None else rewrite(tape, a)


def _mse_loss(tape: Tape, a: Arguments) -> Value:
    """``(x - y)^2``: the kernel has no second derivative in forward mode."""
    difference = tape.emit("aten.sub.Tensor", a["self"], a["target"])
    square = tape.emit("aten.square.default", difference)
    reduce = _REDUCTIONS[a["reduction"]]
    return square if reduce is None else tape.emit(reduce, square)


def _huber_loss(tape: Tape, a: Arguments) -> Value:
    """``delta * smooth_l1(beta=delta)``: the kernel has no forward mode."""
    smooth = tape.emit(
        "aten.smooth_l1_loss.default",
        a["self"],
        a["target"],
        a["reduction"],
        float(a["delta"]),
    )
    return tape.emit("aten.mul.Tensor", smooth, float(a["delta"]))


def _to_dtype(tape: Tape, a: Arguments) -> Value:
    return tape.emit("aten.to.dtype", a["self"], a["dtype"])


def _instance_norm(tape: Tape, a: Arguments) -> Value:
    """Use the running statistics, or leave them alone."""
    own = a["use_input_stats"]
    return tape.emit(
        "aten.instance_norm.default",
        a["input"],
        a["weight"],
        a["bias"],
        None if own else a["running_mean"],
        None if own else a["running_var"],
        own,
        a["momentum"],
        a["eps"],
        a["cudnn_enabled"],
    )


def _uninitialised(tape: Tape, a: Arguments) -> Value:
    """Make zeros; whoever reads them before they are written is refused."""
    options = {} if a.get("dtype") is None else {"dtype": a["dtype"]}
    if "self" not in a:
        value = tape.emit("aten.zeros.default", a["size"], **options)
    elif "size" in a:
        value = tape.emit("aten.new_zeros.default", a["self"], a["size"], **options)
    else:
        value = tape.emit("aten.zeros_like.default", a["self"], **options)
    value.uninitialised = True
    return value


def _scalar_tensor(tape: Tape, a: Arguments) -> Value | None:
    """Make NaN, which no message holds, the logarithm of -1."""
    if not isinstance(a["s"], float) or not math.isnan(a["s"]):
        return None
    dtype = a["dtype"] or torch.get_default_dtype()
    return tape.emit(
        "aten.log.default", tape.emit("aten.scalar_tensor.default", -1.0, dtype=dtype)
    )


def _rrelu(tape: Tape, a: Arguments) -> Value:
    """In evaluation the slope is the mean of its bounds."""
    slope = (a["lower"] + a["upper"]) / 2
    return tape.emit("aten.leaky_relu.default", a["self"], slope)


def _embedding(tape: Tape, a: Arguments) -> Value | None:
    """Leave out how the gradient is to be stored."""
    if a["sparse"] is not True:
        return None
    return tape.emit(
        "aten.embedding.default", a["weight"], a["indices"], a["padding_idx"]
    )


def _shift(name: str) -> Callable[[Tape, Arguments], Value]:
    """Name the operator of Python's ``<<`` or ``>>``; by a number it has another overload."""

    def emitted(tape: Tape, a: Arguments) -> Value:
        scalar = not isinstance(a["other"], Value)
        overload = "Tensor_Scalar" if scalar else "Tensor"
        return tape.emit(f"aten.{name}.{overload}", a["self"], a["other"])

    return emitted


_REWRITES: Mapping[str, Callable[[Tape, Arguments], Value | None]] = {
    "aten.scalar_tensor.default": _scalar_tensor,
    "aten.rrelu.default": _rrelu,
    "aten.empty.memory_format": _uninitialised,
    "aten.empty_like.default": _uninitialised,
    "aten.empty_permuted.default": _uninitialised,
    "aten.empty_strided.default": _uninitialised,
    "aten.new_empty.default": _uninitialised,
    "aten.new_empty_strided.default": _uninitialised,
    "aten.rrelu_.default": _rrelu,
    "aten.embedding.default": _embedding,
    "aten.mse_loss.default": _mse_loss,
    "aten.huber_loss.default": _huber_loss,
    "aten.to.device": _to_dtype,
    "aten.to.dtype_layout": _to_dtype,
    "aten._to_copy.default": lambda tape, a: (
        tape.emit("aten.clone.default", a["self"])
        if a["dtype"] is None
        else _to_dtype(tape, a)
    ),
    **{
        f"aten.{dunder}.{overload}": _shift(name)
        for dunder, name in (
            ("__lshift__", "bitwise_left_shift"),
            ("__rshift__", "bitwise_right_shift"),
        )
        for overload in ("Scalar", "Tensor")
    },
    "aten.instance_norm.default": _instance_norm,
    "aten.lift_fresh_copy.default": lambda tape, a: tape.emit(
        "aten.clone.default", a["self"]
    ),
    "aten.detach_.default": lambda tape, a: tape.emit("aten.detach.default", a["self"]),
    "aten.zero_.default": lambda tape, a: tape.emit(
        "aten.zeros_like.default", a["self"]
    ),
    "aten.fill_.Scalar": lambda tape, a: tape.emit(
        "aten.full_like.default", a["self"], a["value"]
    ),
    "aten.copy_.default": lambda tape, a: tape.emit(
        "aten.expand_as.default", a["src"], a["self"]
    ),
}
