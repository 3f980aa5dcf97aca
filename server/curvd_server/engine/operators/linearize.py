"""Linearisations: a curvature operator's action at one mini-batch, made once.

A linearisation runs everything that does not depend on the multiplied vector, and
multiplies any number of vectors at the cost of the linear part alone. There
are several modes, equal in exact arithmetic:

* ``program``: ``jvp(grad)`` traced once and evaluated up to the tangents; see `program`.
* ``replayed_program``: the same, captured as a CUDA graph; only where there is CUDA.
* ``double_backward``: the graph of the gradient is kept; a product walks it backwards
  (Pearlmutter, Neural Computation 6, 1994, as reverse over reverse). It runs in C++
  without Python or the GIL, which wins where operations are tiny.
* ``forward_over_reverse``: ``jvp(grad)``; keeps nothing, recomputes all.

Restricted to a block, the first two visit only what lies between the block's layers
and the loss, so the blocks share forward and first backward work.

Rows come as one tensor per parameter, or None for zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvd.contract import OperatorSpec
from curvd_server.engine.objective import Batch, Problem
from curvd_server.engine.operators.protocol import Linearisation
from curvd_server.engine.operators.registry import definition
from curvd_server.engine.program import (
    HessianProgram,
    JacobianProgram,
    ReplayedProgram,
    held_bytes,
)
from curvd_server.system import yield_point

ADMode = Callable[[Problem, OperatorSpec, Batch], Linearisation]


def program(
    problem: Problem, spec: OperatorSpec, batch: Batch
) -> HessianProgram | JacobianProgram:
    """Linearise by partial evaluation."""
    return definition(spec.kind).program(problem, spec, batch)


def replayed_program(
    problem: Problem, spec: OperatorSpec, batch: Batch
) -> ReplayedProgram:
    """Linearise by partial evaluation, and launch the linear rest as one."""
    return ReplayedProgram(program(problem, spec, batch))


def double_backward(
    problem: Problem, spec: OperatorSpec, batch: Batch
) -> Linearisation:
    """Keep the graph whose backward pass is the product."""
    with problem.model.recording(problem.parameters):
        return definition(spec.kind).double_backward(problem, spec, batch)


def forward_over_reverse(
    problem: Problem, spec: OperatorSpec, batch: Batch
) -> Linearisation:
    """Keep nothing; differentiate in forward mode at every product."""
    return definition(spec.kind).forward_over_reverse(problem, spec, batch)


def cached_bytes(mode: str, problem: Problem, spec: OperatorSpec, batch: Batch) -> int:
    """Measure the memory that keeping a linearisation holds.

    Counts the storages saved in the graph that are neither parameters nor data, in a
    graph made for the purpose: hooks would slow every later product down.

    Args:
        mode: Name in `MODES`.
        problem: The objective.
        spec: The operator.
        batch: The mini-batch to linearise.

    Returns:
        Bytes; 0 for a mode that keeps nothing.
    """
    if mode == "forward_over_reverse":
        return 0
    own = (*problem.parameters, *problem.model.constants.values(), *batch.inputs)
    known = {t.untyped_storage().data_ptr() for t in own}
    if mode in TRACED:
        held = held_bytes(program(problem, spec, batch), known)
        places = 2 * sum(p.nbytes for p in problem.parameters)  # tangents and rows
        return held + (places if mode == "replayed_program" else 0)
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would make a reference cycle

    yield_point()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        MODES[mode](problem, spec, batch)
    seen |= {at: n for at, n in problem.model.kept().items() if at not in known}
    return sum(seen.values())


def block_ranges(spec: OperatorSpec, parameters: int) -> list[range]:
    """List the parameter indices of each diagonal block; one block if there is none."""
    if spec.block_sizes is None:
        return [range(parameters)]
    blocks, start = [], 0
    for size in spec.block_sizes:
        blocks.append(range(start, start + size))
        start += size
    return blocks


MODES: dict[str, ADMode] = {
    "program": program,
    "double_backward": double_backward,
    "forward_over_reverse": forward_over_reverse,
}
"""By name, the usually fastest first."""
if torch.cuda.is_available():
    MODES["replayed_program"] = replayed_program
TRACED = frozenset({"program", "replayed_program"})
"""Those whose work depends on the shapes of a mini-batch, and on the block."""
