"""The verification itself: it has to catch what is known to be wrong."""

from __future__ import annotations

import types

import pytest
import torch
from support.reference import columns, flat, problem_of
from support.zoo import ANIMALS, REFUSED, Animal
from torch import Tensor, nn

from curvd.contract.enums import Dtype
from curvd.contract.specs import DatasetSpec, LossSpec, OperatorSpec
from curvd.errors import InvalidSpec, NotDeterministic, NotFinite, OutOfMemory
from curvd_server.engine.building import build
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.operators import linearize
from curvd_server.engine.verification import verify
from curvd_server.engine.verification.verify import Reference

HUGE = 2**30
GELU = next(a for a in ANIMALS if a.name == "gelu")


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)
def test_some_mode_verifies_far_below_the_tolerance(animal: Animal):
    evidence = Reference(problem_of(animal), OperatorSpec()).examine(
        "double_backward", batched=False
    )
    assert evidence.ok
    assert evidence.difference_gap < 1e-6
    assert evidence.symmetry_gap < 1e-9


def test_a_wrong_row_is_named(monkeypatch: pytest.MonkeyPatch):
    def crooked(problem, spec, batch):
        right = linearize.double_backward(problem, spec, batch)

        class Crooked:
            def product(self, tangents, block, *, batched):
                rows = right.product(tangents, block, batched=batched)
                return [rows[0] * 1.01, *rows[1:]]

        return Crooked()

    monkeypatch.setitem(linearize.MODES, "crooked", crooked)
    problem = problem_of(GELU)
    evidence = Reference(problem, OperatorSpec()).examine("crooked", batched=False)
    assert evidence.wrong == (problem.layout.names[0],)
    assert evidence.difference_gap == pytest.approx(0.01, rel=0.01)


def test_the_directions_are_independent():
    problem = problem_of(GELU)
    reference = Reference(problem, OperatorSpec())
    columns = torch.stack([
        flat(d.tensors(problem.parameters))
        for d in (reference._perturbation, *reference._directions)
    ])
    cosines = torch.corrcoef(columns)[*torch.triu_indices(3, 3, 1)]
    assert cosines.abs().max() < 0.5
    assert len({float(row[0]) for row in columns}) == 3


def test_a_product_that_is_right_along_one_direction_only_is_refused(monkeypatch):
    """What is added is zero along the direction of the differences, so symmetry tells."""
    problem = problem_of(GELU)
    reference = Reference(problem, OperatorSpec())
    v = flat(reference._directions[0].tensors(problem.parameters))
    perturbation = columns(problem, 1)[0]
    perturbation -= (perturbation @ v) / (v @ v) * v

    def asymmetric(problem, spec, batch):
        right = linearize.double_backward(problem, spec, batch)

        class Asymmetric:
            def product(self, tangents, block, *, batched):
                rows = right.product(tangents, block, batched=batched)
                return [r + 0.1 * (perturbation @ flat(tangents)) for r in rows]

        return Asymmetric()

    monkeypatch.setitem(linearize.MODES, "asymmetric", asymmetric)
    evidence = reference.examine("asymmetric", batched=False)
    assert evidence.difference_gap < 1e-6
    assert evidence.symmetry_gap > 1e-3
    assert not evidence.ok


def test_a_host_that_cannot_hold_an_examination_is_named(monkeypatch):
    problem = problem_of(GELU)
    needed = 24 * problem.layout.size
    for available in (needed, needed - 1):
        monkeypatch.setattr(
            verify.psutil,
            "virtual_memory",
            lambda free=available: types.SimpleNamespace(available=free),
        )
        if available == needed:
            Reference(problem, OperatorSpec())
        else:
            with pytest.raises(
                OutOfMemory, match=rf"{needed} bytes on the host.*params"
            ):
                Reference(problem, OperatorSpec())


def test_a_mode_that_cannot_run_is_passed_over():
    """weight_norm has no forward mode; torch's message is kept."""
    evidence = Reference(problem_of(REFUSED), OperatorSpec()).examine(
        "forward_over_reverse", batched=False
    )
    assert not evidence.ok
    assert "forward" in evidence.failure


def test_dead_starts_do_not_hide_rows():
    """Layers initialised with zeros make most rows zero; the formulas still show."""

    class Zeros(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
            nn.init.zeros_(self[2].weight)

    animal = Animal("zeros", Zeros)
    evidence = Reference(problem_of(animal), OperatorSpec()).examine(
        "double_backward", batched=False
    )
    assert evidence.ok


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, training=True)


def test_a_random_layer_is_refused_with_its_likely_cause():
    with pytest.raises(NotDeterministic, match=r"loss .*dropout"):
        build(problem_of(Animal("noisy", Noisy)), OperatorSpec(), budget_bytes=HUGE)


def test_parameters_that_are_not_finite_are_refused():
    problem = problem_of(GELU)
    bad = torch.full(problem.layout.shapes[0], torch.nan)
    broken = problem.with_parameters({problem.layout.names[0]: bad})
    with pytest.raises(NotFinite, match="the loss is NaN or infinite in rows 0 to"):
        build(broken, OperatorSpec(), budget_bytes=HUGE)


def test_the_global_random_numbers_are_left_alone():
    problem = problem_of(GELU)
    before = torch.get_rng_state()
    build(problem, OperatorSpec(kind="fisher"), budget_bytes=HUGE, tuning_s=0.0)
    assert torch.equal(before, torch.get_rng_state())


def test_the_callers_module_is_left_alone():
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten())
    module.append(nn.Linear(12, 3)).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    data = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    arrays = {"x": torch.randn(6, 2, 3, 3), "y": torch.zeros(6, dtype=torch.int64)}
    problem = Problem.load(
        module,
        {},
        arrays,
        data,
        LossSpec(name="cross_entropy"),
        mode="batch_statistics",
        dtype=Dtype.FLOAT64,
    )
    build(problem, OperatorSpec(), budget_bytes=HUGE, tuning_s=0.0)
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_model_without_free_parameters_is_refused():
    frozen = Animal("frozen", lambda: nn.Linear(4, 3).requires_grad_(False))
    with pytest.raises(InvalidSpec, match="requires_grad"):
        problem_of(frozen)
