"""Estimates are unbiased and inside their 95 % intervals 95 % of the time over seeds."""

import math

import numpy as np
import pytest
import torch

from curvd.contract.enums import Distribution, Estimator, Stop
from curvd_server.linalg import space
from curvd_server.linalg.base import Products, drain
from curvd_server.linalg.density import spectral_density
from curvd_server.linalg.diagonals import diagonal
from curvd_server.linalg.intervals import mean_of, student_975, uncertainty
from curvd_server.linalg.lanczos import quadratures
from curvd_server.linalg.log_determinants import logdet
from curvd_server.linalg.norm import frobenius_norm
from curvd_server.linalg.random_probes import probes
from curvd_server.linalg.sampling import Target
from curvd_server.linalg.shifted_determinants import shifted_determinants
from curvd_server.linalg.traces import trace

SIZE, SEEDS = 48, 300
LEAST = 0.92  # 2.4 binomial deviations below 95 % for 300 seeds
RANK = torch.arange(1, SIZE + 1, dtype=torch.float64)
SPECTRA = {
    "flat": torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64),
    "decaying": RANK**-2,
    "low rank": torch.where(RANK <= 4, 5 - RANK, 1e-3),
    "indefinite": torch.where(RANK % 3 == 0, -0.5, 1.0) / RANK,
}


@pytest.fixture(scope="module", autouse=True)
def _probes_made_once():
    """Probes depend on their seed alone: all spectra and estimators share them."""
    made = {}

    def kept(distribution, seed, indices, size, make=space.probes, **options):
        key = (
            distribution,
            seed,
            tuple(indices),
            size,
            *sorted(options.items(), key=str),
        )
        if key not in made:
            made[key] = make(distribution, seed, indices, size, **options)
        return made[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "probes", kept)
        yield


def matrix(spectrum):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal)[0]
    return (basis * SPECTRA[spectrum]) @ basis.T


def products_of(A, **options):
    return Products(lambda V: V @ A, size=len(A), dtype=A.dtype, **options)


def covered(found, exact):
    return np.mean([abs(f.value - exact) <= f.half_width for f in found])


@pytest.mark.parametrize("samples", [16, 40])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("estimator", Estimator)
def test_traces(estimator, spectrum, samples):
    if (estimator, samples) == (Estimator.HUTCHPP, 16):
        pytest.skip("6 samples of the remainder are too few for any interval")
    A, target = matrix(spectrum), Target(samples=samples)
    found = [
        drain(trace(products_of(A), estimator=estimator, target=target, seed=s))
        for s in range(SEEDS)
    ]
    errors = np.array([f.value for f in found]) - float(A.trace())
    spread = errors.std() / math.sqrt(SEEDS)
    assert abs(errors.mean()) < 4 * spread
    assert covered(found, float(A.trace())) >= LEAST
    assert all(f.products <= samples for f in found)
    stated = np.sqrt(np.mean([f.standard_error**2 for f in found]))
    assert stated >= 0.9 * errors.std()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_standard_error_of_xtrace_is_not_much_larger_than_the_error(spectrum):
    A, target = matrix(spectrum), Target(samples=40)
    found = [drain(trace(products_of(A), target=target, seed=s)) for s in range(100)]
    errors = np.array([f.value for f in found]) - float(A.trace())
    stated = np.mean([f.standard_error for f in found])
    assert stated < 1.7 * np.sqrt(np.mean(errors**2))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("estimator", [Estimator.HUTCHINSON, Estimator.EXCHANGEABLE])
def test_diagonals(estimator, spectrum):
    A, target = matrix(spectrum), Target(samples=30)
    exact = A.diagonal()
    found = [
        drain(diagonal(products_of(A), estimator=estimator, target=target, seed=s))
        for s in range(SEEDS)
    ]
    errors = torch.stack([f.values - exact for f in found])
    deviations = errors.mean(0) / (errors.std(0) / math.sqrt(SEEDS))
    assert float(deviations.abs().max()) < 5
    stated = torch.stack([f.quantile * f.standard_errors for f in found])
    assert float((errors.abs() <= stated).double().mean()) >= LEAST


