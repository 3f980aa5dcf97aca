"""Random directions that take no memory, and projections on them.

A direction's entries in one parameter, in the order of its memory, are those of a rank one
matrix ``g n^T`` of `WIDTH` columns: ``n`` is normal, ``g`` takes few values. What is not
zero has a projection on it that is normal for each ``g``, so that it is zero with
probability zero, and its square is on average that of the norm, times what the squares of
``g`` are on average (Khatri-Rao projections: Sun, Guo, Tropp, Udell, "Tensor random
projection for low memory dimension reduction", 2018). They cost a rank one update or a
thin matrix product, at the speed of memory.

Entries are products of numbers of eight binary digits and powers of two, so they are the
same numbers in float64, float32 and bfloat16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd_server.engine.objective import norm

WIDTH = 16381
"""A prime, so that the rows of the pattern never lie in line with those of a parameter."""
_POOL = 4
"""Widths of normals, of which each parameter's ``n`` is a part of its own."""
_ROWS = 16
"""Rows of the pattern that are in float64 at once."""
PROJECTIONS = 8
"""An estimate of a norm by so many is a hundredth of it with odds of 1e-15."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A direction in the space of all parameters."""

    seed: int
    scales: tuple[float, ...]
    """Typical size of its entries, by parameter; powers of two."""
    fixed: tuple[tuple[int, int], ...] = ()
    """Rows that stay zero, by index of the parameter and of the row."""

    def add(self, index: int, to: Tensor, length: float = 1.0) -> Tensor:
        """Add its entries in one parameter, times a length.

        Args:
            index: The index of the parameter.
            to: Contiguous, and written to.
            length: What they are multiplied by.

        Returns:
            What was written to.
        """
        rows = [row for at, row in self.fixed if at == index]
        kept = to[rows].clone() if rows else None
        weight = length * self.scales[index]
        factors, normals = self._parts(index, to.numel())
        factors, normals = factors.to(to), normals.to(to)
        whole = to.numel() // WIDTH * WIDTH
        flat = to.view(-1)
        flat[:whole].view(-1, WIDTH).addcmul_(
            factors[: whole // WIDTH, None], normals, value=weight
        )
        rest = flat[whole:]
        rest.addcmul_(factors[-1], normals[: len(rest)], value=weight)
        if kept is not None:
            to[rows] = kept
        return to

    def dot(self, index: int, row: Tensor) -> float:
        """Multiply its entries in one parameter with something of the same shape."""
        if any(at == index for at, _ in self.fixed):
            own = self.add(index, torch.zeros(row.shape, dtype=torch.float64))
            return float((own * row.to(own)).sum())
        factors, normals = self._parts(index, row.numel())
        found = float(_projected(row, factors[None], normals[None])[0])
        return self.scales[index] * found

    def _parts(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """Give ``g`` and ``n`` of one parameter, in float64."""
        return _parts(self.seed, index, -(-size // WIDTH))


@dataclass(frozen=True, slots=True)
class Projections:
    """Projections on `PROJECTIONS` directions, parameter by parameter."""

    seed: int

    def of(self, index: int, row: Tensor) -> Tensor:
        """Project a gradient or a product in one parameter.

        Args:
            index: The index of the parameter.
            row: In the parameter's shape, on any device.

        Returns:
            ``[PROJECTIONS]``, in float64 on the CPU.
        """
        count = -(-row.numel() // WIDTH)
        parts = [_parts(self.seed + k, index, count) for k in range(PROJECTIONS)]
        factors, normals = (torch.stack(p) for p in zip(*parts, strict=True))
        return _projected(row, factors, normals)


def _projected(row: Tensor, factors: Tensor, normals: Tensor) -> Tensor:
    """Multiply with directions ``factors: [K, rows]`` times ``normals: [K, WIDTH]``."""
    factors, normals = factors.to(row.device), normals.to(row.device)
    found = torch.zeros(len(factors), dtype=torch.float64, device=row.device)
    for at, chunk in _chunks(row):
        width = chunk.shape[1]
        inner = chunk.double() @ normals[:, :width].T
        found += (inner.T * factors[:, at : at + len(chunk)]).sum(1)
    return found.cpu()


def _chunks(row: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Cut what is projected into rows of the pattern; yield the first one's index, too."""
    flat = row.detach().reshape(-1)
    whole = flat.numel() // WIDTH
    rows = flat[: whole * WIDTH].view(whole, WIDTH)
    for at in range(0, whole, _ROWS):
        yield at, rows[at : at + _ROWS]
    if flat.numel() > whole * WIDTH:
        yield whole, flat[whole * WIDTH :][None]


def _parts(seed: int, index: int, rows: int) -> tuple[Tensor, Tensor]:
    # note: torch's generator reads 32 bits of a seed, the lowest.
    generator = torch.Generator().manual_seed((seed + 1_000_003 * index) % 2**32)
    start = int(torch.randint((_POOL - 1) * WIDTH, (), generator=generator))
    signs = 2.0 * torch.randint(2, (max(rows, 1),), generator=generator) - 1.0
    sizes = torch.randint(-1, 2, (max(rows, 1),), generator=generator)
    factors = signs.double() * torch.exp2(sizes.double())
    return factors, _pool(seed)[start : start + WIDTH]


@functools.lru_cache(maxsize=2 * PROJECTIONS)
def _pool(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed % 2**32)
    normals = torch.randn(_POOL * WIDTH, generator=generator)
    return normals.bfloat16().double()


def power_of_two(parameter: Tensor) -> float:
    """Round the typical size of a parameter's entries.

    It is not too small if all are zero, and 1 if some are not finite, which is refused
    elsewhere.
    """
    if not parameter.numel():
        return 0.0
    size = max(norm(parameter) / math.sqrt(parameter.numel()), 1e-2)
    return 2.0 ** round(math.log2(size)) if math.isfinite(size) else 1.0
