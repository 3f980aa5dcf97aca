"""Rows of the outputs' Jacobian at given inputs, some data points at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvd_server.engine.finite import check_finite
from curvd_server.engine.objective import Batch, Problem, rows_of
from curvd_server.linalg import lengths
from curvd_server.system import is_out_of_memory


class OutputRows:
    """Maps data points to their outputs and to these outputs' gradients.

    The gradients come of one vectorised pass, if they add up to what plain autograd
    computes of all the outputs together, each with a random weight; else of one pass for
    each output of each data point.

    Args:
        problem: The model, as a function of the parameters in question.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.vectorised: bool | None = None
        """Whether torch's vectorised gradients are right; None: not known yet."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Differentiate the outputs of some data points.

        Args:
            batch: b data points.

        Returns:
            Outputs [b, *outputs], and gradients [b, C, P] in the type of results.

        Raises:
            NotFinite: If a number is NaN or infinite.
        """
        if self.vectorised is None:
            self.vectorised = self._agrees(batch)
        outputs = self._outputs(batch)
        rows = self._together(batch) if self.vectorised else self._alone(batch, outputs)
        what = "an output of a data point, or its gradient,"
        check_finite(self._problem, batch, what, [outputs, rows])
        return outputs, rows

    def _outputs(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._problem.outputs(self._problem.parameters, batch)

    def _agrees(self, batch: Batch) -> bool:
        outputs = self._outputs(batch)
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(outputs.shape, generator=generator).to(outputs)
        try:
            rows = self._together(batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False  # outputs one by one will say so if it is true
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self._problem.parameters]
            whole = self._flat(self._backward(leaves, batch, weights))
        # Outputs [b] have no axis to flatten.
        wide = weights.to(rows.dtype).reshape(len(weights), -1)
        ours = torch.einsum("bc,bcp->p", wide, rows)
        scale = (lengths(rows.flatten(0, 1)) * wide.abs().flatten().double()).sum()
        tolerance = torch.finfo(self._problem.dtype).eps ** 0.5
        apart = lengths((ours - whole)[None])
        return bool(apart.isfinite() and apart <= tolerance * scale)

    def _together(self, batch: Batch) -> Tensor:
        problem = self._problem
        parameters = tuple(p.detach() for p in problem.parameters)

        def outputs(
            parameters: tuple[Tensor, ...], inputs: tuple[Tensor, ...], target: Tensor
        ) -> Tensor:
            one = Batch(batch.start, tuple(x[None] for x in inputs), target[None])
            return problem.outputs(parameters, one).reshape(-1)

        each: Any = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0, 0))
        parts: Sequence[Tensor] = each(parameters, batch.inputs, batch.targets)
        wide = (p.to(problem.result_dtype) for p in parts)
        return torch.cat([p.reshape(*p.shape[:2], -1) for p in wide], 2)

    def _alone(self, batch: Batch, outputs: Tensor) -> Tensor:
        count = math.prod(outputs.shape[1:])
        found = []
        for n in range(len(outputs)):
            one = rows_of(batch, slice(n, n + 1))
            with torch.enable_grad():
                leaves = [p.detach().requires_grad_() for p in self._problem.parameters]
                for unit in torch.eye(count, dtype=outputs.dtype).to(outputs.device):
                    weights = unit.reshape(1, *outputs.shape[1:])
                    found.append(self._flat(self._backward(leaves, one, weights)))
        return torch.stack(found).reshape(len(outputs), count, -1)

    def _backward(
        self, leaves: Sequence[Tensor], batch: Batch, weights: Tensor
    ) -> Sequence[Tensor]:
        z = self._problem.outputs(leaves, batch)
        if not z.requires_grad:
            return [torch.zeros_like(p) for p in leaves]
        rows = torch.autograd.grad(z, leaves, weights, allow_unused=True)
        pairs = zip(rows, leaves, strict=True)
        return [torch.zeros_like(p) if row is None else row for row, p in pairs]

    def _flat(self, rows: Sequence[Tensor]) -> Tensor:
        wide = self._problem.result_dtype
        return torch.cat([row.detach().to(wide).reshape(-1) for row in rows])
