"""Vectors of whole parameters, and the slices of them that workers have.

A worker's slice of a vector is what its shards are of the parameters: a piece of each,
filled up with zeros, one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from curvd.contract import ParameterLayout
from curvd_server.device.protocols import Array
from curvd_server.engine.sharding import length_of


class Slices:
    """How vectors are cut.

    Args:
        layout: Of whole vectors.
        world: Workers that have a slice each.
    """

    def __init__(self, layout: ParameterLayout, world: int) -> None:
        self._layout, self._world = layout, world
        self.size = sum(length_of(p.size, world) for p in layout.parameters)
        """Elements of a slice."""

    def of(self, columns: Array, rank: int) -> Array:
        """Cut columns.

        Args:
            columns: ``[K, P]``.
            rank: Whose slice.

        Returns:
            ``[K, size]``, in memory of its own.
        """
        found = np.zeros((len(columns), self.size), columns.dtype)
        for here, there in self._places(rank):
            found[:, here] = columns[:, there]
        return found

    def whole(self, slices: Mapping[int, Array]) -> Array:
        """Put slices together.

        Args:
            slices: ``[K, size]`` of each rank.

        Returns:
            ``[K, P]``.
        """
        first = slices[0]
        found = np.empty((len(first), self._layout.size), first.dtype)
        for rank, rows in slices.items():
            for here, there in self._places(rank):
                found[:, there] = rows[:, here]
        return found

    def _places(self, rank: int) -> Iterator[tuple[slice, slice]]:
        """List where pieces lie in a slice, and in a whole vector."""
        start = 0
        for p in self._layout.parameters:
            length = length_of(p.size, self._world)
            first = min(rank * length, p.size)
            count = min(length, p.size - first)
            at = p.offset + first
            yield slice(start, start + count), slice(at, at + count)
            start += length
