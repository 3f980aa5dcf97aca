"""A module as its owner trains it: run on a few rows, differentiated by ``.backward()``.

Nothing of the caller's is changed: a copy runs, in float64 where it can, and where only
the module itself can run, its gradients, buffers and random numbers are put back.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from curvd.errors import InvalidGraph
from curvd.graph.checkpoints import plain_checkpoints, watched_checkpoints
from curvd.graph.manifest import Inputs

LARGE = 1 << 27
"""Elements of a module above which no copy in float64 is made: it would be 1 GiB."""

_INSIDE = ("BackwardHookFunction", "CheckpointFunction")
"""Functions of torch's own that are written in Python."""


@dataclass
class Run:
    """A module, ready to be run as often as is wanted."""

    module: nn.Module
    inputs: Inputs
    dtype: torch.dtype
    """What it computes in, unless it says otherwise itself."""
    own: torch.dtype
    """What its owner runs it in."""
    movable: bool
    """Whether it is a copy, whose parameters may be changed."""
    narrowest: torch.dtype
    """The type with the fewest digits among all that it computed."""
    hooks: list[str] = field(default_factory=list)
    """Hooks on gradients that were seen."""
    cut: bool = False
    """Whether a reentrant checkpoint was called without an input that requires one."""

    def outputs(self) -> Tensor:
        """Run it."""
        digits = Digits(self.narrowest)
        with torch.enable_grad(), digits:
            args = (self.inputs.args, dict(self.inputs.kwargs))
            result: Tensor = self.module(*args)
        self.narrowest = digits.narrowest
        return result

    def loss(self, eager: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
        """Apply a loss; one that insists on the module's own type gets that."""
        digits = Digits(self.narrowest)
        with torch.enable_grad(), digits:
            try:
                result = eager(outputs)
            except RuntimeError:  # of two types that it does not mix
                result = eager(outputs.to(self.own))
        self.narrowest = digits.narrowest
        return result

    def gradients(self, outputs: Tensor, cotangent: Tensor) -> dict[str, Tensor | None]:
        """Differentiate as a training loop does, and take what is found.

        Args:
            outputs: From `outputs`; can be differentiated again.
            cotangent: What it is multiplied by: a scalar's is one.

        Returns:
            The gradient of each trained parameter, under each of its names; None where
            there is none.
        """
        named = dict(self.module.named_parameters(remove_duplicate=False))
        trained = {n: p for n, p in named.items() if p.requires_grad}
        for parameter in trained.values():
            parameter.grad = None
        try:
            torch.autograd.backward(outputs, cotangent, retain_graph=True)
        except Exception as error:  # of a hook, or of a backward of its own
            what = "fails in .backward()"
            raise failure(what, error) from error
        found = {
            n: None if p.grad is None else p.grad.detach().clone()
            for n, p in trained.items()
        }
        for parameter in trained.values():
            parameter.grad = None
        return found


@contextlib.contextmanager
def runs(
    wrapper: nn.Module, rows: Inputs, dtype: torch.dtype
) -> Iterator[tuple[Run, Tensor]]:
    """Find a way to run a module, and run it once.

    Args:
        wrapper: Calls the module; returns one tensor.
        rows: What with.
        dtype: The module's floating point type.

    Yields:
        The run, and its outputs.

    Raises:
        InvalidGraph: If it cannot be run.
    """
    own = {id(p) for p in wrapper.parameters()}
    with _undisturbed(rows), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in dict.fromkeys((torch.float64, dtype)):
            found = _copied(wrapper, rows, kind, dtype)
            # A function that holds the module itself does not run on its copy.
            if found is not None and not own & {id(t) for t in leaves(found[1])}:
                if found[1].requires_grad:
                    yield found
                    return
        with _restored(wrapper):
            run = Run(wrapper, rows, dtype, dtype, movable=False, narrowest=dtype)
            try:
                with _watched(run):
                    outputs = run.outputs()
            except Exception as error:
                what = f"fails when it is called with {len(rows.leaves[0])} data points"
                raise failure(what, error) from error
            yield run, outputs


def failure(what: str, error: Exception) -> InvalidGraph:
    """Say that a module cannot be compared with its graph."""
    first = str(error).strip().partition("\n")[0][:300]
    msg = f"the module was exported, but {what}: {type(error).__name__}: {first}"
    return InvalidGraph(msg)


def _copied(
    wrapper: nn.Module, rows: Inputs, dtype: torch.dtype, own: torch.dtype
) -> tuple[Run, Tensor] | None:
    """Run a copy; None if there is none that runs."""
    if sum(t.numel() for t in wrapper.parameters()) > LARGE:
        return None
    try:
        twin: Any = copy.deepcopy(wrapper)
        twin._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
        _take_hooks(wrapper, twin)
        wide = widened(rows, dtype)
        run = Run(twin, wide, dtype, own, movable=True, narrowest=dtype)
        with _watched(run):
            return run, run.outputs()
    except Exception:  # of the module's own code: another way is tried
        return None


def _take_hooks(wrapper: nn.Module, twin: nn.Module) -> None:
    """Give the parameters of a copy the hooks of their models, which copying drops."""
    copies = dict(twin.named_parameters(remove_duplicate=False))
    for name, parameter in wrapper.named_parameters(remove_duplicate=False):
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(parameter, hooks, None):
                setattr(copies[name], hooks, getattr(parameter, hooks))


@contextlib.contextmanager
def _undisturbed(rows: Inputs) -> Iterator[None]:
    devices = {t.device.index for t in rows.leaves if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
        yield


@contextlib.contextmanager
def _restored(wrapper: nn.Module) -> Iterator[None]:
    """Put gradients and buffers back."""
    gradients = [(p, p.grad) for p in wrapper.parameters()]
    buffers = [(b, b.detach().clone()) for b in wrapper.buffers()]
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def _watched(run: Run) -> Iterator[None]:
    """Note what makes gradients of its own while a module runs."""
    run.hooks += standing_hooks(run.module)
    original: Any = Tensor.register_hook

    def registering(tensor: Tensor, hook: Callable[..., Any]) -> Any:
        frame = sys._getframe(1)
        where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        run.hooks.append(f"a hook on a tensor ({where} in {frame.f_code.co_name})")
        return original(tensor, hook)

    Tensor.register_hook = registering  # type: ignore[method-assign]
    try:
        with watched_checkpoints() as is_cut:
            yield
            run.cut = is_cut()
    finally:
        Tensor.register_hook = original  # type: ignore[method-assign]


def standing_hooks(module: nn.Module) -> list[str]:
    """Name the hooks on gradients that a module has before it runs."""
    found = []
    for name, layer in module.named_modules():
        if layer._backward_hooks or layer._backward_pre_hooks:
            found.append(f"a backward hook of {shown(name)}")
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            found.append(f"a hook on the parameter {shown(name)}")
    return found


def functions_in(run: Run, outputs: Tensor) -> list[str]:
    """Name the functions with a backward of their own that outputs went through.

    Args:
        run: What made them.
        outputs: They.

    Returns:
        Their names.
    """
    names = {_name(node): None for node in nodes(outputs) if _is_python(node)}
    if "CheckpointFunction" in names:
        # What is inside shows only if the checkpoint steps aside.
        with contextlib.suppress(Exception), plain_checkpoints():
            names |= {_name(n): None for n in nodes(run.outputs()) if _is_python(n)}
    return [name for name in names if name not in _INSIDE]


def _is_python(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


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


def widened(rows: Inputs, dtype: torch.dtype) -> Inputs:
    """Convert the floating point tensors of inputs."""
    return _mapped(rows, lambda leaf: leaf.detach().to(dtype))


def multiplied(rows: Inputs, factor: float) -> Inputs:
    """Multiply the floating point tensors of inputs."""
    return _mapped(rows, lambda leaf: leaf * factor)


def _mapped(rows: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    def applied(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return function(leaf) if floating else leaf

    args, kwargs = pytree.tree_map(applied, (rows.args, dict(rows.kwargs)))
    return Inputs(args, kwargs, rows.names, tuple(map(applied, rows.leaves)))


def shown(name: str) -> str:
    """Name a tensor or layer of a wrapped module as its owner does."""
    return name.removeprefix("module.") or "the module"


class Digits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the floating point type with the fewest digits of a computation.

    Args:
        narrowest: The type to begin with.
    """

    def __init__(self, narrowest: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.narrowest = narrowest

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operator, and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, tuple | list) else (result,):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                if torch.finfo(leaf.dtype).eps > torch.finfo(self.narrowest).eps:
                    self.narrowest = leaf.dtype
        return result