def on_coordinates(rank, tail):
    """Of low rank along few coordinates, where signs of a few probes often coincide."""
    values = torch.full((SIZE,), tail, dtype=torch.float64)
    values[:rank] = 1.0 + torch.arange(rank)
    return torch.diag(values)


@pytest.mark.parametrize("tail", [0.0, 1e-3])
@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("samples", [5, 8, 14])
@pytest.mark.parametrize("estimator", [Estimator.HUTCHPP, Estimator.EXCHANGEABLE])
def test_few_probes_are_not_certain_of_a_map_on_few_coordinates(
    estimator, samples, rank, tail
):
    A, target = on_coordinates(rank, tail), Target(samples=samples)
    found = [
        drain(trace(products_of(A), estimator=estimator, target=target, seed=s))
        for s in range(100)
    ]
    assert covered(found, float(A.trace())) >= 0.9
    # Where they miss it, they do so by little.
    widths = [f.half_width + 1e-9 for f in found]
    errors = [abs(f.value - float(A.trace())) for f in found]
    assert max(e / w for e, w in zip(errors, widths, strict=True)) < 10


@pytest.mark.parametrize("samples", [5, 8, 14])
@pytest.mark.parametrize("rank", [2, 5, SIZE])
def test_nor_are_they_of_its_diagonal(rank, samples):
    A, target = on_coordinates(rank, 0.0), Target(samples=samples)
    if rank == SIZE:
        A = torch.eye(SIZE, dtype=A.dtype)
    inside = []
    for seed in range(60):
        found = drain(diagonal(products_of(A), target=target, seed=seed))
        stated = found.quantile * found.standard_errors + 1e-12
        inside.append(((found.values - A.diagonal()).abs() <= stated)[:rank])
    assert float(torch.cat(inside).double().mean()) >= 0.9


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("samples", [16, 50])
def test_frobenius_norms(spectrum, samples):
    A, target = matrix(spectrum), Target(samples=samples)
    found = [
        drain(frobenius_norm(products_of(A), target=target, seed=s))
        for s in range(SEEDS)
    ]
    assert covered(found, float(torch.linalg.matrix_norm(A))) >= LEAST


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_log_determinants(spectrum):
    A = matrix(spectrum)
    A = A @ A + 0.01 * torch.eye(SIZE, dtype=A.dtype)
    target = Target(samples=10)
    found = [
        drain(logdet(products_of(A), steps=10, target=target, seed=s, block=10))
        for s in range(SEEDS)
    ]
    assert covered(found, float(torch.logdet(A))) >= LEAST


WIDE = {
    "three close beside many small ones": torch.cat([
        10 - 1e-7 * torch.arange(3).double(),
        torch.rand(300, generator=torch.Generator().manual_seed(0)).double(),
    ]),
    "eight decades": torch.logspace(-6, 2, 200, dtype=torch.float64),
    "thirty decades": torch.logspace(-15, 14, 30, dtype=torch.float64),
    "half is zero": torch.cat([
        torch.zeros(100),
        torch.logspace(-3, 1, 100, dtype=torch.float64),
    ]).double(),
    "indefinite": torch.linspace(-0.99e-3, 5, 150, dtype=torch.float64),
}


