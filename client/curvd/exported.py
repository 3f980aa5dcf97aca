"""Any module as a graph that a server can check and run; needs ``curvd[torch]``.

Importing this costs nothing: torch is imported when something is exported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from curvd.contract import Dtype, LossSpec, Mode, Normaliser, Output, member
from curvd.errors import CurvdError, InvalidGraph, InvalidSpec, missing
from curvd.graph.garbage import full_collections
from curvd.v1 import graph_pb2 as graph_pb

if TYPE_CHECKING:
    from torch import Tensor, nn

    from curvd.graph.mixed import Types
    from curvd.graph.origins import Origin, Traced

P = ParamSpec("P")
T = TypeVar("T")

_turn = threading.RLock()


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A module as data: what `Client.register_model` takes instead of a builder."""

    graph: graph_pb.Graph = field(repr=False)
    state: Mapping[str, Any] = field(repr=False)
    """Tensors by the names that they go by, constants of the code included."""
    mode: Mode
    """What a session of it needs: batch statistics if BatchNorm was training."""
    parameters: tuple[str, ...]
    """Names of those that are differentiated, in order."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(i.name for i in self.graph.inputs)


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a session of a module needs; see `Client.session_for`."""

    model: ExportedModel
    data: Mapping[str, Any]
    """The dataset's tensors by name."""
    target: str
    """The target's name."""
    loss: LossSpec | Mapping[str, Any] | str
    dtype: Dtype
    """What the module computes in."""
    batch_size: int
    """``B``."""
    origin: Origin
    """The module as it was, for updates that are given the module itself."""


@functools.cache
def _renewed_in_children() -> None:
    """Have forked children begin with nobody exporting."""

    def renew() -> None:
        global _turn
        _turn = threading.RLock()

    os.register_at_fork(after_in_child=renew)


