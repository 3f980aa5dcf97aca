"""Whether module, data and loss fit one another, said in the caller's words.

torch says what an operator was given; a caller wants to know which argument that was.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TopLevelTracedModule

from curvd.contract import LossName, LossSpec
from curvd.errors import InvalidSpec

_IGNORED = -100
"""The class index that torch's losses count for nothing unless they are told another."""


def check_module(module: Any) -> None:
    """Refuse what is no module.

    Args:
        module: What the caller gave as one.

    Raises:
        InvalidSpec: With what to pass instead.
    """
    if isinstance(module, TopLevelTracedModule):
        msg = (
            "module was made by torch.jit.trace, whose code has the sizes of its example: "
            "pass the module that it was traced from"
        )
        raise InvalidSpec(msg, module=type(module).__name__)
    if isinstance(module, nn.Module):
        return
    remedy = "pass the nn.Module that has the parameters"
    what = f"a {type(module).__name__}"
    owner = getattr(module, "__self__", None)
    if inspect.isclass(module):
        what = f"the class {module.__name__}"
        remedy = f"pass an instance, {module.__name__}(…)"
    elif isinstance(owner, nn.Module):
        what = f"the method {module.__name__} of a {type(owner).__name__}"
        remedy = "pass the module itself, whose forward is what counts"
    elif callable(module):
        what = f"the function {getattr(module, '__name__', type(module).__name__)}"
        remedy = (
            "parameters belong to modules, so make it the forward of one: "
            "class Model(nn.Module), with what trains as nn.Parameter"
        )
    elif isinstance(module, Mapping):
        remedy = "a state has no forward: pass the nn.Module that it is loaded into"
    msg = f"module must be an nn.Module, got {what}; {remedy}"
    raise InvalidSpec(msg, module=type(module).__name__)


def check_loss(loss: Any) -> None:
    """Refuse what is no loss.

    Args:
        loss: What the caller gave as one: no name and no specification.

    Raises:
        InvalidSpec: With what to pass instead.
    """
    if inspect.isclass(loss):
        msg = (
            f"loss is the class {loss.__name__}, which has to be made before it is "
            f"called: pass an instance, {loss.__name__}()"
        )
        raise InvalidSpec(msg, loss=loss.__name__)
    if not callable(loss):
        msg = (
            f"loss must be a function of outputs and targets, got {type(loss).__name__}: "
            "pass one of torch's losses such as nn.CrossEntropyLoss(), a function that "
            "returns a scalar, or a name such as 'mse'"
        )
        raise InvalidSpec(msg, loss=type(loss).__name__)


def check_lengths(inputs: Sequence[Tensor], targets: Any) -> None:
    """Refuse targets that are no tensor, and data points without a target.

    Args:
        inputs: [N, ...] each.
        targets: What the caller gave.

    Raises:
        InvalidSpec: If there are no data points, or not one target for each.
    """
    if not isinstance(targets, Tensor):
        msg = (
            f"the targets are a {type(targets).__name__}, where one tensor [N, ...] is "
            "needed: pass (inputs, targets)"
        )
        raise InvalidSpec(msg, targets=type(targets).__name__)
    if not inputs:
        msg = "the inputs have no tensor; pass (inputs, targets), inputs [N, ...]"
        raise InvalidSpec(msg, targets=targets.shape)
    shapes = [list(leaf.shape) for leaf in inputs]
    points = {shape[0] if shape else -1 for shape in shapes}
    given = f"inputs {', '.join(map(str, shapes))}, targets {list(targets.shape)}"
    if points == {0} or (targets.dim() and not len(targets)):
        msg = (
            f"the data has no data points ({given}); a session needs at least one, "
            "[N, ...] with N > 0: has a filter or a slice left none?"
        )
        raise InvalidSpec(msg)
    if not targets.dim() or points != {len(targets)}:
        msg = (
            f"inputs and targets need one leading axis N, a target for each data "
            f"point; got {given}: cut them alike, inputs[:n] and targets[:n]"
        )
        raise InvalidSpec(msg)


