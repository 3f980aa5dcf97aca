"""Estimators: their definitions, their products, and when they stop."""

import math

import numpy as np
import pytest
import torch

from curvd.contract.enums import Estimator, Solver, Stop
from curvd.errors import NotFinite
from curvd_server.linalg.base import Products, drain
from curvd_server.linalg.density import spectral_density
from curvd_server.linalg.diagonals import diagonal
from curvd_server.linalg.eigenpairs import eigsh
from curvd_server.linalg.linear_systems import solve
from curvd_server.linalg.log_determinants import logdet
from curvd_server.linalg.norm import frobenius_norm
from curvd_server.linalg.sampling import Target
from curvd_server.linalg.traces import trace

SIZE = 80


def matrix(decay=2.0, floor=0.0, size=SIZE):
    """Eigenvalues fall like a power; some are negative unless there is a floor."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(
        torch.randn(size, size, generator=generator, dtype=torch.float64)
    )[0]
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    if not floor:
        values[::5] *= -0.5
    return (basis * (values + floor)) @ basis.T


def products_of(A, **options):
    return Products(lambda V: V @ A, size=len(A), dtype=A.dtype, **options)


def test_xtrace_beats_hutchinson_where_eigenvalues_decay():
    A = matrix(decay=3.0)
    exact = float(A.trace())

    def error(estimator):
        target = Target(samples=40)
        return np.sqrt(
            np.mean([
                (
                    drain(
                        trace(
                            products_of(A), estimator=estimator, target=target, seed=s
                        )
                    ).value
                    - exact
                )
                ** 2
                for s in range(30)
            ])
        )

    assert error(Estimator.EXCHANGEABLE) < 0.05 * error(Estimator.HUTCHINSON)
    assert error(Estimator.HUTCHPP) < 0.2 * error(Estimator.HUTCHINSON)


@pytest.mark.parametrize("estimator", Estimator)
def test_traces_stop_at_the_requested_standard_error(estimator):
    A = matrix(decay=1.0, floor=0.1)
    target = Target(relative=0.02, samples=4000)
    found = drain(trace(products_of(A), estimator=estimator, target=target))
    assert found.stopped is Stop.CONVERGED
    assert found.standard_error <= 0.02 * abs(found.value)
    assert found.value == pytest.approx(float(A.trace()), rel=0.1)
    assert found.products < 1000


@pytest.mark.parametrize("estimator", Estimator)
def test_traces_of_low_rank_maps_are_exact_once_the_sketch_spans_them(estimator):
    vectors = torch.randn(
        3, SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    A = vectors.T @ vectors
    found = drain(trace(products_of(A), estimator=estimator, target=Target(samples=60)))
    if estimator is Estimator.HUTCHINSON:
        assert abs(found.value - float(A.trace())) < 4 * found.standard_error
    else:
        assert found.value == pytest.approx(float(A.trace()), rel=1e-9)
        assert found.standard_error < 1e-6 * found.value


def test_diagonals_of_small_maps_are_read_off_all_columns():
    A = matrix(size=12)
    found = drain(diagonal(products_of(A), target=Target(samples=100)))
    np.testing.assert_allclose(found.values, A.diagonal(), atol=1e-12)
    assert found.products == 12


def test_xdiag_equals_its_definition():
    from curvd_server.linalg.diagonals import _exchanged
    from curvd_server.linalg.sketch import Sketch

    A = matrix(size=20)
    sketch = Sketch(products_of(A), seed=3)
    sketch.grow(4)
    sketch.grow(3)
    W, Y = sketch.w, sketch.y
    np.testing.assert_allclose(sketch.r.T @ sketch.q, Y, atol=1e-12)
    diagonals, traces = [], []
    for i in range(7):
        others = torch.cat((Y[:i], Y[i + 1 :]))
        Q = torch.linalg.qr(others.T)[0]
        P = Q @ Q.T
        rest = torch.eye(20, dtype=A.dtype) - P
        diagonals.append((P @ A).diagonal() + W[i] * (rest @ A @ W[i]))
        traces.append(float((P @ A @ P).trace() + W[i] @ rest @ A @ rest @ W[i]))
    found = _exchanged(products_of(A), sketch).result(Stop.CONVERGED)
    np.testing.assert_allclose(found.values, torch.stack(diagonals).mean(0), atol=1e-12)
    np.testing.assert_allclose(sketch.exchanged_traces(), traces, atol=1e-12)


def test_frobenius_norms_stop_at_the_requested_standard_error():
    A = matrix(decay=0.5)
    precise = drain(
        frobenius_norm(products_of(A), target=Target(relative=0.01, samples=10**4))
    )
    assert precise.standard_error <= 0.01 * precise.value
    assert precise.value == pytest.approx(float(torch.linalg.matrix_norm(A)), rel=0.05)


def test_log_determinants_count_their_products_and_report_the_smallest_ritz_value():
    A = matrix(decay=1.0, floor=0.5)
    damped = A + 0.1 * torch.eye(SIZE, dtype=A.dtype)
    target = Target(samples=20)
    found = drain(logdet(products_of(A), damping=0.1, steps=25, target=target, block=4))
    assert found.products == 20 * 25
    assert found.smallest >= float(torch.linalg.eigvalsh(damped)[0]) - 1e-9
    assert found.value == pytest.approx(float(torch.logdet(damped)), rel=0.05)


def test_log_determinants_of_indefinite_maps_are_refused_with_the_ritz_value_that_proves_it():
    found = drain(
        logdet(products_of(matrix()), damping=1e-3, target=Target(samples=20))
    )
    assert found.stopped is Stop.NEGATIVE_CURVATURE
    assert math.isnan(found.value)
    assert found.smallest < 0


@pytest.mark.parametrize("null", [0, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_determinants_say_where_steps_leave_room_for_a_null_space(null, dtype):
    values = torch.logspace(-3, 1, SIZE - null, dtype=torch.float64)
    basis = torch.linalg.qr(matrix(decay=0.1, floor=1.0))[0]
    A = (basis * torch.cat([torch.zeros(null), values]) @ basis.T).to(dtype)
    A = (A + A.T) / 2
    target, many = Target(samples=10), SIZE - 8
    plain = drain(logdet(products_of(A), steps=many, target=target, block=10))
    if null:
        assert plain.stopped in {Stop.STAGNATED, Stop.NEGATIVE_CURVATURE}
    else:
        assert plain.stopped is Stop.CONVERGED
        assert abs(plain.value - float(values.log().sum())) <= 2 * plain.half_width
    few = drain(logdet(products_of(A), steps=12, target=target, block=10))
    assert few.stopped is Stop.STAGNATED, "few steps cannot tell"
    damped = drain(
        logdet(products_of(A), steps=12, damping=0.1, target=target, block=10)
    )
    assert damped.stopped is Stop.CONVERGED


def test_log_determinants_of_shifted_identities_have_no_variance():
    A = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    found = drain(logdet(products_of(A), damping=3.0, target=Target(samples=12)))
    assert found.value == pytest.approx(SIZE * math.log(3))
    assert found.standard_error < 1e-10


@pytest.mark.parametrize("logarithmic", [False, True])
def test_densities_integrate_to_one_and_match_the_smoothed_spectrum(logarithmic):
    A = matrix(decay=1.0)
    found = drain(
        spectral_density(
            products_of(A),
            samples=60,
            steps=40,
            width=0.1,
            logarithmic=logarithmic,
            floor=1e-3,
            block=7,
        )
    )
    values = torch.linalg.eigvalsh(A).numpy()
    axis, places = found.grid, values
    if logarithmic:
        axis, places = np.log10(axis), np.log10(np.maximum(np.abs(values), 1e-3))
    exact = np.exp(-0.5 * ((axis[:, None] - places) / 0.1) ** 2).mean(1) / (
        0.1 * math.sqrt(2 * math.pi)
    )
    assert np.trapezoid(found.density, axis) == pytest.approx(1, abs=1e-3)
    inside = (
        np.abs(found.density - exact) <= 4 * found.standard_error + 0.02 * exact.max()
    )
    assert inside.mean() > 0.98
    assert found.products == 60 * 40
    np.testing.assert_allclose(found.weights.sum(1), 1)
    np.testing.assert_allclose(found.nodes.max(), values.max(), rtol=1e-6)


def test_densities_of_tiny_ranks_need_few_steps():
    vectors = torch.randn(
        2, SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    found = drain(
        spectral_density(products_of(vectors.T @ vectors), samples=3, steps=50, block=3)
    )
    assert found.products <= 3 * 4
    assert np.isfinite(found.density).all()


@pytest.mark.parametrize(
    "query",
    [
        lambda p: trace(p, estimator=Estimator.HUTCHINSON, target=Target(samples=100)),
        lambda p: trace(p, estimator=Estimator.HUTCHPP, target=Target(samples=100)),
        lambda p: trace(
            p, estimator=Estimator.EXCHANGEABLE, target=Target(samples=100)
        ),
        lambda p: diagonal(p, target=Target(samples=100)),
        lambda p: diagonal(
            p, estimator=Estimator.HUTCHINSON, target=Target(samples=100)
        ),
        lambda p: frobenius_norm(p, target=Target(samples=100)),
        lambda p: spectral_density(p, samples=9, steps=9),
        lambda p: logdet(p, damping=10.0, target=Target(samples=9), steps=9),
    ],
)
@pytest.mark.parametrize("limit", [0, 1, 2, 33])
def test_queries_never_exceed_their_products_and_return_the_best_so_far(query, limit):
    counted = []
    A = matrix()
    products = Products(
        lambda V: (counted.append(len(V)), V @ A)[1],
        size=SIZE,
        dtype=A.dtype,
        limit=limit,
    )
    found = drain(query(products))
    assert found.products == sum(counted) <= limit
    assert found.stopped is Stop.PRODUCTS


@pytest.mark.parametrize("estimator", [Estimator.HUTCHINSON, Estimator.EXCHANGEABLE])
@pytest.mark.parametrize("size", [6, 60])
def test_a_diagonal_of_no_products_is_nan(estimator, size):
    products = products_of(matrix(size=size), expired=lambda: True)
    found = drain(
        diagonal(products, estimator=estimator, target=Target(samples=20), seed=1)
    )
    assert found.products == 0 and found.values.isnan().all()
    assert found.relative_error == math.inf and found.quantile == math.inf


def test_queries_whose_time_is_up_return_the_best_so_far():
    A = matrix()
    clock = iter([False, False, True])
    products = products_of(A, expired=lambda: next(clock))
    found = drain(
        trace(
            products,
            estimator=Estimator.HUTCHINSON,
            target=Target(samples=100),
            block=4,
        )
    )
    assert found.stopped is Stop.TIME
    assert found.samples == 8
    assert math.isfinite(found.value)


def test_the_jackknife_of_xtrace_equals_its_definition():
    from curvd_server.linalg.sketch import Sketch

    A = matrix(size=20)
    sketch = Sketch(products_of(A), seed=3)
    sketch.grow(6)
    mean = float(np.mean(sketch.exchanged_traces()))
    W, Y = sketch.w, sketch.y
    without = []
    for j in range(6):
        values = []
        for i in set(range(6)) - {j}:
            others = [m for m in range(6) if m not in (i, j)]
            Q = torch.linalg.qr(Y[others].T)[0]
            P = Q @ Q.T
            rest = torch.eye(20, dtype=A.dtype) - P
            values.append(float((P @ A @ P).trace() + W[i] @ rest @ A @ rest @ W[i]))
        without.append(np.mean(values))
    expected = math.sqrt(5 / 6 * np.sum((np.array(without) - mean) ** 2))
    assert sketch.jackknife_error(mean) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "query",
    [
        lambda p: trace(p, estimator=Estimator.HUTCHINSON, target=Target(samples=40)),
        lambda p: trace(p, estimator=Estimator.HUTCHPP, target=Target(samples=40)),
        lambda p: trace(p, target=Target(samples=40)),
        lambda p: diagonal(p, target=Target(samples=40)),
        lambda p: diagonal(
            p, estimator=Estimator.HUTCHINSON, target=Target(samples=40)
        ),
        lambda p: frobenius_norm(p, target=Target(samples=40)),
        lambda p: spectral_density(p, samples=9, steps=9),
        lambda p: logdet(p, damping=10.0, target=Target(samples=9), steps=9),
        lambda p: eigsh(p, 3),
        lambda p: solve(p, torch.ones(1, p.size, dtype=p.dtype), damping=1.0),
        lambda p: solve(p, torch.ones(1, p.size, dtype=p.dtype), solver=Solver.MINRES),
    ],
)
def test_products_that_are_not_finite_end_a_query_with_a_typed_error(query, value):
    A = matrix()
    for last in (0, 1):  # from the first product on, or later
        left = [last]

        def multiply(V, left=left):
            left[0] -= len(V)
            return V @ A if left[0] >= 0 else torch.full_like(V, value)

        products = Products(multiply, size=SIZE, dtype=A.dtype)
        with pytest.raises(NotFinite, match="of the query is"):
            drain(query(products))


@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize("touched", [12, SIZE])
@pytest.mark.parametrize("estimator", [Estimator.EXCHANGEABLE, Estimator.HUTCHPP])
def test_a_sketch_that_spans_the_range_is_exact_to_rounding(estimator, touched, rank):
    generator = torch.Generator().manual_seed(rank)
    vectors = torch.zeros(rank, SIZE, dtype=torch.float64)
    vectors[:, :touched] = torch.randn(
        rank, touched, generator=generator, dtype=torch.float64
    )
    A = vectors.T @ vectors
    for seed in range(20):
        target = Target(samples=60)
        found = drain(
            trace(products_of(A), estimator=estimator, target=target, seed=seed)
        )
        assert abs(found.value - float(A.trace())) <= found.half_width
        assert found.half_width < 1e-12 * found.value
        read = drain(diagonal(products_of(A), target=target, seed=seed))
        reach = read.quantile * read.standard_errors
        assert ((read.values - A.diagonal()).abs() <= reach).all()
        assert float(reach.max()) < 1e-12 * float(A.diagonal().max())


@pytest.mark.parametrize("size", [1, 2, 15, 81])
def test_estimates_of_zero_are_zero_without_an_error(size):
    A = torch.zeros(size, size, dtype=torch.float64)
    for estimator in Estimator:
        found = drain(
            trace(products_of(A), estimator=estimator, target=Target(samples=40))
        )
        assert (found.value, found.half_width) == (0.0, 0.0)
    norm = drain(frobenius_norm(products_of(A), target=Target(samples=40)))
    assert (norm.value, norm.half_width) == (0.0, 0.0)
    for estimator in (Estimator.HUTCHINSON, Estimator.EXCHANGEABLE):
        read = drain(
            diagonal(products_of(A), estimator=estimator, target=Target(samples=40))
        )
        assert not read.values.any()
        assert not read.standard_errors.any()


def test_signs_that_coincide_on_few_coordinates_do_not_pass_for_an_exhausted_range():
    A = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    A[:2, :2] = torch.tensor([[3.0, 1.0], [1.0, -2.0]])
    for seed in range(40):
        found = drain(trace(products_of(A), target=Target(samples=60), seed=seed))
        assert found.value == pytest.approx(1.0, abs=1e-9)
