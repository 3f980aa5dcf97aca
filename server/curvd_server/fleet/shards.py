"""How mini-batches are cut into shards, and shards are given to workers.

Shards depend on the data and on a setting alone, and partial products are added in the
order of shards. So bits do not depend on how many workers there are, nor on which of them
had to be started anew.
"""

from __future__ import annotations

import itertools

from curvd_server.fleet.messages import Part


def cut(batches: int, shards: int) -> tuple[Part, ...]:
    """Cut mini-batches into consecutive shards, as even as can be.

    Args:
        batches: Mini-batches of the dataset.
        shards: How many shards; fewer if there are fewer mini-batches.

    Returns:
        The shards in order; none is empty.

    Examples:
        >>> [(part.start, part.stop) for part in cut(5, 2)]
        [(0, 2), (2, 5)]
    """
    count = min(batches, shards)
    bounds = [index * batches // count for index in range(count + 1)]
    pairs = itertools.pairwise(bounds)
    return tuple(
        Part(index=index, start=start, stop=stop)
        for index, (start, stop) in enumerate(pairs)
    )


def one_each(batches: int, workers: int) -> dict[int, tuple[Part, ...]]:
    """Give each worker consecutive mini-batches, as even as can be.

    Args:
        batches: Mini-batches of the dataset.
        workers: How many workers there are.

    Returns:
        A shard for each, by rank; empty ones if there are fewer mini-batches.

    Examples:
        >>> [(p.start, p.stop) for (p,) in one_each(1, 2).values()]
        [(0, 0), (0, 1)]
    """
    bounds = [rank * batches // workers for rank in range(workers + 1)]
    pairs = enumerate(itertools.pairwise(bounds))
    return {i: (Part(index=i, start=start, stop=stop),) for i, (start, stop) in pairs}


def segments(size: int, shards: int, workers: int) -> dict[int, tuple[Part, ...]]:
    """Cut vectors as data is, and give their segments to workers.

    Args:
        size: P.
        shards: How many there are of the data.
        workers: How many workers there are.

    Returns:
        The segments of each worker by its rank, in elements.
    """
    return deal(cut(size, shards), workers)


def deal(parts: tuple[Part, ...], workers: int) -> dict[int, tuple[Part, ...]]:
    """Give consecutive shards to workers, as even as can be.

    Args:
        parts: The shards in order.
        workers: How many workers there are.

    Returns:
        The shards of each worker by its rank; workers beyond the shards have none.

    Examples:
        >>> {rank: len(parts) for rank, parts in deal(cut(9, 4), 3).items()}
        {0: 1, 1: 1, 2: 2}
    """
    busy = min(workers, len(parts))
    bounds = [rank * len(parts) // busy for rank in range(busy + 1)]
    return {rank: parts[bounds[rank] : bounds[rank + 1]] for rank in range(busy)}
