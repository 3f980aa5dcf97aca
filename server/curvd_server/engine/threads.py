"""How many threads torch computes with: part of a plan, for small nets are slower with more.

OpenMP's threads meet after every operation, so on a busy machine each of a hundred short
operations waits until the last of them was given a core.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def _most() -> list[int]:
    return [torch.get_num_threads()]


def most_threads() -> int:
    """Say with how many threads large operations are computed."""
    return _most()[0]


def use_threads(count: int) -> None:
    """Set with how many threads large operations are computed.

    Args:
        count: How many; at least one.
    """
    _most()[0] = count
    torch.set_num_threads(count)


class computing_with:
    """Computes with so many threads inside, on this thread.

    Args:
        count: How many; 0: as many as there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count or most_threads()

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._before != self._count:
            torch.set_num_threads(self._count)

    def __exit__(self, *raised: object) -> None:
        if self._before != self._count:
            torch.set_num_threads(self._before)