def check_targets(spec: LossSpec, outputs: Tensor, targets: Tensor) -> None:
    """Refuse targets that one of torch's losses cannot take.

    Args:
        spec: The loss.
        outputs: The module's, for a few data points, [B, ...].
        targets: All of them, [N, ...].

    Raises:
        InvalidSpec: With what the loss takes, and how to make that of these.
    """
    if spec.name.has_classes:
        _check_classes(spec, outputs, targets)
        return
    wrong_type = (
        not targets.is_floating_point()
        if spec.name is LossName.BCE_WITH_LOGITS
        else targets.dtype is torch.bool
    )
    if wrong_type:
        msg = (
            f"{spec.name} takes targets that are numbers of floating point; these are "
            f"{kind_of(targets)}: pass targets.float()"
        )
        raise InvalidSpec(msg, targets=targets.dtype)


def _check_classes(spec: LossSpec, outputs: Tensor, targets: Tensor) -> None:
    said = f"the targets are {kind_of(targets)}, the outputs {kind_of(outputs, 'B')}"
    alike = targets.shape[1:] == outputs.shape[1:]
    if targets.is_floating_point():
        if spec.name is LossName.CROSS_ENTROPY and alike and outputs.dim() > 1:
            return  # probabilities
        also = ""
        if spec.name is LossName.CROSS_ENTROPY:
            also = f", or probabilities of the outputs' shape {_shape(outputs, 'N')}"
        msg = (
            f"{spec.name} takes class indices, integers{also}; {said}: pass "
            "targets.long() if they are indices; for numbers to be met there is "
            "nn.MSELoss()"
        )
        raise InvalidSpec(msg, targets=targets.dtype)
    if targets.dtype not in (torch.int64, torch.uint8):
        msg = f"{spec.name} takes class indices as int64; {said}: pass targets.long()"
        raise InvalidSpec(msg, targets=targets.dtype)
    axis = _class_axis(outputs, targets)
    if axis is None:
        wanted = ["N", *map(str, outputs.shape[2:])]
        remedy = "one index for each"
        if alike:
            remedy = "targets.argmax(1) of one-hot targets, or targets.float()"
        elif targets.shape[1:] == (1, *outputs.shape[2:]):
            remedy = "targets.squeeze(1)"
        msg = (
            f"{spec.name} takes class indices of shape [{', '.join(wanted)}] for outputs "
            f"[B, C, ...]; {said}: pass {remedy}"
        )
        raise InvalidSpec(msg, targets=targets.shape, outputs=outputs.shape)
    _check_range(spec, outputs.shape[axis], len(outputs), targets)


def _check_range(spec: LossSpec, classes: int, points: int, targets: Tensor) -> None:
    """Refuse an index of a class that the outputs do not have."""
    ignored = _IGNORED if spec.ignore_index is None else spec.ignore_index
    counted = targets[targets != ignored]
    outside = counted[(counted < 0) | (counted >= classes)]
    if len(outside):
        joined = ""
        if classes == points:
            joined = (
                f"; if the outputs compare the {points} data points of the mini-batch with "
                "each other, they are no function of single data points, and there is no "
                "session of such a module"
            )
        msg = (
            f"the outputs have {classes} classes, so class indices are 0 to "
            f"{classes - 1} (and {ignored} for targets that do not count); the targets "
            f"have {int(outside[0])}: subtract the smallest if they begin at 1, or give "
            f"the module an output for each class{joined}"
        )
        raise InvalidSpec(msg, target=int(outside[0]), classes=classes)


def _class_axis(outputs: Tensor, targets: Tensor) -> int | None:
    """Find the axis of the classes; None if there is none that fits the targets."""
    rest = targets.shape[1:]
    if outputs.dim() > 1 and outputs.shape[2:] == rest:
        return 1
    return (
        outputs.dim() - 1 if outputs.dim() > 1 and outputs.shape[1:-1] == rest else None
    )


def kind_of(tensor: Tensor, first: str = "N") -> str:
    """Say a tensor's type and shape.

    Args:
        tensor: The tensor.
        first: What stands for its leading axis.

    Returns:
        Such as ``float32 [N, 3]``.
    """
    return f"{str(tensor.dtype).removeprefix('torch.')} {_shape(tensor, first)}"


def _shape(tensor: Tensor, first: str) -> str:
    sizes = [first, *map(str, tensor.shape[1:])] if tensor.dim() else []
    return f"[{', '.join(sizes)}]"
