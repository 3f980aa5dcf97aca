"""Eigenpairs, systems, probes: against dense float64 algebra on small symmetric maps."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from curvd.contract.enums import Distribution, Solver, Stop, Which
from curvd.tensors import random_probes as client_probes
from curvd_server.linalg.base import Products, drain
from curvd_server.linalg.eigenpairs import eigsh
from curvd_server.linalg.intervals import student_975
from curvd_server.linalg.linear_systems import solve
from curvd_server.linalg.random_probes import probes

SIZE = 120


def hessian_like(seed=0, size=SIZE, negative=0.1):
    """A symmetric matrix with a few large, many tiny and some negative eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(size, size, generator=generator, dtype=torch.float64)
    )[0]
    values = torch.logspace(1, -5, size, dtype=torch.float64)
    values[-size // 4 :] *= -1
    values[-1] = -negative
    return (basis * values) @ basis.T


def products_of(A, **options):
    return Products(lambda V: V @ A.T, size=len(A), dtype=A.dtype, **options)


@pytest.mark.parametrize("which", Which)
@pytest.mark.parametrize("k", [1, 5, 10])
def test_eigenvalues_are_those_of_the_dense_matrix_to_1e_6(which, k):
    A = hessian_like()
    exact = np.linalg.eigvalsh(A.numpy())
    result = drain(eigsh(products_of(A), k, which=which, tolerance=1e-8))
    expected = {
        Which.LARGEST: exact[-k:],
        Which.SMALLEST: exact[:k],
        Which.LARGEST_MAGNITUDE: exact[np.argsort(-abs(exact))[:k]],
        Which.BOTH: np.r_[exact[: k // 2], exact[len(exact) - (k + 1) // 2 :]],
    }[which]
    np.testing.assert_allclose(result.values, sorted(expected)[::-1], rtol=1e-6)
    assert result.stopped is Stop.CONVERGED


def test_reported_residuals_equal_recomputed_ones():
    A = hessian_like(1)
    result = drain(eigsh(products_of(A), 6, tolerance=1e-4))
    values = torch.tensor(result.values, dtype=A.dtype)[:, None]
    recomputed = torch.linalg.vector_norm(
        result.vectors @ A - values * result.vectors, dim=1
    )
    np.testing.assert_allclose(result.residuals, recomputed, rtol=1e-6, atol=1e-13)
    gram = result.vectors @ result.vectors.T
    np.testing.assert_allclose(gram, torch.eye(6), atol=1e-12)


def test_eigsh_counts_its_products_and_stops_where_it_is_told():
    A = hessian_like()
    seen = []
    products = Products(
        lambda V: (seen.append(len(V)), V @ A)[1], size=SIZE, dtype=A.dtype, limit=15
    )
    result = drain(eigsh(products, 5, tolerance=1e-12))
    assert result.stopped is Stop.PRODUCTS
    assert result.products == sum(seen) == 15
    assert len(result.values) == 5


def test_float32_rounding_does_not_keep_eigsh_from_ending():
    A = hessian_like().float()
    generator = torch.Generator().manual_seed(3)
    noise = 1e-6 * torch.randn(SIZE, SIZE, generator=generator)
    result = drain(eigsh(products_of(A + noise, limit=2000), 5, tolerance=1e-12))
    assert result.stopped is Stop.CONVERGED
    assert 1e-7 < result.asymmetry < 1e-4
    exact = np.linalg.eigvalsh(hessian_like().numpy())[::-1][:5]
    np.testing.assert_allclose(result.values, exact, rtol=1e-4)


def test_warm_start_follows_a_changing_matrix_in_fewer_products():
    A = hessian_like()
    cold = drain(eigsh(products_of(A), 3, tolerance=1e-3))
    drift = 1e-4 * hessian_like(5)
    again = drain(eigsh(products_of(A + drift), 3, tolerance=1e-3))
    warm = drain(eigsh(products_of(A + drift), 3, tolerance=1e-3, start=cold.vectors))
    np.testing.assert_allclose(warm.values, again.values, rtol=1e-5)
    assert warm.products <= 15 < again.products


@pytest.mark.parametrize(
    "matrix", [torch.zeros(30, 30), torch.eye(30), torch.diag(torch.arange(30) % 3.0)]
)
def test_invariant_subspaces_are_no_obstacle(matrix):
    A = matrix.double()
    result = drain(eigsh(products_of(A, limit=500), 4, basis=10))
    exact = np.linalg.eigvalsh(A.numpy())[::-1][:4]
    np.testing.assert_allclose(result.values[0], exact[0], atol=1e-10)
    assert max(result.residuals) < 1e-8


def test_all_eigenvalues_of_a_small_matrix():
    A = hessian_like(size=6)
    result = drain(eigsh(products_of(A), 6))
    np.testing.assert_allclose(
        result.values, np.linalg.eigvalsh(A.numpy())[::-1], atol=1e-12
    )


@pytest.mark.parametrize("solver", Solver)
def test_solutions_are_those_of_dense_algebra(solver):
    A = hessian_like(negative=1e-5)
    A = A @ A
    B = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1), dtype=A.dtype)
    result = drain(
        solve(products_of(A), B, solver=solver, damping=0.1, tolerance=1e-10)
    )
    damped = A + 0.1 * torch.eye(SIZE, dtype=A.dtype)
    np.testing.assert_allclose(
        result.solution, torch.linalg.solve(damped, B.T).T, rtol=1e-6, atol=1e-8
    )
    assert result.stopped is Stop.CONVERGED
    true = torch.linalg.vector_norm(B - result.solution @ damped, dim=1)
    np.testing.assert_allclose(result.residuals, true, rtol=1e-3, atol=1e-14)


@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("limit", [8, 20, 60])
def test_reported_residuals_are_true_when_products_run_out(solver, limit):
    A = hessian_like()
    A = A @ A
    B = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1), dtype=A.dtype)
    result = drain(
        solve(
            products_of(A, limit=limit), B, solver=solver, damping=1e-6, tolerance=1e-12
        )
    )
    assert result.stopped is Stop.PRODUCTS
    assert result.products <= limit
    damped = A + 1e-6 * torch.eye(SIZE, dtype=A.dtype)
    true = torch.linalg.vector_norm(B - result.solution @ damped, dim=1)
    np.testing.assert_allclose(result.residuals, true, rtol=1e-9)


