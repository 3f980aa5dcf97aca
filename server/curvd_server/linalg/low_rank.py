"""What is known of a map's largest eigenvalues, and what it is good for elsewhere.

A Nystroem sketch and eigenvectors with their values are the same object: a few orthonormal
vectors and what the map does along them. It preconditions systems, at every damping, and
takes the largest part out of a determinant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd_server.linalg.space import Space


@dataclass(frozen=True, slots=True)
class LowRank:
    """``U' diag(values) U``, an approximation of a map from below."""

    vectors: Tensor
    """U: [r, P], orthonormal rows."""
    values: NDArray[np.float64]
    """[r] Eigenvalues."""

    @property
    def rank(self) -> int:
        """Number of vectors, r."""
        return len(self.vectors)

    def congruent(self, weights: Tensor, space: Space) -> LowRank:
        """Make ``D U' diag(values) U D``, with D the diagonal matrix of some weights.

        Args:
            weights: [P].
            space: Where the vectors live.

        Returns:
            The same approximation of ``D A D``, from the values that are positive.
        """
        values = torch.from_numpy(self.values).to(self.vectors.device)
        used = values > 0
        roots = values[used].sqrt()[:, None].to(self.vectors.dtype)
        W = roots * self.vectors[used] * weights
        gram = space.cross(W, W)
        found, turn = torch.linalg.eigh((gram + gram.T) / 2)
        unseen = torch.finfo(W.dtype).eps * len(W) * found.amax() if len(W) else 0.0
        used = found > unseen
        change = (turn[:, used] / found[used].sqrt()).T
        return LowRank(space.combine(change, W), found[used].cpu().numpy())

    def at(self, damping: float, space: Space) -> Preconditioner:
        """Make the preconditioner of ``A + damping * I``.

        ``P^-1 = I + U' ((l + damping) / (values + damping) - 1) U`` with l the smallest of
        the values (Frangella, Tropp & Udell, SIAM J. Matrix Anal. Appl. 44, 2023), so that
        what U does not span stays a multiple of the identity.

        Args:
            damping: At least 0; a negative one counts as 0.
            space: Where the vectors live.

        Returns:
            The preconditioner, from the values that are positive.
        """
        values = torch.from_numpy(self.values).double()
        shifted, used = values + max(0.0, damping), values > 0
        shifted = shifted[used]
        weights = shifted.min() / shifted if len(shifted) else shifted
        return Preconditioner(
            self.vectors[used.to(self.vectors.device)], weights, space
        )


@dataclass(frozen=True, slots=True)
class Preconditioner:
    """``P^-1 = I + U' (weights - 1) U``, positive definite."""

    vectors: Tensor
    """U: [r, P], orthonormal rows."""
    weights: Tensor
    """[r] In (0, 1], float64."""
    space: Space
    """Where the vectors live."""

    def inverse(self, V: Tensor) -> Tensor:
        """Compute ``P^-1 V``: [K, P]."""
        return self._scaled(V, self.weights)

    def root(self, V: Tensor) -> Tensor:
        """Compute ``P^-1/2 V``, symmetric: [K, P]."""
        return self._scaled(V, self.weights.sqrt())

    @property
    def log_determinant(self) -> float:
        """``log det P``."""
        return -float(self.weights.log().sum())

    def _scaled(self, V: Tensor, weights: Tensor) -> Tensor:
        found = self.space.cross(self.vectors, V) * (weights.to(V.device) - 1)
        return self.space.add(V, found, self.vectors)
