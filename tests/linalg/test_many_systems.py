"""Block CG, sketches and what they precondition: against dense float64 algebra."""

import math

import numpy as np
import pytest
import torch

from curvd.contract.enums import Solver, Stop
from curvd.errors import FailedPrecondition
from curvd_server.linalg import (
    LowRank,
    Products,
    Space,
    nystrom,
    solve,
    solve_dampings,
)
from curvd_server.linalg.base import drain
from curvd_server.linalg.block_krylov import factors

SIZE = 160


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def semidefinite(size=SIZE, seed=0, decay=6.0):
    """Like a Gauss-Newton matrix: a few large eigenvalues, and a long tail to zero."""
    basis = torch.linalg.qr(normal(size, size, seed=seed))[0]
    values = torch.logspace(0, -decay, size, dtype=torch.float64)
    values[3 * size // 4 :] = 0
    return (basis * values) @ basis.T


def map_of(A, **options):
    return Products(lambda V: V @ A, size=len(A), dtype=A.dtype, **options)


def residuals(A, damping, B, X):
    return (B - X @ A - damping * X).double().norm(dim=1) / B.double().norm(dim=1)


def exact(A, damping, B):
    return torch.linalg.solve(A + damping * torch.eye(len(A), dtype=A.dtype), B.T).T


@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("columns", [2, 16, 64])
def test_a_block_is_solved_as_dense_algebra_does_in_no_more_products(columns, damping):
    A, B = semidefinite(), normal(columns, SIZE, seed=1)
    alone = drain(solve(map_of(A), B, damping=damping, tolerance=1e-8, block=1))
    found = drain(solve(map_of(A), B, damping=damping, tolerance=1e-8))
    torch.testing.assert_close(
        found.solution, exact(A, damping, B), rtol=0, atol=1e-6 / damping
    )
    assert found.stopped is Stop.CONVERGED
    assert found.products <= 1.05 * alone.products
    true = residuals(A, damping, B, found.solution)
    torch.testing.assert_close(
        torch.tensor(found.relative_residuals, dtype=A.dtype), true, rtol=0.01, atol=0
    )


def test_sixty_four_columns_together_take_a_fifth_of_the_products():
    A, B = semidefinite(1000), normal(64, 1000, seed=1)
    alone = drain(solve(map_of(A), B, damping=1e-4, tolerance=1e-3, block=1))
    found = drain(solve(map_of(A), B, damping=1e-4, tolerance=1e-3))
    assert found.products <= 0.2 * alone.products


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-10])
def test_columns_that_depend_on_each_other_are_no_obstacle(tolerance):
    A = semidefinite()
    b = normal(3, SIZE, seed=2)
    B = torch.stack([
        b[0],
        b[0],
        1e-6 * b[1],
        1e6 * b[1],
        torch.zeros(SIZE, dtype=torch.float64),
        b[0] + 1e-9 * b[2],
        b[0] - b[1],
        A[0],
    ])
    found = drain(solve(map_of(A), B, damping=1e-3, tolerance=tolerance))
    assert found.stopped is Stop.CONVERGED
    true = (B - found.solution @ A - 1e-3 * found.solution).norm(dim=1)
    assert (true <= 1.01 * tolerance * B.norm(dim=1)).all()
    assert found.solution[4].count_nonzero() == 0


def test_more_columns_than_dimensions_are_solved_in_one_step():
    A, B = semidefinite(12), normal(30, 12, seed=3)
    found = drain(solve(map_of(A), B, damping=1e-2, tolerance=1e-10))
    torch.testing.assert_close(found.solution, exact(A, 1e-2, B))
    assert found.iterations == 1
    assert found.products <= 12 + 30  # and their residuals, if in doubt


def test_a_column_that_has_converged_leaves_the_block_and_costs_no_more():
    A = semidefinite()
    vectors = torch.linalg.eigh(A)[1]
    easy = vectors[:, -1] + 1e-3 * vectors[:, -2]  # done after two steps
    B = torch.stack([easy, normal(SIZE, seed=4)])
    alone = drain(solve(map_of(A), B, damping=1e-4, tolerance=1e-6, block=1))
    found = drain(solve(map_of(A), B, damping=1e-4, tolerance=1e-6))
    assert found.stopped is Stop.CONVERGED
    assert found.products <= alone.products