def test_cg_reports_negative_curvature_column_by_column():
    A = torch.diag(torch.linspace(-1, 3, SIZE, dtype=torch.float64))
    B = torch.zeros(2, SIZE, dtype=torch.float64)
    B[0, 0], B[1, -1] = 1, 1
    result = drain(solve(products_of(A), B, solver=Solver.CG))
    assert result.column_stops == (Stop.NEGATIVE_CURVATURE, Stop.CONVERGED)
    assert result.stopped is Stop.NEGATIVE_CURVATURE
    assert result.indefinite == (True, False)
    assert result.curvatures[0] == pytest.approx(-1)
    assert result.relative_residuals[0] == 1


def test_minres_solves_indefinite_systems_and_says_that_they_are():
    A = hessian_like() + 0.05 * torch.eye(SIZE, dtype=torch.float64)
    b = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(2), dtype=A.dtype)
    result = drain(solve(products_of(A), b, solver=Solver.MINRES, tolerance=1e-9))
    assert result.stopped is Stop.CONVERGED
    assert result.indefinite == (True,)
    np.testing.assert_allclose(result.solution @ A, b, atol=1e-7)


def test_a_good_preconditioner_and_a_good_start_save_products():
    scales = torch.logspace(-3, 3, SIZE, dtype=torch.float64)
    A = torch.diag(scales) + 1e-3 * torch.ones(SIZE, SIZE, dtype=torch.float64)
    b = torch.ones(1, SIZE, dtype=A.dtype)
    plain = drain(solve(products_of(A), b, tolerance=1e-8))
    better = drain(
        solve(products_of(A), b, tolerance=1e-8, preconditioner=A.diagonal())
    )
    assert better.products < plain.products / 4
    exact = torch.linalg.solve(A, b.T).T
    known = drain(solve(products_of(A), b, tolerance=1e-8, start=exact))
    assert known.products == 1
    assert known.stopped is Stop.CONVERGED


