"""A model is tried on a few data points before anything is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvd.contract import Mode
from curvd.errors import InvalidSpec
from curvd_server.engine.objective.data import rows_of
from curvd_server.engine.objective.prefetch import on_host
from curvd_server.system import yield_point

if TYPE_CHECKING:
    from curvd_server.engine.objective.objective import Problem

_SIZES = (3, 2)
"""Data points that a model is tried on; several sizes, because the first axis of its
outputs must follow them, and more than one, because of layers that need a variance."""


def tried(problem: Problem) -> Tensor:
    """Run a model on a few data points, and on a last mini-batch of one.

    Args:
        problem: The model and its data.

    Returns:
        Its outputs for the first two data points.

    Raises:
        InvalidSpec: If they lack the batch axis, or depend on other data points; no
            parameter has a derivative; or the last mini-batch is too small for the
            statistics of the model.
    """
    _check_last(problem)
    at_once = -(-max(_SIZES) // len(problem.data[0].targets))
    first = problem.joined(at_once).data[0]
    leaves = [p.detach().requires_grad_() for p in problem.parameters]
    whole = None
    for size in _SIZES:
        few = rows_of(first, slice(0, size))
        yield_point()
        with torch.enable_grad():
            outputs = problem.outputs(leaves, few)
        check_batch_axis(outputs.shape, len(few.targets))
        if whole is not None and problem.mode is Mode.EVAL:
            gap = _gap(whole[: len(outputs)], outputs)
            if gap:
                yield_point()
                with torch.enable_grad():
                    again = problem.outputs(leaves, few)
                # What is random differs anyhow; `verification.determinism` says so.
                if not _gap(again, outputs):
                    raise _mixing(gap)
        whole = outputs
    if not outputs.requires_grad:
        msg = (
            "the model's outputs have no derivative in any of the parameters: these are "
            "not used, or behind detach() or no_grad()"
        )
        raise InvalidSpec(msg, parameters=", ".join(problem.layout.names))
    return outputs.detach()


def _mixing(gap: float) -> InvalidSpec:
    """Refuse rows that are others in a smaller mini-batch.

    Mini-batches are cut and joined as it suits, so that this changes nothing.
    """
    msg = (
        "a row of the model's output depends on the other data points of its "
        f"mini-batch (relative difference {gap:.2g}), so "
        "curvature depends on the batch size: make it a function of its own data "
        "point, or say mode='batch_statistics' if mini-batches are what you mean"
    )
    return InvalidSpec(msg)


def _gap(first: Tensor, second: Tensor) -> float:
    """Tell how much outputs differ, relative to the second; 0 if by rounding only."""
    allowed = min(10 * torch.finfo(second.dtype).eps ** 0.5, 0.1)
    with torch.no_grad():
        off, size = float((first - second).norm()), float(second.norm())
    if not off > allowed * size:
        return 0.0
    return off / size if size else off


def check_batch_axis(shape: Sequence[int], rows: int) -> None:
    """Refuse outputs that are not one row per data point.

    Args:
        shape: The shape of the outputs.
        rows: Data points that they belong to.

    Raises:
        InvalidSpec: If the first axis is another one.
    """
    if not shape or shape[0] != rows:
        msg = (
            f"the model's outputs have shape {list(shape)} for {rows} data points; the "
            "first axis must be that of the data points, [B, ...]: return one row per "
            "data point, and leave means and sums over them to the loss"
        )
        raise InvalidSpec(msg, shape=list(shape), rows=rows)


def _check_last(problem: Problem) -> None:
    """Refuse statistics of one value, of which BatchNorm has no variance."""
    batches = on_host(problem.data)
    last, size = batches[len(batches) - 1], len(batches[0].targets)
    (single,) = problem.model.company.most([len(last.targets) == 1])
    if not single:
        return
    try:
        with torch.no_grad():
            problem.outputs(problem.parameters, problem.data[len(batches) - 1])
    except (ValueError, InvalidSpec) as error:
        if "value per channel" not in str(error):
            raise
        points = last.start + 1
        fits = [b for b in range(max(size, 2), points + 1) if points % b != 1]
        advice = f"take batch_size={fits[0]}" if fits else "add data points"
        msg = (
            f"{points} data points in mini-batches of {size} leave one with a single "
            "data point, and BatchNorm has no statistics of one value per channel: "
            f"{advice}, or leave a data point out"
        )
        raise InvalidSpec(msg, data_points=points, batch_size=size) from error
