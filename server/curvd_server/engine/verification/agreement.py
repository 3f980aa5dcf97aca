"""Whether two modes agree in a session's own precision, on its mini-batches and blocks.

What reproduced the truth did so on an excerpt in float64. A mode whose work depends on shapes,
on the type or on the block is also held against another one where it will be used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvd.contract import OperatorSpec, Stage
from curvd_server.engine.objective import Batch, Problem, distance, norm, on_host
from curvd_server.engine.operators import Linearisation, block_ranges
from curvd_server.engine.program import Rows
from curvd_server.engine.verification.comparison import linearised, product, relative
from curvd_server.engine.verification.finite_differences import filled, scale_of
from curvd_server.system import advance, enter_stage

AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.5}
"""How far two correct modes may differ in a session's own precision."""


def disagreements(
    problem: Problem, spec: OperatorSpec, mode: str, reference: str, *, batched: bool
) -> tuple[str, ...]:
    """Compare two modes in the session's own precision, shapes and blocks.

    Args:
        problem: The objective.
        spec: The operator.
        mode: Name in `MODES` of the mode in question.
        reference: Of one that reproduced the truth.
        batched: Whether to examine the vectorised product.

    Returns:
        Names of the parameters whose rows disagree on some mini-batch.
    """
    tolerance = AGREEMENT[problem.dtype]
    generator = torch.Generator().manual_seed(4)
    tangents = [
        torch.randn(p.shape, generator=generator).mul_(scale_of(p)).to(p)
        for p in problem.parameters
    ]
    names, blocks = problem.layout.names, block_ranges(spec, len(tangents))
    wrong: list[str] = []
    batches = _one_of_each_shape(problem)
    enter_stage(Stage.VERIFYING, f"{mode} beside {reference}", total=len(batches))
    for batch in batches:
        ours, theirs = (linearised(m, problem, spec, batch) for m in (mode, reference))
        gaps = _disagreement(
            ours, theirs, blocks, tangents, floor=tolerance, batched=batched
        )
        wrong += [n for n, gap in zip(names, gaps, strict=True) if not gap <= tolerance]
        advance()
    return tuple(dict.fromkeys(wrong))


def _disagreement(
    ours: Linearisation,
    theirs: Linearisation,
    blocks: Sequence[range],
    tangents: Sequence[Tensor],
    *,
    floor: float,
    batched: bool,
) -> list[float]:
    """Compare the rows of two linearisations, block by block."""
    gaps, norms = list[float](), list[float]()
    for block in blocks:
        inside = tangents[block.start : block.stop]
        want = filled(product(theirs, inside, block, batched=False), inside)
        got = filled(_second_of(ours, inside, block, batched=batched), inside)
        gaps += map(distance, got, want)
        norms += map(norm, want)
        del want, got  # before the next block's
    return relative(gaps, norms, floor=floor)


def _second_of(
    linear: Linearisation, tangents: Sequence[Tensor], block: range, *, batched: bool
) -> Rows:
    """Multiply tangents, or two columns of them, and take the second's rows."""
    if not batched:
        return product(linear, tangents, block, batched=False)
    twice = [torch.stack((t, t)) for t in tangents]
    rows = product(linear, twice, block, batched=True)
    return [r if r is None else r[1] for r in rows]


def _one_of_each_shape(problem: Problem) -> list[Batch]:
    shapes = {
        tuple(t.shape for t in (*batch.inputs, batch.targets)): index
        for index, batch in enumerate(on_host(problem.data))
    }
    return [problem.data[index] for index in shapes.values()]
