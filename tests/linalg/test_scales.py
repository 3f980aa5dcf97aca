"""Maps of any size: refused with a remedy that works, or right against float64."""

import math
import re

import pytest
import torch

from curvd.contract.enums import Estimator, Solver, Stop, Which
from curvd.errors import ScaleOutOfRange
from curvd_server.linalg import (
    Products,
    Target,
    diagonal,
    eigsh,
    frobenius_norm,
    logdet,
    shifted_determinants,
    solve,
    spectral_density,
    trace,
    weighted_determinants,
)
from curvd_server.linalg.base import drain

SIZE = 50
SIZES = [
    *[(torch.float32, s) for s in (1e-36, 1e-30, 1e-22, 1e-18, 1e19, 1e25, 1e30)],
    *[(torch.float64, s) for s in (1e-300, 1e-165, 1e-100, 1e100, 1e160, 1e290)],
]
RIGHT = [
    *[(torch.float32, s) for s in (1e-11, 1e-6, 1.0, 1e6, 1e15)],
    *[(torch.float64, s) for s in (1e-60, 1e-30, 1.0, 1e30, 1e70)],
]


def dense(size=SIZE):
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(basis)[0]
    return (basis * torch.linspace(0.1, 1, size, dtype=torch.float64)) @ basis.T


def map_of(A, **options):
    return Products(lambda V: V @ A, size=len(A), dtype=A.dtype, **options)


def ones(p):
    return torch.ones(1, p.size, dtype=p.dtype)


QUERIES = {
    "eigsh": lambda p: eigsh(p, 2),
    "smallest": lambda p: eigsh(p, 1, which=Which.SMALLEST),
    "trace": lambda p: trace(p, target=Target(samples=30)),
    "hutch++": lambda p: trace(
        p, estimator=Estimator.HUTCHPP, target=Target(samples=30)
    ),
    "diagonal": lambda p: diagonal(p, target=Target(samples=30)),
    "norm": lambda p: frobenius_norm(p, target=Target(samples=30)),
    "logdet": lambda p: logdet(p, damping=0.0, target=Target(samples=9), steps=30),
    "density": lambda p: spectral_density(p, samples=3, steps=20),
    "cg": lambda p: solve(p, ones(p)),
    "minres": lambda p: solve(p, ones(p), solver=Solver.MINRES),
}


@pytest.mark.parametrize(("dtype", "size"), SIZES)
@pytest.mark.parametrize("query", QUERIES)
def test_what_is_out_of_range_is_refused_at_once_and_its_remedy_works(
    query, dtype, size
):
    A = (size * dense()).to(dtype)
    products = map_of(A)
    with pytest.raises(ScaleOutOfRange, match="scale the answer back") as refused:
        drain(QUERIES[query](products))
    assert products.done <= 32
    (power,) = re.findall(r"\(2\.0\*\*\(?(-?\d+)\)? \* H\)", str(refused.value))
    factor = math.ldexp(1.0, int(power))
    found = drain(QUERIES[query](map_of((factor * A.double()).to(dtype))))
    assert found.stopped is not None


@pytest.mark.parametrize(("dtype", "size"), RIGHT)
def test_what_is_in_range_is_right(dtype, size):
    exact = dense()
    A = (size * exact).to(dtype)
    values = torch.linalg.eigvalsh(exact)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-6

    found = drain(eigsh(map_of(A), 2, tolerance=tolerance))
    top = torch.tensor(found.values, dtype=torch.float64) / size
    torch.testing.assert_close(top, values.flip(0)[:2], rtol=10 * tolerance, atol=0)
    assert found.stopped is Stop.CONVERGED

    target = Target(samples=40)
    for query, true in (
        (trace(map_of(A), target=target), values.sum()),
        (frobenius_norm(map_of(A), target=target), values.norm()),
    ):
        got = drain(query)
        assert 0 < got.standard_error / size < 0.2 * float(true)
        assert abs(got.value / size - float(true)) <= 2 * got.half_width / size

    got = drain(logdet(map_of(A), damping=0.0, target=Target(samples=40), steps=40))
    true = float(values.log().sum()) + SIZE * math.log(size)
    assert abs(got.value - true) <= 2 * got.half_width + 1e-3

    X = drain(solve(map_of(A), torch.ones(1, SIZE, dtype=dtype), tolerance=tolerance))
    true = torch.linalg.solve(exact, torch.ones(SIZE, dtype=torch.float64))
    error = (X.solution[0].double() * size - true).norm() / true.norm()
    assert X.stopped is Stop.CONVERGED and float(error) < 20 * tolerance


