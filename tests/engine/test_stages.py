"""Building an operator says which stage it is in, and how far."""

from __future__ import annotations

import pytest
from support.reference import problem_of
from support.zoo import ANIMALS

from curvd.contract import OperatorSpec, Stage, StageProgress, Tier, Work
from curvd_server.engine.building import build, improve
from curvd_server.engine.operators import MODES
from curvd_server.engine.verification.verify import STEPS
from curvd_server.system import Ongoing

GELU = next(a for a in ANIMALS if a.name == "gelu")
HUGE = 2**30


@pytest.fixture
def ongoing() -> Ongoing:
    return Ongoing(Work.BUILDING)


def told(ongoing: Ongoing) -> list[StageProgress]:
    """What was said, without the waiting before."""
    return [p for p in ongoing.news() if p.stage is not Stage.WAITING]


def test_a_first_tier_is_verified_and_warmed(ongoing: Ongoing):
    problem = problem_of(GELU)
    with ongoing.here():
        build(problem, OperatorSpec(), budget_bytes=HUGE, tier=Tier.FIRST)
    verifying, warming = told(ongoing)
    assert (verifying.stage, verifying.detail) == (Stage.VERIFYING, "double_backward")
    # One comparison of two products, and at least one with central differences.
    assert 2 <= verifying.done <= verifying.total == 1 + len(STEPS)
    assert warming.stage is Stage.WARMING
    assert warming.done == warming.total == problem.batches


def test_a_last_tier_is_tuned_verified_and_warmed(ongoing: Ongoing):
    problem = problem_of(GELU)
    first = build(problem, OperatorSpec(), budget_bytes=HUGE, tier=Tier.FIRST)
    with ongoing.here():
        final = improve(first, budget_bytes=HUGE, tuning_s=0.5)
    stages = told(ongoing)
    assert list(dict.fromkeys(p.stage for p in stages)) == [
        Stage.TUNING,
        Stage.VERIFYING,
        Stage.WARMING,
    ]
    tuning = stages[0]
    assert len(MODES) <= tuning.total
    assert tuning.done < tuning.total
    assert tuning.detail.partition("/")[0] in MODES
    assert any(p.detail.startswith(final.plan.mode) for p in stages[1:-1])


def test_a_plan_that_is_known_is_not_tuned(ongoing: Ongoing):
    problem, memory = problem_of(GELU), {}
    spec = OperatorSpec()
    build(problem, spec, budget_bytes=HUGE, memory=memory, tuning_s=0.0)
    with ongoing.here():
        build(problem, spec, budget_bytes=HUGE, memory=memory)
    assert Stage.TUNING not in {p.stage for p in told(ongoing)}
