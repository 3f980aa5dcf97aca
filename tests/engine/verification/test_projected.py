"""Verification layer by layer: it accepts and refuses what that entry by entry does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.reference import columns, flat, problem_of
from support.zoo import ANIMALS, REFUSED, Animal
from torch import Tensor, nn

from curvd.contract.enums import Dtype
from curvd.contract.specs import LossSpec, OperatorSpec
from curvd.errors import CurvatureUnverified, NotDeterministic, NotFinite, OutOfMemory
from curvd_server.engine import check_gradient, parts
from curvd_server.engine.building import build
from curvd_server.engine.operators import MODES, linearize
from curvd_server.engine.verification import projected, size
from curvd_server.engine.verification.projected import ProjectedReference
from curvd_server.engine.verification.verify import Reference

ZOO = {animal.name: animal for animal in (*ANIMALS, REFUSED)}
HUGE = 2**30
HESSIAN = OperatorSpec()


@pytest.fixture
def large(monkeypatch):
    """Every model is a large one."""
    monkeypatch.setattr(size, "SHARE", 0.0)


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)
def test_a_right_mode_is_accepted_far_below_the_tolerance(animal: Animal):
    reference = ProjectedReference(problem_of(animal), HESSIAN)
    reference.check_objective()
    evidence = reference.examine("double_backward")
    assert evidence.ok
    assert evidence.difference_gap < 1e-6
    assert evidence.symmetry_gap < 1e-9
    slopes = reference.slopes()
    assert slopes.difference == pytest.approx(slopes.gradient, rel=1e-6)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("name", ["gelu", "tied", "padding"])
def test_a_program_with_parameters_that_are_made_anew_is_the_one_that_is_used(
    name: str, kind: str
):
    problem, spec = problem_of(ZOO[name]), OperatorSpec(kind=kind)
    evidence = ProjectedReference(problem, spec).examine("program")
    assert evidence.ok
    assert evidence.difference_gap < 1e-6
    assert evidence.symmetry_gap < 1e-9


@pytest.mark.parametrize("name", ["attention", "batchnorm_statistics", "lstm", "tied"])
def test_in_float32_the_operator_as_it_is_used_is_accepted(name: str):
    problem = problem_of(ZOO[name], dtype=Dtype.FLOAT32)
    evidence = ProjectedReference(problem, HESSIAN).examine("double_backward")
    assert evidence.ok
    assert evidence.difference_gap < projected.ALLOWED[torch.float32] / 20


class _Naive:
    """``jvp(jacrev)`` under ``no_grad``, wrong on norms and silent about it."""

    def __init__(self, problem, spec, batch) -> None:
        self._problem, self._batch = problem, batch

    def product(self, tangents, block, *, batched):
        p = self._problem

        def gradient(parameters):
            return torch.func.jacrev(lambda q: p.objective(q, self._batch))(parameters)

        with torch.no_grad():
            return torch.func.jvp(gradient, (p.parameters,), (tuple(tangents),))[1]


def test_what_entries_refuse_projections_refuse_in_the_whole_zoo(monkeypatch):
    monkeypatch.setitem(linearize.MODES, "naive", _Naive)
    refused = []
    for animal in ZOO.values():
        problem = problem_of(animal, batch_size=6)
        entries = Reference(problem, HESSIAN).examine("naive", batched=False)
        evidence = ProjectedReference(problem, HESSIAN).examine("naive")
        assert evidence.ok == entries.ok, animal.name
        assert bool(evidence.failure) == bool(entries.failure), animal.name
        assert set(evidence.wrong) == set(entries.wrong), animal.name
        refused += [] if evidence.ok else [animal.name]
    assert {"layernorm", "instancenorm", "batchnorm_statistics"} <= set(refused)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT64, Dtype.FLOAT32])
def test_a_wrong_second_derivative_is_refused_with_the_parameter_named(large, dtype):
    with pytest.raises(
        CurvatureUnverified, match="double_backward: wrong in direction"
    ):
        build(problem_of(REFUSED, dtype=dtype), HESSIAN, budget_bytes=HUGE)


def changed(mode, change):
    """A mode whose rows are changed: ``change(index, row, tangents)``."""

    def linearised(problem, spec, batch):
        right = MODES[mode](problem, spec, batch)

        class Changed:
            def product(self, tangents, block, *, batched):
                rows = right.product(tangents, block, batched=batched)
                return [
                    change(i, r, tangents) for i, r in zip(block, rows, strict=True)
                ]

        return Changed()

    return linearised


@pytest.mark.parametrize("dtype", [Dtype.FLOAT64, Dtype.FLOAT32])
def test_a_row_that_is_wrong_by_a_hundredth_is_named(monkeypatch, dtype):
    problem = problem_of(ZOO["gelu"], dtype=dtype)
    for wrong, name in enumerate(problem.layout.names):
        mode = changed(
            "double_backward", lambda i, r, _, w=wrong: r * 1.01 if i == w else r
        )
        monkeypatch.setitem(linearize.MODES, "crooked", mode)
        evidence = ProjectedReference(problem, HESSIAN).examine("crooked")
        assert evidence.wrong == (name,)
        assert evidence.difference_gap == pytest.approx(0.01, rel=0.05)


def test_one_wrong_entry_is_seen(monkeypatch):
    problem = problem_of(ZOO["gelu"])

    def change(index, row, tangents):
        if index == 0:
            row = row.clone()
            row[-1, -1] += 1e-2 * row.norm()
        return row

    monkeypatch.setitem(linearize.MODES, "crooked", changed("double_backward", change))
    evidence = ProjectedReference(problem, HESSIAN).examine("crooked")
    assert evidence.wrong == (problem.layout.names[0],)


def test_a_product_that_is_right_along_one_direction_only_is_refused(monkeypatch):
    """What is added is zero along the direction of the differences, so symmetry tells."""
    problem = problem_of(ZOO["gelu"])
    reference = ProjectedReference(problem, HESSIAN)
    v = flat([
        reference._v.add(i, torch.zeros_like(p))
        for i, p in enumerate(problem.parameters)
    ])
    away = columns(problem, 1)[0]
    away -= (away @ v) / (v @ v) * v
    mode = changed("double_backward", lambda i, r, t: r + 0.1 * (away @ flat(t)))
    monkeypatch.setitem(linearize.MODES, "asymmetric", mode)
    evidence = reference.examine("asymmetric")
    assert evidence.difference_gap < 1e-6
    assert evidence.symmetry_gap > 1e-3
    assert not evidence.ok


def test_a_block_that_is_wrong_by_itself_is_named(monkeypatch):
    problem = problem_of(ZOO["gelu"])
    names = problem.layout.names
    spec = OperatorSpec(block_sizes=(1, len(names) - 1))

    def change(index, row, tangents):
        return row * 1.01 if index == 0 and len(tangents) == 1 else row

    monkeypatch.setitem(linearize.MODES, "crooked", changed("double_backward", change))
    evidence = ProjectedReference(problem, spec).examine("crooked")
    assert evidence.wrong == (names[0],)
    assert ProjectedReference(problem, spec).examine("double_backward").ok


def test_the_odd_last_mini_batch_is_compared_too(monkeypatch):
    problem = problem_of(ZOO["gelu"], batch_size=4)  # of 6 data points

    def odd(problem, spec, batch):
        if len(batch.targets) == 2:
            mode = changed("double_backward", lambda i, r, t: r * 1.01)
            return mode(problem, spec, batch)
        return MODES["double_backward"](problem, spec, batch)

    monkeypatch.setitem(linearize.MODES, "odd", odd)
    evidence = ProjectedReference(problem, HESSIAN).examine("odd")
    assert evidence.wrong == problem.layout.names
    assert ProjectedReference(problem, HESSIAN, [2]).examine("odd").ok


def test_a_large_mini_batch_is_the_sum_of_its_pieces(monkeypatch):
    monkeypatch.setattr(projected, "POINTS", 2)
    problem = problem_of(ZOO["gelu"], batch_size=5)
    assert ProjectedReference(problem, HESSIAN).examine("double_backward").ok

    def wide(problem, spec, batch):
        if len(batch.targets) == 5:
            mode = changed("double_backward", lambda i, r, t: r * 1.01)
            return mode(problem, spec, batch)
        return MODES["double_backward"](problem, spec, batch)

    monkeypatch.setitem(linearize.MODES, "wide", wide)
    assert not ProjectedReference(problem, HESSIAN).examine("wide").ok


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, training=True)


def test_a_random_layer_is_refused_with_its_likely_cause(large):
    torch.manual_seed(1)  # whose masks differ
    with pytest.raises(NotDeterministic, match=r"loss .*dropout"):
        build(problem_of(Animal("noisy", _Noisy)), HESSIAN, budget_bytes=HUGE)


def test_parameters_that_are_not_finite_are_refused(large):
    problem = problem_of(ZOO["gelu"])
    bad = torch.full(problem.layout.shapes[0], torch.nan)
    broken = problem.with_parameters({problem.layout.names[0]: bad})
    with pytest.raises(NotFinite, match="loss is not finite"):
        build(broken, HESSIAN, budget_bytes=HUGE)


class _StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z + (z.sign() - z).detach()


class _Offset(nn.Module):
    """A loss's size beside its slope, as targets far beyond all outputs make it."""

    def __init__(self, module: nn.Module, offset: float) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + self.offset.to(x.dtype)


