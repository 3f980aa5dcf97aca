"""Lanczos quadrature from random probes, several at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd_server.linalg.base import Multiply, Products, Progress, Query

_BELOW = 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Quadrature:
    """Gauss quadrature of the spectral measure of one probe."""

    nodes: NDArray[np.float64]
    """[m] Ritz values, ascending."""
    weights: NDArray[np.float64]
    """[m], not negative, sum one."""
    tridiagonal: NDArray[np.float64]
    """[m, m] Their matrix."""
    residual: float
    """What the next step would begin with; rounding where the measure has no more points."""

    def of_logarithms(self, shift: float, least: float) -> tuple[float, float]:
        """Bound the integral of ``log(λ + shift)`` from both sides.

        The even derivatives of a logarithm are negative and the odd ones positive, so that
        Gauss' quadrature is too large, and Radau's, with a node below the spectrum, too small
        (Golub & Meurant, Matrices, Moments and Quadrature, 2010, chapter 6).

        Args:
            shift: Added to every eigenvalue.
            least: No eigenvalue, shift included, is smaller; positive.

        Returns:
            The lower and the upper bound; the same where the quadrature is exact.
        """
        above = float(self.weights @ np.log(self.nodes + shift))
        if self.residual == 0:
            return above, above
        # Rounding may have put a Ritz value on the bound.
        least = min(least, _BELOW * float(self.nodes[0] + shift))
        nodes, weights = self.with_node(least - shift)
        below = float(weights @ np.log(np.maximum(nodes + shift, least)))
        return min(below, above), above

    def with_node(self, node: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute Radau's quadrature, one node of which is given.

        No measure with the same moments has more weight up to that node than this one (the
        inequalities of Chebyshev, Markov and Stieltjes).

        Args:
            node: Below all Ritz values.

        Returns:
            [m + 1] nodes, ascending, and their weights.
        """
        size = len(self.nodes)
        end = np.zeros(size)
        end[-1] = self.residual**2
        try:
            delta = np.linalg.solve(self.tridiagonal - node * np.eye(size), end)
        except np.linalg.LinAlgError:
            # The smallest Ritz value is the node, but for rounding: go below that.
            node -= 4 * np.finfo(np.float64).eps * float(np.abs(self.nodes).max())
            delta = np.linalg.solve(self.tridiagonal - node * np.eye(size), end)
        extended = np.zeros((size + 1, size + 1))
        extended[:-1, :-1] = self.tridiagonal
        extended[-1, -2] = extended[-2, -1] = self.residual
        extended[-1, -1] = node + delta[-1]
        nodes, vectors = np.linalg.eigh(extended)
        return nodes, vectors[0] ** 2


def quadratures(
    products: Products,
    W: Tensor,
    steps: int,
    *,
    iteration: int = 0,
    multiply: Multiply | None = None,
) -> Query[list[Quadrature] | None]:
    """Run Lanczos from each probe, with full reorthogonalisation.

    The nodes are the eigenvalues of the tridiagonal matrix, the weights the squared
    first components of its eigenvectors (Golub & Welsch, Math. Comp. 23, 1969).

    Args:
        products: The map.
        W: [k, P] Probes; all take each step together.
        steps: m, at most P.
        iteration: Steps taken before, for the progress.
        multiply: What the quadrature is of, if not of the map itself, by a product with
            it for each column.

    Yields:
        Progress after each step.

    Returns:
        One quadrature per probe; None if products or time did not suffice.
    """
    steps, multiply = min(steps, products.size), multiply or products
    space = products.space
    basis = space.empty(len(W), steps)  # [k, m, P]
    alpha, beta = np.zeros((len(W), steps)), np.zeros((len(W), steps))
    # Steps until a probe's Krylov space was exhausted.
    length = np.full(len(W), steps)
    basis[:, 0] = W / space.norms(W)[:, None].to(W.dtype)
    scale = 0.0
    for j in range(steps):
        alive = np.flatnonzero(length > j)
        if not len(alive):
            break
        if products.refusal(len(alive)):
            return None
        index = torch.as_tensor(alive, device=W.device)
        U = multiply(basis[index, j])
        alpha[alive, j] = space.dots(basis[index, j], U).cpu().numpy()
        for rows, probes in _runs(alive):
            used = basis[probes, : j + 1]
            space.orthogonalise_each(used[:, -2:], U[rows], passes=1)
            space.orthogonalise_each(used, U[rows])
        beta[alive, j] = space.norms(U).cpu().numpy()
        scale = max(scale, float(np.abs(alpha).max()), float(beta.max()))
        small = 100 * torch.finfo(W.dtype).eps * scale
        for row, probe in enumerate(alive):
            if beta[probe, j] <= small:
                length[probe] = j + 1
            elif j + 1 < steps:
                basis[probe, j + 1] = U[row] / beta[probe, j]
        yield Progress(iteration=iteration + j + 1, products=products.done)
    return [_gauss(a[:m], b[:m]) for a, b, m in zip(alpha, beta, length, strict=True)]


def _runs(indices: NDArray[np.intp]) -> Iterator[tuple[slice, slice]]:
    """Divide indices into runs without a gap, so that what they choose is a view.

    Args:
        indices: Ascending.

    Yields:
        Where a run is among the indices, and which they are.
    """
    start = 0
    for run in np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1):
        stop = start + len(run)
        yield slice(start, stop), slice(int(run[0]), int(run[-1]) + 1)
        start = stop


def _gauss(alpha: NDArray[np.float64], beta: NDArray[np.float64]) -> Quadrature:
    *inner, residual = beta
    tridiagonal = np.diag(alpha) + np.diag(inner, 1) + np.diag(inner, -1)
    nodes, vectors = np.linalg.eigh(tridiagonal)
    return Quadrature(nodes, vectors[0] ** 2, tridiagonal, float(residual))
