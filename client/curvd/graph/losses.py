"""Losses: recognised by name where that is possible, else exported as graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvd.contract import (
    MAX_INLINE_BYTES,
    LossName,
    LossSpec,
    Normaliser,
    Reduction,
    SerializedGraph,
)
from curvd.errors import InvalidGraph, InvalidSpec
from curvd.graph.additive import is_additive, tried
from curvd.graph.capture import graph_of
from curvd.graph.companions import check_loss
from curvd.graph.evaluate import constant, evaluate
from curvd.graph.examples import few, spread
from curvd.graph.fitting import check_targets
from curvd.graph.loss_proof import prove_loss
from curvd.graph.manifest import inputs_of
from curvd.graph.penalties import check_held
from curvd.v1 import graph_pb2 as graph_pb

Loss = Callable[[Tensor, Tensor], Any]

_FUNCTIONS: Mapping[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.nll_loss: nn.NLLLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
}
_NAMES = {
    nn.CrossEntropyLoss: LossName.CROSS_ENTROPY,
    nn.MSELoss: LossName.MSE,
    nn.BCEWithLogitsLoss: LossName.BCE_WITH_LOGITS,
    nn.NLLLoss: LossName.NLL,
    nn.SmoothL1Loss: LossName.SMOOTH_L1,
}
_OPERATORS: Mapping[LossName, Any] = {
    LossName.CROSS_ENTROPY: torch.ops.aten.cross_entropy_loss,
    LossName.MSE: torch.ops.aten.mse_loss,
    LossName.BCE_WITH_LOGITS: torch.ops.aten.binary_cross_entropy_with_logits,
    LossName.NLL: torch.ops.aten.nll_loss_nd,
    LossName.SMOOTH_L1: torch.ops.aten.smooth_l1_loss,
}
"""What they compute, beneath torch's modules and functions: those may have hooks, or others
in their place."""
_IGNORED = -100
"""The class that torch leaves out if nothing else is said."""
_REDUCTIONS = {Reduction.MEAN: 1, Reduction.SUM: 2}
"""As the operators count them."""


class _Summed(nn.Module):
    """A loss as the sum over a mini-batch, and what was counted if it says so.

    Args:
        loss: What is exported.
        normaliser: What it returns; see `curvd.export_loss`.
    """

    def __init__(self, loss: Loss, normaliser: Normaliser) -> None:
        super().__init__()
        self.module, self.normaliser = loss, normaliser

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the loss on outputs and targets.

        Args:
            args: Both.
            kwargs: Nothing.

        Returns:
            The sum, or the sum and the weight.

        Raises:
            InvalidSpec: If the loss returns something else than was declared.
        """
        outputs, _ = args
        result = self.module(*args, **kwargs)
        pair = isinstance(result, tuple | list) and len(result) == 2
        if pair is not (self.normaliser == "counted"):
            msg = (
                f"with normaliser={self.normaliser!r} a loss returns "
                f"{'a pair (sum, weight)' if not pair else 'one scalar'}; "
                f"got {type(result).__name__}"
            )
            raise InvalidSpec(msg, normaliser=self.normaliser)
        total, *weight = result if pair else (result,)
        if not isinstance(total, Tensor) or total.dim():
            shape = list(total.shape) if isinstance(total, Tensor) else type(total)
            msg = f"a loss returns a scalar for a mini-batch; this one returns {shape}"
            raise InvalidSpec(msg)
        if self.normaliser == "points":
            total = total * outputs.shape[0]
        if not weight:
            return (total,)
        (counted,) = weight
        if not isinstance(counted, Tensor):
            counted = torch.ones((), device=outputs.device) * counted
        return total, counted.to(outputs.dtype)


def capture_loss(
    loss: Loss,
    outputs: Tensor,
    targets: Tensor,
    normaliser: Normaliser,
    *,
    model: nn.Module | None = None,
    check: bool = True,
) -> LossSpec:
    """Export a loss; see `curvd.export_loss`.

    Args:
        loss: A function of outputs and targets.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].
        normaliser: What it returns.
        model: The model whose outputs they are; its parameters must not be in the loss.
        check: Whether to prove that the graph is the loss.

    Returns:
        The loss as a specification.

    Raises:
        InvalidSpec: If it is not what `normaliser` declares, or holds parameters.
        InvalidGraph: If it cannot be exported, or has too many constants.
        GradientMismatch: If its gradient is not that of its graph.
    """
    wrapper = _Summed(loss, normaliser)
    z, y = spread(outputs, targets)
    tried(lambda z, y: check_held(loss, model, z, y, {}), z, y)
    if not is_additive(wrapper, z, y):
        declared = {
            "points": "the mean over the data points of a mini-batch",
            "sum": "the sum over the data points of a mini-batch",
            "counted": "a sum and a weight over the data points of a mini-batch",
        }[normaliser]
        msg = (
            f"with normaliser={normaliser!r} a loss returns {declared}, but for this one "
            f"a mini-batch and its parts disagree{_broadcast(z, y)}; declare another "
            "normaliser"
        )
        raise InvalidSpec(msg, normaliser=normaliser)
    rows = inputs_of(_example, few((outputs, targets)))
    holder = loss if isinstance(loss, nn.Module) else nn.Module()
    graph, tensors = graph_of(holder, wrapper, rows, "the loss")
    check_held(loss, model, z, y, tensors)
    if check:
        prove_loss(wrapper, graph, tensors, z, y)
        constants = [tensors[described.names[0]] for described in graph.tensors]
        check_loss(graph, constants, z, y)
    _inline(graph, tensors)
    return LossSpec(
        name=LossName.CUSTOM,
        reduction=Reduction.SUM if normaliser == "sum" else Reduction.MEAN,
        graph=SerializedGraph(graph.SerializeToString(deterministic=True)),
    )


