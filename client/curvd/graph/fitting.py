"""Whether module, data and loss fit one another, said in the caller's words.

torch says what an operator was given; a caller wants to know which argument that was.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TopLevelTracedModule
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from curvd.contract import LossName, LossSpec, Mode
from curvd.errors import CurvdError, InvalidGraph, InvalidSpec
from curvd.graph.examples import few
from curvd.graph.manifest import inputs_of
from curvd.graph.statistics import in_mode

_IGNORED = -100
"""The class index that torch's losses count for nothing unless they are told another."""

_OF_INPUTS = (RuntimeError, IndexError, TypeError, ValueError)
"""What layers raise that get other inputs than they take; subclasses say more."""


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


def check_surroundings() -> None:
    """Refuse states of torch that change what operators compute, unseen by a trace.

    Raises:
        InvalidSpec: With the block to leave.
    """
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            msg = (
                f"torch.autocast is on for {kind}, and a session computes in one type: "
                "leave its block, or put this call under torch.autocast(enabled=False)"
            )
            raise InvalidSpec(msg, autocast=kind)
    modes = _get_current_dispatch_mode_stack()
    if modes:
        what = type(modes[-1]).__name__
        msg = (
            f"{what} is in force, which may change what operators return, and which no "
            "server has: leave its block"
        )
        raise InvalidSpec(msg, mode=what)
    if torch.is_inference_mode_enabled():
        msg = "torch.inference_mode is on, where nothing has a derivative: leave its block"
        raise InvalidSpec(msg, mode="inference_mode")
    if torch.get_default_device().type == "meta":
        msg = (
            "torch's default device is meta, where tensors have no values: call "
            "torch.set_default_device(None) before"
        )
        raise InvalidSpec(msg, device="meta")


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
            f"{_kind(targets)}: pass targets.float()"
        )
        raise InvalidSpec(msg, targets=targets.dtype)


def _check_classes(spec: LossSpec, outputs: Tensor, targets: Tensor) -> None:
    said = f"the targets are {_kind(targets)}, the outputs {_kind(outputs, 'B')}"
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


_DECODER = "decoder_input_ids"
"""What T5 and its like call what their decoder reads."""


@contextlib.contextmanager
def explained(
    module: nn.Module, inputs: Any, mode: Mode | None, targets: Any = None
) -> Iterator[None]:
    """Say of a module that cannot be traced that it does not run, if it does not.

    Args:
        module: The model.
        inputs: The inputs, as for `curvd.export`.
        mode: Whose statistics BatchNorm uses; None: the running ones.
        targets: The targets, if there are any: perhaps they are the inputs.

    Raises:
        InvalidSpec: If the module does not take these inputs.
    """
    try:
        yield
    except InvalidGraph as error:
        # What torch failed at, a module that does not run explains.
        failed = "failed" in error.metadata
        better = misfit(module, inputs, mode, targets) if failed else None
        if better is None:
            raise
        raise better from error


def misfit(
    module: nn.Module, inputs: Any, mode: Mode | None, targets: Any = None
) -> InvalidSpec | None:
    """Tell why a module that cannot be traced does not take its inputs.

    Args:
        module: The model.
        inputs: The inputs, as for `curvd.export`.
        mode: Whose statistics BatchNorm uses; None: the running ones.
        targets: The targets, if there are any: perhaps they are the inputs.

    Returns:
        The layer at which it fails, and what that was given; None if it runs, so that
        tracing is to blame.
    """
    if any(is_lazy(p) for p in module.parameters()):
        return None  # running it would make them
    entered: list[tuple[str, nn.Module, str]] = []
    error = _failing(module, inputs, mode, entered)
    if error is None or type(error) not in _OF_INPUTS:
        return None
    first = str(error).strip().partition("\n")[0][:300]
    name, layer, given = entered[-1] if entered else ("", module, "")
    where = f"its layer {name!r}, {_own(layer)}," if name else f"{_own(layer)}"
    why = f"the module does not take these inputs: {where} fails on {given or 'them'}"
    cast = _cast_that_fits(module, inputs, mode)
    remedy = cast or _remedy(module, layer, inputs, error)
    swapped = isinstance(targets, Tensor) and not cast
    if swapped and _failing(module, targets, mode, []) is None:
        remedy = "it takes the targets: data is (inputs, targets), are they swapped?"
    return InvalidSpec(f"{why}; {remedy} (torch: {first})", layer=name)


