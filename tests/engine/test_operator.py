"""Operators as the service uses them: built once, bounded, cancellable, repeatable."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from support.places import everywhere, here
from support.reference import central_difference, columns, error, flat, problem_of
from support.zoo import ANIMALS

from curvd.contract.enums import Dtype
from curvd.contract.specs import DatasetSpec, LossSpec, OperatorSpec
from curvd.errors import Cancelled, InvalidSpec, InvalidVector, OutOfMemory
from curvd.tensors.buffer_pool import Pool
from curvd_server.engine import batch_product
from curvd_server.engine.batch_product import BatchProduct
from curvd_server.engine.building import build
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.operator import Operator
from curvd_server.engine.operators.linearize import MODES
from curvd_server.engine.tuning.plan import Plan
from curvd_server.models.builders import BUILDERS

HUGE = 2**30
GELU = next(a for a in ANIMALS if a.name == "gelu")
CONV = next(a for a in ANIMALS if a.name == "groupnorm")
BATCHES = 3
KEPT = ("program", "double_backward")


def make(animal=GELU, mode="double_backward", width=1, budget=HUGE, **spec) -> Operator:
    problem = problem_of(animal, batch_size=2)
    plan = Plan(mode, width)
    return build(
        problem, OperatorSpec(**spec), budget_bytes=budget, plan=plan, tuning_s=0.0
    )


@pytest.mark.parametrize("mode", KEPT)
def test_a_thousand_products_linearise_once(mode: str):
    operator = make(mode=mode)
    V = columns(operator.problem, 1)
    for _ in range(1000):
        operator.apply(V)
    assert operator.counters.linearisations == BATCHES
    assert operator.counters.columns == 1000


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_number_of_columns(mode: str, count: int):
    operator = make(mode=mode, width=3)
    V = columns(operator.problem, 7)
    want = torch.cat([operator.apply(v[None]) for v in V])
    got = operator.apply(V[:count])
    assert got.shape == (count, operator.problem.layout.size)
    assert error(got, want[:count]) < 1e-12 or not count


@everywhere
def test_numpy_columns_are_taken():
    operator = make()
    V = columns(operator.problem, 2)
    assert torch.equal(operator.apply(V.numpy()), operator.apply(V))
    assert torch.equal(operator.apply(np.asfortranarray(V)), operator.apply(V))


@everywhere
def test_columns_of_the_wrong_shape_are_refused():
    operator = make()
    for bad in (torch.zeros(3), torch.zeros(2, 3), torch.zeros(1, 39).long()):
        with pytest.raises(InvalidVector, match="P=35"):
            operator.apply(bad)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_products_are_repeatable_to_the_bit(mode: str, kind: str):
    V = columns(problem_of(CONV), 3).float()
    first, second = (make(CONV, mode, 2, kind=kind) for _ in range(2))
    want = first.apply(V)
    assert torch.equal(first.apply(V), want)
    assert torch.equal(second.apply(V), want)


@pytest.mark.parametrize(
    ("animal", "kind"),
    [*((a, "hessian") for a in ANIMALS), (GELU, "ggn"), (CONV, "ggn")],
    ids=lambda x: getattr(x, "name", x),
)
def test_rows_that_are_added_one_by_one_are_the_same(animal, kind, monkeypatch):
    blocks = (1,) * len(problem_of(animal).parameters)
    for sizes in (None, blocks) if animal is CONV else (None,):
        operator = make(animal, "program", kind=kind, block_sizes=sizes)
        V = columns(operator.problem, 1)
        want = operator.apply(V)
        with monkeypatch.context() as patched:
            patched.setattr(batch_product, "EMITTED_BYTES", 0)
            assert torch.equal(operator.apply(V), want)


@everywhere
def test_scale_and_damping():
    plain, both = make(), make(scale=-2.0, damping=0.5)
    V = columns(plain.problem, 2)
    assert error(both.apply(V), -2.0 * plain.apply(V).cpu() + 0.5 * V) < 1e-14


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.FLOAT64])
def test_memory_of_a_result_is_used_again_once_nobody_looks_at_it(dtype: Dtype):
    arrays = {"x": torch.randn(4, 128), "y": torch.randn(4, 8)}
    problem = Problem.load(
        BUILDERS["mlp"]({"widths": [128, 128, 8]}),
        {},
        arrays,
        DatasetSpec(inputs=("x",), target="y", batch_size=2),
        LossSpec(name="mse"),
        dtype=dtype,
    )
    pool = Pool(HUGE)
    operator = build(
        problem,
        OperatorSpec(),
        budget_bytes=HUGE,
        plan=Plan("double_backward"),
        results=pool,
    ).at(problem)
    V = columns(problem, 2)
    first = operator.apply(V)
    want, place = first.clone(), first.data_ptr()
    view = first[1:]
    del first
    assert pool.idle_bytes == 0  # a view is left
    other = operator.apply(2 * V)
    assert other.data_ptr() != place
    assert torch.equal(view, want[1:])
    del view
    assert pool.idle_bytes == want.nbytes
    again = operator.apply(V)
    assert again.data_ptr() == place
    assert torch.equal(again, want)


@everywhere
def test_results_stream_in_order_as_they_are_ready():
    operator = make()
    V = columns(operator.problem, 5)
    stream = operator.stream(V, at_once=2)
    start, rows = next(stream)
    assert (start, len(rows), operator.counters.columns) == (0, 2, 2)
    rest = [r for _, r in stream]
    assert error(torch.cat([rows, *rest]), operator.apply(V)) < 1e-14


class TestMemory:
    @pytest.mark.parametrize("mode", KEPT)
    def test_closing_returns_it_without_a_garbage_collection(self, mode: str):
        operator = make(mode=mode)
        kept = [self._dies(linear) for linear in operator._cache._cached]
        assert all(ref() is not None for refs in kept for ref in refs)
        gc.disable()
        try:
            operator.close()
            assert all(ref() is None for refs in kept for ref in refs)
        finally:
            gc.enable()

    @staticmethod
    def _dies(linear) -> list[weakref.ref]:
        """What has to be gone: the program's constants, the graph's leaves."""
        if hasattr(linear, "constants"):
            own = [t for t in linear.constants.values() if isinstance(t, torch.Tensor)]
            return [weakref.ref(t) for t in own[-2:] if t._base is None]
        return [weakref.ref(t) for t in linear.leaves]

    @pytest.mark.parametrize("mode", KEPT)
    def test_a_closed_operator_still_multiplies(self, mode: str):
        operator = make(mode=mode)
        V = columns(operator.problem, 1)
        want = operator.apply(V)
        operator.close()
        assert torch.equal(operator.apply(V), want)

    @pytest.mark.parametrize("mode", KEPT)
    def test_the_budget_decides_how_many_batches_are_kept(self, mode: str):
        everything = make(mode=mode)
        each = everything.report.kept_bytes // BATCHES
        V = columns(everything.problem, 5)
        for kept in range(BATCHES + 1):
            operator = make(mode=mode, budget=kept * each + each // 2)
            assert operator.report.kept_batches == kept
            assert operator.report.kept_bytes <= kept * each + each // 2
            assert torch.equal(operator.apply(V), everything.apply(V))
            name = operator.report.mode
            assert name.startswith({0: "recomputed", BATCHES: "kept"}.get(kept, "part"))

    @everywhere
    def test_recomputed_batches_share_one_graph_among_columns(self):
        operator = make(budget=0)
        before = operator.counters.linearisations
        operator.apply(columns(operator.problem, 8))
        assert operator.counters.linearisations - before == BATCHES

    @everywhere
    def test_out_of_memory_halves_the_chunk_and_goes_on(self, monkeypatch):
        operator = make(width=8)
        V = columns(operator.problem, 8)
        want = operator.apply(V)
        self._limit_width(monkeypatch, 2)
        assert error(operator.apply(V), want) < 1e-13
        assert operator.report.columns_at_once == 2

    def test_one_column_that_does_not_fit_says_so(self, monkeypatch):
        operator = make(width=8)
        self._limit_width(monkeypatch, 0)
        with pytest.raises(OutOfMemory, match="smaller batch_size"):
            operator.apply(columns(operator.problem, 8))
        assert operator.report.kept_batches == 0

    def test_rows_that_were_added_before_it_are_not_added_again(self, monkeypatch):
        operator = make(mode="program")
        V = columns(operator.problem, 1)
        want = operator.apply(V)
        real, calls = BatchProduct._rows, []

        def breaking(self, linear, V):
            calls.append(linear)
            for at, row in real(self, linear, V):
                if len(calls) == 2 and at == 2:
                    raise torch.OutOfMemoryError("out of memory")
                yield at, row

        monkeypatch.setattr(batch_product, "EMITTED_BYTES", 0)
        monkeypatch.setattr(BatchProduct, "_rows", breaking)
        assert torch.equal(operator.apply(V), want)
        assert len(calls) == BATCHES + 1
        assert operator.report.kept_batches == 0

    @staticmethod
    def _limit_width(monkeypatch, limit: int) -> None:
        real = BatchProduct._rows

        def limited(self, linear, V):
            if len(V) > limit:
                raise torch.OutOfMemoryError("out of memory")
            return real(self, linear, V)

        monkeypatch.setattr(BatchProduct, "_rows", limited)


class TestCancellation:
    @pytest.mark.parametrize("allowed", [0, 1, 2, 4])
    def test_stops_within_one_mini_batch(self, allowed: int):
        operator = make()
        before = operator.counters.batch_products

        def cancelled() -> bool:
            return operator.counters.batch_products - before >= allowed

        with pytest.raises(Cancelled):
            operator.apply(columns(operator.problem, 10), cancelled=cancelled)
        assert operator.counters.batch_products - before == allowed

    def test_leaves_the_operator_usable(self):
        operator = make()
        V = columns(operator.problem, 1)
        want = operator.apply(V)
        with pytest.raises(Cancelled):
            operator.apply(V, cancelled=lambda: True)
        assert torch.equal(operator.apply(V), want)

    @everywhere
    def test_stops_a_build_and_a_gradient(self):
        problem = problem_of(GELU)
        with pytest.raises(Cancelled):
            build(problem, OperatorSpec(), budget_bytes=0, cancelled=lambda: True)
        with pytest.raises(Cancelled):
            problem.gradient(cancelled=lambda: True)


@everywhere
class TestVersions:
    @pytest.mark.parametrize("mode", KEPT)
    def test_a_new_version_is_exact_and_the_old_one_stays(self, mode: str):
        old = make(mode=mode)
        V = columns(old.problem, 1)
        before = old.apply(V)
        name = old.problem.layout.names[0]
        moved = old.problem.with_parameters({name: old.problem.parameters[0] + 0.3})
        new = old.at(moved)
        assert new.plan == old.plan
        assert new.counters.linearisations == 0
        assert error(new.apply(V)[0], central_difference(moved, V[0])) < 1e-6
        assert torch.equal(old.apply(V), before)
        assert new.counters.linearisations == BATCHES

    def test_a_running_product_mixes_no_versions(self):
        operator = make()
        V = columns(operator.problem, 4)
        want = operator.apply(V)
        stream = operator.stream(V, at_once=1)
        first = next(stream)[1]
        moved = operator.problem.with_parameters({
            n: p * 2 for n, p in _named(operator.problem).items()
        })
        operator.at(moved).apply(V)
        rest = [rows for _, rows in stream]
        assert torch.equal(torch.cat([first, *rest]), want)

    def test_the_callers_array_may_change_afterwards(self):
        problem = problem_of(GELU)
        value = problem.parameters[0].cpu().numpy().copy()
        moved = problem.with_parameters({problem.layout.names[0]: value})
        value += 1.0
        assert torch.equal(moved.parameters[0], problem.parameters[0])

    def test_one_memory_holds_the_parameters_of_two_datasets(self):
        moved = problem_of(GELU).with_parameters({
            n: p + 0.1 for n, p in _named(problem_of(GELU)).items()
        })
        other = problem_of(GELU).on(problem_of(GELU).data[:1])
        shared = other.sharing(moved)
        pairs = [*zip(shared.parameters, moved.parameters, strict=True)]
        constants = moved.model.constants
        pairs += [(shared.model.constants[n], constants[n]) for n in constants]
        assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
        own = other.with_parameters(_named(moved))
        assert torch.equal(shared.gradient()[1], own.gradient()[1])
        assert not torch.equal(shared.gradient()[1], moved.gradient()[1])

    def test_unknown_and_misshapen_parameters_are_named(self):
        problem = problem_of(GELU)
        with pytest.raises(InvalidSpec, match="'nope'"):
            problem.with_parameters({"nope": torch.zeros(1)})
        with pytest.raises(InvalidSpec, match=r"'0.weight': got shape \(2,\)"):
            problem.with_parameters({"0.weight": torch.zeros(2)})


def _named(problem) -> dict[str, torch.Tensor]:
    return dict(zip(problem.layout.names, problem.parameters, strict=True))


@everywhere
class TestPrecision:
    def test_float32_is_accurate(self):
        truth = make(CONV).apply(columns(problem_of(CONV), 2))
        for mode in KEPT:
            assert self._error(Dtype.FLOAT32, mode, truth) < 1e-5

    def test_bfloat16_leaves_as_float32_and_is_usable(self):
        truth = make(CONV).apply(columns(problem_of(CONV), 2))
        for mode in KEPT:
            assert self._error(Dtype.BFLOAT16, mode, truth) < 0.1

    @staticmethod
    def _error(dtype: Dtype, mode: str, truth: torch.Tensor) -> float:
        problem = problem_of(CONV, batch_size=2, dtype=dtype)
        operator = build(
            problem, OperatorSpec(), budget_bytes=HUGE, plan=Plan(mode), tuning_s=0.0
        )
        got = operator.apply(columns(problem_of(CONV), 2))
        assert got.dtype is torch.float32
        return error(got.double(), truth)


@everywhere
def test_frozen_parameters_are_no_part_of_the_operator():
    class Frozen(type(GELU.module())):
        pass

    module = GELU.module()
    module[0].weight.requires_grad_(False)
    from curvd_server.engine.objective.objective import Problem

    whole = problem_of(GELU)
    data = whole.model.data
    part = Problem.load(
        module,
        {},
        GELU.arrays(),
        data,
        GELU.loss,
        dtype=Dtype.FLOAT64,
        device=here(),
    )
    assert part.layout.names == whole.layout.names[1:]
    v = columns(part, 1)
    rows = build(part, OperatorSpec(), budget_bytes=HUGE, tuning_s=0.0).apply(v)
    wide = torch.cat([torch.zeros(1, 16, dtype=v.dtype), v], 1)
    full = build(whole, OperatorSpec(), budget_bytes=HUGE, tuning_s=0.0).apply(wide)
    assert error(rows, full[:, 16:]) < 1e-12


@everywhere
def test_gradients_are_torchs():
    problem = problem_of(CONV, batch_size=2)
    loss, gradient = problem.gradient()
    one = problem_of(CONV, batch_size=6)
    leaves = [p.clone().requires_grad_() for p in one.parameters]
    value = one.objective(leaves, one.data[0])
    want = torch.autograd.grad(value, leaves)
    assert loss == pytest.approx(value.item(), rel=1e-13)
    assert error(gradient, flat(want)) < 1e-13


def test_the_callers_grad_mode_does_not_matter():
    operator = make(mode="double_backward")
    V = columns(operator.problem, 1)
    want = operator.apply(V)
    with torch.no_grad():
        assert torch.equal(operator.apply(V), want)
        assert torch.equal(make().apply(V), want)
