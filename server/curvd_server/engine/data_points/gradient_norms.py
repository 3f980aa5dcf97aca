"""Norms of the gradients of single data points' losses, exact, some points at a time.

The gradient of every data point of a part comes of one pass that torch vectorises
(``vmap(grad(loss))``). Whether that is right for a model is shown on the first part: the
gradients have to add up to the one that plain autograd computes of all its points. Where
they do not, or a model does what cannot be vectorised, each point is differentiated alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import Stop, query_options
from curvd_server.engine.data_points.points import Points
from curvd_server.engine.objective import Batch, Problem, rows_of
from curvd_server.linalg import Definition, Query, Room
from curvd_server.system import is_out_of_memory

_TOGETHER = 256
"""Data points of a part at most: more of them gain nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientNormsResult:
    """Norms of gradients, data point by data point."""

    norms: Tensor
    """[n], of the first ones if the query was stopped."""
    parameter_norms: Tensor | None
    """[n, T] of each parameter's part."""
    stopped: Stop


def gradient_norms(
    points: Points, *, rows: int, by_parameter: bool = False
) -> Query[GradientNormsResult]:
    """Compute the norm of the gradient of each data point's summed loss.

    Args:
        points: The data points.
        rows: How many are differentiated together, each a vector of memory.
        by_parameter: Whether to keep each parameter's part.

    Yields:
        Progress.

    Returns:
        The norms.
    """
    squared = SquaredGradients(points.problem)

    def kept(batch: Batch) -> Tensor:
        squares = squared(batch)
        return squares if by_parameter else squares.sum(1, keepdim=True)

    squares, stopped = yield from points.each(kept, rows)
    return GradientNormsResult(
        norms=squares.sum(1).sqrt(),
        parameter_norms=squares.sqrt() if by_parameter else None,
        stopped=stopped,
    )


class SquaredGradients:
    """Maps data points to ``|dloss_n/dp|^2`` of each parameter p: [b, T].

    Args:
        problem: The objective.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.vectorised: bool | None = None
        """Whether torch's vectorised gradients are right; None: not known yet."""

    def __call__(self, batch: Batch) -> Tensor:
        """Square the gradients of one part."""
        if self.vectorised is None:
            self.vectorised = self._agrees(batch)
        if self.vectorised:
            return self._squares(self._together(batch), len(batch.targets))
        alone = (
            self._squares([g[None] for g in self._gradient(rows_of(batch, one))], 1)
            for one in (slice(n, n + 1) for n in range(len(batch.targets)))
        )
        return torch.cat(list(alone))

    def _agrees(self, batch: Batch) -> bool:
        """Tell whether the vectorised gradients add up to that of all points together."""
        try:
            each = self._together(batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False  # whatever it is, the points alone will say so if it is true
        tolerance = torch.finfo(self._problem.dtype).eps ** 0.5
        for rows, whole in zip(each, self._gradient(batch), strict=True):
            # Not relative to the sum: gradients of many points cancel.
            scale = rows.flatten(1).norm(dim=1).sum()
            if not (rows.sum(0) - whole).norm() <= tolerance * scale:
                return False
        return True

    def _together(self, batch: Batch) -> Sequence[Tensor]:
        """Differentiate each data point's loss: per parameter [b, *shape]."""

        def loss(
            parameters: tuple[Tensor, ...], inputs: tuple[Tensor, ...], target: Tensor
        ) -> Tensor:
            one = Batch(batch.start, tuple(x[None] for x in inputs), target[None])
            return self._loss(parameters, one)

        parameters = tuple(p.detach() for p in self._problem.parameters)
        every = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        rows: tuple[Tensor, ...] = every(parameters, batch.inputs, batch.targets)
        return rows

    def _gradient(self, batch: Batch) -> Sequence[Tensor]:
        """Differentiate the loss of all the data points together, by plain autograd."""
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self._problem.parameters]
            loss = self._loss(leaves, batch)
            if not loss.requires_grad:
                return [torch.zeros_like(p) for p in leaves]
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        pairs = zip(found, leaves, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def _loss(self, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        outputs = self._problem.outputs(parameters, batch)
        return self._problem.loss.sum(outputs, batch.targets)

    def _squares(self, gradients: Sequence[Tensor], count: int) -> Tensor:
        wide = self._problem.result_dtype
        rows = [g.reshape(count, -1).to(wide).square().sum(1) for g in gradients]
        return torch.stack(rows, 1)


def _rows(room: Room) -> int:
    return room.fitting(2, _TOGETHER)  # a gradient, and what its square takes


def _vectors(options: query_options.GradientNormsOptions, room: Room) -> int:
    numbers = room.parameters if options.by_parameter else 1
    # The squares, their roots, and a copy on the way out.
    answer = 3 * room.data_points * numbers
    return 2 * _rows(room) + math.ceil(answer / room.size)


def _begin(
    points: Points, options: query_options.GradientNormsOptions, room: Room
) -> Query[GradientNormsResult]:
    return gradient_norms(points, rows=_rows(room), by_parameter=options.by_parameter)


def _tensors(result: GradientNormsResult) -> dict[str, Tensor]:
    if result.parameter_norms is None:
        return {"norms": result.norms}
    return {"norms": result.norms, "parameter_norms": result.parameter_norms}


DEFINITION = Definition(
    options=query_options.GradientNormsOptions,
    vectors=_vectors,
    begin=_begin,
    tensors=_tensors,
)
