"""Mini-batches that are computed because others compute theirs, and count nothing."""

import pytest
import torch
from support.reference import columns, problem_of
from support.zoo import ANIMALS

from curvd.contract import OperatorKind, OperatorSpec
from curvd_server.engine.building import build
from curvd_server.engine.sharding import in_step
from curvd_server.engine.tuning.plan import Plan

GELU = next(a for a in ANIMALS if a.name == "gelu")
KINDS = [k for k in OperatorKind if k not in (OperatorKind.KFAC, OperatorKind.EKFAC)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["double_backward", "program"])
def test_they_add_nothing_to_any_operator(kind, mode):
    problem = problem_of(GELU, batch_size=2)
    spec = OperatorSpec(kind=kind)
    longer = in_step(problem, problem.batches, problem.batches + 3)
    assert longer.batches == problem.batches + 3
    want, got = (
        build(p, spec, budget_bytes=1 << 30, plan=Plan(mode, 1), tuning_s=0.0).apply(
            columns(problem, 2)
        )
        for p in (problem, longer)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
