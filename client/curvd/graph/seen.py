"""What gives a module gradients of its own: hooks, and functions with a backward."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules import module as torch_module

from curvd.graph.checkpoints import plain_checkpoints, watched_checkpoints

_INSIDE = ("BackwardHookFunction", "CheckpointFunction")
"""Functions of torch's own that are written in Python."""


@dataclass
class Seen:
    """What was seen while a module ran."""

    hooks: list[str]
    """Hooks on gradients."""
    cut: bool = False
    """Whether a reentrant checkpoint was called without an input that requires one."""


@contextlib.contextmanager
def watched(module: nn.Module) -> Iterator[Seen]:
    """Note what makes gradients of its own while a module runs.

    Args:
        module: The module.

    Yields:
        What was seen; complete when the context ends.
    """
    seen = Seen(standing_hooks(module))
    original: Any = Tensor.register_hook

    def registering(tensor: Tensor, hook: Callable[..., Any]) -> Any:
        frame = sys._getframe(1)
        where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        seen.hooks.append(f"a hook on a tensor ({where} in {frame.f_code.co_name})")
        return original(tensor, hook)

    Tensor.register_hook = registering  # type: ignore[method-assign]
    try:
        with watched_checkpoints() as is_cut:
            yield seen
            seen.cut = is_cut()
    finally:
        Tensor.register_hook = original  # type: ignore[method-assign]


def standing_hooks(module: nn.Module) -> list[str]:
    """Name the hooks on gradients that a module has before it runs."""
    found = []
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        found.append("a backward hook of all modules (register_module_full_backward_…)")
    for name, layer in module.named_modules():
        if layer._backward_hooks or layer._backward_pre_hooks:
            found.append(f"a backward hook of {shown(name)}")
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            found.append(f"a hook on the parameter {shown(name)}")
    return found


def functions_in(outputs: Tensor, again: Callable[[], Tensor]) -> list[str]:
    """Name the functions with a backward of their own that outputs went through.

    Args:
        outputs: The outputs of a module.
        again: Makes them once more.

    Returns:
        Their names.
    """
    names = {_name(node): None for node in nodes(outputs) if _is_python(node)}
    if "CheckpointFunction" in names:
        # What is inside shows only if the checkpoint steps aside.
        with contextlib.suppress(Exception), plain_checkpoints():
            names |= {_name(n): None for n in nodes(again()) if _is_python(n)}
    return [name for name in names if name not in _INSIDE]


def _is_python(node: Any) -> bool:
    return isinstance(node, BackwardCFunction)


def _name(node: Any) -> str:
    return type(node).__name__.removesuffix("Backward")


def nodes(outputs: Tensor) -> Iterator[Any]:
    """Walk through the functions that a tensor was made by."""
    stack, seen = [outputs.grad_fn], set[Any]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [following for following, _ in node.next_functions]


def leaves(outputs: Tensor) -> list[Tensor]:
    """List the tensors for which a backward pass would leave gradients."""
    return [node.variable for node in nodes(outputs) if hasattr(node, "variable")]


def shown(name: str) -> str:
    """Name a tensor or layer of a wrapped module as its owner does."""
    return name.removeprefix("module.") or "the module"
