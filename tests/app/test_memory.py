"""How many vectors of the size of all parameters are held at once, by allocation.

The torch profiler sees every allocation, also those inside autograd's engine, so the
peaks are exact and the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from curvd.contract.specs import DatasetSpec, LossSpec, OperatorSpec
from curvd_server.engine import batch_product, check_gradient
from curvd_server.engine.building import build
from curvd_server.engine.objective import chunked
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.operators import linearize
from curvd_server.engine.tuning.plan import Plan
from curvd_server.engine.verification import patterns, size, verify
from curvd_server.engine.verification.agreement import disagreements
from curvd_server.engine.verification.determinism import check_objective
from curvd_server.engine.verification.projected import ProjectedReference
from curvd_server.engine.verification.verify import HELD, Reference
from curvd_server.models import builders

LAYERS, WIDTH = 4, 512
ONE = 1.2 / LAYERS
"""Share of the largest parameter, with something for activations and biases."""
KEPT = ("program", "double_backward")


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> Problem:
    """A net in float32 whose parameters dwarf all else; mini-batches of four and three."""
    monkeypatch.setattr(chunked, "PIECE", 1 << 13)
    monkeypatch.setattr(patterns, "_ROWS", 1)
    module = builders.BUILDERS["mlp"]({"widths": [WIDTH] * (LAYERS + 1)})
    generator = torch.Generator().manual_seed(0)
    arrays = {n: torch.randn(7, WIDTH, generator=generator) for n in ("x", "y")}
    data = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    return Problem.load(module, {}, arrays, data, LossSpec(name="mse"))


@pytest.fixture
def peak(tmp_path: Path, problem: Problem) -> Callable[..., float]:
    """Measure the most that some work holds, in float32 vectors."""

    def measure(work: Callable[[], Any]) -> float:
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            result = work()
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        del result
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        changes = sorted(
            (e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]
        )
        held = most = 0
        for change in changes:
            held += change["args"]["Bytes"]
            most = max(most, held)
        return most / (4 * problem.layout.size)

    return measure


def operator_of(problem: Problem, mode: str, **spec: Any):
    return build(
        problem, OperatorSpec(**spec), budget_bytes=2**30, plan=Plan(mode), tuning_s=0.0
    )


def test_the_measure_counts_what_is_held_at_once(peak, problem):
    size = problem.layout.size

    def twice():
        torch.ones(2 * size).sum()
        return torch.ones(size) + torch.ones(size)

    assert peak(twice) == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("mode", KEPT)
def test_an_examination_holds_three_float64_vectors(mode, kind, peak, problem):
    reference = Reference(problem, OperatorSpec(kind=kind))
    held = peak(lambda: reference.examine(mode, batched=False))
    assert 2 * HELD <= held <= 2 * (HELD + ONE)


def test_examining_a_vectorised_product_holds_three_more(peak, problem):
    reference = Reference(problem, OperatorSpec())
    held = peak(lambda: reference.examine("program", batched=True))
    assert held <= 2 * (HELD + 3 + ONE)


def test_examining_blocks_holds_no_more(peak, problem):
    spec = OperatorSpec(block_sizes=(2,) * LAYERS)
    reference = Reference(problem, spec)
    held = peak(lambda: reference.examine("program", batched=False))
    assert held <= 2 * (HELD + ONE)


@pytest.mark.parametrize("mode", KEPT)
def test_opening_an_operator_holds_no_more(mode, peak, problem, monkeypatch):
    monkeypatch.setattr(verify, "KEPT_BYTES", 0)  # of models that are not small
    assert peak(lambda: operator_of(problem, mode)) <= 2 * (HELD + ONE)


LAYERWISE = 2 * 2 / LAYERS
"""Two layers in float64: a gradient, and what it is made of or copied to."""


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_linearising_makes_no_gradient_that_nobody_asks_for(kind, peak, problem):
    spec, batch = OperatorSpec(kind=kind), problem.data[0]
    linearize.program(problem, spec, batch)  # traced
    assert peak(lambda: linearize.program(problem, spec, batch)) <= 2 / LAYERS


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("blocks", [None, (2,) * LAYERS])
def test_verifying_layer_by_layer_holds_two_layers_in_float64(
    kind, blocks, peak, problem
):
    spec = OperatorSpec(kind=kind, block_sizes=blocks)
    # What directions are made of is kept, and as large for all models.
    ProjectedReference(problem, spec).examine("program")
    reference = ProjectedReference(problem, spec)
    held = peak(lambda: reference.examine("program"))
    assert held <= LAYERWISE + ONE


def test_opening_a_large_model_holds_no_more(peak, problem, monkeypatch):
    monkeypatch.setattr(size, "SHARE", 0.0)
    monkeypatch.setattr(batch_product, "EMITTED_BYTES", 1 << 20)
    assert peak(lambda: operator_of(problem, "program")) <= LAYERWISE + ONE
    assert peak(lambda: check_gradient(problem, lambda: False)) <= LAYERWISE + ONE


def test_asking_for_the_sum_over_data_holds_two_float64_vectors(peak, problem):
    reference = Reference(problem, OperatorSpec())
    assert peak(reference.is_sum_over_data) <= 2 * (2 + ONE)


def test_comparing_two_modes_holds_a_vector_and_two_products(peak, problem):
    held = peak(lambda: disagreements(problem, OperatorSpec(), *KEPT, batched=False))
    assert held <= 3 + ONE


def test_evaluating_twice_holds_two_gradients(peak, problem):
    assert peak(lambda: check_objective(problem)) <= 2 + ONE


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("mode", KEPT)
def test_a_product_holds_its_result_and_the_rows(mode, kind, peak, problem):
    """And the operand, which is the caller's."""
    operator = operator_of(problem, mode, kind=kind)
    column = torch.ones(1, problem.layout.size)
    assert peak(lambda: operator.apply(column)) <= 2 + ONE


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_product_with_a_large_column_holds_its_result_and_one_row(
    kind, peak, problem, monkeypatch
):
    """A Hessian's row is the sum of two, so it holds two for a moment."""
    operator = operator_of(problem, "program", kind=kind)
    column = torch.ones(1, problem.layout.size)
    monkeypatch.setattr(batch_product, "EMITTED_BYTES", column.nbytes)
    rows = 2 if kind == "hessian" else 1
    assert peak(lambda: operator.apply(column)) <= 1 + rows * ONE


def test_a_gradient_holds_its_result_and_the_rows(peak, problem):
    assert peak(problem.gradient) <= 2 + ONE


def test_new_parameters_are_copied_once(peak, problem):
    values = {
        n: p.numpy()
        for n, p in zip(problem.layout.names, problem.parameters, strict=True)
    }
    assert peak(lambda: problem.with_parameters(values)) <= 1 + 0.01
