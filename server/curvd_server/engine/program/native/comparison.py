"""Whether native code takes a program's place: it must be right, and faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curvd_server.system import logger

WORTH = 0.97
"""Native code must need less than this share of the program's time."""
AGREEMENT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far its rows may be from the program's; both round differently."""

Native = Callable[..., Sequence[Tensor | None]]


def is_better(program: Native, native: Native, arguments: list[Tensor]) -> bool:
    """Compare native code with its program: every row, and the time of both.

    Args:
        program: What computes now.
        native: What would.
        arguments: Of both.

    Returns:
        Whether it is right, and faster.
    """
    calls = program, native
    with torch.no_grad():
        want, got = (call(*arguments) for call in calls)
        for w, g in zip(want, got, strict=True):
            if w is None and g is None:
                continue
            if w is None or g is None:
                logger().warning("native code is wrong", gap=None)
                return False
            gap = float((g.double() - w.double()).norm())
            if not gap <= AGREEMENT[w.dtype] * float(w.double().norm()) + 1e-300:
                logger().warning("native code is wrong", gap=gap)
                return False
        rounds = list(_race(calls, arguments))
    share = min(b for _, b in rounds) / max(min(a for a, _ in rounds), 1e-9)
    if share >= WORTH:
        logger().info("native code is no faster", share=round(share, 3))
    return share < WORTH


def _race(
    calls: tuple[Native, Native], arguments: list[Tensor]
) -> Iterator[tuple[float, float]]:
    """Time both in turn, a few rounds; on a CPU other threads' work does not count."""
    on_gpu = arguments[0].is_cuda
    clock = time.perf_counter if on_gpu else time.thread_time

    def seconds(call: Native) -> float:
        start = clock()
        call(*arguments)
        if on_gpu:
            torch.cuda.synchronize(arguments[0].device)
        return clock() - start

    for _ in range(4):
        yield seconds(calls[0]), seconds(calls[1])


def aligned(native: Native) -> Native:
    """Copy what starts in the middle of a vector: GPU kernels load 16 bytes at once.

    Args:
        native: Code that takes only what starts at a multiple of them.

    Returns:
        Code that takes all.
    """

    def call(*arguments: Tensor) -> Sequence[Tensor | None]:
        return native(
            *(
                t.clone() if t.is_cuda and t.data_ptr() % 16 else t  # keeps strides
                for t in arguments
            )
        )

    return call
