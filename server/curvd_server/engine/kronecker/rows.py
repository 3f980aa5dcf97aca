"""Rows of the outputs' Jacobian for a few parameters, data point by data point.

What no Kronecker product is made of, such as scales of norms, has its exact second
moments: ``J_n^T c_k`` for each data point n and column k. One vectorised pass computes
them for all data points; where that is not right for a model, each is differentiated alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvd_server.engine.objective import Batch, Problem, rows_of

_BYTES = 1 << 26
"""Of rows that are held at once."""


class Rows:
    """Maps a mini-batch and gradients of its outputs to rows.

    Args:
        problem: The objective.
        chosen: Indices of the parameters, in order.
        vectorised: Whether torch vectorises them rightly.
    """

    def __init__(
        self, problem: Problem, chosen: Sequence[int], *, vectorised: bool
    ) -> None:
        self._problem, self._chosen, self._vectorised = problem, chosen, vectorised
        self.size = sum(problem.parameters[i].numel() for i in chosen)
        """Elements of a row."""

    @property
    def at_once(self) -> int:
        """Data points whose rows, one each, are held at once."""
        return max(1, _BYTES // (8 * max(1, self.size)))

    def __call__(self, batch: Batch, cotangent: Tensor) -> Tensor:
        """Pull a gradient of each data point's outputs back to the parameters.

        Args:
            batch: Data points, b.
            cotangent: [b, *outputs].

        Returns:
            [b, size], in the type of results.
        """
        found = self._together if self._vectorised else self._alone
        return found(batch, cotangent).to(self._problem.result_dtype)

    def _together(self, batch: Batch, cotangent: Tensor) -> Tensor:
        inner = tuple(self._problem.parameters[i].detach() for i in self._chosen)

        def one(inputs: tuple[Tensor, ...], target: Tensor, c: Tensor) -> Any:
            point = Batch(batch.start, tuple(x[None] for x in inputs), target[None])

            def outputs(inner: tuple[Tensor, ...]) -> Tensor:
                return self._problem.outputs(self._whole(inner), point)[0]

            pair: Any = torch.func.vjp(outputs, inner)
            return pair[1](c)[0]

        every = torch.func.vmap(one)
        rows: Any = every(batch.inputs, batch.targets, cotangent)
        return torch.cat([r.reshape(len(cotangent), -1) for r in rows], 1)

    def _alone(self, batch: Batch, cotangent: Tensor) -> Tensor:
        rows = []
        for n in range(len(cotangent)):
            point = rows_of(batch, slice(n, n + 1))
            with torch.enable_grad():
                inner = tuple(
                    self._problem.parameters[i].detach().requires_grad_()
                    for i in self._chosen
                )
                z = self._problem.outputs(self._whole(inner), point)
            rows.append(pulled(z, inner, cotangent[n : n + 1]))
        return torch.stack(rows)

    def _whole(self, inner: Sequence[Tensor]) -> list[Tensor]:
        whole = [p.detach() for p in self._problem.parameters]
        for index, tensor in zip(self._chosen, inner, strict=True):
            whole[index] = tensor
        return whole


def pulled(z: Tensor, leaves: Sequence[Tensor], cotangent: Tensor) -> Tensor:
    """Pull a gradient back by plain autograd.

    Args:
        z: The outputs, with a graph.
        leaves: Parameters.
        cotangent: In the shape of `z`.

    Returns:
        One vector of all parameters' elements.
    """
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if z.requires_grad:
        found = torch.autograd.grad(
            z, leaves, cotangent, retain_graph=True, allow_unused=True
        )
    return torch.cat([
        (torch.zeros_like(p) if g is None else g).reshape(-1)
        for g, p in zip(found, leaves, strict=True)
    ])