@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4, 1e-6])
def test_a_residual_without_a_closing_product_is_true_to_a_percent(damping):
    A = hessian_like()
    A = A @ A + damping * torch.eye(SIZE, dtype=A.dtype)
    B = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1), dtype=A.dtype)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        seen = []
        C, D = A.to(dtype), B.to(dtype)
        products = Products(
            lambda V, C=C, seen=seen: (seen.append(V), V @ C)[1], size=SIZE, dtype=dtype
        )
        result = drain(solve(products, D, tolerance=tolerance))
        true = torch.linalg.vector_norm(
            D.double() - result.solution.double() @ C.double(), dim=1
        )
        closed = [
            any(torch.equal(x, v) for V in seen for v in V) for x in result.solution
        ]
        if dtype is torch.float64 and damping >= 1e-4:
            assert not any(closed)
        if dtype is torch.float64 or damping == 1.0:  # else float32 products err more
            np.testing.assert_allclose(result.residuals, true, rtol=0.01)
        assert result.products == sum(map(len, seen))


def test_float32_systems_end_with_a_true_residual_when_no_better_is_possible():
    A = hessian_like()
    A = (A @ A + 1e-4 * torch.eye(SIZE, dtype=A.dtype)).float()
    b = torch.ones(1, SIZE)
    result = drain(solve(products_of(A, limit=5000), b, tolerance=1e-12))
    assert result.stopped is Stop.STAGNATED
    true = torch.linalg.vector_norm(b.double() - result.solution.double() @ A.double())
    assert result.residuals[0] == pytest.approx(float(true), rel=0.5)


def test_a_zero_right_hand_side_costs_nothing():
    result = drain(
        solve(products_of(hessian_like()), torch.zeros(2, SIZE, dtype=torch.float64))
    )
    assert result.products == 0
    assert result.stopped is Stop.CONVERGED


def test_rademacher_probes_agree_to_the_bit_with_the_client():
    for size in (1, 63, 64, 65, 1000):
        ours = probes(
            Distribution.RADEMACHER, 7, [0, 3, 2**40], size, dtype=torch.float64
        )
        theirs = client_probes.probes("rademacher", 7, [0, 3, 2**40], size, np.float64)
        np.testing.assert_array_equal(ours, theirs)
        assert set(np.unique(ours)) <= {-1.0, 1.0}


def test_normal_probes_agree_to_rounding_with_the_client_and_look_normal():
    ours = probes(Distribution.NORMAL, 2**63 - 1, [0, 1], 9999, dtype=torch.float64)
    theirs = client_probes.probes("normal", 2**63 - 1, [0, 1], 9999, np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    assert abs(theirs.mean()) < 0.03 and abs(theirs.std() - 1) < 0.03
    assert abs(np.mean(theirs[0] * theirs[1])) < 0.04


def test_probes_begin_as_documented():
    text = (Path(__file__).parents[2] / "docs/probes.md").read_text()
    signs = client_probes.probes("rademacher", 0, [0], 16, np.int8)[0]
    assert f"`{''.join('+' if s > 0 else '-' for s in signs)}`" in text
    normals = client_probes.probes("normal", 0, [0], 4, np.float64)[0]
    assert f"`{', '.join(f'{x:.15g}' for x in normals)}`" in text


def test_long_probes_are_made_in_chunks_that_join(monkeypatch):
    whole = probes(Distribution.RADEMACHER, 1, [5], 1000, dtype=torch.float32)
    normal = probes(Distribution.NORMAL, 1, [5], 1000, dtype=torch.float64)
    monkeypatch.setattr("curvd_server.linalg.random_probes._CHUNK_WORDS", 2)
    assert torch.equal(
        whole, probes(Distribution.RADEMACHER, 1, [5], 1000, dtype=torch.float32)
    )
    assert torch.equal(
        normal, probes(Distribution.NORMAL, 1, [5], 1000, dtype=torch.float64)
    )


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 30, 1000])
def test_student_quantiles_match_scipy(freedom):
    stats = pytest.importorskip("scipy.stats")
    assert student_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.02)
    assert math.isfinite(student_975(freedom))
