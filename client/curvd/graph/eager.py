"""A module as its owner trains it: run on a few rows, differentiated by ``.backward()``.

Nothing of the caller's is changed: a copy runs, in float64 where it can, and where only
the module itself can run, its gradients, buffers and random numbers are put back.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvd.errors import InvalidGraph
from curvd.graph.looking import Looking, floating
from curvd.graph.manifest import Inputs
from curvd.graph.seen import Seen, leaves, watched

LARGE = 1 << 27
"""Elements of a module above which no copy in float64 is made: it would be 1 GiB."""


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
    types: Set[torch.dtype]
    """Those whose digits count; see `Digits`."""
    seen: Seen = field(default_factory=lambda: Seen([]))
    """What may make gradients of its own."""
    operands: Set[int] = frozenset()
    """Identities of what operators took when it was run last."""
    strangers: list[Tensor] = field(default_factory=list)
    """What the last gradients reached beside parameters, buffers and inputs."""

    def outputs(self) -> Tensor:
        """Run it."""
        digits = Digits(self.narrowest, self.types)
        with torch.enable_grad(), digits:
            args = (self.inputs.args, dict(self.inputs.kwargs))
            result: Tensor = self.module(*args)
        self.narrowest, self.operands = digits.narrowest, digits.operands
        return result

    def loss(
        self,
        eager: Callable[[Tensor, Tensor], Tensor],
        outputs: Tensor,
        targets: Tensor,
        types: Set[torch.dtype],
    ) -> Tensor:
        """Apply a loss; one that insists on the module's own type, or its caller's, gets that.

        Args:
            eager: The loss.
            outputs: Of the module.
            targets: As the caller has them.
            types: Those that count beside the graph's.

        Returns:
            One number.
        """
        own = outputs.to(self.own)
        ways = (
            (outputs, alike(targets, outputs)),
            (own, alike(targets, own)),
            (own, targets),
        )
        for last, (z, y) in zip((False, False, True), ways, strict=True):
            fewest = max((self.narrowest, z.dtype), key=lambda t: torch.finfo(t).eps)
            digits = Digits(fewest, self.types | types)
            try:
                with torch.enable_grad(), digits:
                    result = eager(z, y)
                mixed = z is not outputs or digits.narrowest is not z.dtype
                if mixed and result.requires_grad:
                    torch.autograd.grad(result, z, retain_graph=True)
                break
            except RuntimeError:  # of two types that it does not mix, there or back
                if last:
                    raise
        self.narrowest = digits.narrowest
        return result

    def gradients(self, outputs: Tensor, cotangent: Tensor) -> dict[str, Tensor | None]:
        """Differentiate as a training loop does, and take what is found.

        Args:
            outputs: The outputs, from `outputs`; can be differentiated again.
            cotangent: What it is multiplied by: a scalar's is one.

        Returns:
            The gradient of each trained parameter, under each of its names; None where
            there is none.
        """
        named = dict(self.module.named_parameters(remove_duplicate=False))
        trained = {n: p for n, p in named.items() if p.requires_grad}
        given = pytree.tree_leaves((self.inputs.args, dict(self.inputs.kwargs)))
        own = {id(t) for t in (*named.values(), *self.module.buffers(), *given)}
        strange = [(t, t.grad) for t in leaves(outputs) if id(t) not in own]
        for leaf in (*trained.values(), *(t for t, _ in strange)):
            leaf.grad = None
        try:
            torch.autograd.backward(outputs, cotangent, retain_graph=True)
        except Exception as error:  # of a hook, or of a backward of its own
            what = "fails in .backward()"
            raise failure(what, error) from error
        found = {
            n: None if p.grad is None else _dense(p.grad) for n, p in trained.items()
        }
        self.strangers = [t for t, _ in strange if t.grad is not None and t.grad.any()]
        for leaf, before in strange:
            leaf.grad = before
        for parameter in trained.values():
            parameter.grad = None
        return found


def _dense(gradient: Tensor) -> Tensor:
    """Copy a gradient; that of a table may be sparse."""
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().clone()


@contextlib.contextmanager
def runs(
    wrapper: nn.Module,
    rows: Inputs,
    kinds: Sequence[torch.dtype],
    types: Set[torch.dtype],
) -> Iterator[tuple[Run, Tensor]]:
    """Find a way to run a module, and run it once.

    Args:
        wrapper: Calls the module; returns one tensor.
        rows: What with.
        kinds: What a copy may compute in, best first; the last is the module's type.
        types: Those that the graph computes in.

    Yields:
        The run, and its outputs.

    Raises:
        InvalidGraph: If it cannot be run.
    """
    own, dtype = {id(p) for p in wrapper.parameters()}, kinds[-1]
    with _undisturbed(rows), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in dict.fromkeys(kinds):
            found = _copied(wrapper, rows, kind, dtype, types)
            # A function that holds the module itself does not run on its copy.
            if found is not None and not own & found[0].operands:
                if found[1].requires_grad:
                    yield found
                    return
        with _restored(wrapper):
            run = Run(wrapper, rows, dtype, dtype, False, dtype, types)
            try:
                with watched(wrapper) as run.seen:
                    outputs = run.outputs()
            except Exception as error:
                what = f"fails when it is called with {len(rows.leaves[0])} data points"
                raise failure(what, error) from error
            yield run, outputs


def alike(targets: Tensor, outputs: Tensor) -> Tensor:
    """Give targets that are numbers the type of the outputs."""
    return targets.to(outputs.dtype) if targets.is_floating_point() else targets


def failure(what: str, error: Exception) -> InvalidGraph:
    """Say that a module cannot be compared with its graph."""
    first = str(error).strip().partition("\n")[0][:300]
    msg = f"the module was exported, but {what}: {type(error).__name__}: {first}"
    return InvalidGraph(msg, failed="run")


def _copied(
    wrapper: nn.Module,
    rows: Inputs,
    dtype: torch.dtype,
    own: torch.dtype,
    types: Set[torch.dtype],
) -> tuple[Run, Tensor] | None:
    """Run a copy; None if there is none that runs."""
    if sum(t.numel() for t in wrapper.parameters()) > LARGE:
        return None
    try:
        twin: Any = copy.deepcopy(wrapper)
        twin._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
        _take_along(wrapper, twin)
        wide = widened(rows, dtype)
        run = Run(twin, wide, dtype, own, True, dtype, types)
        with watched(twin) as run.seen:
            return run, run.outputs()
    except Exception:  # of the module's own code: another way is tried
        return None


def _take_along(wrapper: nn.Module, twin: nn.Module) -> None:
    """Give the tensors of a copy what copying drops: their models' hooks and attributes."""
    others = dict(twin.named_buffers(remove_duplicate=False))
    for name, buffer in wrapper.named_buffers(remove_duplicate=False):
        vars(others[name]).update(vars(buffer))
    copies = dict(twin.named_parameters(remove_duplicate=False))
    for name, parameter in wrapper.named_parameters(remove_duplicate=False):
        vars(copies[name]).update(vars(parameter))
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


class Digits(Looking):  # type: ignore[no-untyped-call]
    """Finds the floating point type with the fewest digits of a computation.

    Args:
        narrowest: The type to begin with.
        types: Those that count: those of the graph. Others lie beside the computation,
            as the copies do that are kept for a backward pass.
    """

    def __init__(self, narrowest: torch.dtype, types: Set[torch.dtype]) -> None:
        super().__init__()
        self.narrowest, self._types = narrowest, types
        self.operands: set[int] = set()
        """Identities of all that operators took."""

    def look(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> Any:
        """Note what it took, and its type, if it has fewer digits."""
        self.operands.update(map(id, args))
        for leaf in floating(result):
            if leaf.dtype in self._types:
                if torch.finfo(leaf.dtype).eps > torch.finfo(self.narrowest).eps:
                    self.narrowest = leaf.dtype
        return result
