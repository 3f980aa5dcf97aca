"""The loss that a module computes itself when it is given labels, as transformers do.

A server differentiates outputs and loss apart, so the loss has to be known as a function
of the outputs. It is one of a few, and which is tried: value and gradient of every
parameter have to be those of the module's own ``.loss``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvd.contract import LossName, LossSpec, Mode, Output
from curvd.errors import InvalidSpec
from curvd.graph.capture import Chosen
from curvd.graph.compared import differing
from curvd.graph.examples import sampled
from curvd.graph.losses import evaluated
from curvd.graph.manifest import inputs_of
from curvd.graph.statistics import in_mode

_IGNORED = -100
"""The class that transformers count for nothing."""
_CLASSES = LossSpec(name=LossName.CROSS_ENTROPY, ignore_index=_IGNORED)
_SPECS: Mapping[str, tuple[LossSpec, Callable[[Tensor], Tensor]]] = {
    "causal language models": (replace(_CLASSES, shift=True), lambda y: y),
    "classifiers": (_CLASSES, lambda y: y),
    "several labels": (LossSpec(name=LossName.BCE_WITH_LOGITS), lambda y: y),
    "regression": (LossSpec(name=LossName.MSE), lambda y: y),
    "regression to one number": (LossSpec(name=LossName.MSE), lambda y: y[:, None]),
}
"""Losses, and what they take the labels as."""


def own_loss(
    module: nn.Module, inputs: Any, labels: Tensor, output: Output, mode: Mode | None
) -> tuple[LossSpec, Tensor]:
    """Find the loss that a module computes itself.

    Args:
        module: Returns ``loss`` beside its outputs when it is called with ``labels=``.
        inputs: The inputs, as for `curvd.export`, without the labels.
        labels: [N, ...].
        output: Which of its results is the loss's.
        mode: Whose statistics BatchNorm uses.

    Returns:
        The loss, and the targets that it takes.

    Raises:
        InvalidSpec: If it computes none, or one that is not known.
    """
    rows = inputs_of(module.forward, sampled(inputs))
    few: Tensor = sampled(labels)
    twin: nn.Module = copy.deepcopy(module)  # some note what they are called with
    with in_mode(twin, mode), torch.enable_grad():
        result = twin(*rows.args, **rows.kwargs, labels=few)
        outputs = Chosen(twin, output)(rows.args, dict(rows.kwargs))
    held = isinstance(result, Mapping)
    total = result.get("loss") if held else getattr(result, "loss", None)
    if not isinstance(total, Tensor) or total.dim():
        msg = (
            "without a loss= the module has to compute it: this one returns no scalar "
            "`loss` when it is called with labels="
        )
        raise InvalidSpec(msg)
    # Some compute their loss in float32, of outputs that are not.
    wide = outputs.to(total.dtype) if outputs.is_floating_point() else outputs
    trained = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    want = _gradients(total, trained)
    for spec, taken in _SPECS.values():
        try:
            targets = taken(few)
            if not spec.name.has_classes and outputs.shape != targets.shape:
                continue  # torch would combine every output with every target
            found = evaluated(spec, wide, targets)
        except (RuntimeError, ValueError, IndexError):  # of shapes and types
            continue
        if not differing({"loss": (found, total)}, total.dtype):
            got = _gradients(found, trained)
            pairs = {name: (got[name], want[name]) for name in trained}
            if not differing(pairs, total.dtype):
                return spec, taken(labels)
    msg = (
        f"the module's own loss is that of none of these: {', '.join(_SPECS)}. Give the "
        "loss as a function of outputs and targets"
    )
    raise InvalidSpec(msg)


def _gradients(total: Tensor, trained: Mapping[str, Tensor]) -> dict[str, Any]:
    rows = torch.autograd.grad(
        total, list(trained.values()), allow_unused=True, retain_graph=True
    )
    return {
        name: torch.zeros_like(trained[name]) if row is None else row
        for name, row in zip(trained, rows, strict=True)
    }
