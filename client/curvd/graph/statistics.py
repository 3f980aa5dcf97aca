"""Layers whose results depend on whether a module trains: the caller says which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from curvd.contract import Mode
from curvd.errors import InvalidSpec
from curvd.v1 import graph_pb2 as graph_pb

_SHOWN = 5
"""Layers that a message names."""


@contextlib.contextmanager
def in_mode(module: nn.Module, mode: Mode | None) -> Iterator[None]:
    """Hold layers in a mode, and leave them as they were.

    Args:
        module: The module whose layers are looked at.
        mode: Evaluation, of all layers; or that normalisation uses the mini-batch's
            statistics, where layers that are frozen in evaluation mode beside others
            that train keep the running ones. None: as they are, which must be the
            running ones.

    Raises:
        InvalidSpec: If a layer depends on a mode that nobody chose.
    """
    layers = {n: m for n, m in module.named_modules() if isinstance(m, _NormBase)}
    if mode is not Mode.BATCH_STATISTICS:
        without = [_shown(n, m) for n, m in layers.items() if _has_none(m)]
        if without:
            raise _undecided(
                without,
                "normalises with the statistics of the mini-batch in every mode, "
                "because it tracks no running ones (track_running_stats=False)",
                "say mode='batch_statistics'",
            )
    if mode is None:
        training = [
            _shown(n, m) for n, m in layers.items() if m.training and _has_running(m)
        ]
        if training:
            raise _undecided(
                training,
                "is in training mode",
                "call module.eval() for the running statistics, or say "
                "mode='batch_statistics' for those of the mini-batches",
            )
    before = {layer: layer.training for layer in module.modules()}
    frozen = {m for m in before if isinstance(m, _BatchNorm) and not m.training}
    if all(m in frozen for m in before if isinstance(m, _BatchNorm)):
        frozen = set()  # the whole module is in evaluation mode: nobody froze a layer
    for layer in before:
        if mode is Mode.EVAL:
            layer.training = False
        elif mode is Mode.BATCH_STATISTICS and isinstance(layer, _BatchNorm):
            layer.training = layer not in frozen
    try:
        yield
    finally:
        for layer, was_training in before.items():
            layer.training = was_training


def needed_mode(graph: graph_pb.Graph, mode: Mode | None) -> Mode:
    """Find the mode of a graph's sessions.

    Args:
        graph: What was traced.
        mode: What the caller chose; None: nothing.

    Returns:
        The mode.

    Raises:
        InvalidSpec: If an operator uses the mini-batch's statistics, which nobody chose.
    """
    if mode is Mode.BATCH_STATISTICS:
        return mode
    for node in graph.nodes:
        if (
            node.operator == "aten.batch_norm.default"
            and node.arguments[5].literal.boolean
        ):
            where = graph.sources[node.source - 1] if node.source else "batch_norm"
            raise _undecided(
                [where],
                "calls batch_norm with training=True",
                "call module.eval(), or say mode='batch_statistics'",
            )
    return Mode.EVAL


def _has_running(layer: nn.Module) -> bool:
    return layer.running_mean is not None


def _has_none(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is None


def _shown(name: str, layer: nn.Module) -> str:
    return f"{type(layer).__name__} {name!r}" if name else type(layer).__name__


def _undecided(names: list[str], what: str, remedy: str) -> InvalidSpec:
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    msg = f"{shown}{more} {what}, so curvature depends on the batch size: {remedy}"
    return InvalidSpec(msg, layers=", ".join(names))
