"""Tiers: the first is as right as the last, and neither answers unverified."""

from __future__ import annotations

import pytest
import torch
from support.reference import central_difference, columns, error, problem_of
from support.zoo import ANIMALS, REFUSED, Animal

from curvd.contract.enums import OperatorKind, Tier
from curvd.contract.specs import OperatorSpec
from curvd.errors import CurvatureUnverified
from curvd_server.engine.building import build, improve
from curvd_server.engine.operator import Operator
from curvd_server.engine.operators import LINEARISED, linearize
from curvd_server.engine.program import linear_program
from curvd_server.engine.tuning.plan import UNPREPARED
from curvd_server.engine.verification.finite_differences import FiniteDifferences

HUGE = 2**30
GELU = next(a for a in ANIMALS if a.name == "gelu")


def first(animal: Animal, spec: OperatorSpec | None = None) -> Operator:
    """The first tier of an animal's operator."""
    return build(
        problem_of(animal),
        spec or OperatorSpec(),
        budget_bytes=HUGE,
        tier=Tier.FIRST,
    )


def last(operator: Operator) -> Operator:
    """Its last tier; the clock has no say in which plan that is."""
    return improve(operator, budget_bytes=HUGE, tuning_s=0.0)


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)
def test_both_tiers_of_every_layer_equal_central_differences(animal: Animal):
    operator = first(animal)
    assert (operator.tier, operator.report.tier) == (Tier.FIRST, Tier.FIRST)
    V = columns(operator.problem, 2)
    want = torch.stack([central_difference(operator.problem, v) for v in V])
    assert error(operator.apply(V), want) < 1e-7
    final = last(operator)
    assert final.report.tier is Tier.FINAL
    assert error(final.apply(V), want) < 1e-7


@pytest.mark.parametrize("kind", sorted(LINEARISED))
def test_both_tiers_agree_on_every_operator(kind: OperatorKind):
    samples = {"mc_samples": 2} if kind is OperatorKind.FISHER else {}
    operator = first(GELU, OperatorSpec(kind=kind, **samples))
    V = columns(operator.problem, 2)
    assert error(operator.apply(V), last(operator).apply(V)) < 1e-10


def crooked(right):
    """A mode whose first row is one per cent off."""

    def mode(problem, spec, batch):
        linear = right(problem, spec, batch)

        class Crooked:
            def product(self, tangents, block, *, batched):
                rows = linear.product(tangents, block, batched=batched)
                return [rows[0] * 1.01, *rows[1:]]

        return Crooked()

    return mode


def test_a_wrong_mode_answers_in_no_tier(monkeypatch: pytest.MonkeyPatch):
    wrong = crooked(linearize.double_backward)
    monkeypatch.setitem(linearize.MODES, "double_backward", wrong)
    operator = first(GELU)
    assert operator.plan.mode == "forward_over_reverse"
    assert last(operator).plan.mode != "double_backward"


def test_where_no_mode_without_preparation_is_right_the_first_answer_is_final(
    monkeypatch: pytest.MonkeyPatch,
):
    for name in UNPREPARED:
        wrong = crooked(linearize.MODES[name])
        monkeypatch.setitem(linearize.MODES, name, wrong)
    operator = first(GELU)
    assert (operator.plan.mode, operator.tier) == ("program", Tier.FINAL)


def test_what_no_mode_computes_right_is_refused_by_the_first_tier():
    with pytest.raises(CurvatureUnverified, match="direction"):
        first(REFUSED)


def test_a_mode_that_went_wrong_since_is_refused_by_the_last_tier(
    monkeypatch: pytest.MonkeyPatch,
):
    operator = first(GELU)
    monkeypatch.setitem(linearize.MODES, "program", crooked(linearize.program))
    assert last(operator).plan.mode in UNPREPARED


def test_the_first_tier_traces_and_times_nothing(monkeypatch: pytest.MonkeyPatch):
    def never(*args, **kwargs):
        raise AssertionError("a first tier was prepared")

    monkeypatch.setattr(linear_program, "trace", never)
    monkeypatch.setattr("curvd_server.engine.tuning.plan.ranked", never)
    assert first(GELU).plan.mode == "double_backward"


def test_both_tiers_are_compared_with_the_same_differences(
    monkeypatch: pytest.MonkeyPatch,
):
    made = []
    quotient = FiniteDifferences.quotient

    def counted(self, spec, step):
        made.append(step)
        return quotient(self, spec, step)

    monkeypatch.setattr(FiniteDifferences, "quotient", counted)
    operator = first(GELU)
    last(operator)
    assert len(made) == len(set(made)) >= 1


def test_the_first_tier_has_the_same_bits_each_time():
    operator = first(GELU)
    V = columns(operator.problem, 1)
    assert torch.equal(operator.apply(V), operator.apply(V))


def test_the_first_tier_gives_its_linearisations_back():
    operator = first(GELU)
    assert operator.counters.linearisations
    final = last(operator)
    assert operator._cache.is_empty()
    assert not final._cache.is_empty()
