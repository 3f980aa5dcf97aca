"""Vectors of any size that callers give: right against float64, or refused with a remedy."""

import math
import re

import numpy as np
import pytest
import torch

from curvd.contract.enums import Solver, Stop
from curvd.errors import ScaleOutOfRange
from curvd_server.linalg import LowRank, Products, eigsh, solve, solve_dampings
from curvd_server.linalg.base import drain

SIZE = 50
SIZES = [
    *[(torch.float32, e) for e in (-120, -100, -70, -40, 0, 40, 70, 100, 120)],
    *[(torch.float64, e) for e in (-1000, -520, 0, 520, 1000)],
]


def dense():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(basis)[0]
    return (basis * torch.linspace(0.1, 1, SIZE, dtype=torch.float64)) @ basis.T


def map_of(A):
    return Products(lambda V: V @ A, size=len(A), dtype=A.dtype)


def columns(dtype, exponent):
    """Three of this size, one of zeros, one of usual size, all exact in the type."""
    generator = torch.Generator().manual_seed(1)
    B = torch.randn(5, SIZE, generator=generator, dtype=torch.float64)
    B[1] = 0
    powers = torch.tensor([exponent, 0, exponent, 0, exponent], dtype=torch.float64)
    return (B * torch.exp2(powers)[:, None]).to(dtype)


def relative(X, B, damping):
    """Errors relative to the true solutions, by columns in units of their own."""
    A = dense() + damping * torch.eye(SIZE, dtype=torch.float64)
    units = B.double().abs().amax(1, keepdim=True)
    units = torch.where(units > 0, torch.exp2(units.log2().floor()), 1.0)
    true = torch.linalg.solve(A, (B.double() / units).T).T
    got = X.double() / units
    return [
        float((g - t).norm() / t.norm()) if t.any() else float(g.norm())
        for g, t in zip(got, true, strict=True)
    ]


SOLVERS = {
    "cg, together": {},
    "cg, alone": {"block": 1},
    "minres": {"solver": Solver.MINRES},
    "preconditioned": {"preconditioner": torch.linspace(0.5, 2, SIZE)},
    "sketched": {"preconditioner": LowRank(torch.eye(SIZE)[:3], np.array([3.0, 2, 1]))},
    "minres, sketched": {
        "solver": Solver.MINRES,
        "preconditioner": LowRank(torch.eye(SIZE)[:3], np.array([3.0, 2, 1])),
    },
}


def typed(options, dtype):
    """Make the tensors of a solver of a type."""
    known = options.get("preconditioner")
    if isinstance(known, LowRank):
        known = LowRank(known.vectors.to(dtype), known.values)
    elif known is not None:
        known = known.to(dtype)
    return {**options, "preconditioner": known}


@pytest.mark.parametrize(("dtype", "exponent"), SIZES)
@pytest.mark.parametrize("how", SOLVERS)
def test_right_hand_sides_of_any_size_have_their_solutions(how, dtype, exponent):
    B = columns(dtype, exponent)
    found = drain(
        solve(
            map_of(dense().to(dtype)), B, tolerance=1e-5, **typed(SOLVERS[how], dtype)
        )
    )
    assert found.stopped is Stop.CONVERGED
    assert max(relative(found.solution, B, 0.0)) < 2e-4
    assert not found.solution[1].any()
    assert all(0 <= r <= 1e-5 for r in found.relative_residuals)
    # Absolute ones are those of a product.
    sizes = torch.where(B[0] != 0, B[0], 1.0).abs().double().amax()
    rest = B.double() - found.solution.double() @ dense().to(dtype).double()
    for column in (0, 2, 4):
        true = float((rest[column] / sizes).norm())
        got = found.residuals[column] / float(sizes)
        assert got == pytest.approx(true, abs=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "exponent"), SIZES)
def test_so_have_those_at_several_dampings(dtype, exponent):
    B = columns(dtype, exponent)
    dampings = (0.0, 0.5, 3.0)
    found = drain(
        solve_dampings(map_of(dense().to(dtype)), B, dampings, tolerance=1e-5)
    )
    for one, damping in zip(found, dampings, strict=True):
        assert one.stopped is Stop.CONVERGED
        assert max(relative(one.solution, B, damping)) < 2e-4


