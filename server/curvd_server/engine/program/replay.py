"""Replaying a program on a CUDA device: one call launches all its kernels.

A linear program is a straight line of kernels whose addresses never change once its
tangents and rows have fixed places, so it is captured as a CUDA graph. That saves the
launches, which are all that a small net's product costs. Untried: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvd_server.engine.program.linear_program import (
    HessianProgram,
    JacobianProgram,
    Rows,
)
from curvd_server.system import logger

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Rows]], tuple[Rows, Replay]]
"""Takes what a program does; gives its rows, and what computes them again in place."""
_WARM_UPS = 3
"""Runs before a capture, in which libraries make their handles and workspaces."""


def cuda_graph(run: Callable[[], Rows]) -> tuple[Rows, Replay]:
    """Capture what a function launches; see `Capture`."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads serve calls meanwhile; what they do is no part of it.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        rows = run()
    return rows, graph.replay


@dataclass(slots=True)
class ReplayedProgram:
    """A linearisation that replays its program; on the CPU it is the program."""

    program: HessianProgram | JacobianProgram
    capture: Capture = cuda_graph
    _captured: dict[range, tuple[list[Tensor], Rows, Replay] | None] = field(
        default_factory=dict
    )
    """Places of tangents and rows, by diagonal block; None: it cannot be captured."""

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        """Multiply one diagonal block; see `Linearisation`.

        Returns:
            Rows that the next product of the same block overwrites.
        """
        if batched or tangents[0].device.type == "cpu":
            return self.program.product(tangents, block, batched=batched)
        if block not in self._captured:
            self._captured[block] = self._recorded(tangents, block)
        found = self._captured[block]
        if found is None:
            return self.program.product(tangents, block, batched=False)
        places, rows, replay = found
        for place, tangent in zip(places, tangents, strict=True):
            place.copy_(tangent)
        replay()
        return list(rows)

    def _recorded(
        self, tangents: Sequence[Tensor], block: range
    ) -> tuple[list[Tensor], Rows, Replay] | None:
        places = [t.clone(memory_format=torch.contiguous_format) for t in tangents]
        try:
            rows, replay = self.capture(
                lambda: self.program.product(places, block, batched=False)
            )
        except RuntimeError as error:
            # What cannot be captured (a kernel that asks the host) runs as it is.
            logger().info("not captured", reason=str(error).partition("\n")[0][:300])
            return None
        return places, rows, replay
