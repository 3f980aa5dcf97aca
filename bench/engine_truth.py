"""What the products of `bench/engine.py` should be: definitions in float64.

Nothing here is the engine's. The Hessian is double backward written out, and a central
difference of the gradient has to agree with it in the same run; likewise the GGN, whose
``J v`` a central difference of the outputs has to reproduce.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from engine_models import Contest, TokenLoss
from torch import Tensor

STEPS = (1e-9, 1e-11, 1e-10, 1e-12)
"""Of central differences, in turn until one agrees: only tiny ones cross no kink of a
ReLU, and larger ones round less."""
AGREEMENT = 1e-5
"""How far a definition may be from its central difference, relatively."""


class Reference:
    """Products in float64 on one contest's model and data."""

    def __init__(self, c: Contest) -> None:
        self._module = copy.deepcopy(c.module).double()
        self._data = [
            (x.double() if x.is_floating_point() else x, y) for x, y in c.data
        ]
        self._sizes = c.problem.layout.sizes
        self._parameters = list(self._module.parameters())

    def hessian(self, V: Tensor, blocks: Sequence[int] | None = None) -> Tensor:
        """Multiply the Hessian, or its diagonal blocks of so many parameters.

        Args:
            V: ``[K, P]``.
            blocks: Parameters per block; None: one block.

        Returns:
            ``[K, P]``.
        """
        out = torch.zeros_like(V, dtype=torch.float64)
        blocks = blocks or (len(self._parameters),)
        for loss in self._losses():
            gradient = torch.autograd.grad(loss, self._parameters, create_graph=True)
            for v, row in zip(V.double(), out, strict=True):
                row += self._double_backward(gradient, self._split(v), blocks)
        return out

    def ggn(self, v: Tensor) -> Tensor:
        """Multiply the Gauss-Newton matrix, ``[P]``."""
        out = torch.zeros_like(v, dtype=torch.float64)
        for x, y in self._data:
            z = self._module(x)
            u = torch.zeros_like(z, requires_grad=True)
            pulled = torch.autograd.grad(z, self._parameters, u, create_graph=True)
            (pushed,) = torch.autograd.grad(pulled, u, self._split(v.double()))
            out += self._pull(z, pushed, y.numel())
        return out / len(self._data)

    def hessian_gap(self, v: Tensor, product: Tensor) -> float:
        """Compare a product with central differences of the gradient."""
        return _first_good(lambda step: self._hessian_gap(v.double(), product, step))

    def ggn_gap(self, v: Tensor, product: Tensor) -> float:
        """Compare a product with central differences of the outputs."""
        return _first_good(lambda step: self._ggn_gap(v.double(), product, step))

    def _losses(self) -> list[Tensor]:
        share = 1 / len(self._data)
        return [share * TokenLoss()(self._module(x), y) for x, y in self._data]

    def _split(self, v: Tensor) -> list[Tensor]:
        pieces = zip(v.split(list(self._sizes)), self._parameters, strict=True)
        return [piece.view_as(p) for piece, p in pieces]

    def _double_backward(
        self,
        gradient: Sequence[Tensor],
        v: Sequence[Tensor],
        blocks: Sequence[int],
    ) -> Tensor:
        rows: list[Tensor] = []
        for size in blocks:
            inside = slice(len(rows), len(rows) + size)
            rows += torch.autograd.grad(
                gradient[inside], self._parameters[inside], v[inside], retain_graph=True
            )
        return _flat(rows)

    def _pull(self, z: Tensor, pushed: Tensor, terms: int) -> Tensor:
        """Give ``J^T (diag(p) - p p^T) / terms`` of what was pushed through ``J``."""
        p = z.detach().softmax(-1)
        pu = p * pushed
        metric = (pu - p * pu.sum(-1, keepdim=True)) / terms
        rows = torch.autograd.grad(z, self._parameters, metric, retain_graph=True)
        return _flat(rows)

    def _hessian_gap(self, v: Tensor, product: Tensor, step: float) -> float:
        ends = []
        for sign in (1, -1):
            self._move(v, sign * step)
            ends.append(
                sum(
                    _flat(torch.autograd.grad(loss, self._parameters))
                    for loss in self._losses()
                )
            )
            self._move(v, -sign * step)
        return error((ends[0] - ends[1]) / (2 * step), product)

    def _ggn_gap(self, v: Tensor, product: Tensor, step: float) -> float:
        got = torch.zeros_like(product)
        for x, y in self._data:
            ends = []
            for sign in (1, -1):
                self._move(v, sign * step)
                with torch.no_grad():
                    ends.append(self._module(x))
                self._move(v, -sign * step)
            pushed = (ends[0] - ends[1]) / (2 * step)
            got += self._pull(self._module(x), pushed, y.numel())
        return error(got / len(self._data), product)

    @torch.no_grad()
    def _move(self, v: Tensor, step: float) -> None:
        for p, piece in zip(self._parameters, self._split(v), strict=True):
            p += step * piece


def error(got: Tensor, want: Tensor) -> float:
    """Give the relative error of a product."""
    return float((got.double() - want).norm() / want.norm())


def _first_good(gap: Callable[[float], float]) -> float:
    best = math.inf
    for step in STEPS:
        best = min(best, gap(step))
        if best <= AGREEMENT:
            break
    return best


def _flat(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([row.reshape(-1) for row in rows])
