"""What shows that the wanted eigenvalues are all there are, and how rarely it errs."""

import math

import numpy as np
import pytest
import torch

from curvd.contract import Stop, Which
from curvd_server.linalg import eigsh
from curvd_server.linalg.band import Band, Complement
from curvd_server.linalg.base import Products, drain
from curvd_server.linalg.complement import Part, parts
from curvd_server.linalg.copies import missing
from curvd_server.linalg.evidence import Evidence, Target, sides

SIZE = 100
BULK = np.linspace(-1, 1, SIZE - 6)
SPECTRA = {
    "flat": np.linspace(-1, 1, SIZE),
    "outliers": np.r_[BULK, 1.2, 1.5, 2, 3, 5, 8],
    "close": np.r_[BULK, 1.2, 1.2012, 1.5, 1.6, 1.7, 1.8],
    "decaying": 1 / np.arange(1, SIZE + 1.0) ** 2,
}


def matrix(values, seed=0):
    normal = np.random.default_rng(seed).standard_normal((len(values),) * 2)
    basis = torch.from_numpy(np.linalg.qr(normal)[0])
    return (basis * torch.from_numpy(np.asarray(values))) @ basis.T


def products_of(A, **options):
    return Products(lambda V: V @ A, size=len(A), dtype=A.dtype, **options)