def _far(module: Callable[[], nn.Module], offset: float):
    """Have targets of zero and outputs that far away, which to `mse` is the same."""
    made = Animal("far", lambda: _Offset(module(), offset), loss=LossSpec(name="mse"))
    return problem_of(made)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("offset", [1e3, 1e8, 1e10, 1e13, 1e15])
def test_a_loss_that_is_large_beside_its_slope_is_compared_over_wider_steps(
    share: float, offset: float, monkeypatch: pytest.MonkeyPatch
):
    """And where no step has digits, that is what is said; a wrong gradient is never taken."""
    monkeypatch.setattr(size, "SHARE", share)
    net = lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    wrong = _far(_StraightThrough, offset)
    if offset < 1e11:
        check_gradient(_far(net, offset), lambda: False)
        said = "not that of the loss" if offset < 1e9 else "not that of|rounding"
        with pytest.raises(CurvatureUnverified, match=said):
            check_gradient(wrong, lambda: False)
        return
    for problem in (_far(net, offset), wrong):
        with pytest.raises(
            CurvatureUnverified, match=r"rounding of float64.*deviation"
        ):
            check_gradient(problem, lambda: False)


def test_a_gradient_that_is_not_the_losss_is_refused(large):
    problem = problem_of(Animal("straight", _StraightThrough))
    with pytest.raises(CurvatureUnverified, match="not that of the loss"):
        check_gradient(problem, lambda: False)


