"""Arithmetic on stored vectors is NumPy's, and nothing of their length travels."""

import grpc
import numpy as np
import pytest
import raw
import torch
from support.small_net import open_session
from torch.nn import functional as F

import curvd
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.models import builders

SIZE = 57


@pytest.fixture
def session(live_target):
    with curvd.connect(live_target) as client, open_session(client) as opened:
        yield opened


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_sums_are_stored_and_may_take_the_place_of_a_term(session):
    x, y = normal(SIZE), normal(SIZE, seed=1)
    stored = session.put("x", x)
    session.put("y", y)
    total = session.combine({stored: 2.0, "y": -0.5}, store="sum")
    np.testing.assert_allclose(session.get(total), 2 * x - y / 2, rtol=1e-14)
    session.combine({"x": 1.0, "y": 3.0}, store="x")
    np.testing.assert_allclose(session.get("x"), x + 3 * y, rtol=1e-14)
    session.put("columns", normal(SIZE, 4))
    session.combine({"columns": 0.5}, store="half")
    np.testing.assert_allclose(session.get("half"), normal(SIZE, 4) / 2)


def test_a_retry_does_not_add_once_more(session, live_target):
    session.put("x", np.ones(SIZE))
    request = curvature_pb.CombineVectorsRequest(
        session_id=session.id, store_as="x", request_id="step 1"
    )
    request.terms.add(name="x", coefficient=2.0)
    with grpc.insecure_channel(live_target) as channel:
        for _ in range(2):
            raw.call(channel, "CombineVectors", request)
        np.testing.assert_array_equal(session.get("x"), np.full(SIZE, 2.0))
        request.terms[0].coefficient = 3.0
        with pytest.raises(curvd.RequestIdReused):
            raw.call(channel, "CombineVectors", request)


def test_inner_products_and_norms_are_those_of_the_columns(session):
    A, b = normal(SIZE, 3), normal(SIZE, seed=2)
    session.put("A", A)
    session.put("b", b)
    whole = np.column_stack([A, b])
    np.testing.assert_allclose(
        session.inner_products(["A", "b"]), whole.T @ whole, rtol=1e-12
    )
    np.testing.assert_allclose(session.inner_products("A", "b"), (A.T @ b)[:, None])


def test_a_basis_spans_what_the_vectors_do_and_no_more(session):
    A = normal(SIZE, 3)
    session.put("A", A)
    session.put("again", A @ normal(3, 5, seed=3))  # nothing new
    basis = session.orthonormalise(["A", "again"], store="Q")
    assert basis.shape == (3, SIZE)
    Q = session.get(basis)
    np.testing.assert_allclose(Q.T @ Q, np.eye(3), atol=1e-13)
    np.testing.assert_allclose(Q @ (Q.T @ A), A, atol=1e-12)
    one = session.orthonormalise("A", store="one", tolerance=1.0 - 1e-9)
    assert one.shape == (1, SIZE)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("power", [1, 20, 50, 100, 120])
def test_short_vectors_beside_long_ones_stay_in_the_basis(live_target, dtype, power):
    own = np.float32 if dtype == "F32" else np.float64
    A = normal(SIZE, 3, seed=8).astype(own)
    sizes = 2.0 ** np.array([0, -power / 2, -power]).round()
    with (
        curvd.connect(live_target) as client,
        open_session(client, dtype=dtype) as session,
    ):
        session.put("A", A * sizes.astype(own))
        Q = session.get(session.orthonormalise("A", store="Q")).astype(float)
        eps = float(np.finfo(own).eps)
        assert Q.shape == (SIZE, 3)  # numpy.linalg.matrix_rank of A
        np.testing.assert_allclose(Q.T @ Q, np.eye(3), atol=100 * eps)
        np.testing.assert_allclose(Q @ (Q.T @ A), A, atol=100 * eps)
        # Tolerances are about lengths, as stored.
        few = session.orthonormalise("A", store="few", tolerance=0.9 * sizes[1])
        long = np.linalg.svd(A * sizes, compute_uv=False) > 0.9 * sizes[1] * (
            np.linalg.norm(A * sizes, 2)
        )
        assert few.shape == (long.sum(), SIZE)


