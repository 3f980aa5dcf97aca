"""Every operator on every layer, against definitions without second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from support.reference import (
    block_diagonal,
    central_difference,
    columns,
    dense_empirical_fisher,
    dense_ggn,
    error,
    problem_of,
)
from support.zoo import ANIMALS, REFUSED, Animal
from torch import Tensor

from curvd.contract.enums import OperatorKind
from curvd.contract.specs import LossSpec, OperatorSpec
from curvd.errors import CurvatureUnverified
from curvd_server.engine import building
from curvd_server.engine.building import build
from curvd_server.engine.objective import tangents_of
from curvd_server.engine.operators import LINEARISED
from curvd_server.engine.operators.linearize import MODES
from curvd_server.engine.tuning.autotune import PlanTimer
from curvd_server.engine.tuning.plan import Plan

HUGE = 2**30
zoo = pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)


def of_name(name: str) -> Animal:
    return next(a for a in ANIMALS if a.name == name)


@pytest.fixture(scope="module", autouse=True)
def _one_reference() -> Iterator[None]:
    """Modes of one problem are verified against the same differences, as in a session."""
    made = {}

    def reference(problem, spec, make=building.reference_of):
        key = id(problem), spec
        if key not in made:  # with the problem, whose identity it keeps taken
            made[key] = make(problem, spec), problem
        return made[key][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "reference_of", reference)
        yield
    shared.cache_clear()
    slope.cache_clear()
    one_by_one.cache_clear()


@functools.cache
def shared(name: str):
    """The problem of an animal, made once: a session has one for all its operators."""
    return problem_of(of_name(name))


@functools.cache
def slope(name: str, column: int) -> Tensor:
    """The truth about a Hessian product, which does not depend on the mode."""
    problem = shared(name)
    return central_difference(problem, columns(problem, 2)[column])


@functools.cache
def one_by_one(name: str, spec: OperatorSpec) -> Tensor:
    """Five columns through double backward, each by itself."""
    problem = shared(name)
    return quick(problem, spec).apply(columns(problem, 5))


def quick(problem, spec: OperatorSpec, mode: str = "double_backward"):
    """An operator without timing anything."""
    return build(problem, spec, budget_bytes=HUGE, plan=Plan(mode), tuning_s=0.0)


@zoo
@pytest.mark.parametrize("mode", ["program", "double_backward"])
def test_hessian_products_match_central_differences(animal: Animal, mode: str):
    problem = shared(animal.name)
    operator = quick(problem, OperatorSpec(), mode)
    assert operator.plan.mode == mode
    for column, row in enumerate(operator.apply(columns(problem, 2))):
        assert error(row, slope(animal.name, column)) < 1e-6


@zoo
def test_diagonal_blocks_match_central_differences_of_their_own(animal: Animal):
    problem = shared(animal.name)
    ones = (1,) * len(problem.parameters)
    V = columns(problem, 1)
    want = torch.zeros_like(V)
    for p in problem.layout.parameters:
        inside = slice(p.offset, p.offset + p.size)
        alone = torch.zeros_like(V[0])
        alone[inside] = V[0, inside]
        want[0, inside] = central_difference(problem, alone)[inside]
    for mode in ("program", "double_backward"):
        operator = quick(problem, OperatorSpec(block_sizes=ones), mode)
        assert error(operator.apply(V), want) < 1e-6


@zoo
def test_gauss_newton_and_empirical_fisher_match_their_definitions(animal: Animal):
    problem = shared(animal.name)
    V = columns(problem, 2)
    halves = (1, len(problem.parameters) - 1)
    for kind, dense in (
        (OperatorKind.GGN, dense_ggn(problem)),
        (OperatorKind.EMPIRICAL_FISHER, dense_empirical_fisher(problem)),
    ):
        for mode in ("program", "double_backward"):
            whole = quick(problem, OperatorSpec(kind=kind), mode)
            assert error(whole.apply(V), V @ dense) < 1e-6
        spec = OperatorSpec(kind=kind, block_sizes=halves)
        want = V @ block_diagonal(problem, halves, dense)
        assert error(quick(problem, spec).apply(V), want) < 1e-6


@pytest.mark.parametrize("name", ["gelu", "conv", "linear_bce"])
def test_the_jacobian_gram_matches_dense_jacobians_of_torch_func(name: str):
    problem = problem_of(of_name(name))
    total = torch.zeros(problem.layout.size, problem.layout.size, dtype=torch.float64)
    for batch in problem.data:
        run = lambda p, b=batch: problem.outputs(p, b)  # noqa: E731
        rows = torch.func.jacrev(run)(problem.parameters)
        outputs = run(problem.parameters).numel()
        J = torch.cat([r.reshape(outputs, -1) for r in rows], 1)
        total += J.T @ J
    V, halves = columns(problem, 2), (1, len(problem.parameters) - 1)
    for mode in sorted(MODES):
        whole = quick(problem, OperatorSpec(kind="jacobian_gram"), mode)
        assert error(whole.apply(V), V @ total) < 1e-12
    spec = OperatorSpec(kind="jacobian_gram", block_sizes=halves)
    want = V @ block_diagonal(problem, halves, total)
    assert error(quick(problem, spec).apply(V), want) < 1e-12


def test_the_jacobian_gram_does_not_depend_on_the_loss():
    problem = problem_of(of_name("linear_mse"))  # whose loss has the curvature 2
    V = columns(problem, 1)
    gram = quick(problem, OperatorSpec(kind="jacobian_gram")).apply(V)
    ggn = quick(problem, OperatorSpec(kind="ggn")).apply(V)
    assert error(gram * 2 / problem.normaliser, ggn) < 1e-12


@pytest.mark.parametrize("name", ["linear_mse", "linear_bce", "gelu", "attention"])
@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical_fisher", "fisher"])
def test_columns_together_equal_columns_one_by_one(name: str, mode: str, kind: str):
    problem = shared(name)
    blocks = (2, len(problem.parameters) - 2)
    for sizes in (None, blocks):
        spec = OperatorSpec(kind=kind, block_sizes=sizes)
        V = columns(problem, 5)
        plan = Plan(mode, 3)
        wide = build(problem, spec, budget_bytes=HUGE, plan=plan, tuning_s=0.0)
        assert wide.plan == plan
        assert error(wide.apply(V), one_by_one(name, spec)) < 1e-12


def test_the_zoo_bites():
    """The seed's formula fails on norms, silently, and on others with an error."""
    wrong = [a.name for a in ANIMALS if not _the_formula_is_right(a)]
    assert {"layernorm", "instancenorm", "batchnorm_statistics"} <= set(wrong)


