"""What products work with, whatever is multiplied."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray

from curvd.tensors import Pool
from curvd_server.config import LimitsConfig
from curvd_server.device import Batcher
from curvd_server.service.result_cache import ResultCache

T = TypeVar("T")

_SMALL_BYTES = 1 << 20
"""Up to here, work on an array is quicker than handing it to a thread."""


@dataclass(frozen=True, slots=True)
class ProductDependencies:
    """What all products of a server share."""

    batcher: Batcher
    """The queue of the device."""
    limits: LimitsConfig
    pool: Pool
    """Memory of operands, for the next ones."""
    results: ResultCache
    """Results that are kept for callers whose stream broke."""


async def off_the_loop(work: Callable[..., T], array: NDArray[Any], *args: Any) -> T:
    """Work on an array where it holds up no other call.

    Args:
        work: Called with the array and the arguments; on a thread if the array is large.
        array: Any.
        args: Whatever else it takes.

    Returns:
        What the work returns.
    """
    if array.nbytes <= _SMALL_BYTES:
        return work(array, *args)
    return await asyncio.to_thread(work, array, *args)
