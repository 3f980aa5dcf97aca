"""Losses: recognised by name where that is possible, else exported as graphs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvd.choices import LossName, Reduction
from curvd.errors import InvalidGraph, InvalidSpec
from curvd.graph.capture import few, traced, translated
from curvd.graph.manifest import inputs_of
from curvd.types import LossSpec, Normaliser, SerializedGraph
from curvd.v1 import graph_pb2 as graph_pb
from curvd.vocabulary import MAX_INLINE_BYTES

Loss = Callable[[Tensor, Tensor], Any]

_CLOSE = 1e-4
"""Rounding of float32 is far below, a wrong normaliser far above."""
_FUNCTIONS: Mapping[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.nll_loss: nn.NLLLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
}
_NAMES = {
    nn.CrossEntropyLoss: LossName.CROSS_ENTROPY,
    nn.MSELoss: LossName.MSE,
    nn.BCEWithLogitsLoss: LossName.BCE_WITH_LOGITS,
    nn.NLLLoss: LossName.NLL,
    nn.SmoothL1Loss: LossName.SMOOTH_L1,
}


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
    loss: Loss, outputs: Tensor, targets: Tensor, normaliser: Normaliser
) -> LossSpec:
    """Export a loss; see `curvd.export_loss`.

    Args:
        loss: A function of outputs and targets.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].
        normaliser: What it returns.

    Returns:
        The loss as a specification.

    Raises:
        InvalidSpec: If it is not what `normaliser` declares.
        InvalidGraph: If it cannot be exported, or has too many constants.
    """
    wrapper = _Summed(loss, normaliser).eval()
    z, y = few((outputs, targets))
    if not _is_additive(wrapper, z, y):
        declared = {
            "points": "the mean over the data points of a mini-batch",
            "sum": "the sum over the data points of a mini-batch",
            "counted": "a sum and a weight over the data points of a mini-batch",
        }[normaliser]
        msg = (
            f"with normaliser={normaliser!r} a loss returns {declared}, but for this one "
            "a mini-batch and its parts disagree; declare another normaliser"
        )
        raise InvalidSpec(msg, normaliser=normaliser)
    rows = inputs_of(_example, (z, y))
    holder = loss if isinstance(loss, nn.Module) else nn.Module()
    graph, tensors = translated(holder, traced(wrapper, rows), rows)
    _inline(graph, tensors)
    return LossSpec(
        name=LossName.CUSTOM,
        reduction=Reduction.SUM if normaliser == "sum" else Reduction.MEAN,
        graph=SerializedGraph(graph.SerializeToString(deterministic=True)),
    )


def recognised(loss: Any, outputs: Tensor, targets: Tensor) -> LossSpec:
    """Find the name of a loss, or export it.

    Args:
        loss: A module or function of torch, a `functools.partial` of one, or any
            function of outputs and targets that is their mean or sum.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].

    Returns:
        The loss as a specification.

    Raises:
        InvalidSpec: If it is neither a mean nor a sum over data points.
    """
    named = _named(loss)
    if named is not None and not _is_ambiguous(named, outputs, targets):
        return named
    z, y = few((outputs, targets))
    with torch.no_grad():
        result = loss(z, y)
    if isinstance(result, tuple | list):
        return capture_loss(loss, outputs, targets, "counted")
    choices: tuple[Normaliser, ...] = ("points", "sum")
    fitting = [n for n in choices if _is_additive(_Summed(loss, n).eval(), z, y)]
    if len(fitting) == 1:
        return capture_loss(loss, outputs, targets, fitting[0])
    what = "both a mean and a sum" if fitting else "neither a mean nor a sum"
    msg = (
        f"on the example the loss is {what} over data points: let it return (sum, "
        "weight), the sum of all losses and what they are to be divided by, or use "
        "curvd.export_loss"
    )
    raise InvalidSpec(msg)


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
    ignored = getattr(loss, "ignore_index", -100)
    return LossSpec(
        name=_NAMES[kind],
        reduction=loss.reduction,
        ignore_index=None if ignored == -100 else ignored,
        class_weights=None if weights is None else tuple(weights.tolist()),
        label_smoothing=getattr(loss, "label_smoothing", 0.0),
        beta=getattr(loss, "beta", 1.0),
    )


def _is_ambiguous(spec: LossSpec, outputs: Tensor, targets: Tensor) -> bool:
    """Tell whether a server would take another axis for the classes than torch."""
    return (
        spec.name.has_classes
        and outputs.dim() > 2
        and outputs.shape[:-1] == targets.shape
        and outputs.shape[1] == outputs.shape[-1]
    )


def _is_additive(wrapper: _Summed, outputs: Tensor, targets: Tensor) -> bool:
    """Compare a mini-batch with its parts."""

    def totals(rows: slice) -> list[float]:
        with torch.no_grad():
            z, y = (wide(t[rows]) for t in (outputs, targets))
            return [float(v) for v in wrapper((z, y), {})]

    def wide(tensor: Tensor) -> Tensor:
        return (
            tensor.float() if tensor.dtype.itemsize < 4 and floating(tensor) else tensor
        )

    def floating(tensor: Tensor) -> bool:
        return tensor.is_floating_point()

    whole, first, rest = totals(slice(None)), totals(slice(1)), totals(slice(1, None))
    return all(
        math.isclose(w, a + b, rel_tol=_CLOSE, abs_tol=1e-12)
        for w, a, b in zip(whole, first, rest, strict=True)
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