def _the_formula_is_right(animal: Animal) -> bool:
    """``vmap(jvp(jacrev(loss)))`` under ``no_grad``, as curvlinops 3.0.1 has it."""
    problem = problem_of(animal, batch_size=6)
    v = columns(problem, 1)[0]
    tangents = [
        v[p.offset : p.offset + p.size].reshape(1, *p.shape)
        for p in problem.layout.parameters
    ]

    def product(*t: Tensor) -> tuple[Tensor, ...]:
        gradient = torch.func.jacrev(lambda p: problem.objective(p, problem.data[0]))
        return torch.func.jvp(gradient, (problem.parameters,), (t,))[1]

    try:
        with torch.no_grad():
            rows = torch.func.vmap(product)(*tangents)
    except (RuntimeError, NotImplementedError):
        return False
    got = torch.cat([r.reshape(-1) for r in rows])
    return error(got, central_difference(problem, v)) < 1e-3


def test_a_wrong_second_derivative_is_refused_with_the_parameter_named():
    with pytest.raises(CurvatureUnverified, match="direction") as caught:
        build(problem_of(REFUSED), OperatorSpec(), budget_bytes=HUGE, tuning_s=0.0)
    assert "direction" in caught.value.metadata["parameters"]
    assert "freeze" in str(caught.value)


def test_a_padding_row_is_zero():
    problem = problem_of(of_name("padding"))
    V = columns(problem, 1)
    for kind in LINEARISED:
        rows = quick(problem, OperatorSpec(kind=kind)).apply(V)[0, :20].reshape(5, 4)
        assert not rows[1].any()
        assert rows[0].any()