def recognised(
    loss: Any,
    outputs: Tensor,
    targets: Tensor,
    *,
    model: nn.Module | None = None,
    check: bool = True,
) -> LossSpec:
    """Find the name of a loss, or export it.

    Args:
        loss: A module or function of torch, a `functools.partial` of one, or any
            function of outputs and targets that is their mean or sum.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].
        model: The model whose outputs they are; its parameters must not be in the loss.
        check: Whether to prove that an exported graph is the loss.

    Returns:
        The loss as a specification.

    Raises:
        InvalidSpec: If it is neither a mean nor a sum over data points.
    """
    named = _named(loss)
    if named is not None:
        check_targets(named, outputs, targets)
    if named is not None and not _is_ambiguous(named, outputs, targets):
        if not named.name.has_classes and outputs.shape[1:] != targets.shape[1:]:
            msg = (
                f"{named.name} needs outputs and targets of one shape"
                f"{_broadcast(outputs, targets)}"
            )
            raise InvalidSpec(msg, outputs=outputs.shape, targets=targets.shape)
        return named
    counts = named is not None and _counts_targets(named, targets)
    if named is not None and counts:
        loss = _counted(named)
    captured = functools.partial(
        capture_loss, loss, outputs, targets, model=model, check=check
    )
    if counts:
        return captured("counted")
    z, y = spread(outputs, targets)
    tried(lambda z, y: check_held(loss, model, z, y, {}), z, y)
    if isinstance(tried(loss, z, y), tuple | list):
        return captured("counted")
    choices: tuple[Normaliser, ...] = ("points", "sum")
    wrappers = {n: _Summed(loss, n) for n in choices}
    fitting = [n for n, wrapper in wrappers.items() if is_additive(wrapper, z, y)]
    if len(fitting) != 1 and (lost := z.isnan().reshape(len(z), -1).any(1)).any():
        msg = (
            f"the module's outputs are NaN at data point {int(lost.nonzero()[0])} of the "
            "example, so no loss is a number there: look for 0/0, a row that is masked "
            "whole, or a logarithm of what is negative, or leave such data points out"
        )
        raise InvalidSpec(msg)
    if len(fitting) > 1:
        fitting = [n for n in fitting if is_additive(wrappers[n], z, y, elsewhere=True)]
    if len(fitting) == 1:
        return captured(fitting[0])
    what = "neither a mean nor a sum"
    if fitting:
        what = "both a mean and a sum (it is zero, or no number, at these outputs and others)"
    msg = (
        f"on the example the loss is {what} over data points{_broadcast(z, y)}: let it "
        "return (sum, "
        "weight), the sum of all losses and what they are to be divided by, or use "
        "curvd.export_loss; a loss that compares data points with each other (contrastive, "
        "ranking, Cox) is no such sum, and has no session"
    )
    raise InvalidSpec(msg)


def evaluated(
    spec: LossSpec, outputs: Tensor, targets: Tensor, *, divided: bool = False
) -> Tensor:
    """Compute what a loss returns for a mini-batch, from its specification alone.

    Args:
        spec: The spec, from `recognised`.
        outputs: The outputs of the model, [B, ...].
        targets: [B, ...].
        divided: Whether a sum is divided by what the loss counts beside it.

    Returns:
        The scalar that the caller's loss returns; of a pair, the sum.
    """
    if spec.name is LossName.CUSTOM:
        graph = graph_pb.Graph.FromString(spec.graph)
        constants = [constant(t) for t in graph.tensors]
        wide = [t.to(outputs) if t.is_floating_point() else t for t in constants]
        total, *weight = evaluate(graph, (outputs, targets), wide)
        if weight and divided:
            return total / weight[0]
        is_sum = bool(weight) or spec.reduction is Reduction.SUM
        return total if is_sum else total / outputs.shape[0]
    if spec.shift:
        outputs, targets = outputs[:, :-1], targets[:, 1:]
    if spec.name.has_classes and outputs.shape[:-1] == targets.shape:
        outputs = outputs.movedim(-1, 1)  # where torch wants the classes
    weights = None
    if spec.class_weights is not None:
        weights = torch.tensor(spec.class_weights, dtype=torch.float64).to(outputs)
    options: dict[str, Any] = {"reduction": _REDUCTIONS[spec.reduction]}
    if spec.name is LossName.BCE_WITH_LOGITS:
        options["pos_weight"] = weights
    elif spec.name.has_classes:
        ignored = spec.ignore_index
        options |= {
            "weight": weights,
            "ignore_index": _IGNORED if ignored is None else ignored,
        }
    if spec.name is LossName.CROSS_ENTROPY:
        options["label_smoothing"] = spec.label_smoothing
    if spec.name is LossName.SMOOTH_L1:
        options["beta"] = spec.beta
    result: Tensor = _OPERATORS[spec.name](outputs, targets, **options)
    return result


