"""On a CUDA device every layer's product is the CPU's in every mode, and memory comes back.

Run with ``make gpu-test`` on a machine that has one, together with what tests of other
files do there (`support.places`).
"""

from __future__ import annotations

import gc

import pytest
import torch
from support.reference import columns, error
from support.zoo import ANIMALS, Animal

from curvd.contract.enums import Dtype
from curvd.contract.specs import DatasetSpec, OperatorSpec
from curvd_server.engine.building import build
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.operators.linearize import MODES
from curvd_server.engine.tuning.plan import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HUGE = 2**30


def problem_on(device: str, animal: Animal, dtype: Dtype = Dtype.FLOAT64) -> Problem:
    data = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    torch.manual_seed(0)
    return Problem.load(
        animal.module(),
        {},
        animal.arrays(),
        data,
        animal.loss,
        animal.mode,
        dtype,
        device,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)
def test_products_are_those_of_the_cpu(animal: Animal, mode: str):
    for kind in ("hessian", "ggn"):
        spec, plan = OperatorSpec(kind=kind), Plan(mode)
        here, there = problem_on("cpu", animal), problem_on("cuda", animal)
        V = columns(here, 3)
        want = build(here, spec, budget_bytes=HUGE).apply(V)
        operator = build(there, spec, budget_bytes=HUGE, plan=plan)
        got = operator.apply(V)
        assert got.is_cuda
        assert error(got.cpu(), want) < 1e-9
        assert torch.equal(operator.apply(V), got)


def test_memory_comes_back():
    gelu = next(a for a in ANIMALS if a.name == "gelu")
    gc.collect()
    before = torch.cuda.memory_allocated()
    problem = problem_on("cuda", gelu)
    operator = build(problem, OperatorSpec(), budget_bytes=HUGE)
    operator.apply(columns(problem, 40))
    assert torch.cuda.memory_allocated() > before
    operator.close()
    del operator, problem
    gc.collect()
    assert torch.cuda.memory_allocated() == before