def _one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Let threads export one after the other, and have failures say what failed.

    torch's tracers patch what all threads share. Full collections of garbage wait.
    """

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        _renewed_in_children()
        with _turn, full_collections.later():
            try:
                return function(*args, **kwargs)
            except (CurvdError, ImportError):
                raise
            except Exception as error:  # of the caller's code, or torch's
                first = str(error).strip().partition("\n")[0][:300]
                msg = (
                    "torch fails on this module, loss or data, which do not fit one "
                    f"another or cannot be traced: {type(error).__name__}: {first}"
                )
                raise InvalidGraph(msg) from error

    return alone


@_one_at_a_time
def export(
    module: nn.Module,
    inputs: Any,
    *,
    output: Output = None,
    mode: Mode | str | None = None,
    check: bool = True,
) -> ExportedModel:
    """Write a module as a graph of operators, with its tensors.

    The module is traced with a few of the given data points; the size of the mini-batch
    stays open, every other size is fixed. Call ``module.eval()`` before, or say which
    statistics BatchNorm is to use.

    Args:
        module: Anything that torch.export traces: no branches on values, no chance.
        inputs: What it is called with: a tensor, a tuple of arguments, or a mapping of
            keyword arguments, such as a tokenizer's batch; each has the leading axis N.
            Arrays of NumPy become tensors of the module's type. The server binds a
            dataset's tensors by order, or by these names.
        output: Which of its results, by name or index, [B, ...]. None: ``logits`` if
            there is such a field, else the first tensor. Several, in a list, or all of
            them, ``...``, are laid side by side, [B, S]; see `Client.session_for`.
        mode: ``eval``: BatchNorm uses the running statistics; ``batch_statistics``: the
            mini-batch's, but for layers that are frozen beside others that train. None:
            the running ones, and a layer in training mode is refused.
        check: Whether to prove on a few of the data points, those that differ most among
            them, that the graph has the module's outputs and gradients, as
            ``.backward()`` computes them. It costs
            at most one gradient over a few dozen data points, and memory for a copy of
            the module in float64.

    Returns:
        The model.

    Raises:
        InvalidGraph: If it cannot be written as a graph.
        InvalidSpec: If the output has no batch axis, or nobody chose a mode.
        GradientMismatch: If ``.backward()`` computes something else than the derivative
            of what was exported.
        ModuleNotFoundError: If torch is not installed.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU()).eval()
        >>> exported = curvd.export(net, torch.randn(10, 4))
        >>> exported.inputs, exported.parameters
        (('input',), ('0.weight', '0.bias'))
        >>> model = client.register_model(exported)
        >>> [tensor.name for tensor in model.tensors]
        ['0.weight', '0.bias']
    """
    _need_torch()
    from curvd.graph.data import tensors_of
    from curvd.graph.fitting import check_module
    from curvd.graph.itself import check_itself
    from curvd.graph.manifest import check_closures
    from curvd.graph.misfits import explained, of_one_type
    from curvd.graph.prepare import prove_module
    from curvd.graph.surroundings import check_surroundings
    from curvd.graph.twins import apart

    check_surroundings()
    check_module(module)
    inputs, chosen = tensors_of(inputs, module), _chosen(mode)

    def made(module: nn.Module) -> ExportedModel:
        with of_one_type(module):
            model = _captured(module, inputs, output, chosen)
            if not check:
                check_closures(model.graph)
            else:
                graph, state = model.graph, model.state
                with explained(module, inputs, chosen):
                    prove_module(module, inputs, output, chosen, graph, state)
        return model

    def compare(module: nn.Module, twin: nn.Module) -> None:
        check_itself(module, twin, inputs, output, chosen)

    return apart(module, made, compare if check else None)


def _captured(
    module: nn.Module,
    inputs: Any,
    output: Output,
    mode: Mode | None,
    targets: Any = None,
    types: Types | None = None,
) -> ExportedModel:
    from curvd.graph.capture import capture
    from curvd.graph.misfits import explained

    with explained(module, inputs, mode, targets):
        graph, state, needed = capture(module, inputs, output, mode)
    if types is not None:
        graph, state = types.graph(graph, state)
    parameters = tuple(
        tensor.names[0]
        for tensor in graph.tensors
        if tensor.role == graph_pb.GRAPH_TENSOR_ROLE_PARAMETER
    )
    return ExportedModel(graph, state, needed, parameters)


def _chosen(mode: Mode | str | None) -> Mode | None:
    return None if mode is None else member(Mode, mode, "mode")


@_one_at_a_time
def export_loss(
    loss: Callable[[Tensor, Tensor], Any],
    outputs: Tensor,
    targets: Tensor,
    *,
    normaliser: Normaliser = "points",
    check: bool = True,
) -> LossSpec:
    """Write a loss of your own as a graph: ``loss=`` of `Client.create_session`.

    The objective is over the whole dataset, so a loss must say what it is divided by:

    * ``points``: it returns the mean over a mini-batch's data points; the objective is
      the mean over all of them.
    * ``sum``: it returns the sum over a mini-batch; the objective is the sum.
    * ``counted``: it returns a pair, the sum over a mini-batch and its weight (unmasked
      tokens, for example), which depends on the targets only; the objective is the sum
      of all sums divided by the sum of all weights.

    Args:
        loss: A function of outputs and targets, or a module, whose own parameters and
            buffers become constants, at most 64 KiB.
        outputs: Example outputs of the model, [B, ...].
        targets: Example targets, [B, ...].
        normaliser: One of the three; it is checked on the example.
        check: Whether to prove on the example that the graph has the loss's value and
            gradient.

    Returns:
        The loss.

    Raises:
        InvalidSpec: If there is no such normaliser, or the loss holds parameters of a
            model.
        GradientMismatch: If ``.backward()`` computes something else than the derivative
            of what was exported.
        ModuleNotFoundError: If torch is not installed.

    Examples:
        >>> import torch
        >>> def huber(outputs, targets):
        ...     return torch.nn.functional.huber_loss(outputs, targets, delta=0.5)
        >>> loss = curvd.export_loss(huber, torch.randn(10, 3), torch.randn(10, 3))
        >>> loss.name
        <LossName.CUSTOM: 'custom'>
    """
    if normaliser not in ("points", "sum", "counted"):
        msg = f"unknown normaliser {normaliser!r}; known: points, sum, counted"
        raise InvalidSpec(msg, normaliser=normaliser)
    _need_torch()
    from curvd.graph.losses import capture_loss
    from curvd.graph.surroundings import check_surroundings

    check_surroundings()
    return capture_loss(loss, outputs, targets, normaliser, check=check)


@_one_at_a_time
def prepare(
    module: nn.Module,
    loss: Any,
    data: Any,
    output: Output,
    mode: Mode | str | None,
    *,
    batch_size: int | None,
    dtype: Dtype | None = None,
    check: bool,
) -> Prepared:
    """Export all that a session of a module needs.

    Args:
        module: The model.
        loss: A specification, a loss of torch, or a function; None: the module's own.
        data: Inputs and targets, in whatever way `curvd.graph.data` reads.
        output: Which of the module's results the loss takes.
        mode: The mode, as for `export`.
        batch_size: The batch size of the session; None: that of the data.
        dtype: What the session is to compute in; None: the module's type.
        check: Whether to prove that the graphs are module and loss.

    Returns:
        What is to be registered.

    Raises:
        InvalidSpec: If `data` has no targets or no batch size, if module, loss and data
            do not fit one another, the module is in half precision, or has parameters that
            `dtype` does not hold.
        ModuleNotFoundError: If torch is not installed.
    """
    _need_torch()
    from curvd.graph.data import opened
    from curvd.graph.fitting import (
        check_lengths,
        check_loss,
        check_module,
    )
    from curvd.graph.itself import check_itself
    from curvd.graph.loss_origin import LossOrigin
    from curvd.graph.losses import recognised
    from curvd.graph.manifest import check_closures
    from curvd.graph.misfits import explained
    from curvd.graph.mixed import mixed
    from curvd.graph.origins import Origin
    from curvd.graph.own_loss import own_loss
    from curvd.graph.packing import OfSeveral, is_several, packed
    from curvd.graph.prepare import example_outputs, leaves_of, prove_module
    from curvd.graph.surroundings import check_surroundings
    from curvd.graph.twins import apart

    check_surroundings()
    check_module(module)
    is_own = not isinstance(loss, str | Mapping | LossSpec | None)
    if is_own:
        check_loss(loss)
    types = mixed(module, dtype)
    held = opened(data, module)
    inputs, targets = held.inputs, held.targets
    size = batch_size if batch_size is not None else held.batch_size
    if size is None:
        msg = (
            f"data that comes whole, here a {type(data).__name__}, needs batch_size=; a "
            "DataLoader or an iterable of mini-batches has one of its own"
        )
        raise InvalidSpec(msg)
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        msg = f"batch_size must be a whole number, at least 1, got {size!r}"
        raise InvalidSpec(msg, batch_size=size)
    check_lengths(leaves_of(inputs), targets)
    chosen = _chosen(mode)
    origin = Origin(module, _like(inputs, output, chosen, types))

    def made(module: nn.Module) -> tuple[ExportedModel, LossSpec, Any]:
        model = _captured(module, inputs, output, chosen, targets, types)
        spec, known, aims = loss, None, targets
        if loss is None:
            spec, aims = own_loss(module, inputs, targets, output, chosen)
        elif is_own:
            with explained(module, inputs, chosen, targets):
                outputs = example_outputs(module, inputs, output, chosen)
            applied = loss
            several = is_several(output)
            origin.loss = LossOrigin(loss, outputs, targets, is_several=several)
            if several:
                applied, outputs = OfSeveral(loss, outputs), packed(outputs)
            spec = recognised(applied, outputs, targets, model=module, check=check)
            known = applied, spec, targets
        if not check:
            check_closures(model.graph)
        else:
            graph, state = model.graph, model.state
            prove_module(
                module, inputs, output, chosen, graph, state, known, size, types
            )
        return model, spec, aims

    def compare(module: nn.Module, twin: nn.Module) -> None:
        check_itself(module, twin, inputs, output, chosen)

    model, spec, targets = apart(module, made, compare if check else None)
    target = next(n for n in ("target", "targets", "y_target") if n not in model.inputs)
    leaves = dict(zip(model.inputs, leaves_of(inputs), strict=True))
    origin.exported(model.graph, model.state)
    kind = dtype or member(Dtype, model.graph.dtype, "dtype")
    data = {**leaves, target: targets}
    if types is not None:
        data = types.values(data)
    return Prepared(model, data, target, spec, kind, size, origin)


def _like(
    inputs: Any, output: Output, mode: Mode | None, types: Types | None
) -> Callable[[nn.Module, bool], Traced]:
    """Make what exports a module again, with the same examples."""
    from curvd.graph.examples import few
    from curvd.graph.prepare import prove_module

    examples = few(inputs)

    @_one_at_a_time
    def traced(module: nn.Module, prove: bool) -> Traced:
        model = _captured(module, examples, output, mode, types=types)
        graph, state = model.graph, model.state
        if prove:
            prove_module(module, examples, output, mode, graph, state, types=types)
        return graph, state

    return traced


def named(
    data: Any, inputs: Sequence[str], target: str
) -> Mapping[str, Any] | str | os.PathLike[str]:
    """Give the tensors of a dataset their names.

    Args:
        data: Arrays by name, or the path of a file, which is what it is; a loader, a data
            set, a pair or an iterable of mini-batches, as for `Client.session_for`.
        inputs: Names of the inputs, in order.
        target: Name of the target.

    Returns:
        The tensors by name, or the path.

    Raises:
        InvalidSpec: If there are more names than inputs, or fewer.
        ModuleNotFoundError: If torch is needed and not installed.
    """
    if isinstance(data, Mapping | str | os.PathLike):
        return data
    _need_torch()
    from curvd.graph.data import by_name

    return by_name(data, tuple(inputs), target)


def _need_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise missing(what="exporting a module", module="torch", extra="torch")
