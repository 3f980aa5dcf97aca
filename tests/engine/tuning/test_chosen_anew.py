"""A plan that was chosen on a busy machine is chosen anew when it is quiet."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from support.reference import columns, problem_of
from support.zoo import ANIMALS

from curvd.contract import OperatorSpec, Tier
from curvd_server.engine import choose_again, is_in_doubt
from curvd_server.engine.building import build, improve
from curvd_server.engine.tuning import autotune
from curvd_server.engine.tuning import plan as plans
from curvd_server.engine.tuning.autotune import Plan, PlanTimer
from curvd_server.engine.tuning.chosen_anew import BUSY

HUGE = 2**30
GELU = next(a for a in ANIMALS if a.name == "gelu")
SPEC = OperatorSpec()


class Machine:
    """What plans take, and how busy it is, both as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = {Plan("program"): 0.02, Plan("double_backward"): 0.01}
        self.busy, self.timed = 3.0, list[Plan]()
        # Steps of many mini-batches are too long: nothing is joined.
        monkeypatch.setattr(autotune, "LONGEST_STEP_S", 0.0)

        def pretend(timer: PlanTimer, plan: Plan) -> float | None:
            self.timed.append(plan)
            return self.seconds.get(plan)

        monkeypatch.setattr(PlanTimer, "seconds_per_column", pretend)
        monkeypatch.setattr(PlanTimer, "busy", property(lambda timer: self.busy))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def chosen(memory: dict[str, str]):
    """The last tier of an operator, chosen as busy as the machine is."""
    first = build(problem_of(GELU), SPEC, budget_bytes=HUGE, tier=Tier.FIRST)
    return improve(first, budget_bytes=HUGE, memory=memory, tuning_s=99)


def again(operator, memory: dict[str, str], *, quiet: bool = True):
    return choose_again(
        operator,
        budget_bytes=HUGE,
        memory=memory,
        tuning_s=99,
        quiet=lambda: quiet,
    )


def test_the_better_plan_takes_over_and_says_so(machine: Machine):
    memory: dict[str, str] = {}
    operator = chosen(memory)
    assert (operator.plan, operator.report.busy) == (Plan("double_backward"), 3.0)
    assert is_in_doubt(operator)
    machine.busy, machine.seconds[Plan("program")] = 1.0, 0.005
    made = again(operator, memory)
    assert (made.plan, made.tier) == (Plan("program"), Tier.FINAL)
    assert (made.report.busy, made.report.revision) == (1.0, 1)
    assert not is_in_doubt(made)
    V = columns(operator.problem, 2)
    torch.testing.assert_close(made.apply(V), operator.apply(V))


def test_a_plan_that_is_hardly_better_changes_no_bits(machine: Machine):
    memory: dict[str, str] = {}
    operator = chosen(memory)
    machine.busy, machine.seconds[Plan("program")] = 1.0, 0.0095
    assert again(operator, memory) is None
    assert (operator.report.busy, operator.report.revision) == (1.0, 0)
    assert not is_in_doubt(operator)


def test_a_machine_that_is_busy_is_not_asked_for_times(machine: Machine):
    memory: dict[str, str] = {}
    operator = chosen(memory)
    machine.timed.clear()
    assert again(operator, memory, quiet=False) is None
    assert machine.timed == []
    assert is_in_doubt(operator)


def test_a_machine_that_became_as_busy_meanwhile_decides_nothing(machine: Machine):
    memory: dict[str, str] = {}
    operator = chosen(memory)
    machine.seconds[Plan("program")] = 0.001
    assert again(operator, memory) is None
    assert is_in_doubt(operator)


def test_the_next_last_tier_has_the_better_plan_and_one_set_of_bits_the_first(
    machine: Machine,
):
    memory: dict[str, str] = {}
    operator = chosen(memory)
    machine.busy, machine.seconds[Plan("program")] = 1.0, 0.005
    again(operator, memory)
    machine.timed.clear()
    later = chosen(memory)
    assert (later.plan, later.report.busy) == (Plan("program"), 1.0)
    final = build(problem_of(GELU), SPEC, budget_bytes=HUGE, memory=memory)
    assert final.plan == Plan("double_backward")
    assert machine.timed == []


def test_a_remembered_plan_says_how_busy_the_machine_was(machine: Machine):
    memory: dict[str, str] = {}
    chosen(memory)
    (record,) = memory.values()
    assert json.loads(record)["busy"] == 3.0
    machine.busy = 1.0
    assert is_in_doubt(chosen(memory))  # it was not timed again
    key = plans.structure(problem_of(GELU), SPEC)
    older = {key: '{"mode": "program"}'}
    assert not is_in_doubt(chosen(older))


def test_a_plan_stays_in_doubt_at_the_next_version(machine: Machine):
    operator = chosen({})
    assert is_in_doubt(operator.at(operator.problem))


def test_a_first_tier_is_never_in_doubt(machine: Machine):
    first = build(problem_of(GELU), SPEC, budget_bytes=HUGE, tier=Tier.FIRST)
    assert (first.report.busy, is_in_doubt(first)) == (0.0, False)


def test_waiting_for_a_core_is_what_makes_a_machine_busy(
    monkeypatch: pytest.MonkeyPatch,
):
    waits = itertools.count(step=6.0)  # in and after each timing
    monkeypatch.setattr(autotune, "waited_s", lambda: next(waits))
    ticks = itertools.count()
    timer = PlanTimer(problem_of(GELU), SPEC, HUGE, budget_s=1000.0)
    timer._clock = lambda: float(next(ticks))
    assert timer.busy == 0.0
    assert timer.seconds_per_column(Plan("double_backward")) is not None
    passes = timer._spent_s / 2.0  # a product and an addition, a second each
    assert timer.busy == 1.0 + 6.0 / (2.0 * passes)
    assert (timer.busy > BUSY) == (passes < 6)
