"""Why a module does not take its inputs, where it cannot be traced.

It is run on a few data points: the layer at which it fails, what that was given, and a type
with which it would run say more than what torch raises.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from curvd.contract import Mode
from curvd.errors import CurvdError, GradientMismatch, InvalidGraph, InvalidSpec
from curvd.graph.examples import few
from curvd.graph.fitting import kind_of
from curvd.graph.manifest import inputs_of
from curvd.graph.mixed import said, types_of
from curvd.graph.statistics import in_mode

_OF_INPUTS = (RuntimeError, IndexError, TypeError, ValueError)
"""What layers raise that get other inputs than they take; subclasses say more."""
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


@contextlib.contextmanager
def of_one_type(module: nn.Module) -> Iterator[None]:
    """Say of a module that fails, and has parameters of several types, that this is why.

    Args:
        module: The model.

    Raises:
        InvalidGraph: If it has.
    """
    try:
        yield
    except (InvalidGraph, GradientMismatch, RuntimeError) as error:
        types = types_of(module)
        if len(types) < 2:
            raise
        why = str(error).strip().partition("\n")[0][:200]
        msg = (
            f"the module's parameters have several types ({said(types)}), and a graph has "
            "one: give all of them one, as copy.deepcopy(module).float() does, and leave "
            f"casts out of forward ({why}). session_for(…, dtype='float32') does it by itself"
        )
        raise InvalidGraph(msg, types=len(types)) from error


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
        with in_mode(module, mode), _noted(module, entered):
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
                kind_of(value, "B")
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
