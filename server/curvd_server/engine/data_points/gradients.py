"""Gradients of single data points' losses, some points at a time.

The gradient of every data point of a part comes of one pass that torch vectorises
(``vmap(grad(loss))``). Whether that is right for a model is shown on the first part: the
gradients have to add up to the one that plain autograd computes of all its points. Where
they do not, or a model does what cannot be vectorised, each point is differentiated alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvd_server.engine.finite import check_finite
from curvd_server.engine.objective import Batch, Problem, rows_of
from curvd_server.linalg import lengths
from curvd_server.system import is_out_of_memory

TOGETHER = 256
"""Data points of a part at most: more of them gain nothing."""


class Gradients:
    """Maps data points to the gradients of their summed losses.

    Args:
        problem: The objective.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.vectorised: bool | None = None
        """Whether torch's vectorised gradients are right; None: not known yet."""

    def __call__(self, batch: Batch) -> Sequence[Tensor]:
        """Differentiate each data point's loss: per parameter [b, *shape].

        Raises:
            NotFinite: If a number is NaN or infinite.
        """
        if self.vectorised is None:
            self.vectorised = self._agrees(batch)
        found = self._together(batch) if self.vectorised else self._alone(batch)
        check_finite(self._problem, batch, "the gradient of a data point", found)
        return found

    def _alone(self, batch: Batch) -> Sequence[Tensor]:
        points = (rows_of(batch, slice(n, n + 1)) for n in range(len(batch.targets)))
        alone = zip(*(self._gradient(point) for point in points), strict=True)
        return [torch.stack(rows) for rows in alone]

    def flat(self, batch: Batch) -> Tensor:
        """Differentiate each data point's loss: [b, P], in the type of results."""
        count, wide = len(batch.targets), self._problem.result_dtype
        return torch.cat([g.reshape(count, -1).to(wide) for g in self(batch)], 1)

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
            # A parameter without axes has rows [b], which have none to flatten.
            scale = lengths(rows.reshape(len(rows), -1)).sum()
            apart = lengths((rows.sum(0) - whole).reshape(1, -1))
            if not (apart.isfinite() and apart <= tolerance * scale):
                return False
        return True

    def _together(self, batch: Batch) -> Sequence[Tensor]:
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
