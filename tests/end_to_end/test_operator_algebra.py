"""Operators as they are written are what NumPy says of their matrices."""

import asyncio
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import curvd  # noqa: E402

# With CURVD_TEST_DEVICES workers compute, which time their plans all the same.
pytestmark = pytest.mark.usefixtures("untimed")

I = curvd.Identity()  # noqa: E741 - as it is written
RNG = np.random.default_rng(0)
P = 43
V = RNG.standard_normal((P, 3))
EYE = np.eye(P)


@pytest.fixture(scope="module")
def dense(tanh_session):
    """Hessian and GGN of the session, column by column."""
    return tuple(op @ EYE for op in (tanh_session.hessian(), tanh_session.ggn()))


@pytest.fixture
def moving(live_target, tanh_session):
    """A session of its own, for tests that move its parameters."""
    info = tanh_session.info
    with (
        curvd.connect(live_target) as client,
        client.create_session(
            info.model_id, info.dataset_id, loss="cross_entropy", dtype="F64"
        ) as session,
    ):
        yield session


WRITTEN = {
    "H + G": (lambda H, G: H + G, lambda h, g: h + g),
    "H - G": (lambda H, G: H - G, lambda h, g: h - g),
    "2 * H": (lambda H, G: 2 * H, lambda h, g: 2 * h),
    "H * np.float32(2)": (lambda H, G: H * np.float32(2), lambda h, g: 2 * h),
    "np.float64(2) * H": (lambda H, G: np.float64(2) * H, lambda h, g: 2 * h),
    "torch.tensor(2.0) * H": (lambda H, G: torch.tensor(2.0) * H, lambda h, g: 2 * h),
    "H / 4": (lambda H, G: H / 4, lambda h, g: h / 4),
    "-H": (lambda H, G: -H, lambda h, g: -h),
    "H - 0.3 * I": (lambda H, G: H - 0.3 * I, lambda h, g: h - 0.3 * EYE),
    "0.3 * I - H": (lambda H, G: 0.3 * I - H, lambda h, g: 0.3 * EYE - h),
    "2 * (H + 3 * I)": (lambda H, G: 2 * (H + 3 * I), lambda h, g: 2 * h + 6 * EYE),
    "H + I + I": (lambda H, G: H + (I + I), lambda h, g: h + 2 * EYE),
    "H + H": (lambda H, G: H + H, lambda h, g: 2 * h),
    "sum": (lambda H, G: sum([H, G, H]), lambda h, g: 2 * h + g),
    "(H + 2 * G) / 2 - I": (
        lambda H, G: (H + 2 * G) / 2 - I,
        lambda h, g: h / 2 + g - EYE,
    ),
    "H.T": (lambda H, G: H.T, lambda h, g: h),
    "(H + G).mT": (lambda H, G: (H + G).mT, lambda h, g: h + g),
    "H.adjoint()": (lambda H, G: H.adjoint().mH.H, lambda h, g: h),
    "H['3.*', '3.*']": (lambda H, G: H["3.*", "3.*"], lambda h, g: h[25:, 25:]),
    "another order": (
        lambda H, G: H[["3.bias", "1.bias"], ["3.bias", "1.bias"]],
        lambda h, g: h[np.r_[40:43, 20:25]][:, np.r_[40:43, 20:25]],
    ),
    "names of two layers": (lambda H, G: H["1.*", "3.*"], lambda h, g: h[:25, 25:]),
    "rows by name": (lambda H, G: H["3.bias"], lambda h, g: h[40:]),
    "name and slice": (lambda H, G: H["3.bias", 5:9], lambda h, g: h[40:, 5:9]),
    "slices": (lambda H, G: H[3:30:4, -5:], lambda h, g: h[3:30:4, -5:]),
    "indices": (
        lambda H, G: H[[5, -1], [7, 3, 0]],
        lambda h, g: h[[5, -1]][:, [7, 3, 0]],
    ),
    "a mask": (
        lambda H, G: H[np.arange(P) % 2 == 0, :2],
        lambda h, g: h[::2, :2],
    ),
    "torch's indices": (
        lambda H, G: H[torch.tensor([4, 2]), ...],
        lambda h, g: h[[4, 2]],
    ),
    "one entry": (lambda H, G: H[[7], [9]], lambda h, g: h[7:8, 9:10]),
    "rows of rows": (lambda H, G: H[10:, :][:5, 2:4], lambda h, g: h[10:15, 2:4]),
    "of a sum": (lambda H, G: (H + G)["1.*", "3.*"], lambda h, g: (h + g)[:25, 25:]),
    "a principal one of a sum": (
        lambda H, G: (H + 2 * G)["3.*", "3.*"],
        lambda h, g: (h + 2 * g)[25:, 25:],
    ),
    "algebra of submatrices": (
        lambda H, G: 2 * H[:4, 5:] - G[:4, 5:] / 2,
        lambda h, g: 2 * h[:4, 5:] - g[:4, 5:] / 2,
    ),
    "a shifted submatrix": (
        lambda H, G: 3 * I - H[:4, :4],
        lambda h, g: 3 * np.eye(4) - h[:4, :4],
    ),
    "the transpose of one": (lambda H, G: H[:4, 5:].T, lambda h, g: h[5:, :4]),
}


