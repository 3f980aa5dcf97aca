"""A replayed program is the program: rows at fixed places, computed again by one call."""

from __future__ import annotations

import pytest
import torch
from support.places import OTHERS, STANDIN
from support.reference import problem_of
from support.zoo import ANIMALS

from curvd.contract.specs import OperatorSpec
from curvd_server.engine.operators import linearize
from curvd_server.engine.program.replay import ReplayedProgram, cuda_graph

ZOO = {animal.name: animal for animal in ANIMALS}
off_the_cpu = pytest.mark.parametrize("place", OTHERS, indirect=True)


def again(run):
    """Capture as CUDA does: the same places each time, and nothing new is looked at."""
    rows = run()

    def replay():
        for row, new in zip(rows, run(), strict=True):
            if row is not None:
                row.copy_(new)

    return rows, replay


def refusing(run):
    msg = "operation not permitted when stream is capturing"
    raise RuntimeError(msg)


def tangents_of(problem, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        for p in problem.parameters
    ]


@off_the_cpu
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ["gelu", "unused"])
def test_rows_are_the_programs_for_every_vector_and_block(place, name, kind):
    problem = problem_of(ZOO[name])
    spec, count = OperatorSpec(kind=kind), len(problem.parameters)
    program = linearize.program(problem, spec, problem.data[0])
    capture = cuda_graph if place == "cuda" else again
    replayed = ReplayedProgram(program, capture)
    for seed in range(3):
        for block in (range(count), range(1, count)):
            tangents = tangents_of(problem, seed)[block.start : block.stop]
            want = program.product(tangents, block, batched=False)
            got = replayed.product(tangents, block, batched=False)
            for w, g in zip(want, got, strict=True):
                assert (w is None) == (g is None)
                if w is not None:
                    torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)


@off_the_cpu
def test_columns_that_go_together_are_not_replayed(place):
    problem = problem_of(ZOO["gelu"])
    program = linearize.program(problem, OperatorSpec(), problem.data[0])
    replayed, whole = ReplayedProgram(program, refusing), range(len(problem.parameters))
    columns = [torch.stack((t, 2 * t)) for t in tangents_of(problem, 0)]
    want = program.product(columns, whole, batched=True)
    got = replayed.product(columns, whole, batched=True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert not replayed._captured


@pytest.mark.parametrize("place", [STANDIN], indirect=True)
def test_what_cannot_be_captured_runs_as_it_is(place):
    problem = problem_of(ZOO["gelu"])
    program = linearize.program(problem, OperatorSpec(), problem.data[0])
    replayed, whole = ReplayedProgram(program, refusing), range(len(problem.parameters))
    for seed in range(2):
        tangents = tangents_of(problem, seed)
        want = program.product(tangents, whole, batched=False)
        got = replayed.product(tangents, whole, batched=False)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_nothing_is_captured_on_the_cpu_and_without_cuda_it_is_no_mode():
    problem = problem_of(ZOO["gelu"])
    program = linearize.program(problem, OperatorSpec(), problem.data[0])
    tangents, whole = tangents_of(problem, 0), range(len(problem.parameters))
    replayed = ReplayedProgram(program, refusing)
    want = program.product(tangents, whole, batched=False)
    got = replayed.product(tangents, whole, batched=False)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert not replayed._captured
    assert ("replayed_program" in linearize.MODES) == torch.cuda.is_available()