def test_blocks_that_fit_memory_solve_the_same():
    A, B = semidefinite(), normal(20, SIZE, seed=5)
    widths = []

    def multiply(V):
        widths.append(len(V))
        return V @ A

    products = Products(multiply, size=SIZE, dtype=A.dtype)
    found = drain(solve(products, B, damping=1e-2, tolerance=1e-9, block=8))
    assert max(widths) == 8
    torch.testing.assert_close(found.solution, exact(A, 1e-2, B), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [0, 7, 40, 111])
def test_residuals_are_true_when_products_run_out_in_the_middle_of_a_block(limit):
    A, B = semidefinite(), normal(6, SIZE, seed=6)
    found = drain(
        solve(map_of(A, limit=limit), B, damping=1e-6, tolerance=1e-12, block=4)
    )
    assert found.stopped is Stop.PRODUCTS
    assert found.products <= limit
    torch.testing.assert_close(
        torch.tensor(found.relative_residuals, dtype=A.dtype),
        residuals(A, 1e-6, B, found.solution),
    )


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
def test_float32_residuals_are_recomputed_from_the_solution_that_is_returned(
    columns, damping
):
    A, B = semidefinite().float(), normal(columns, SIZE, seed=7).float()
    seen = []

    def multiply(V):
        seen.append(V.clone())
        return V @ A

    products = Products(multiply, size=SIZE, dtype=A.dtype, limit=20_000)
    found = drain(solve(products, B, damping=damping, tolerance=1e-6))
    rows = torch.cat(seen)
    # Columns are solved in units of their own, powers of two.
    units = torch.exp2(torch.frexp(B.abs().amax(1)).exponent.float())
    for x, unit in zip(found.solution, units, strict=True):
        assert (rows == x / unit).all(dim=1).any()
    recomputed = residuals(A, damping, B, found.solution)
    reported = torch.tensor(found.relative_residuals, dtype=torch.float64)
    torch.testing.assert_close(reported, recomputed, rtol=1e-2, atol=1e-6)


def test_negative_curvature_is_reported_of_the_columns_that_met_it():
    A = torch.diag(torch.linspace(-1, 3, SIZE, dtype=torch.float64))
    B = torch.zeros(3, SIZE, dtype=torch.float64)
    B[0, 0], B[1, -20:], B[2, -1] = 1, 1, 1
    found = drain(solve(map_of(A), B))
    assert found.indefinite == (True, False, False)
    assert found.column_stops == (
        Stop.NEGATIVE_CURVATURE,
        Stop.CONVERGED,
        Stop.CONVERGED,
    )
    assert found.curvatures[0] == pytest.approx(-1)
    assert min(found.curvatures[1:]) > 0


def with_outlier(top: float, dtype: torch.dtype) -> torch.Tensor:
    """A bulk of eigenvalues from 1 to 2, and one far above it."""
    values = torch.linspace(1, 2, 60, dtype=torch.float64)
    values[0] = top
    basis = torch.linalg.qr(normal(60, 60, seed=1))[0]
    A = (basis * values) @ basis.T
    return ((A + A.T) / 2).to(dtype)


OUTLIERS = [
    *[(torch.float32, top) for top in (1e3, 1e4, 1e5)],
    *[(torch.float64, top) for top in (1e3, 1e7, 1e10)],
]


@pytest.mark.parametrize("columns", [2, 4, 8])
@pytest.mark.parametrize(("dtype", "top"), OUTLIERS)
def test_an_eigenvalue_far_above_the_others_does_not_blow_a_block_up(
    dtype, top, columns
):
    """What rounding hides of it grows in the directions, unless they are made anew."""
    A = with_outlier(top, dtype)
    # The accuracy that products of this rounding allow.
    tolerance = max(1e-6, 0.45 * top * torch.finfo(dtype).eps)
    exact_inverse = torch.linalg.inv(A.double())
    for seed in range(6):
        B = normal(columns, 60, seed=seed)
        B[-1] = B[-1] @ A.double()
        B = B.to(dtype)
        alone = drain(solve(map_of(A), B, tolerance=tolerance, block=1))
        found = drain(solve(map_of(A), B, tolerance=tolerance))
        assert found.stopped is Stop.CONVERGED
        assert found.products <= 1.2 * alone.products
        true = residuals(A.double(), 0.0, B.double(), found.solution.double())
        assert float(true.max()) <= 1.1 * tolerance
        # The smallest eigenvalue is about one: errors are no larger than residuals.
        error = found.solution.double() - B.double() @ exact_inverse
        assert (error.norm(dim=1) <= 1.2 * tolerance * B.double().norm(dim=1)).all()


