"""What the child reads is what the server runs."""

from __future__ import annotations

import pytest
import torch
from support.reference import problem_of
from support.zoo import ANIMALS

from curvd.contract.specs import OperatorSpec
from curvd_server.engine.operators.linearize import program
from curvd_server.engine.program.native.writing import describe, rebuild


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)
def test_a_program_survives_being_written(animal):
    """What the child reads is what this process runs, to the bit."""
    problem = problem_of(animal)
    for kind in ("hessian", "ggn"):
        linear = program(problem, OperatorSpec(kind=kind), problem.data[0])
        for task in linear.tasks(range(len(problem.parameters))):
            arguments = task.arguments()
            text = describe(task.kernel.module.graph, arguments)
            module, examples = rebuild(text)
            assert [(t.shape, t.stride(), t.dtype) for t in examples] == [
                (t.shape, t.stride(), t.dtype) for t in arguments
            ]
            with torch.no_grad():
                want = task.kernel.module(*arguments)
                got = module(*arguments)
            for a, b in zip(want, got, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
