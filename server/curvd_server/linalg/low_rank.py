"""What is known of a map's largest eigenvalues, and what it is good for elsewhere.

A Nystroem sketch and eigenvectors with their values are the same object: a few orthonormal
vectors and what the map does along them. It preconditions systems, at every damping, and
takes the largest part out of a determinant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvd_server.linalg.vectors import cross


@dataclass(frozen=True, slots=True)
class LowRank:
    """``U' diag(values) U``, an approximation of a map from below."""

    vectors: Tensor
    """U: [r, P], orthonormal rows."""
    values: Tensor
    """[r] Eigenvalues, float64."""

    @property
    def rank(self) -> int:
        """Number of vectors, r."""
        return len(self.vectors)

    def at(self, damping: float) -> Preconditioner:
        """Make the preconditioner of ``A + damping * I``.

        ``P^-1 = I + U' ((l + damping) / (values + damping) - 1) U`` with l the smallest of
        the values (Frangella, Tropp & Udell, SIAM J. Matrix Anal. Appl. 44, 2023), so that
        what U does not span stays a multiple of the identity.

        Args:
            damping: At least 0; a negative one counts as 0.

        Returns:
            The preconditioner, from the values that are positive.
        """
        shifted = self.values.double() + max(0.0, damping)
        used = self.values > 0
        shifted = shifted[used]
        weights = shifted.min() / shifted if len(shifted) else shifted
        return Preconditioner(self.vectors[used.to(self.vectors.device)], weights)


@dataclass(frozen=True, slots=True)
class Preconditioner:
    """``P^-1 = I + U' (weights - 1) U``, positive definite."""

    vectors: Tensor
    """U: [r, P], orthonormal rows."""
    weights: Tensor
    """[r] In (0, 1], float64."""

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
        found = cross(self.vectors, V) * (weights.to(V.device) - 1)
        return torch.addmm(V, found.to(V.dtype), self.vectors)