@pytest.mark.parametrize("damping", [1e25, 1e30])
def test_a_damping_that_leaves_the_range_is_refused(damping):
    A = dense().float()
    for solver in Solver:
        with pytest.raises(ScaleOutOfRange):
            drain(solve(map_of(A), ones(map_of(A)), solver=solver, damping=damping))


def test_a_tiny_map_is_no_matter_beside_its_damping():
    tiny = map_of((1e-30 * dense()).float())
    found = drain(solve(tiny, ones(tiny), damping=2.0))
    assert found.stopped is Stop.CONVERGED
    torch.testing.assert_close(found.solution, ones(tiny) / 2)


TINY = [(torch.float32, 1e-20), (torch.float32, 1e-36), (torch.float64, 1e-200)]


@pytest.mark.parametrize(("dtype", "size"), TINY)
@pytest.mark.parametrize("damping", [1e-3, 2.0, 1e6])
def test_so_it_is_to_its_determinant(damping, dtype, size):
    tiny = (size * dense()).to(dtype)
    found = drain(
        logdet(map_of(tiny), damping=damping, target=Target(samples=9), steps=10)
    )
    assert found.stopped is Stop.CONVERGED
    assert found.value == pytest.approx(SIZE * math.log(damping), rel=1e-6)
    assert found.smallest == pytest.approx(damping, rel=1e-6)
    with pytest.raises(ScaleOutOfRange):
        drain(logdet(map_of(tiny), damping=0.0, target=Target(samples=9), steps=10))


@pytest.mark.parametrize(("dtype", "size"), TINY)
@pytest.mark.parametrize("samples", [5, SIZE])
def test_and_to_its_determinants_at_several_dampings(samples, dtype, size):
    tiny = map_of((size * dense()).to(dtype))
    options = {"samples": samples, "steps": 8, "seed": 0, "block": 4}
    found = drain(shifted_determinants(tiny, [3.0, 0.5], **options))
    true = [SIZE * math.log(d) for d in (3.0, 0.5)]
    assert found.values == pytest.approx(true, rel=1e-6)
    assert found.stopped is Stop.CONVERGED
    assert found.exact is (samples == SIZE)


@pytest.mark.parametrize("samples", [5, SIZE])
def test_diagonals_may_bring_a_map_into_range(samples):
    """``D A D + damping``, of A of 1e-20 and D of 1e10 and of 1."""
    A = (1e-20 * dense()).float()
    ones = torch.linspace(0.5, 1, SIZE)
    weights = torch.stack((1e10 * ones, ones))
    options = {"samples": samples, "steps": 9, "seed": 0, "block": 4}
    found = drain(weighted_determinants(map_of(A), weights, 0.5, **options))
    unit = torch.eye(SIZE, dtype=torch.float64)
    for value, error, w in zip(
        found.values, found.standard_errors, weights.double(), strict=True
    ):
        true = torch.logdet(w[:, None] * A.double() * w + 0.5 * unit)
        assert abs(value - float(true)) <= 4 * error + 1e-3
    assert found.exact is (samples == SIZE)


@pytest.mark.parametrize("size", [10, SIZE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("query", ["eigsh", "trace", "diagonal", "norm", "hutch++"])
def test_a_zero_map_has_zero_for_an_answer(query, dtype, size):
    found = drain(QUERIES[query](map_of(torch.zeros(size, size, dtype=dtype))))
    if query == "eigsh":
        assert set(found.values) == {0.0}
    elif query == "diagonal":
        assert not found.values.any()
    else:
        assert (found.value, found.half_width) == (0.0, 0.0)
    assert found.stopped is Stop.CONVERGED


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_whole_maps_are_refused_only_if_all_of_them_is_too_small(size):
    target = Target(samples=30)
    tiny = (size * dense(10)).float()
    with pytest.raises(ScaleOutOfRange):
        drain(frobenius_norm(map_of(tiny), target=target))
    # Rows that are tiny beside others are numbers like others.
    A = torch.diag(torch.tensor([1e-30, 1e-25, 0.0, *[1.0] * 7]))
    found = drain(frobenius_norm(map_of(A), target=target, block=1))
    assert found.value == pytest.approx(math.sqrt(7))
