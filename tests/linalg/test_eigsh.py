"""The basis of Eigsh: its relation, its restarts, and its products beside SciPy's."""

import math

import numpy as np
import pytest
import torch

from curvd.contract.enums import Stop, Which
from curvd_server.linalg.band import Band
from curvd_server.linalg.base import Products, drain
from curvd_server.linalg.drift import Drift
from curvd_server.linalg.eigenpairs import default_basis, eigsh
from curvd_server.linalg.ritz import keep_of, select
from curvd_server.linalg.space import Space

SIZE = 200


def matrix(values, seed=0):
    values = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(
        len(values), len(values), generator=generator, dtype=torch.float64
    )
    basis = torch.linalg.qr(normal)[0]
    return (basis * values) @ basis.T


def products_of(A, **options):
    return Products(lambda V: V @ A, size=len(A), dtype=A.dtype, **options)


FLAT = np.linspace(-1, 1, SIZE)
SPECTRA = {
    "flat": FLAT,
    "decaying": 1 / np.arange(1, SIZE + 1.0),
    "outliers": np.r_[FLAT[8:], 1.5, 2, 3, 4, 6, 8, 10, 20],
    "indefinite": np.r_[np.logspace(1, -3, SIZE // 2), -np.logspace(-1, -3, SIZE // 2)],
}


def relation_gaps(band, A):
    """How far the rows are from orthonormal, and from reproducing the map."""
    n = band.count
    rows = band._rows[: n + band.pending].double()
    Q, N = rows[:n].numpy(), rows[n:].numpy()
    gram = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)
    gap = A.double().numpy() @ Q.T - Q.T @ band.h - N.T @ band.c
    return float(gram.abs().max()), float(np.abs(gap).max())


@pytest.mark.parametrize("width", [1, 3])
def test_the_basis_and_its_pending_directions_reproduce_the_map(width):
    A = matrix(SPECTRA["indefinite"])
    start = torch.randn(
        width, SIZE, generator=torch.Generator().manual_seed(1), dtype=A.dtype
    )
    band = Band(products_of(A), 20, start, seed=0)
    for step in range(30):
        if band.count == band.size:
            band.settle()
            _, turn = band.ritz()
            band.shrink(turn[:, -8:])
        if step >= width:
            band.aim(band.c @ band.ritz()[1][:, -1])
        band.grow()
    band.settle()
    assert band.pending == width
    orthogonality, relation = relation_gaps(band, A)
    assert orthogonality < 1e-14
    assert relation < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_rows_that_waited_are_as_orthogonal_as_if_they_had_not(spectrum, dtype):
    A = matrix(SPECTRA[spectrum]).to(dtype)
    scale = float(np.abs(SPECTRA[spectrum]).max())
    for window in (1, 8):
        band = Band(products_of(A), 60, None, seed=0, window=window)
        waited = 0
        for _ in range(59):
            band.ritz()
            band.grow()
            waited += not band.settled
        assert waited == 0 if window == 1 else waited >= 20
        band.settle()
        orthogonality, relation = relation_gaps(band, A)
        assert orthogonality < 40 * band.eps
        assert relation < 40 * band.eps * scale
        assert np.linalg.norm(band.h - band.h.T, 2) < 100 * band.eps * scale


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_rows_wait_until_their_drift_is_large_and_no_longer(spectrum, monkeypatch):
    seen, correct = [], Drift.correct

    def noted(drift, measured):
        seen.append((measured, drift.latest))
        correct(drift, measured)

    monkeypatch.setattr(Drift, "correct", noted)
    band = Band(products_of(matrix(SPECTRA[spectrum])), 60, None, seed=0, window=60)
    for _ in range(59):
        band.ritz()
        band.grow()
    measured, forecast = np.array(seen).T
    assert len(seen) < 20
    assert (forecast <= 1e-2).all()
    assert (measured <= 3 * forecast).all()
    # Nothing drifts before some Ritz pair has converged.
    assert spectrum == "flat" or measured.max() > 1e-10


def test_steps_that_rounding_spoilt_are_undone():
    A = matrix(SPECTRA["flat"])
    band = Band(
        Products(lambda V: V @ A + extra, size=SIZE, dtype=A.dtype), 40, None, 0
    )
    extra = torch.zeros(SIZE, dtype=A.dtype)
    while band.count < 12 or not band.settled:
        band.ritz()
        band.grow()
    known = band.count
    band.grow()
    # A product of which nearly all is rounding, along a row that this step does not see.
    extra = 100 * band._rows[3].clone()
    band.grow()
    assert not band.settle()
    assert (band.count, band.pending) == (known, 1)
    extra = torch.zeros_like(extra)
    while band.count < 20:
        band.grow()
        assert band.settled  # from now on, no row waits
    assert max(relation_gaps(band, A)) < 1e-13


def test_a_noisy_operator_is_reported_truthfully():
    A = matrix(SPECTRA["outliers"])
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(A.shape, generator=generator, dtype=A.dtype)
    B = A + 1e-4 * (noise - noise.T)
    found = drain(
        eigsh(Products(lambda V: V @ B.T, size=SIZE, dtype=A.dtype), 4, tolerance=1e-8)
    )
    assert found.stopped is Stop.CONVERGED
    assert found.asymmetry > 1e-4
    exact = np.linalg.eigvalsh(A.numpy())[::-1][:4]
    np.testing.assert_allclose(found.values, exact, rtol=1e-6)
    true = torch.linalg.vector_norm(
        found.vectors @ B.T
        - torch.tensor(found.values, dtype=A.dtype)[:, None] * found.vectors,
        dim=1,
    )
    np.testing.assert_allclose(found.residuals, true, rtol=1e-3)


def test_a_direction_that_leads_nowhere_is_replaced_by_a_random_one():
    A = matrix(np.r_[np.zeros(SIZE - 4), 1, 2, 3, 3])
    found = drain(eigsh(products_of(A, limit=60), 6, basis=10))
    np.testing.assert_allclose(found.values[0], 3, atol=1e-12)
    assert max(found.residuals) < 1e-12
    gram = found.vectors @ found.vectors.T
    np.testing.assert_allclose(gram, np.eye(6), atol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_more_products_than_scipy_with_its_basis(spectrum, which, tolerance):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    if spectrum == "decaying" and which in {"SA", "BE"}:
        pytest.skip("an end so clustered that neither converges in 21 vectors")
    A = matrix(SPECTRA[spectrum])
    ours_of = {
        "LA": Which.LARGEST,
        "SA": Which.SMALLEST,
        "LM": Which.LARGEST_MAGNITUDE,
        "BE": Which.BOTH,
    }
    ours = theirs = 0
    for seed in range(3):
        v0 = np.random.default_rng(seed).standard_normal(SIZE)
        counted = []
        operator = linalg.LinearOperator(
            A.shape,
            matvec=lambda v, c=counted: (c.append(1), A.numpy() @ v)[1],
            dtype=A.numpy().dtype,
        )
        linalg.eigsh(operator, k=10, ncv=21, which=which, tol=tolerance, v0=v0)
        theirs += len(counted)
        ours += drain(
            eigsh(
                products_of(A, limit=2000),
                10,
                which=ours_of[which],
                tolerance=tolerance,
                basis=21,
                start=torch.from_numpy(v0)[None],
                copies=False,  # as SciPy, which does not look for them
            )
        ).products
    assert ours <= 1.02 * theirs


def test_small_bases_reach_what_large_ones_do():
    A = matrix(SPECTRA["outliers"])
    exact = np.linalg.eigvalsh(A.numpy())[::-1][:6]
    for basis in (8, 9, 12, 40):
        found = drain(eigsh(products_of(A, limit=3000), 6, basis=basis, tolerance=1e-8))
        np.testing.assert_allclose(found.values, exact, rtol=1e-10)
        assert found.stopped is Stop.CONVERGED
        assert (found.restarts > 0) == (found.products > basis)


def test_reported_residuals_are_true_after_many_restarts():
    A = matrix(SPECTRA["flat"])
    for dtype, slack in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        B = A.to(dtype)
        found = drain(eigsh(products_of(B, limit=1500), 4, basis=9, tolerance=1e-5))
        assert found.restarts > 20
        vectors = found.vectors.double()
        values = torch.tensor(found.values, dtype=torch.float64)
        true = torch.linalg.vector_norm(
            vectors @ B.double() - values[:, None] * vectors, dim=1
        )
        np.testing.assert_allclose(found.residuals, true, rtol=1e-3, atol=slack)


def test_every_start_vector_is_used_before_any_other_direction():
    A = matrix(SPECTRA["indefinite"])
    exact = torch.linalg.eigh(A)[1][:, -6:].T.contiguous()
    found = drain(eigsh(products_of(A), 6, start=exact, tolerance=1e-9, copies=False))
    assert found.products == 6
    dependent = torch.cat((exact[:3], exact[:3], torch.zeros_like(exact[:1])))
    found = drain(eigsh(products_of(A), 3, start=dependent, tolerance=1e-2))
    assert found.products <= 30
    assert found.stopped is Stop.CONVERGED


def test_the_default_basis_holds_small_maps_whole_and_large_ones_not():
    assert default_basis(3, 57, 57 * 8) == 57
    assert default_basis(3, 1000, 8000) == 256
    assert default_basis(10, 10**7, 4 * 10**7) == 40
    assert default_basis(200, 10**7, 4 * 10**7) == 420


@pytest.mark.parametrize("which", Which)
def test_a_restart_keeps_the_wanted_and_leaves_room(which):
    values = np.sort(np.random.default_rng(0).standard_normal(24))
    for k in (1, 5, 21, 22):
        goals = values[-1:]
        kept = keep_of(values, k, which, goals)
        assert k <= len(kept) < 24
        assert len(set(kept)) == len(kept)


def test_long_vectors_are_summed_in_double_precision(monkeypatch):
    monkeypatch.setattr("curvd_server.linalg.vectors._CPU_PART", 7)
    generator = torch.Generator().manual_seed(2)
    V = torch.randn(5, 1000, generator=generator)
    space = Space.of(V)
    exact = V.double() @ V.double().T
    np.testing.assert_allclose(space.dots(V, V), exact.diagonal(), rtol=1e-6)
    np.testing.assert_allclose(space.norms(V[0]) ** 2, exact[0, 0], rtol=1e-6)
    np.testing.assert_allclose(
        space.coefficients(V, V[2]), exact[2], rtol=1e-4, atol=1e-3
    )
    basis = torch.linalg.qr(V.T)[0].T.contiguous()
    rest = torch.randn(1000, generator=generator)
    before = rest.clone()
    weights, left = space.orthogonalise(basis, rest)
    np.testing.assert_allclose(left, space.norms(rest), rtol=1e-12)
    assert float((basis @ rest).abs().max()) < 1e-6
    np.testing.assert_allclose(weights.float() @ basis + rest, before, atol=1e-5)
    assert math.isclose(float(Space.of(rest).norms(torch.zeros(3))), 0.0)


N = 120
MULTIPLE = {
    "triples": np.repeat(1 / np.arange(1, 41.0), 3),
    "copies of the last but one": np.r_[
        np.linspace(-1, 1, N - 7), 2, 1.9, 1.8, 1.15, 1.15, 1.15, 1.12
    ],
    "both ends": np.r_[
        np.linspace(-0.5, 0.5, N - 8), [1, 1, -1, -1, 0.8, 0.8, -0.8, -0.8]
    ],
    "null space": np.r_[np.repeat(np.logspace(0, -3, 10), 3), np.zeros(N - 30)],
    "clusters": np.r_[
        np.linspace(-1, 1, N - 6), 1.5 + 1e-8 * np.arange(3), 1.2 + 1e-4 * np.arange(3)
    ],
    "identity": np.ones(N),
    "zero": np.zeros(N),
}


def assert_right(found, values, k, which, tolerance):
    exact = np.sort(values)
    exact = exact[np.sort(select(exact, k, which))][::-1]
    got = np.array(found.values)
    if which is Which.LARGEST_MAGNITUDE:  # of equal ones, signs are free
        exact, got = -np.sort(-np.abs(exact)), -np.sort(-np.abs(got))
    np.testing.assert_allclose(got, exact, rtol=2 * tolerance, atol=1e-9)


@pytest.mark.parametrize(("basis", "tolerance"), [(None, 1e-6), (20, 1e-3)])
@pytest.mark.parametrize("which", Which)
@pytest.mark.parametrize("spectrum", MULTIPLE)
def test_copies_are_found_or_the_query_has_not_converged(
    spectrum, which, basis, tolerance
):
    A = matrix(MULTIPLE[spectrum])
    for k in (2, 6):
        found = drain(
            eigsh(
                products_of(A, limit=400),
                k,
                which=which,
                basis=basis,
                tolerance=tolerance,
            )
        )
        gram = found.vectors @ found.vectors.T
        np.testing.assert_allclose(gram, np.eye(k), atol=1e-12)
        values = torch.tensor(found.values, dtype=A.dtype)[:, None]
        rest = found.vectors @ A - values * found.vectors
        true = torch.linalg.vector_norm(rest, dim=1)
        np.testing.assert_allclose(found.residuals, true, rtol=1e-3, atol=1e-12)
        if found.stopped is Stop.CONVERGED:
            assert_right(found, MULTIPLE[spectrum], k, which, tolerance)
        else:  # lower ends that 20 vectors hardly resolve
            assert (spectrum in {"triples", "null space"}) and basis == 20


def test_a_query_that_runs_out_while_it_looks_for_copies_has_not_converged():
    A = matrix(MULTIPLE["copies of the last but one"])
    free = drain(eigsh(products_of(A), 4, copies=False)).products
    whole = drain(eigsh(products_of(A), 4)).products
    assert free < whole
    for limit in (free, whole - 1):
        found = drain(eigsh(products_of(A, limit=limit), 4))
        assert found.stopped is Stop.PRODUCTS
        assert found.products == limit
    assert drain(eigsh(products_of(A, limit=whole), 4)).stopped is Stop.CONVERGED


def test_a_start_that_is_the_wrong_eigenvector_misleads_nobody():
    A = matrix(SPECTRA["outliers"])
    wrong = torch.linalg.eigh(A)[1][:, -4:-2].T.contiguous()
    for k, start in ((1, wrong[:1]), (1, wrong), (2, wrong)):
        found = drain(eigsh(products_of(A), k, start=start))
        assert found.stopped is Stop.CONVERGED
        np.testing.assert_allclose(found.values, [20, 10][:k], rtol=1e-6)


def test_copies_of_a_float32_map_are_found():
    for seed in range(5):
        A = matrix(MULTIPLE["triples"], seed).float()
        for which in (Which.LARGEST, Which.BOTH):
            found = drain(
                eigsh(products_of(A, limit=600), 4, which=which, tolerance=1e-3)
            )
            assert found.stopped is Stop.CONVERGED
            assert_right(found, MULTIPLE["triples"], 4, which, 1e-3)


def test_one_pair_needs_no_search():
    A = matrix(SPECTRA["indefinite"])
    for which in (Which.LARGEST, Which.SMALLEST, Which.LARGEST_MAGNITUDE):
        plain = drain(eigsh(products_of(A), 1, which=which, copies=False))
        sure = drain(eigsh(products_of(A), 1, which=which))
        # A few steps more: what a vector may have lost is near what it converged to.
        assert plain.products <= sure.products <= 1.15 * plain.products