@pytest.mark.parametrize(("dtype", "exponent"), SIZES)
@pytest.mark.parametrize("solver", Solver)
def test_first_guesses_are_of_the_size_of_what_they_guess(solver, dtype, exponent):
    B = columns(dtype, exponent)
    A = dense().to(dtype)
    cold = drain(solve(map_of(A), B, solver=solver))
    warm = drain(solve(map_of(A), B, solver=solver, start=cold.solution))
    assert warm.iterations < cold.iterations / 2
    assert max(relative(warm.solution, B, 0.0)) < 2e-4


@pytest.mark.parametrize("solver", Solver)
def test_a_guess_that_hides_its_right_hand_side_is_refused(solver):
    A = dense().float()
    for size, guess in ((1.0, 1e30), (1e-30, 1.0)):
        B, X = (torch.full((2, SIZE), s) for s in (size, guess))
        with pytest.raises(ScaleOutOfRange, match="first guess of column 0"):
            drain(solve(map_of(A), B, solver=solver, start=X))
    # A column of zeros has the solution zero, and hides behind nothing.
    zero = torch.zeros(1, SIZE)
    for guess in (1e-30, 1.0, 1e30):
        start = torch.full_like(zero, guess)
        found = drain(solve(map_of(A), zero, solver=solver, start=start))
        assert found.stopped is Stop.CONVERGED and not found.solution.any()


@pytest.mark.parametrize(
    ("dtype", "map_size", "size"),
    [
        (torch.float32, 1e-8, 1e33),
        (torch.float32, 1e8, 1e-34),
        (torch.float64, 1e-30, 1e290),
        (torch.float64, 1e30, 1e-290),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_solution_that_is_no_number_is_refused_and_the_remedy_works(
    several, dtype, map_size, size
):
    A, B = (map_size * dense()).to(dtype), torch.full((1, SIZE), size, dtype=dtype)

    def ask(B):
        if several:
            return drain(solve_dampings(map_of(A), B, (0.0,)))[0]
        return drain(solve(map_of(A), B))

    with pytest.raises(ScaleOutOfRange, match="solution of column 0") as refused:
        ask(B)
    (power,) = re.findall(r"\(2\.0\*\*\(?(-?\d+)\)? \* b\)", str(refused.value))
    factor = math.ldexp(1.0, int(power))
    scaled = ask(B * factor).solution.double()
    true = torch.linalg.solve(dense(), torch.ones(SIZE, dtype=torch.float64))
    error = scaled / (size * factor) * map_size - true
    assert float(error.norm() / true.norm()) < 2e-4


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_a_diagonal_preconditioner_has_no_size(size):
    A, B = dense().float(), columns(torch.float32, 0)
    usual = torch.linspace(0.5, 2, SIZE)
    plain = drain(solve(map_of(A), B, preconditioner=usual))
    found = drain(solve(map_of(A), B, preconditioner=size * usual))
    assert abs(found.iterations - plain.iterations) <= 2
    assert max(relative(found.solution, B, 0.0)) < 2e-4
    usual[0] = 1e-25
    with pytest.raises(ScaleOutOfRange, match="preconditioner differ"):
        drain(solve(map_of(A), B, preconditioner=usual))


@pytest.mark.parametrize(("dtype", "exponent"), SIZES)
def test_start_vectors_of_any_size_start(dtype, exponent):
    A = dense().to(dtype)
    values, vectors = torch.linalg.eigh(dense())
    start = torch.ldexp(vectors[:, -2:].T, torch.tensor(float(exponent))).to(dtype)
    found = drain(eigsh(map_of(A), 2, start=start, copies=False))
    # What the start vectors know costs their products alone.
    assert found.products <= 6
    torch.testing.assert_close(
        torch.tensor(found.values, dtype=torch.float64),
        values.flip(0)[:2],
        rtol=1e-5,
        atol=0,
    )