@pytest.mark.parametrize(("dtype", "top"), OUTLIERS)
def test_nor_does_it_at_several_dampings(dtype, top):
    A, dampings = with_outlier(top, dtype), (1e-3, 1.0)
    tolerance = max(1e-6, 0.45 * top * torch.finfo(dtype).eps)
    for seed in range(6):
        B = normal(4, 60, seed=seed).to(dtype)
        found = drain(solve_dampings(map_of(A), B, dampings, tolerance=tolerance))
        for one, damping in zip(found, dampings, strict=True):
            assert one.stopped is Stop.CONVERGED
            true = residuals(A.double(), damping, B.double(), one.solution.double())
            assert float(true.max()) <= 1.1 * tolerance


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@pytest.mark.parametrize("top", [1e5, 1e7, 1e10])
def test_what_rounding_does_not_let_be_solved_ends_with_finite_solutions(
    top, tolerance
):
    A = with_outlier(top, torch.float32)
    for seed in range(6):
        B = normal(4, 60, seed=seed + 10)
        B[-1] = B[-1] @ A.double()
        products = map_of(A, limit=5000)
        found = drain(solve(products, B.float(), tolerance=tolerance))
        assert found.stopped is not Stop.PRODUCTS
        assert torch.isfinite(found.solution).all()
        assert all(map(math.isfinite, found.relative_residuals))
        assert products.done < 1000