def test_a_parameter_that_is_not_used_gets_a_zero_row():
    problem = problem_of(of_name("unused"))
    used = sum(p.size for p in problem.layout.parameters if "unused" not in p.name)
    for mode in sorted(MODES):
        for kind in LINEARISED:
            operator = quick(problem, OperatorSpec(kind=kind), mode)
            assert not operator.apply(columns(problem, 1))[0, used:].any()


@pytest.mark.parametrize("kind", sorted(LINEARISED))
@pytest.mark.parametrize("mode", sorted(MODES))
def test_columns_together_are_columns_one_by_one_beside_a_parameter_that_is_not_used(
    mode: str, kind: OperatorKind
):
    problem = problem_of(of_name("unused"))
    samples = {"mc_samples": 2} if kind is OperatorKind.FISHER else {}
    spec = OperatorSpec(kind=kind, **samples)
    linear = MODES[mode](problem, spec, problem.data[0])
    V, block = columns(problem, 3), range(len(problem.parameters))
    together = linear.product(tangents_of(V, problem.layout), block, batched=True)
    alone = [
        linear.product(tangents_of(v, problem.layout), block, batched=False) for v in V
    ]
    for rows, *singles in zip(together, *alone, strict=True):
        if rows is None:
            assert all(row is None for row in singles)
        else:
            torch.testing.assert_close(rows, torch.stack(singles))


def test_wide_plans_are_timed_beside_a_parameter_that_is_not_used():
    problem = problem_of(of_name("unused"))
    timer = PlanTimer(problem, OperatorSpec(), HUGE, budget_s=60.0)
    assert timer.seconds_per_column(Plan("program", columns_at_once=8)) is not None


def test_a_block_of_nothing_but_an_unused_parameter_is_zero_for_every_column():
    problem = problem_of(of_name("unused"))
    names = problem.layout.names
    linear = MODES["program"](problem, OperatorSpec(), problem.data[0])
    at = names.index("unused.weight")
    tangents = tangents_of(columns(problem, 3), problem.layout)[at : at + 1]
    assert linear.product(tangents, range(at, at + 1), batched=True) == [None]


def test_an_objective_that_is_linear_has_a_zero_hessian():
    loss = LossSpec(name="nll")  # linear in the outputs, as these are in the parameters
    problem = problem_of(Animal("linear", lambda: torch.nn.Linear(4, 3), loss=loss))
    operator = build(problem, OperatorSpec(damping=2.0), budget_bytes=HUGE)
    V = columns(problem, 2)
    assert torch.equal(operator.apply(V), 2 * V)


class TestSampled:
    problem = property(lambda self: problem_of(of_name("gelu")))

    @pytest.mark.parametrize("name", ["gelu", "linear_mse", "linear_bce", "attention"])
    def test_the_expectation_is_the_exact_gauss_newton_matrix(self, name: str):
        problem = problem_of(of_name(name))
        V = columns(problem, 1)
        exact = quick(problem, OperatorSpec(kind="ggn")).apply(V)
        errors = [
            error(
                quick(problem, OperatorSpec(kind="fisher", mc_samples=s)).apply(V),
                exact,
            )
            for s in (20, 20_000)
        ]
        assert errors[1] < 0.05
        assert errors[1] < errors[0]

    def test_the_seed_fixes_the_product_to_the_bit(self):
        spec = OperatorSpec(kind="fisher", mc_samples=2, seed=7)
        other = OperatorSpec(kind="fisher", mc_samples=2, seed=8)
        V = columns(self.problem, 1)
        first, second = (quick(self.problem, spec).apply(V) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, quick(self.problem, other).apply(V))

    @pytest.mark.parametrize("name", ["gelu", "linear_mse", "attention"])
    def test_the_samples_do_not_depend_on_the_cut_into_batches(self, name: str):
        spec = OperatorSpec(kind="ggn", mc_samples=3, seed=5)
        a, b = (problem_of(of_name(name), batch_size=n) for n in (1, 4))
        V = columns(a, 1)
        assert error(quick(a, spec).apply(V), quick(b, spec).apply(V)) < 1e-12