def run(A, steps, size, seed):
    """A run from the random vector of a seed, with restarts if the basis is small."""
    band = Band(products_of(A), size, None, seed)
    for _ in range(steps):
        if band.count == size:
            band.settle()
            band.shrink(band.ritz()[1][:, -size // 2 :])
        band.grow()
    band.settle()
    return band


@pytest.mark.parametrize("size", [60, 20])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_eigenvector_hides_better_than_the_evidence_says(spectrum, size):
    A = matrix(SPECTRA[spectrum])
    exact, vectors = (x.numpy() for x in torch.linalg.eigh(A))
    for seed in range(5):
        band = run(A, 30, size, seed)
        ritz, turn = band.ritz()
        start = products_of(A).normal(seed, 0).numpy()
        start /= np.linalg.norm(start)
        slopes = np.linalg.norm(band.c @ turn, axis=0)
        slopes *= np.abs(turn.T @ band.basis.numpy() @ start)
        evidence = Evidence(ritz, slopes, SIZE)
        # The top only: dropped Ritz values are roots as well, further inside.
        for value, vector in list(zip(exact, vectors.T, strict=True))[-6:]:
            component = abs(vector @ start)
            most = evidence.missed(value) / math.sqrt(2 * SIZE / math.pi)
            near = np.abs(ritz - value).min() < 1e-12  # a root, to rounding
            assert near or evidence.missed(value) == 1 or component <= 1.01 * most


def beyond(values, target):
    return int((target.sign * values > target.distance).sum())


def on_the_complement(A, there):
    """The eigenvalues of the map that a search multiplies by."""
    rows = there.beside.numpy()
    rest = np.linalg.svd(rows, full_matrices=True)[2][len(rows) :]
    B = rest @ A.numpy() @ rest.T
    if there.along is not None:
        along = rest @ there.along.numpy().T
        B += along @ there.pull @ along.T
    return np.linalg.eigvalsh((B + B.T) / 2)


@pytest.mark.parametrize("steps", [15, 35, 70])
@pytest.mark.parametrize("spectrum", ["pairs", *SPECTRA])
def test_a_basis_and_its_complement_share_the_eigenvalues_beyond_a_target(
    spectrum, steps
):
    values = {"pairs": np.r_[BULK, 2, 2, 1.5, 1.5, 1.5, 1.2], **SPECTRA}[spectrum]
    A = matrix(values)
    # 70 steps: by then rounding has brought a part of every copy into the basis.
    for seed in range(3):
        band = run(A, steps, 80, seed)
        ritz, turn = band.ritz()
        for target in [Target(1, s, 1e-4) for s in (1.05, 1.3, 1.55, 1.9)]:
            part = parts(band, [target], turn[:, -4:])[0]
            inside = on_the_complement(A, part.complement)
            total = beyond(ritz, target) + beyond(inside, target)
            assert total == beyond(values, target)


def test_both_ends_at_once_hide_nothing_that_either_would_show():
    checked = 0
    for seed, steps in ((s, n) for s in range(4) for n in (20, 40, 60)):
        top = np.r_[np.repeat([2, 1.6, 1.3], seed % 3 + 1), 1.2]
        values = np.r_[np.linspace(-1, 1, SIZE - 2 * len(top)), top, -top]
        A = matrix(values, seed)
        band = run(A, steps, 80, seed)
        turn = band.ritz()[1]
        wanted = np.c_[turn[:, :4], turn[:, -4:]]
        targets = [Target(sign, 1.45, 1e-4, 0.2) for sign in (1, -1)]
        found = parts(band, targets, wanted)
        ritz = band.ritz()[0]  # the basis may have turned
        if len(found) > 1:
            continue
        checked += 1
        inside = on_the_complement(A, found[0].complement)
        for before, after in zip(targets, found[0].targets, strict=True):
            assert before.distance - before.slack <= after.distance <= before.distance
            lost = beyond(values, before) - beyond(ritz, before)
            assert beyond(inside, after) >= lost
    assert checked >= 8


def test_a_side_ends_at_its_last_value_and_begins_again_at_the_next_that_differs():
    values, wanted = np.array([3.0, 2.0, 1.0001, 1.0, -4.0]), np.full(5, 1e-3)
    (top,) = sides(values[:4], wanted[:4], Which.LARGEST)
    assert (top.sign, top.last, top.next) == (1, 1.0, 2.0)
    top, bottom = sides(values, wanted, Which.LARGEST_MAGNITUDE)
    assert (top.last, top.next) == (1.0, 2.0)
    assert (bottom.sign, bottom.last, bottom.next) == (-1, 1.0, 4.0)
    top, bottom = sides(values, wanted, Which.BOTH)
    assert (top.last, top.next) == (1.0001, 2.0)
    assert (bottom.last, bottom.next) == (-1.0, 4.0)


def test_a_complement_that_is_exhausted_hides_nothing():
    A = matrix(np.r_[BULK[:20], 2, 2])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(A.shape, generator=generator, dtype=A.dtype)
    B = A + 1e-3 * (noise - noise.T)  # no pair converges as well as it should
    known = torch.linalg.eigh(A)[1][:, :20].T.contiguous()
    part = Part(Complement(known), (Target(1, 1.5, 1e-4),))
    found = drain(
        missing(
            Products(lambda V: V @ B.T, size=len(A), dtype=A.dtype),
            part,
            tolerance=1e-12,
            size=32,
            seed=0,
            turn=0,
            progress=lambda: None,
        )
    )
    assert len(found.vectors) == 2


def lost(values, k, tolerance, seeds):
    """How many of so many seeds end with a value that is wrong, and are not told."""
    A = torch.diag(torch.from_numpy(values))
    top = np.sort(values)[::-1][:k]
    count = 0
    for seed in range(seeds):
        found = drain(eigsh(products_of(A), k, tolerance=tolerance, seed=seed))
        assert found.stopped is Stop.CONVERGED
        count += np.abs(np.array(found.values) - top).max() > 2 * tolerance * top[-1]
    return count


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_a_value_beside_the_last_is_rarely_lost(tolerance):
    # Ten tolerances apart: 4 % of random vectors would lose the larger for the smaller.
    pair = np.r_[np.linspace(-1, 1, SIZE - 4), 1.2, 1.2 * (1 + 10 * tolerance)]
    assert lost(np.r_[pair, 1.4, 1.6], 3, tolerance, 100) == 0
    assert lost(pair, 1, tolerance, 100) <= 3


def test_a_start_with_no_part_of_an_eigenvalue_does_not_lose_it():
    # This seed's vector has next to nothing of the last pair.
    bulk = np.linspace(-0.5, 0.5, 112)
    values = np.r_[bulk, 1, 1, -1, -1, 0.8, 0.8, -0.8, -0.8]
    A = matrix(values, 226)
    for which in (Which.BOTH, Which.LARGEST_MAGNITUDE):
        found = drain(
            eigsh(
                products_of(A, limit=600),
                10,
                which=which,
                basis=20,
                tolerance=1e-3,
                seed=226,
            )
        )
        smallest = np.sort(np.abs(found.values))[:2]
        assert found.stopped is not Stop.CONVERGED or smallest.min() > 0.499


def test_certainty_costs_what_one_more_random_vector_does():
    A = matrix(np.linspace(-1, 1, 400))
    costs = []
    for k, which in ((1, Which.LARGEST), (10, Which.LARGEST), (10, Which.BOTH)):
        plain, sure = (
            sum(
                drain(
                    eigsh(
                        products_of(A),
                        k,
                        which=which,
                        tolerance=1e-6,
                        seed=seed,
                        copies=copies,
                    )
                ).products
                for seed in range(3)
            )
            for copies in (False, True)
        )
        costs.append(sure / plain)
    assert costs[0] <= 1.1
    assert costs[1] <= 1.22
    assert costs[2] <= 1.38


def test_a_start_that_is_nearly_right_costs_less_than_none():
    A = matrix(SPECTRA["outliers"])
    noise = matrix(np.linspace(-1, 1, SIZE), 3)
    moved = A + 1e-4 * noise
    for k, which in ((1, Which.LARGEST), (4, Which.LARGEST), (4, Which.BOTH)):
        old = drain(eigsh(products_of(A), k, which=which, tolerance=1e-3)).vectors
        cold, warm = (
            drain(
                eigsh(products_of(moved), k, which=which, tolerance=1e-3, start=start)
            )
            for start in (None, old)
        )
        assert warm.stopped is Stop.CONVERGED
        np.testing.assert_allclose(warm.values, cold.values, rtol=1e-5)
        assert warm.products <= 0.8 * cold.products