def singular(rank: int, values: str, dtype: torch.dtype) -> torch.Tensor:
    """A matrix of a null space; its other eigenvalues are alike, decay, or have both signs."""
    spectrum = {
        "alike": torch.linspace(1, 2, rank, dtype=torch.float64),
        "decaying": torch.logspace(0, -3, rank, dtype=torch.float64),
        "signed": torch.linspace(-1, 1, rank + 1, dtype=torch.float64)[:rank],
    }
    U = torch.linalg.qr(normal(SIZE, rank))[0]
    A = (U * spectrum[values]) @ U.T
    return ((A + A.T) / 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", [1, None])
@pytest.mark.parametrize(
    ("solver", "values"),
    [
        (Solver.CG, "alike"),
        (Solver.CG, "decaying"),
        (Solver.MINRES, "alike"),
        (Solver.MINRES, "decaying"),
        (Solver.MINRES, "signed"),
    ],
)
def test_a_singular_map_leads_no_solution_farther_away_than_zero(
    solver, values, block, dtype
):
    A, B = singular(9, values, dtype), normal(3, SIZE, seed=5).to(dtype)
    products = map_of(A)
    found = drain(solve(products, B, solver=solver, block=block, tolerance=1e-5))
    assert found.stopped is not Stop.CONVERGED
    assert max(found.relative_residuals) <= 1 + 1e-6
    true = residuals(A.double(), 0.0, B.double(), found.solution.double())
    reported = torch.tensor(found.relative_residuals, dtype=torch.float64)
    torch.testing.assert_close(reported, true, rtol=1e-2, atol=1e-6)
    assert products.done < 1000
    # Right-hand sides of its range have solutions, and these are found.
    B = B @ A
    found = drain(solve(map_of(A), B, solver=solver, block=block, tolerance=1e-4))
    assert found.stopped is Stop.CONVERGED
    assert float(residuals(A, 0.0, B, found.solution).max()) < 2e-4


@pytest.mark.parametrize("seed", range(5))
def test_an_indefinite_block_stops_with_finite_solutions_and_says_so(seed):
    A = semidefinite(seed=seed) - 1e-2 * torch.eye(SIZE, dtype=torch.float64)
    B = normal(8, SIZE, seed=seed + 10)
    found = drain(solve(map_of(A), B, tolerance=1e-8))
    assert found.stopped is Stop.NEGATIVE_CURVATURE
    assert all(found.indefinite) and min(found.curvatures) < 0
    assert torch.isfinite(found.solution).all()
    # A truncated step still goes downhill on the quadratic model.
    model = ((found.solution @ A) * found.solution).sum(1) / 2
    assert (model - (found.solution * B).sum(1) <= 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [0, 1, 7, 10])
def test_factors_multiply_to_what_was_given_and_reveal_its_rank(rank, dtype):
    W = (normal(10, rank, seed=1) @ normal(rank, 5000, seed=2)).to(dtype)
    Q, Z, T = factors(Space.of(W), W, W)
    eps = torch.finfo(dtype).eps
    assert Z is Q and len(Q) == rank
    torch.testing.assert_close(
        Q.double() @ Q.double().T,
        torch.eye(rank, dtype=torch.float64),
        rtol=0,
        atol=1e3 * eps,
    )
    torch.testing.assert_close(
        T.T @ Q.double(), W.double(), rtol=0, atol=1e3 * eps * float(W.norm() + 1)
    )


def test_factors_tell_directions_apart_down_to_rounding():
    basis = torch.linalg.qr(normal(2000, 6, seed=3))[0].T
    W = torch.logspace(0, -12, 6, dtype=torch.float64)[:, None] * basis
    mixed = normal(6, 6, seed=4) @ W
    Q = factors(Space.of(mixed), mixed, mixed)[0]
    torch.testing.assert_close(Q @ Q.T, torch.eye(6, dtype=Q.dtype), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [5, 20, 60])
def test_a_sketch_is_as_near_as_its_theory_says(rank):
    A = semidefinite(decay=3)
    values = torch.linalg.eigvalsh(A).flip(0)
    errors = []
    for seed in range(5):
        sketch = drain(nystrom(map_of(A), rank, seed=seed)).sketch
        low = (sketch.vectors.T * torch.from_numpy(sketch.values)) @ sketch.vectors
        gram = sketch.vectors @ sketch.vectors.T
        torch.testing.assert_close(
            gram, torch.eye(len(gram), dtype=A.dtype), rtol=0, atol=1e-8
        )
        # From below: the rest is positive semi-definite.
        assert float(torch.linalg.eigvalsh(A - low)[0]) > -1e-9
        errors.append(float(torch.linalg.matrix_norm(A - low, 2)))
    # Corollary 2.3 of Frangella, Tropp & Udell, with p = 2 rank - 1 in place of the rank.
    best = (rank + 1) // 2
    bound = 3 * values[best - 1] + 2 * torch.e**2 / rank * values[best - 1 :].sum()
    assert sum(errors) / len(errors) <= float(bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("columns", [1, 6])
def test_one_sketch_preconditions_every_damping(columns, solver, dtype):
    A, B = semidefinite(), normal(columns, SIZE, seed=8)
    sketch = drain(nystrom(map_of(A.to(dtype)), 40)).sketch
    for damping in (1e-1, 1e-2, 1e-3):
        tolerance = 1e-5 if dtype is torch.float64 else 3e-4
        given = {"solver": solver, "damping": damping, "tolerance": tolerance}
        C, D = A.to(dtype), B.to(dtype)
        plain = drain(solve(map_of(C), D, **given))
        found = drain(solve(map_of(C), D, preconditioner=sketch, **given))
        assert found.stopped is Stop.CONVERGED
        assert found.iterations < plain.iterations
        true = residuals(A, damping, B, found.solution.double())
        assert float(true.max()) <= 1.1 * tolerance


def test_a_preconditioned_minres_solves_indefinite_systems():
    A = semidefinite() - 3e-3 * torch.eye(SIZE, dtype=torch.float64)
    b = normal(2, SIZE, seed=9)
    sketch = drain(nystrom(map_of(semidefinite()), 40)).sketch
    given = {"solver": Solver.MINRES, "tolerance": 1e-8}
    plain = drain(solve(map_of(A), b, **given))
    found = drain(solve(map_of(A), b, preconditioner=sketch, **given))
    assert found.indefinite == (True, True)
    assert float(residuals(A, 0, b, found.solution).max()) <= 1.01e-8
    assert found.products < plain.products


def test_eigenvectors_with_values_are_as_good_as_a_sketch():
    A, B = semidefinite(), normal(4, SIZE, seed=8)
    values, vectors = torch.linalg.eigh(A)
    known = LowRank(vectors[:, -20:].T.flip(0), values[-20:].flip(0).numpy())
    plain = drain(solve(map_of(A), B, damping=1e-3, tolerance=1e-6, block=1))
    found = drain(
        solve(map_of(A), B, damping=1e-3, tolerance=1e-6, block=1, preconditioner=known)
    )
    assert found.iterations < 0.6 * plain.iterations
    assert float(residuals(A, 1e-3, B, found.solution).max()) <= 1.01e-6


def test_values_that_are_not_positive_do_not_precondition():
    vectors = torch.eye(4, dtype=torch.float64)[:3]
    known = LowRank(vectors, np.array([3.0, 0.0, -2.0]))
    at = known.at(0.5, Space.of(vectors))
    assert at.weights.tolist() == [1.0]
    V = normal(2, 4)
    torch.testing.assert_close(at.inverse(V), V)


def test_a_preconditioner_inverts_what_it_knows_and_leaves_the_rest():
    A = semidefinite(40, decay=2)
    sketch = drain(nystrom(map_of(A), 10)).sketch
    at = sketch.at(1e-2, Space.of(A))
    eye = torch.eye(40, dtype=torch.float64)
    least = sketch.values[-1] + 1e-2
    outside = eye - sketch.vectors.T @ sketch.vectors
    P = (
        sketch.vectors.T * torch.from_numpy((sketch.values + 1e-2) / least)
    ) @ sketch.vectors + outside
    torch.testing.assert_close(at.inverse(eye), torch.linalg.inv(P))
    torch.testing.assert_close(at.root(at.root(eye)), torch.linalg.inv(P))
    assert at.log_determinant == pytest.approx(float(torch.linalg.slogdet(P)[1]))


def test_a_sketch_grows_until_more_would_not_pay():
    A = semidefinite(decay=4)
    counts = {}
    for damping in (1e-1, 1e-2, 1e-3):
        found = drain(nystrom(map_of(A), SIZE, damping=damping))
        counts[damping] = found.products
        assert found.stopped is Stop.CONVERGED
        assert float(found.sketch.values[-1]) <= 10 * damping
    assert counts[1e-1] <= counts[1e-2] <= counts[1e-3] < SIZE
    few = drain(nystrom(map_of(A), SIZE, damping=1e-3, columns=1, tolerance=0.1))
    assert few.products < counts[1e-3]


def test_a_sketch_of_an_indefinite_map_is_refused_and_of_a_zero_map_is_empty():
    A = semidefinite() - 0.1 * torch.eye(SIZE, dtype=torch.float64)
    found = drain(nystrom(map_of(A), 20))
    assert found.stopped is Stop.NEGATIVE_CURVATURE
    assert found.smallest < 0 and found.sketch.rank == 0
    zero = drain(nystrom(map_of(0 * A), 20))
    assert zero.stopped is Stop.CONVERGED and zero.sketch.rank == 0
    # What knows nothing changes nothing.
    B = normal(3, SIZE)
    solved = drain(solve(map_of(0 * A), B, damping=2.0, preconditioner=zero.sketch))
    torch.testing.assert_close(solved.solution, B / 2)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 2.0**100),
        (torch.float32, 2.0**62),
        (torch.float32, 2.0**-60),
        (torch.float32, 2.0**-90),
        (torch.float64, 2.0**900),
        (torch.float64, 2.0**-900),
    ],
)
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_a_sketch_of_a_map_of_any_size_is_that_of_the_map_scaled(dtype, size, damping):
    A = semidefinite(decay=4).to(dtype)
    usual = drain(nystrom(map_of(A), 40, damping=damping))
    scaled = map_of(size * A)
    scaled.scale_free = True
    found = drain(nystrom(scaled, 40, damping=size * damping))
    assert found.stopped is Stop.CONVERGED and found.products == usual.products
    values = torch.from_numpy(found.sketch.values / size)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        values, torch.from_numpy(usual.sketch.values), rtol=0, atol=100 * eps
    )
    V, W = found.sketch.vectors[:5], usual.sketch.vectors[:5]
    signs = (V * W).sum(1, keepdim=True).sign()
    torch.testing.assert_close(V * signs, W, rtol=0, atol=eps**0.5)