def _named(loss: Any) -> LossSpec | None:
    """Read the options off a loss that servers know; None if it is not one."""
    options: dict[str, Any] = {}
    if isinstance(loss, functools.partial):
        if loss.args:
            return None
        loss, options = loss.func, dict(loss.keywords)
    if loss in _FUNCTIONS:
        try:
            loss = _FUNCTIONS[loss](**options)
        except TypeError:
            return None
    elif options:
        return None
    if type(loss) is nn.HuberLoss and loss.delta == 1:
        loss = nn.SmoothL1Loss(reduction=loss.reduction)  # the same function
    kind = type(loss)
    if kind not in _NAMES or loss.reduction not in ("mean", "sum"):
        return None
    weights = getattr(loss, "weight", None)
    if kind is nn.BCEWithLogitsLoss:
        if weights is not None:
            return None  # one per element, which has no name
        weights = loss.pos_weight
    if weights is not None and weights.dim() != 1:
        return None
    ignored = getattr(loss, "ignore_index", _IGNORED)
    return LossSpec(
        name=_NAMES[kind],
        reduction=loss.reduction,
        ignore_index=None if ignored == _IGNORED else ignored,
        class_weights=None if weights is None else tuple(weights.tolist()),
        label_smoothing=getattr(loss, "label_smoothing", 0.0),
        beta=getattr(loss, "beta", 1.0),
    )


def _is_ambiguous(spec: LossSpec, outputs: Tensor, targets: Tensor) -> bool:
    """Tell whether the classes could be in the last axis as well as in torch's second."""
    rest = targets.shape[1:]  # an example may have fewer data points than the targets
    return (
        spec.name.has_classes
        and not targets.is_floating_point()
        and outputs.dim() > 2
        and outputs.shape[1:-1] == outputs.shape[2:] == rest
    )


def _counts_targets(spec: LossSpec, targets: Tensor) -> bool:
    """Tell whether a mean over classes is divided by something else than their number."""
    if spec.reduction is Reduction.SUM:
        return False
    weighted = spec.class_weights is not None or spec.ignore_index is not None
    return weighted or bool((targets == _IGNORED).any())


def _counted(spec: LossSpec) -> Loss:
    """Write such a mean as a sum, and what it is divided by; classes as torch wants them."""
    ignored = _IGNORED if spec.ignore_index is None else spec.ignore_index
    options: dict[str, Any] = {"ignore_index": ignored, "reduction": 2}
    if spec.name is LossName.CROSS_ENTROPY:
        options["label_smoothing"] = spec.label_smoothing

    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        kept, weights = targets != ignored, None
        count = kept.to(outputs.dtype)
        if spec.class_weights is not None:
            weights = torch.tensor(spec.class_weights, dtype=torch.float64).to(outputs)
            count = count * weights[torch.where(kept, targets, 0)]
        total = _OPERATORS[spec.name](outputs, targets, weight=weights, **options)
        return total, count.sum()

    return loss


def _broadcast(outputs: Tensor, targets: Tensor) -> str:
    """Say that torch would combine every output with every target, if it would."""
    if outputs.shape[1:] == targets.shape[1:] or not targets.is_floating_point():
        return ""
    shapes = [["B", *map(str, t.shape[1:])] for t in (outputs, targets)]
    said = " and ".join(f"[{', '.join(shape)}]" for shape in shapes)
    return (
        f" (outputs and targets are {said} and may broadcast over each other's data "
        "points: give both one shape, as with targets[:, None] or outputs.squeeze(1))"
    )


def _example(outputs: Tensor, targets: Tensor) -> None:
    """Names the inputs of a loss."""


def _inline(graph: graph_pb.Graph, tensors: Mapping[str, Tensor]) -> None:
    """Put the constants of a loss into its graph."""
    for described in graph.tensors:
        tensor = tensors[described.names[0]].contiguous().cpu()
        described.role = graph_pb.GRAPH_TENSOR_ROLE_BUFFER
        described.data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    size = sum(len(t.data) for t in graph.tensors)
    if size > MAX_INLINE_BYTES:
        msg = (
            f"the constants of the loss have {size} bytes; the limit is "
            f"{MAX_INLINE_BYTES}. Make them part of the model, or of the targets"
        )
        raise InvalidGraph(msg, bytes=size, limit=MAX_INLINE_BYTES)
