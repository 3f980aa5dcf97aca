"""Plans: chosen by measurement among those that verify, remembered by structure."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.reference import columns, error, problem_of
from support.zoo import ANIMALS

from curvd.contract.enums import Dtype, Mode
from curvd.contract.specs import DatasetSpec, LossSpec, ModelSpec, OperatorSpec
from curvd.errors import CurvatureUnverified, InvalidSpec
from curvd_server.device import torch_device
from curvd_server.engine.building import build
from curvd_server.engine.operators.linearize import MODES
from curvd_server.engine.program import linear_program
from curvd_server.engine.tuning import autotune
from curvd_server.engine.tuning import plan as plans
from curvd_server.engine.tuning.autotune import Plan, PlanTimer
from curvd_server.engine.verification.verify import Reference
from curvd_server.models.builders import BUILDERS

HUGE = 2**30
GELU = next(a for a in ANIMALS if a.name == "gelu")


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[Plan, float]) -> list[Plan]:
    """Replace the clock; return the list of plans that get timed."""
    asked: list[Plan] = []

    def pretend(self, plan: Plan) -> float | None:
        asked.append(plan)
        return seconds.get(plan)

    monkeypatch.setattr(PlanTimer, "seconds_per_column", pretend)
    return asked


def test_the_fastest_mode_for_one_column_wins(monkeypatch):
    timed(monkeypatch, {Plan("program"): 2.0, Plan("double_backward"): 1.0})
    operator = build(problem_of(GELU), OperatorSpec(), budget_bytes=HUGE, tuning_s=99)
    assert operator.plan == Plan("double_backward")


def test_modes_that_are_close_are_timed_again_in_turn(monkeypatch):
    """A busy moment made the faster one look slower; a pruned one waits no more."""
    monkeypatch.setattr(autotune, "LONGEST_STEP_S", 0.0)  # nothing is joined
    clock = iter([0.011, 0.010, 0.050, 0.008, 0.010, 0.012, 0.011])
    asked: list[Plan] = []

    def pretend(self, plan: Plan) -> float | None:
        asked.append(plan)
        return next(clock, None)

    monkeypatch.setattr(PlanTimer, "seconds_per_column", pretend)
    operator = build(problem_of(GELU), OperatorSpec(), budget_bytes=HUGE, tuning_s=1)
    assert operator.plan == Plan("program")
    modes = [plan.mode for plan in asked if not plan.batched]
    assert modes == [*MODES, *("program", "double_backward") * 2]


def test_adding_rows_to_the_result_is_part_of_what_is_timed(monkeypatch):
    """It is what a joined step saves, so joining is judged by it as well."""
    added: list[tuple[int, ...]] = []
    real = autotune.add_rows

    def watched(vectors, layout, rows):
        added.append(tuple(vectors.shape))
        real(vectors, layout, rows)

    monkeypatch.setattr(autotune, "add_rows", watched)
    problem = problem_of(GELU)
    watch = PlanTimer(problem, OperatorSpec(), HUGE, 9.0)
    for plan, lead in ((Plan("program"), ()), (Plan("program", 8), (8,))):
        added.clear()
        assert watch.seconds_per_column(plan) is not None
        assert set(added) == {(*lead, problem.layout.size)}


class Device:
    """A clock that products move: a mode takes so many seconds, or as many in turn."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]]
    ):
        self.now, self.runs = 0.0, dict.fromkeys(MODES, 0)
        monkeypatch.setattr(autotune.time, "thread_time", lambda: self.now)
        monkeypatch.setattr(autotune.time, "perf_counter", self.wall)
        for mode in MODES:
            monkeypatch.setitem(MODES, mode, self.linearise(mode, seconds[mode]))

    def wall(self) -> float:
        raise AssertionError("products on the CPU are timed by the wall")

    def linearise(self, mode: str, seconds: list[float]):
        real = MODES[mode]

        def made(problem, spec, batch):
            linear = real(problem, spec, batch)

            class Slow:
                def product(_, tangents, block, *, batched):
                    self.now += seconds[min(self.runs[mode], len(seconds) - 1)]
                    self.runs[mode] += 1
                    return linear.product(tangents, block, batched=batched)

            return Slow()

        return made


