"""Estimates are unbiased and inside their 95 % intervals 95 % of the time over seeds."""

import math

import numpy as np
import pytest
import torch

from curvd.contract.enums import Distribution, Estimator
from curvd_server.linalg import space
from curvd_server.linalg.base import Products, drain
from curvd_server.linalg.density import spectral_density
from curvd_server.linalg.diagonals import diagonal
from curvd_server.linalg.intervals import mean_of, student_975, uncertainty
from curvd_server.linalg.log_determinants import logdet
from curvd_server.linalg.norm import frobenius_norm
from curvd_server.linalg.random_probes import probes
from curvd_server.linalg.sampling import Target
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
    return Products(lambda V: V @ A, size=SIZE, dtype=A.dtype, **options)


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