@pytest.mark.parametrize("apart", [1e-3, 1e-8, 1e-11, 1e-13])
def test_vectors_that_are_nearly_parallel_span_what_numpy_says(session, apart):
    a, b = normal(SIZE, 2, seed=9).T
    V = np.column_stack([a, a + apart * b])
    session.put("V", V)
    Q = session.get(session.orthonormalise("V", store="Q"))
    assert Q.shape[1] == np.linalg.matrix_rank(V) == 2
    plane = np.linalg.qr(np.column_stack([a, b]))[0]
    np.testing.assert_allclose(Q @ (Q.T @ plane), plane, atol=1e-13 / apart)
    session.put("V", np.column_stack([a, a + 1e-17 * b]))
    assert session.orthonormalise("V", store="Q").shape == (1, SIZE)


def test_principal_directions_come_first(session):
    A = normal(SIZE, 4, seed=10) * [1.0, 5.0, 0.2, 30.0]
    session.put("A", A)
    Q = session.get(session.orthonormalise("A", store="Q"))
    left = np.linalg.svd(A, full_matrices=False)[0]
    np.testing.assert_allclose(np.abs(Q.T @ left), np.eye(4), atol=1e-12)


def test_float32_is_summed_in_float64(live_target):
    with (
        curvd.connect(live_target) as client,
        open_session(client, dtype="F32") as session,
    ):
        A = normal(SIZE, 3).astype(np.float32)
        session.put("A", A)
        found = session.inner_products("A")
        np.testing.assert_allclose(
            found, A.T.astype(float) @ A.astype(float), rtol=1e-5
        )
        session.combine({"A": 1e30}, store="large")
        with pytest.raises(curvd.NotFinite, match="overflows its type"):
            session.combine({"large": 1e30}, store="larger")
        session.put("again", np.hstack([A, A @ np.ones((3, 1), np.float32)]))
        assert session.orthonormalise("again", store="Q").shape == (3, SIZE)


@pytest.mark.parametrize(("dtype", "power"), [("F32", 60), ("F32", 120), ("F64", 500)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_vectors_of_any_size_have_their_products_and_their_basis(
    live_target, dtype, power, sign
):
    own = np.float32 if dtype == "F32" else np.float64
    A = normal(SIZE, 3).astype(own)
    size = 2.0 ** (sign * power)
    with (
        curvd.connect(live_target) as client,
        open_session(client, dtype=dtype) as session,
    ):
        session.put("A", A)
        session.put("sized", A * own(size))
        true = A.astype(float).T @ A.astype(float)
        tolerance = 1e-5 if dtype == "F32" else 1e-12
        found = session.inner_products("A", "sized") / size
        np.testing.assert_allclose(found, true, rtol=tolerance, atol=tolerance)
        found = session.inner_products("sized") / size / size
        np.testing.assert_allclose(found, true, rtol=tolerance, atol=tolerance)
        plain = session.orthonormalise("A", store="Q")
        basis = session.orthonormalise("sized", store="P")
        assert basis.shape == plain.shape == (3, SIZE)
        spans = session.get("P").T @ session.get("Q")
        np.testing.assert_allclose(spans @ spans.T, np.eye(3), atol=1e-5)


def test_products_and_sums_that_are_no_numbers_are_refused(live_target):
    for dtype, size in (("F32", 2.0**-100), ("F64", 2.0**-900), ("F64", 2.0**900)):
        own = np.float32 if dtype == "F32" else np.float64
        with (
            curvd.connect(live_target) as client,
            open_session(client, dtype=dtype) as session,
        ):
            session.put("b", normal(SIZE).astype(own) * own(size))
            if size < 1:
                with pytest.raises(curvd.ScaleOutOfRange, match="no digits left"):
                    session.combine({"b": size}, store="x")
                session.combine({"b": 0.0}, store="x")
                assert not session.get("x").any()
            if dtype == "F64":
                with pytest.raises(
                    curvd.ScaleOutOfRange, match="largest inner product"
                ):
                    session.inner_products("b")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.combine({}, store="x"), "at least one term"),
        (lambda s: s.combine({"b": 1.0}, store=""), "needs a name"),
        (lambda s: s.combine({"none": 1.0}, store="x"), "stores no vector 'none'"),
        (lambda s: s.combine({"b": np.nan}, store="x"), "coefficient must be finite"),
        (lambda s: s.combine({"b": 1.0, "two": 1.0}, store="x"), "of one shape"),
        (lambda s: s.inner_products([]), "at least one stored vector"),
        (lambda s: s.inner_products(["b"] * 600), "more than 250000"),
        (lambda s: s.inner_products("b", "short"), "vectors of one length"),
        (lambda s: s.orthonormalise("zero", store="x"), "span nothing"),
        (lambda s: s.orthonormalise("b", store=""), "needs a name"),
    ],
)
def test_what_does_not_fit_is_refused(session, ask, message):
    session.put("b", normal(SIZE))
    session.put("two", normal(SIZE, 2))
    session.put("zero", np.zeros(SIZE))
    session.ggn(params="3.*").eigsh(1, store="short")
    with pytest.raises(curvd.CurvdError, match=message):
        ask(session)