def test_a_mode_that_is_hopeless_and_slow_runs_once(monkeypatch):
    device = Device(
        monkeypatch,
        {
            "program": [0.2, 0.15],
            "double_backward": [0.14, 0.14],
            "forward_over_reverse": [0.9],
        },
    )
    monkeypatch.setattr(autotune, "cached_bytes", lambda *_: 1)
    watch = PlanTimer(problem_of(GELU), OperatorSpec(), HUGE, 99.0)
    times = [watch.seconds_per_column(Plan(mode)) for mode in MODES]
    assert times == pytest.approx([0.15, 0.14, 0.9])
    assert device.runs == {
        "program": 2,
        "double_backward": 2,
        "forward_over_reverse": 1,
    }


@pytest.mark.parametrize("budget_s", [99.0, 1.0])
def test_joined_mini_batches_run_three_times_however_slow_the_first_runs_were(
    monkeypatch, budget_s
):
    Device(
        monkeypatch,
        {
            "program": [0.2, 0.2, 0.9, 0.5, 0.36],
            "double_backward": [0.2],
            "forward_over_reverse": [0.2],
        },
    )
    monkeypatch.setattr(autotune, "cached_bytes", lambda *_: 1)
    problem = problem_of(GELU, batch_size=3)
    watch = PlanTimer(problem, OperatorSpec(), HUGE, budget_s)
    one, two = Plan("program"), Plan("program", 1, 2)
    times = [watch.seconds_per_column(plan) for plan in (one, two)]
    assert times == pytest.approx([0.2, 0.18])


def test_a_short_product_is_never_hopeless(monkeypatch):
    """Its first run may be anything: caches are cold."""
    device = Device(
        monkeypatch,
        {
            "program": [0.01],
            "double_backward": [0.05, 0.008],
            "forward_over_reverse": [0.01],
        },
    )
    monkeypatch.setattr(autotune, "cached_bytes", lambda *_: 1)
    watch = PlanTimer(problem_of(GELU), OperatorSpec(), HUGE, 99.0)
    times = [watch.seconds_per_column(Plan(mode)) for mode in MODES]
    assert times == pytest.approx([0.01, 0.008, 0.01])
    assert set(device.runs.values()) == {3}


def test_joining_is_decided_by_times_taken_in_turn(monkeypatch):
    """One slow moment of the single mini-batch is no reason to join."""
    one, two = Plan("program"), Plan("program", 1, 2)
    clock = {one: iter([1.0, 0.89, 0.89]), two: iter([0.9, 0.9, 0.9])}
    monkeypatch.setattr(
        PlanTimer, "seconds_per_column", lambda _, plan: next(clock[plan])
    )
    monkeypatch.setattr(autotune, "LONGEST_STEP_S", 2.0)
    watch = PlanTimer(problem_of(GELU, batch_size=3), OperatorSpec(), HUGE, 9.0)
    assert watch.batches == 2
    timed = {one: next(clock[one])}
    assert autotune._joined(watch, one, timed, lambda: False) == one


def test_columns_go_together_only_where_that_really_gains(monkeypatch):
    one, eight = Plan("program"), Plan("program", 8)
    for gain, expected in ((0.95, one), (0.5, eight)):
        timed(monkeypatch, {one: 1.0, eight: gain})
        problem = problem_of(GELU)
        operator = build(problem, OperatorSpec(), budget_bytes=HUGE, tuning_s=999)
        assert operator.plan == expected


def test_columns_that_would_fill_the_memory_do_not_go_together(monkeypatch):
    problem = problem_of(GELU)
    for limit in (0, autotune.WIDEST_BYTES):
        monkeypatch.setattr(autotune, "WIDEST_BYTES", limit)
        watch = PlanTimer(problem, OperatorSpec(), HUGE, 1.0)
        assert watch.seconds_per_column(Plan("program")) is not None
        wide = watch.seconds_per_column(Plan("program", 8))
        assert (wide is None) == (limit == 0)