@pytest.mark.parametrize(("ours", "numpys"), WRITTEN.values(), ids=WRITTEN)
def test_what_is_written_is_what_numpy_says(tanh_session, dense, ours, numpys):
    operator = ours(tanh_session.hessian(), tanh_session.ggn())
    want = numpys(*dense)
    rows, columns = want.shape
    assert operator.shape == want.shape
    assert operator.ndim == 2
    x, y = V[:columns], RNG.standard_normal((2, rows))
    close = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(operator @ x, want @ x, **close)
    np.testing.assert_allclose(operator @ x[:, 0], want @ x[:, 0], **close)
    np.testing.assert_allclose(operator.matmat(x), want @ x, **close)
    np.testing.assert_allclose(operator.matvec(x[:, 0]), want @ x[:, 0], **close)
    np.testing.assert_allclose(y @ operator, y @ want, **close)
    np.testing.assert_allclose(y[0] @ operator, y[0] @ want, **close)
    np.testing.assert_allclose(operator.to_dense(), want, **close)
    ours = operator @ torch.from_numpy(x)
    assert isinstance(ours, torch.Tensor)
    np.testing.assert_allclose(ours.numpy(), want @ x, **close)


@pytest.mark.parametrize(("ours", "numpys"), WRITTEN.values(), ids=WRITTEN)
def test_the_asyncio_client_writes_the_same(
    live_target, tanh_session, dense, ours, numpys
):
    async def multiplied():
        async with curvd.aio.connect(live_target) as client:
            session = await client.session(tanh_session.id)
            operator = ours(session.hessian(), session.ggn())
            rows, columns = operator.shape
            x, y = V[:columns], V[:rows].T
            return [
                await (operator @ x),
                (await (y @ operator)).T,
                await operator.matmat(x),
                await operator.matvec(x[:, 0]),
                await operator.to_dense(),
            ]

    want = numpys(*dense)
    x, y = V[: want.shape[1]], V[: want.shape[0]].T
    wanted = [want @ x, (y @ want).T, want @ x, want @ x[:, 0], want]
    for found, expected in zip(asyncio.run(multiplied()), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_scales_shifts_and_names_stay_one_operator_of_the_server(tanh_session):
    H = tanh_session.hessian(damping=1.0)
    assert (2 * H - 3 * I).spec == curvd.OperatorSpec(scale=2.0, damping=-1.0)
    assert (H - H / 2).spec == curvd.OperatorSpec(scale=0.5, damping=0.5)
    assert H["3.*", "3.*"].spec.parameters == ("3.weight", "3.bias")
    assert (H + tanh_session.ggn()).terms[1].spec.kind is curvd.OperatorKind.GGN


def test_a_tuple_of_one_key_is_that_key(tanh_session):
    H = tanh_session.hessian()
    assert H[("3.*",)].shape == H["3.*"].shape == (18, 43)
    assert H[[1, 2],].shape == (2, 43)


def test_a_sum_takes_every_layout_and_says_where_it_is_from(tanh_session):
    H, G = tanh_session.hessian(), tanh_session.ggn()
    total = H + G
    parts = {
        n: np.ones(s) for n, s in zip(H.layout.names, H.layout.shapes, strict=True)
    }
    for x in (parts, [*parts.values()], tuple(parts.values())):
        found = total @ x
        assert type(found) is type(x)
        flat = found.values() if isinstance(found, dict) else found
        np.testing.assert_allclose(
            np.concatenate([f.ravel() for f in flat]), total @ np.ones(P)
        )
    assert [info.version for info in total.last] == [tanh_session.info.version] * 2
    stored = tanh_session.put("x", np.ones(P))
    np.testing.assert_allclose(total.multiply(stored), total @ np.ones(P))
    assert (H.last, G.last) == (None, None)  # the caller's own are left alone


def test_the_terms_of_a_sum_are_under_way_at_once():
    from curvd.remote import operator_sum

    everyone = threading.Barrier(3, timeout=60)

    class Term:
        def __matmul__(self, x):
            everyone.wait()  # passes only if all three are here
            return x

    found = operator_sum._at_once(lambda term: term @ 1.0, [Term(), Term(), Term()])
    assert found == [1.0, 1.0, 1.0]


def test_terms_belong_to_one_version(moving, monkeypatch):
    H, G = moving.hessian(), moving.ggn()
    total = H + G
    updates = iter([True])

    def late(term):
        product = term @ np.ones(P)
        if term is total.terms[0] and next(updates, False):
            moving.update_parameters({"3.bias": np.full(3, 0.1)})
        return product

    # One after the other, so that the first product is of the version before.
    monkeypatch.setattr(
        "curvd.remote.operator_sum._at_once",
        lambda multiply, terms: [*map(multiply, terms)],
    )
    found = total._multiplied(late)
    assert len({info.version for info in total.last}) == 1
    np.testing.assert_allclose(found, H @ np.ones(P) + G @ np.ones(P), rtol=1e-9)


def test_parameters_that_never_rest_are_told(moving, monkeypatch):
    total = moving.hessian() + moving.ggn()

    def late(term):
        product = term @ np.ones(P)
        if term is total.terms[0]:
            moving.update_parameters({"3.bias": np.zeros(3)})
        return product

    monkeypatch.setattr(
        "curvd.remote.operator_sum._at_once",
        lambda multiply, terms: [*map(multiply, [total.terms[0], total.terms[1]])][
            : len(terms)
        ],
    )
    with pytest.raises(curvd.VersionMismatch, match="update less often"):
        total._multiplied(late)


def test_sessions_of_two_datasets_add_up(live_target, tanh_session):
    with curvd.connect(live_target) as client:
        info = tanh_session.info
        data = {"x": RNG.standard_normal((9, 4)), "y": RNG.integers(0, 3, 9)}
        other = client.register_dataset(data, inputs="x", target="y", batch_size=9)
        with client.create_session(
            info.model_id, other, loss="cross_entropy", dtype="F64"
        ) as test:
            total = (20 * tanh_session.hessian() + 9 * test.hessian()) / 29
            want = 20 * (tanh_session.hessian() @ V) + 9 * (test.hessian() @ V)
            np.testing.assert_allclose(total @ V, want / 29, rtol=1e-9, atol=1e-12)


def test_scipy_takes_sums_and_submatrices(tanh_session, dense):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    h, g = dense
    total = (tanh_session.hessian() + tanh_session.ggn()).to_scipy()
    found = linalg.eigsh(total, k=2, return_eigenvectors=False)
    exact = sorted(np.linalg.eigvalsh(h + g), key=abs)[-2:]
    np.testing.assert_allclose(sorted(found), sorted(exact), rtol=1e-6)
    block = tanh_session.hessian()[:20, 25:].to_scipy()
    np.testing.assert_allclose(block.T @ np.ones(20), h[:20, 25:].T @ np.ones(20))
    singular = linalg.svds(block, k=1, return_singular_vectors=False)
    np.testing.assert_allclose(singular, np.linalg.norm(h[:20, 25:], 2), rtol=1e-6)


REFUSED = {
    "an array of it": (
        lambda s: np.asarray(s.hessian()),
        TypeError,
        r"becomes an array by 43 products.*to_dense\(\).*H @ V",
    ),
    "an array of rows": (
        lambda s: np.asarray(s.hessian()[:3]),
        TypeError,
        r"submatrix \[3, 43\].*to_dense\(\)",
    ),
    "a number": (
        lambda s: s.hessian() - 0.5,
        curvd.InvalidSpec,
        r"no operator: add -0\.5 \* curvd\.Identity\(\)",
    ),
    "an array times it": (
        lambda s: np.ones(P) * s.hessian(),
        curvd.InvalidVector,
        r"scaled by numbers, got an array \[43\]: write H @ x",
    ),
    "it times a tensor": (
        lambda s: s.hessian() * torch.ones(P, 2),
        curvd.InvalidVector,
        r"got an array \[43, 2\]",
    ),
    "other parameters": (
        lambda s: s.hessian() + s.ggn(params="3.*"),
        curvd.InvalidSpec,
        r"1\.weight.*P = 43.*3\.weight.*P = 18.*params=",
    ),
    "a name that is not there": (
        lambda s: s.hessian()["4.*", "3.*"],
        curvd.InvalidSpec,
        r"'4\.\*' matches none.*near it are",
    ),
    "a single index": (
        lambda s: s.hessian()[3, 4],
        curvd.InvalidSpec,
        r"got 3: for one entry write H\[\[i\], \[j\]\]",
    ),
    "an index out of range": (
        lambda s: s.hessian()[[43], :],
        curvd.InvalidSpec,
        r"index 43 is out of range: the operator has 43 rows",
    ),
    "a short mask": (
        lambda s: s.hessian()[np.ones(5, bool)],
        curvd.InvalidSpec,
        "a mask has 5 entries; the operator has 43",
    ),
    "a row twice": (
        lambda s: s.hessian()[[1, 1], :],
        curvd.InvalidSpec,
        "twice",
    ),
    "another length": (
        lambda s: s.hessian()[:3, :4] @ np.ones(3),
        curvd.InvalidVector,
        r"\[3, 4\] multiplies an array \[4\] or \[4, K\], got shape \[3\]",
    ),
    "an identity on other rows": (
        lambda s: s.hessian()[:3, 1:4] + I,
        curvd.InvalidSpec,
        "same rows and columns",
    ),
    "other submatrices": (
        lambda s: s.hessian()[:3, 1:4] + s.ggn()[:3, :3],
        curvd.InvalidSpec,
        "same rows and columns",
    ),
    "three axes": (
        lambda s: s.hessian()[[1], [2], [3]],
        curvd.InvalidSpec,
        "rows and columns, got 3 axes",
    ),
    "no rows": (
        lambda s: s.hessian()[np.array([], int)],
        curvd.InvalidSpec,
        "chosen by an empty list",
    ),
    "it times NaN": (
        lambda s: float("nan") * s.hessian(),
        curvd.InvalidSpec,
        "finite numbers, got nan",
    ),
    "an infinite shift": (
        lambda s: s.hessian()[:3, :3] * np.float64("inf"),
        curvd.InvalidSpec,
        "finite numbers, got inf",
    ),
    "it over nothing": (
        lambda s: s.hessian() / 0,
        curvd.InvalidSpec,
        "divided by numbers other than 0",
    ),
    "a submatrix over nothing": (
        lambda s: s.hessian()[:3, :4] / 0.0,
        curvd.InvalidSpec,
        "divided by numbers other than 0",
    ),
    "a walk over rows": (lambda s: list(s.hessian()), TypeError, "not iterable"),
}


@pytest.mark.parametrize(("call", "kind", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_written_says_what_can(tanh_session, call, kind, match):
    with pytest.raises(kind, match=match):
        call(tanh_session)


def test_blocks_are_cut_by_index(tanh_session, dense):
    H = tanh_session.hessian(block_sizes=[2, 2])
    assert not (H["1.*", "3.*"] @ np.ones(18)).any()
    inner = H["3.*", "3.*"] @ np.eye(18)
    np.testing.assert_allclose(inner, dense[0][25:, 25:], rtol=1e-9, atol=1e-12)


def test_a_dense_matrix_has_a_limit(tanh_session, monkeypatch):
    monkeypatch.setattr("curvd.remote.algebra._DENSE_BYTES", 43 * 43 * 8 - 1)
    for operator in (
        tanh_session.hessian(),
        tanh_session.hessian() + tanh_session.ggn(),
    ):
        with pytest.raises(curvd.LimitExceeded, match=r"\[43, 43\] has 14792 bytes"):
            operator.to_dense()
    assert tanh_session.hessian()[:5].to_dense().shape == (5, 43)