@pytest.mark.parametrize("damping", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", WIDE)
def test_what_the_steps_leave_open_is_in_the_interval(name, rotated, damping):
    """Also where probes agree: signs have no variance on a diagonal map."""
    eigenvalues = WIDE[name]
    size = len(eigenvalues)
    if float(eigenvalues.min()) + damping <= 0:
        damping = 1e-3
    A, exact = torch.diag(eigenvalues), float((eigenvalues + damping).log().sum())
    if rotated:
        generator = torch.Generator().manual_seed(1)
        Q = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
        A = Q * eigenvalues @ Q.T
        A = (A + A.T) / 2
    found = [
        drain(
            logdet(products_of(A), damping=damping, target=Target(samples=10), seed=s)
        )
        for s in range(3 if rotated else 1)
    ]
    for one in found:
        if math.isnan(one.value):  # rounding of the largest hides the smallest
            assert one.smallest <= 1e-15 * size * float(eigenvalues.max())
        else:
            width = 2 * one.half_width if rotated else one.half_width
            assert abs(one.value - exact) <= width
    if float(eigenvalues.min()) < 0:
        return
    few = shifted_determinants(
        products_of(A), [damping], samples=4, steps=min(16, size - 1), seed=0, block=4
    )
    shifted = drain(few)
    error = 2 * student_975(3) * shifted.standard_errors[0] + 1e-9 * abs(exact)
    assert shifted.exact or abs(shifted.values[0] - exact) <= error


@pytest.mark.parametrize("steps", [1, 8])
def test_a_damping_that_makes_a_map_singular_does_not_pass_for_converged(steps):
    signs = torch.ones(60, dtype=torch.float64)
    signs[::2] = -1
    A = torch.diag(signs)
    for seed in range(8):
        target = Target(samples=4)
        found = drain(
            logdet(products_of(A), damping=1.0, steps=steps, target=target, seed=seed)
        )
        assert found.stopped in (Stop.STAGNATED, Stop.NEGATIVE_CURVATURE)
        exact = float((signs + 1000).log().sum())
        damped = drain(
            logdet(products_of(A), damping=1e3, steps=steps, target=target, seed=seed)
        )
        assert damped.stopped is Stop.CONVERGED
        assert abs(damped.value - exact) <= damped.half_width < 0.1


@pytest.mark.parametrize("steps", [1, 3, 8, 20, 32])
def test_quadratures_of_logarithms_bound_the_integral(steps):
    eigenvalues = torch.logspace(-4, 1, 60, dtype=torch.float64)
    w = torch.randn(1, 60, generator=torch.Generator().manual_seed(2)).double()
    (found,) = drain(quadratures(products_of(torch.diag(eigenvalues)), w, steps))
    weights = w[0] ** 2 / w[0].square().sum()
    exact = float(weights @ (eigenvalues + 1e-5).log())
    for least in (1e-5, 1e-4, 1e-12):
        low, high = found.of_logarithms(1e-5, least)
        assert low - 1e-12 <= exact <= high + 1e-12
        assert low < high


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_densities(spectrum):
    A, inside = matrix(spectrum), []
    values = torch.linalg.eigvalsh(A).numpy()
    width = 0.1 * float(values[-1] - values[0])
    for seed in range(40):
        found = drain(
            spectral_density(
                products_of(A), samples=8, steps=16, width=width, seed=seed, block=8
            )
        )
        exact = np.exp(-0.5 * ((found.grid[:, None] - values) / width) ** 2).mean(1)
        exact /= width * math.sqrt(2 * math.pi)
        seen = exact > 1e-2 * exact.max()
        inside.append((abs(found.density - exact) <= found.half_width)[seen].mean())
    assert np.mean(inside) >= LEAST


def test_skewed_samples_have_wider_intervals_and_symmetric_ones_students():
    symmetric, skewed = [-2.0, -1.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.1, 5.0]
    plain = mean_of(symmetric)
    assert plain.half_width == pytest.approx(student_975(4) * plain.standard_error)
    wide = mean_of(skewed)
    assert wide.half_width > 1.5 * student_975(4) * wide.standard_error
    mirrored = mean_of([-s for s in skewed])
    assert mirrored.half_width == pytest.approx(wide.half_width)


def test_intervals_of_few_or_equal_samples():
    assert mean_of([3.0]).half_width == math.inf
    two = mean_of([1.0, 2.0])
    assert two.half_width == pytest.approx(student_975(1) * 0.5)
    assert mean_of([2.0, 2.0, 2.0]).half_width == 0.0
    error, width = uncertainty(np.zeros((1, 4)))
    assert np.isinf(error).all() and np.isinf(width).all()


def test_ten_samples_of_a_rank_one_map_keep_their_promise():
    A = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    A[:8, :8] = 1.0
    inside = 0
    for seed in range(1000):
        W = probes(Distribution.RADEMACHER, seed, range(10), SIZE, dtype=A.dtype)
        mean = mean_of(((W @ A) * W).sum(1).tolist())
        inside += abs(mean.value - 8.0) <= mean.half_width
    assert inside >= 920
