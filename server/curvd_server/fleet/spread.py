"""Algorithms that run on all workers at once: what the front does for them.

Every worker runs the same program on its segments of all vectors (`programs`). The front
knows where it is, not what it does: it adds sums in the order of segments, has products
computed as for anybody else, in the device's turn, and hands out the parts. Before it does
any of that it has heard all workers, and that they have come to the same place by the same
numbers; so nobody waits in half a reduction, and none goes another way in silence.

Of a program nothing is kept but what it was given. When a worker is lost it begins again,
from the same vectors, and finds the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from curvd.errors import Unavailable
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Array, Frame
from curvd_server.fleet.fleet import Fleet
from curvd_server.fleet.packing import Packed, pack, unpack
from curvd_server.fleet.seats import Lost, Request
from curvd_server.linalg import Products, Query
from curvd_server.system import logger

R = TypeVar("R")

ATTEMPTS = 4
"""How often a program is begun before its caller is told."""


class Parted(Exception):
    """Workers have come to different places, or by different numbers."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Runs algorithms on the workers of a fleet.

    Args:
        fleet: The workers.
        segments: Of vectors, by rank, in elements.
    """

    fleet: Fleet
    segments: Mapping[int, tuple[messages.Part, ...]]

    def __call__(
        self,
        products: Products,
        algorithm: Callable[..., Query[R]],
        arguments: Mapping[str, Any],
    ) -> Query[R]:
        """Make an algorithm, not begun, that runs on all workers.

        Args:
            products: The map; multiplies here.
            algorithm: The algorithm.
            arguments: What it takes beside the map.

        Yields:
            Its progress.

        Returns:
            Its result, with whole vectors.

        Raises:
            Unavailable: If workers were lost, or parted, again and again.
        """
        given, why = pack(arguments), ""
        for _ in range(ATTEMPTS):
            try:
                result: R = yield from self._attempt(products, algorithm, given)
            except (Lost, Parted) as error:
                why = str(error)
                logger().warning("query restarts", query=algorithm.__name__, why=why)
            else:
                return result
        msg = (
            f"this query was begun {ATTEMPTS} times and could not be ended, last because "
            f"{why}; nothing of it is kept but what it was given, so call again, and look "
            "at the server's log"
        )
        raise Unavailable(msg)

    def _attempt(
        self, products: Products, algorithm: Callable[..., Query[R]], given: Packed
    ) -> Query[R]:
        def cancelled() -> bool:
            products.expired()  # raises if nobody wants the result any more
            return False

        fleet = self.fleet
        program = fleet.next_number()
        try:
            only = fleet.there(self.segments, cancelled=cancelled)
            requests = self._begin(program, products, algorithm.__name__, given)
            while True:
                frames = fleet.all(requests, cancelled=cancelled, only=only)
                paused, small, parts = _agreed(frames)
                yield from paused.progress
                if paused.asks[0] == "result":
                    found: R = _result(paused, small, parts, products)
                    return found
                arrays = self._answer(paused.asks[0], parts, products)
                message = messages.Resume(program=program, expired=products.expired())
                requests = {
                    rank: Request(message, arrays[rank]) for rank in self.segments
                }
        finally:
            fleet.forget(messages.End(program=program))

    def _begin(
        self, program: int, products: Products, name: str, given: Packed
    ) -> dict[int, Request]:
        """Write what each worker begins."""
        vectors = [vector.cpu().numpy() for vector in given.vectors]
        return {
            rank: Request(
                messages.Begin(
                    program=program,
                    algorithm=name,
                    arguments=given.text,
                    small=len(given.small),
                    size=products.size,
                    dtype=str(products.dtype).removeprefix("torch."),
                    segments=parts,
                    limit=products.limit,
                    expired=products.expired(),
                ),
                [
                    *given.small,
                    *(v[..., p.start : p.stop] for p in parts for v in vectors),
                ],
            )
            for rank, parts in self.segments.items()
        }

    def _answer(
        self, ask: messages.Ask, parts: Sequence[Sequence[Array]], products: Products
    ) -> Mapping[int, Sequence[Array]]:
        """Compute what lets the members go on.

        Args:
            ask: What they need.
            parts: What each has, in the order of segments.
            products: The map.

        Returns:
            The arrays for each rank.
        """
        given = [array for (array,) in parts]
        if ask == "sum":
            total = given[0].copy()
            for other in given[1:]:
                total += other
            return {rank: [total] for rank in self.segments}
        whole = np.concatenate(given, axis=-1)
        if ask == "join":
            return {rank: [whole] for rank in self.segments}
        rows = products(torch.from_numpy(whole).to(products.device)).cpu().numpy()
        return {
            rank: [rows[:, part.start : part.stop] for part in own]
            for rank, own in self.segments.items()
        }


def _agreed(
    frames: Mapping[int, Frame],
) -> tuple[messages.Paused, Sequence[Array], list[Sequence[Array]]]:
    """Compare what the workers say.

    Args:
        frames: Their answers by rank.

    Returns:
        What the first says, its small arrays, and the arrays of all segments.

    Raises:
        Parted: If they are not at the same place, by the same numbers.
    """
    places, parts, first = set(), list[Sequence[Array]](), None
    for rank in sorted(frames):
        message, arrays = frames[rank].message, frames[rank].arrays
        assert isinstance(message, messages.Paused)
        places |= set(zip(message.asks, message.digests, strict=True))
        own = arrays[message.small :]
        each = len(own) // len(message.asks)
        parts += [own[i * each : (i + 1) * each] for i in range(len(message.asks))]
        first = first or (message, arrays[: message.small])
    if len(places) > 1:
        msg = (
            "workers computed different numbers from the same sums, which those on "
            "processors of different kinds may"
        )
        raise Parted(msg)
    assert first is not None
    return *first, parts


def _result(
    paused: messages.Paused,
    small: Sequence[Array],
    parts: Sequence[Sequence[Array]],
    products: Products,
) -> Any:
    """Put a result together: its vectors are whole again."""
    whole: list[Tensor] = [
        torch.from_numpy(np.concatenate(arrays, axis=-1)).to(products.device)
        for arrays in zip(*parts, strict=True)
    ]
    return unpack(paused.result, whole, small)
