"""With how many threads a plan is fastest: measured by the wall, which callers wait for."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from curvd.contract import OperatorSpec
from curvd_server.engine.objective import Problem, tangents_of
from curvd_server.engine.operators import MODES, block_ranges
from curvd_server.engine.threads import computing_with, most_threads
from curvd_server.engine.tuning.autotune import Plan
from curvd_server.system import yield_point

SHORT_S = 5e-3
"""A product of one mini-batch that takes less on one thread stays there: what more threads
could save is less than they cost where other processes want the cores."""
WORTH = 0.8
"""Share of the time on one thread below which all of them are used."""
_RUNS = 3


def measured_threads(problem: Problem, spec: OperatorSpec, plan: Plan) -> int:
    """Find out whether a plan is faster with one thread or with all.

    Args:
        problem: The objective.
        spec: The operator.
        plan: A plan that is right.

    Returns:
        1, or 0 for all there are.
    """
    if problem.device.type != "cpu" or most_threads() == 1:
        return 0
    work = problem.joined(plan.batches_at_once)
    yield_point()
    linear = MODES[plan.mode](work, spec, work.data[0])
    shape = (*((plan.columns_at_once,) if plan.batched else ()), problem.layout.size)
    columns = torch.ones(shape, dtype=problem.dtype)
    tangents = tangents_of(columns, problem.layout)

    def product() -> None:
        for block in block_ranges(spec, len(problem.parameters)):
            cut = tangents[block.start : block.stop]
            linear.product(cut, block, batched=plan.batched)

    alone_s = _seconds(product, 1)
    if alone_s < SHORT_S * plan.columns_at_once:
        return 1
    return 0 if _seconds(product, 0) < WORTH * alone_s else 1


def _seconds(product: Callable[[], None], threads: int) -> float:
    """Best time of a few; the first warms caches and the pool of threads."""
    found = []
    for _ in range(_RUNS):
        yield_point()
        with computing_with(threads):
            start = time.perf_counter()
            product()
            found.append(time.perf_counter() - start)
    return min(found)