def test_products_of_no_map_do_not_keep_a_sketch_for_ever():
    """Random products: no shift below their own size makes such a core positive."""
    generator = torch.Generator().manual_seed(0)

    def multiply(V):
        return torch.randn(V.shape, generator=generator, dtype=V.dtype)

    products = Products(multiply, size=50, dtype=torch.float32)
    assert drain(nystrom(products, 20)).stopped is Stop.NEGATIVE_CURVATURE


def test_a_core_that_no_shift_makes_positive_is_refused(monkeypatch):
    def never(A):
        return A, torch.tensor(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", never)
    with pytest.raises(FailedPrecondition, match="no Cholesky factor"):
        drain(nystrom(map_of(semidefinite(30)), 5))


def test_a_sketch_takes_as_many_probes_as_products_are_left():
    found = drain(nystrom(map_of(semidefinite(), limit=10), 30))
    assert found.stopped is Stop.PRODUCTS
    assert found.products == 10 and found.sketch.rank == 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sketch_of_every_dimension_solves_at_once(dtype):
    A, B = semidefinite(30).to(dtype), normal(4, 30).to(dtype)
    sketch = drain(nystrom(map_of(A), 1000)).sketch
    found = drain(
        solve(map_of(A), B, damping=1e-2, tolerance=1e-4, preconditioner=sketch)
    )
    assert found.iterations <= 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [1, 3, 20])