def test_a_large_model_has_a_traced_program_and_nothing_is_timed(large):
    problem = problem_of(ZOO["gelu"])
    operator = build(problem, HESSIAN, budget_bytes=HUGE, tier="first")
    assert operator.plan.mode == "program"
    assert operator.tier == "final"
    assert operator.choice.evidence.projections
    assert operator.report.seconds_per_product > 0
    small = ProjectedReference(problem, HESSIAN)
    assert operator.choice.evidence == small.examine("program")
    V = columns(problem, 2)
    want = sum(
        flat(
            linearize.double_backward(problem, HESSIAN, batch).product(
                [
                    p.reshape(q.shape)
                    for p, q in zip(
                        V[1].split([q.numel() for q in problem.parameters]),
                        problem.parameters,
                        strict=True,
                    )
                ],
                range(len(problem.parameters)),
                batched=False,
            )
        )
        for batch in problem.data
    )
    torch.testing.assert_close(operator.apply(V)[1], want)


def test_other_parts_of_the_data_compare_sizes_that_were_not_compared(
    large, monkeypatch
):
    whole = problem_of(ZOO["gelu"], batch_size=4)
    first, last = (
        whole.part(range(i, i + 1), penalised=False).normalised(6.0) for i in (0, 1)
    )
    choice, verified = parts.decide(first, HESSIAN, budget_bytes=HUGE, memory={})
    assert verified == {4}
    follow = {"choice": choice, "budget_bytes": HUGE, "verified": verified}
    operator = parts.follow(last, HESSIAN, **follow)
    assert operator.plan == choice.plan
    mode = changed("program", lambda i, r, t: r * 1.01)
    monkeypatch.setitem(linearize.MODES, "program", mode)
    with pytest.raises(
        CurvatureUnverified, match="central differences on a mini-batch"
    ):
        parts.follow(last, HESSIAN, **follow)


def test_copies_that_the_host_cannot_hold_are_refused(monkeypatch):
    problem = problem_of(ZOO["gelu"])
    monkeypatch.setattr(projected, "COPIES", 1 << 50)
    reference = ProjectedReference(problem, HESSIAN)
    with pytest.raises(OutOfMemory, match="without a traced program takes"):
        reference.examine("double_backward")
    assert reference.examine("program").ok