async def test_the_asynchronous_client_computes_the_same(session, live_target):
    session.put("x", np.ones(SIZE))
    async with curvd.aio.connect(live_target) as client:
        same = await client.session(session.id)
        await same.combine({"x": 3.0}, store="y")
        np.testing.assert_allclose(await same.inner_products("x", "y"), [[3 * SIZE]])
        assert (await same.orthonormalise(["x", "y"], store="Q")).shape == (1, SIZE)


def test_a_sketch_of_other_parameters_is_refused_though_it_is_as_long(live_target):
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5)
    ).double()
    x, y = torch.from_numpy(normal(24, 5)), torch.arange(24) % 5
    with (
        curvd.connect(live_target) as client,
        client.session_for(net, "cross_entropy", (x, y), batch_size=8) as own,
    ):
        own.ggn(params="0.*").sketch("first", rank=5)
        b = np.ones(30)
        options = {"damping": 0.1, "preconditioner": "first"}
        assert own.ggn(params="0.*").solve(b, **options).converged
        with pytest.raises(
            curvd.InvalidVector, match=r"in 2 parameters \(0.weight, 0.bias"
        ):
            own.ggn(params="2.*").solve(b, **options)


def test_a_sketch_of_version_1_serves_thirty_steps_later(live_target):
    """Iterations within 1.4 times those of a fresh one, at small dampings, too."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy(digits.data[:400] / 16)
    y = torch.from_numpy(digits.target[:400])
    torch.manual_seed(0)
    config = {"widths": [64, 16, 10], "activation": "tanh"}
    net = builders.BUILDERS["mlp"](config).double()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step():
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()

    for _ in range(400):
        step()
    with curvd.connect(live_target) as client:
        model = client.register_model("mlp", config, net.state_dict())
        dataset = client.register_dataset(
            {"x": x, "y": y}, inputs="x", target="y", batch_size=400
        )
        with client.create_session(
            model, dataset, loss="cross_entropy", dtype="F64"
        ) as session:
            largest = session.sketch("old", rank=50).values[0]
            for _ in range(30):
                step()
                session.update_parameters(net.state_dict())
            assert session.info.version == 31
            session.sketch("fresh", rank=50)
            G, b = session.ggn(), session.gradient()[1]
            for damping in (1e-2 * largest, 1e-3 * largest, 1e-4 * largest):
                options = {"damping": damping, "tolerance": 1e-6}
                old, fresh, none = (
                    G.solve(b, preconditioner=name, **options)
                    for name in ("old", "fresh", None)
                )
                assert old.converged and fresh.converged
                assert fresh.iterations < none.iterations
                assert old.iterations <= 1.4 * fresh.iterations