def test_several_dampings_take_about_the_products_of_the_smallest(columns, dtype):
    A, B = semidefinite(600), normal(columns, 600, seed=11)
    C, D = A.to(dtype), B.to(dtype)
    dampings = (1e-3, 1.0, 1e-2, 1e-1)
    tolerance = 1e-7 if dtype is torch.float64 else 1e-4
    found = drain(solve_dampings(map_of(C), D, dampings, tolerance=tolerance))
    counts = []
    for damping, one in zip(dampings, found, strict=True):
        assert one.stopped is Stop.CONVERGED
        true = residuals(A, damping, B, one.solution.double())
        assert float(true.max()) <= 1.05 * tolerance
        alone = drain(solve(map_of(C), D, damping=damping, tolerance=tolerance))
        counts.append(alone.products)
    closing = len(dampings) * columns
    assert found[-1].products < sum(counts)
    assert found[-1].products <= 1.3 * max(counts) + 2 * closing


def test_dampings_of_columns_that_depend_on_each_other_and_of_none():
    A, b = semidefinite(), normal(1, SIZE, seed=12)
    B = torch.cat((b, 1e5 * b, 0 * b))
    found = drain(solve_dampings(map_of(A), B, (0.5, 0.1), tolerance=1e-8, block=2))
    for damping, one in zip((0.5, 0.1), found, strict=True):
        torch.testing.assert_close(
            one.solution, exact(A, damping, B), rtol=1e-6, atol=1e-6
        )


def test_an_indefinite_damping_does_not_spoil_the_others():
    A = semidefinite() - 0.05 * torch.eye(SIZE, dtype=torch.float64)
    B = normal(3, SIZE, seed=13)
    low, high = drain(solve_dampings(map_of(A), B, (0.0, 0.2), tolerance=1e-8))
    assert low.stopped is Stop.NEGATIVE_CURVATURE and all(low.indefinite)
    assert high.stopped is Stop.CONVERGED
    torch.testing.assert_close(high.solution, exact(A, 0.2, B), rtol=1e-6, atol=1e-6)


def test_dampings_stop_where_products_do_with_true_residuals():
    A, B = semidefinite(), normal(2, SIZE, seed=14)
    found = drain(solve_dampings(map_of(A, limit=40), B, (1e-6, 1e-5), tolerance=1e-12))
    assert found[-1].products <= 40
    for damping, one in zip((1e-6, 1e-5), found, strict=True):
        assert one.stopped is Stop.PRODUCTS
        torch.testing.assert_close(
            torch.tensor(one.relative_residuals, dtype=A.dtype),
            residuals(A, damping, B, one.solution),
        )