def test_mini_batches_are_joined_unless_that_is_slower(monkeypatch):
    """Six mini-batches of one data point, of which two fit a step."""
    one, two = Plan("program"), Plan("program", 1, 2)
    alone = 0.48 * autotune.LONGEST_STEP_S
    for gain, expected in ((1.01, one), (0.99, two)):
        asked = timed(monkeypatch, {one: alone, two: gain * alone})
        problem = problem_of(GELU, batch_size=1)
        operator = build(problem, OperatorSpec(), budget_bytes=HUGE, tuning_s=1)
        assert operator.plan == expected
        assert two in asked
        assert operator.report.batches == operator.report.kept_batches == 6
        V = columns(problem, 2)
        plain = build(problem, OperatorSpec(), budget_bytes=HUGE, plan=one)
        assert error(operator.apply(V), plain.apply(V)) < 1e-12


def test_fewer_are_joined_where_more_do_not_fit(monkeypatch):
    """Six at once do not fit; a quarter of twelve are three."""
    one, three = Plan("program"), Plan("program", 1, 3)
    problem = problem_of(GELU, batch_size=1)
    twice = dataclasses.replace(problem, data=problem.data * 2)
    asked = timed(monkeypatch, {one: 0.01, three: 0.001})
    watch = PlanTimer(twice, OperatorSpec(), HUGE, 1.0)
    times = {one: 0.01}
    assert autotune._joined(watch, one, times, lambda: False) == three
    assert times[three] == 0.001
    assert asked == [Plan("program", 1, 12), three]


def test_coupled_data_points_are_not_joined():
    """Batch statistics forbid it; a model that mixes its rows otherwise is refused."""
    joined = Plan("double_backward", 1, 3)
    statistics = next(a for a in ANIMALS if a.name == "batchnorm_statistics")
    problem = problem_of(statistics, batch_size=2)
    plain = build(
        problem, OperatorSpec(), budget_bytes=HUGE, plan=Plan("double_backward")
    )
    operator = build(problem, OperatorSpec(), budget_bytes=HUGE, plan=joined)
    V = columns(problem, 1)
    assert error(operator.apply(V), plain.apply(V)) < 1e-12


def test_a_faster_mode_that_is_wrong_is_passed_over(monkeypatch):
    def crooked(problem, spec, batch):
        right = MODES["double_backward"](problem, spec, batch)

        class Crooked:
            def product(self, tangents, block, *, batched):
                rows = right.product(tangents, block, batched=batched)
                return [rows[0] * 1.01, *rows[1:]]

        return Crooked()

    monkeypatch.setitem(MODES, "crooked", crooked)
    timed(monkeypatch, {Plan("crooked"): 0.6, Plan("double_backward"): 1.0})
    operator = build(problem_of(GELU), OperatorSpec(), budget_bytes=HUGE, tuning_s=99)
    assert operator.plan == Plan("double_backward")


def test_the_next_session_of_the_structure_times_nothing(monkeypatch):
    asked = timed(monkeypatch, {Plan("double_backward"): 1.0})
    memory: dict[str, str] = {}
    options = {"budget_bytes": HUGE, "memory": memory}
    plan = build(problem_of(GELU), OperatorSpec(), **options).plan
    asked.clear()
    again = build(problem_of(GELU), OperatorSpec(), **options)
    assert (again.plan, asked) == (plan, [])
    build(problem_of(GELU, batch_size=3), OperatorSpec(), **options)
    assert asked


def test_a_plan_that_another_version_remembered_is_not_believed():
    problem, spec = problem_of(GELU), OperatorSpec()
    key = plans.structure(problem, spec)
    for text in ("", "{", "[]", '{"mode": "magic"}', '{"mode": "program", "x": 1}'):
        assert plans.recall({key: text}, key) is None
    memory: dict[str, str] = {}
    plans.remember(memory, key, Plan("program", 8, 2))
    assert plans.recall(memory, key) == Plan("program", 8, 2)