def _cast_that_fits(module: nn.Module, inputs: Any, mode: Mode | None) -> str | None:
    """Find the type of the inputs with which a module runs, if that is what it misses."""
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    short = str(own).removeprefix("torch.")
    real = f"the module's parameters are {short}: pass inputs.to(torch.{short})"
    whole = "it takes integers as int64: pass inputs.long()"
    for remedy, reals, integers in (
        (real, own, None),
        (real, own, own),
        (whole, None, torch.int64),
        (whole, torch.int64, torch.int64),
    ):
        cast = _cast(inputs, reals, integers)
        if cast is not None and _failing(module, cast, mode, []) is None:
            return remedy
    return None


def _cast(
    inputs: Any, reals: torch.dtype | None, integers: torch.dtype | None
) -> Any | None:
    """Give tensors of inputs other types; None where that changes nothing, or values."""
    leaves, structure = pytree.tree_flatten(few(inputs))
    cast = []
    for leaf in leaves:
        tensor = isinstance(leaf, Tensor) and not leaf.is_complex()
        dtype = None
        if tensor:
            dtype = reals if leaf.is_floating_point() else integers
        cast.append(leaf if dtype is None else leaf.to(dtype))
        if tensor and dtype is torch.int64 and (cast[-1] != leaf).any():
            return None  # numbers that are no indices
    if all(new is old for new, old in zip(cast, leaves, strict=True)):
        return None
    return pytree.tree_unflatten(cast, structure)


def _failing(
    module: nn.Module,
    inputs: Any,
    mode: Mode | None,
    entered: list[tuple[str, nn.Module, str]],
) -> Exception | None:
    """Run a module on a few data points, and note which layers were not left."""
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        rows = inputs_of(module.forward, few(inputs))
        with in_mode(module, mode or Mode.EVAL), _noted(module, entered):
            arguments = rows.args, dict(rows.kwargs)
            torch.func.functional_call(module, state, *arguments)
    except CurvdError:
        return None  # has been said already, in better words
    except Exception as error:  # of the module's own code
        return error
    return None


@contextlib.contextmanager
def _noted(
    module: nn.Module, entered: list[tuple[str, nn.Module, str]]
) -> Iterator[None]:
    """Keep the layers that are being called on a list, the innermost last."""

    def enter(name: str) -> Any:
        return lambda layer, args, kwargs: entered.append((
            name,
            layer,
            ", ".join(
                _kind(value, "B")
                for value in (*args, *kwargs.values())
                if isinstance(value, Tensor)
            ),
        ))

    def leave(*called: Any) -> None:
        entered.pop()

    with contextlib.ExitStack() as hooks:
        for name, layer in module.named_modules():
            before = layer.register_forward_pre_hook(enter(name), with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(layer.register_forward_hook(leave).remove)
        yield


def _remedy(module: nn.Module, layer: nn.Module, inputs: Any, error: Exception) -> str:
    """Say what a layer takes, as far as its kind tells."""
    if "nference tensor" in str(error):
        return (
            "its forward enters torch.inference_mode(), which cuts gradients: remove it"
        )
    for attribute, axis in (("in_features", "..., "), ("in_channels", "B, ")):
        size = getattr(layer, attribute, None)
        if size is not None:
            more = ", ..." if attribute == "in_channels" else ""
            return f"it takes [{axis}{size}{more}]: give inputs of that width"
    if isinstance(layer, nn.Embedding):
        return (
            f"it takes integers from 0 to {layer.num_embeddings - 1}: pass indices, "
            "as int64"
        )
    if _DECODER in _left_out(module, inputs):
        return (
            f"an encoder with a decoder takes {_DECODER!r}, too, which it makes of labels "
            "alone, and labels are no inputs here: give inputs as "
            f'{{"input_ids": ..., "{_DECODER}": ...}}, the labels moved by one position'
        )
    return "give what module(inputs) takes for a mini-batch"


def _left_out(module: nn.Module, inputs: Any) -> set[str]:
    """Name the arguments of a module's forward that inputs do not give."""
    names = list(inspect.signature(module.forward).parameters)
    if isinstance(inputs, Mapping):
        return {*names} - {str(name) for name in inputs}
    return {*names[len(inputs) if isinstance(inputs, tuple | list) else 1 :]}


def _own(layer: nn.Module) -> str:
    """Show a layer in one line."""
    text = repr(layer)
    return text if "\n" not in text and len(text) < 80 else type(layer).__name__


def _kind(tensor: Tensor, first: str = "N") -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {_shape(tensor, first)}"


def _shape(tensor: Tensor, first: str) -> str:
    sizes = [first, *map(str, tensor.shape[1:])] if tensor.dim() else []
    return f"[{', '.join(sizes)}]"