def test_a_remembered_plan_is_verified_again(monkeypatch):
    problem = problem_of(GELU)
    memory: dict[str, str] = {}
    key = plans.structure(problem, OperatorSpec())
    plans.remember(memory, key, Plan("program"))
    seen: list[str] = []
    real = Reference.examine

    def watched(self, mode, *, batched):
        seen.append(mode)
        return real(self, mode, batched=batched)

    monkeypatch.setattr(Reference, "examine", watched)
    build(problem, OperatorSpec(), budget_bytes=HUGE, memory=memory)
    assert seen[0] == "program"  # then the mode that it is compared with


def test_whatever_is_measured_the_product_is_the_same():
    problem = problem_of(GELU)
    V = columns(problem, 9)
    chosen = build(problem, OperatorSpec(), budget_bytes=HUGE, tuning_s=2.0)
    fixed = build(
        problem, OperatorSpec(), budget_bytes=HUGE, plan=Plan("double_backward")
    )
    assert error(chosen.apply(V), fixed.apply(V)) < 1e-12


def test_the_report_is_the_evidence():
    report = build(problem_of(GELU), OperatorSpec(), budget_bytes=HUGE).report
    assert report.difference_gap < 1e-6
    assert report.symmetry_gap < 1e-9
    assert report.batches == report.kept_batches == 2
    assert 0 < report.kept_bytes < report.peak_bytes
    assert report.seconds_per_product > 0


def test_if_nothing_verifies_every_mode_is_reported(monkeypatch):
    for mode in list(MODES):

        def broken(problem, spec, batch, mode=mode):
            raise RuntimeError(f"{mode} is not implemented")

        monkeypatch.setitem(MODES, mode, broken)
    with pytest.raises(CurvatureUnverified, match="program is not implemented"):
        build(problem_of(GELU), OperatorSpec(), budget_bytes=HUGE)


def test_block_sizes_that_do_not_cover_the_parameters_are_refused():
    spec = OperatorSpec(block_sizes=(1, 2))
    with pytest.raises(InvalidSpec, match="sum to 3, but the operator acts on 4"):
        build(problem_of(GELU), spec, budget_bytes=HUGE)


def test_an_architecture_is_traced_once(monkeypatch):
    """Its next session, and its next version, runs what was traced before."""
    device = torch_device.TorchDevice({}, "cpu")
    traced: list[object] = []
    real = linear_program.trace
    monkeypatch.setattr(
        linear_program, "trace", lambda *a, **k: traced.append(1) or real(*a, **k)
    )

    def product(widths: list[int], scale: float):
        spec = ModelSpec(builder="mlp", config={"widths": widths})
        module = BUILDERS["mlp"](spec.config)
        state = {n: scale * p.detach().numpy() for n, p in module.named_parameters()}
        problem = device.load(
            spec,
            state,
            {"x": np.ones((3, 4)), "y": np.ones((3, 2))},
            DatasetSpec(inputs=("x",), target="y", batch_size=2),
            LossSpec(name="mse"),
            Mode.EVAL,
            Dtype.FLOAT64,
        )
        plans.remember(
            problem._tools.plans,
            plans.structure(problem._problem, OperatorSpec()),
            Plan("program"),
        )
        operator = problem.build(
            OperatorSpec(), budget_bytes=HUGE, cancelled=lambda: False
        )
        return operator.apply(
            np.ones((1, problem.layout.size)), cancelled=lambda: False
        )

    first = product([4, 3, 2], 1.0)
    once = len(traced)
    second = product([4, 3, 2], 2.0)
    assert once > 0
    assert len(traced) == once
    assert error(torch.from_numpy(first), torch.from_numpy(second)) > 0.1
    product([4, 5, 2], 1.0)
    assert len(traced) == 2 * once
