"""Systems through a real server: blocks, sketches and what the session stores."""

import numpy as np
import pytest
import torch
from support.small_net import data, module, open_session
from torch import nn

import curvd
from curvd.contract import query_messages
from curvd_server.service import query_call

SIZE = 57


@pytest.fixture
def session(live_target):
    with curvd.connect(live_target) as client, open_session(client) as opened:
        yield opened


def net_at(values=None):
    net = module()
    if values is not None:
        net.load_state_dict({k: torch.from_numpy(v) for k, v in values.items()})
    return net


def dense_ggn(values=None):
    """J'MJ / N with the softmax metric, from torch.func: [P, P]."""
    net, points = net_at(values), data()
    x = torch.from_numpy(points["x"])
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    start = nn.utils.parameters_to_vector(net.parameters()).detach()

    def outputs(theta):
        parts = torch.split(theta, [s.numel() for s in shapes])
        given = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(net, given, (x,))

    J, p = torch.func.jacrev(outputs)(start), outputs(start).softmax(-1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return (torch.einsum("ncp,ncd,ndq->pq", J, metric, J) / len(x)).numpy()


def sides(columns, seed=0):
    return np.random.default_rng(seed).standard_normal((SIZE, columns))


def exact(A, damping, b):
    return np.linalg.solve(A + damping * np.eye(len(A)), b)


@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4])
def test_right_hand_sides_are_solved_together_as_dense_algebra_does(session, damping):
    G, B = session.ggn(), sides(16)
    found = G.solve(B, damping=damping, tolerance=1e-9)
    alone = G.solve(B, damping=damping, tolerance=1e-9, block=1)
    expected = exact(dense_ggn(), damping, B)
    np.testing.assert_allclose(found.x, expected, rtol=1e-6, atol=1e-7 / damping)
    np.testing.assert_allclose(alone.x, expected, rtol=1e-6, atol=1e-7 / damping)
    assert found.converged and found.products < alone.products
    some = G.solve(B, damping=damping, tolerance=1e-9, block=4)
    assert found.products <= some.products <= alone.products
    true = np.linalg.norm(B - (G @ found.x + damping * found.x), axis=0)
    np.testing.assert_allclose(found.residuals, true, rtol=0.02, atol=1e-13)


def test_a_block_takes_the_columns_that_fit_and_at_least_sixteen(session, monkeypatch):
    monkeypatch.setattr(query_call.QueryCall, "fitting", lambda call, each, most: 1)
    B = sides(20)
    found = session.ggn().solve(B, damping=0.1, tolerance=1e-9)
    np.testing.assert_allclose(found.x, exact(dense_ggn(), 0.1, B), atol=1e-7)


def test_negative_curvature_is_told_of_each_column_of_a_block(session):
    H = session.hessian()
    vectors = np.linalg.eigh(H @ np.eye(SIZE))[1]
    B = np.ascontiguousarray(vectors[:, [0, -1, -2]])
    found = H.solve(B, tolerance=1e-6)
    assert found.indefinite == (True, False, False)
    assert found.column_stops[0] is curvd.Stop.NEGATIVE_CURVATURE
    assert found.column_stops[1:] == (curvd.Stop.CONVERGED,) * 2
    assert found.curvatures[0] < 0 < found.curvatures[1]


def test_float32_residuals_are_those_of_the_solution_that_comes(live_target):
    with (
        curvd.connect(live_target) as client,
        open_session(client, dtype="F32") as session,
    ):
        B = sides(6).astype(np.float32)
        found = session.ggn().solve(B, damping=1e-2, tolerance=1e-5)
        x = found.x.astype(np.float64)
        true = np.linalg.norm(B - dense_ggn() @ x - 1e-2 * x, axis=0)
        scale = np.linalg.norm(B, axis=0)
        assert np.all(np.abs(found.residuals - true) <= 1e-5 * scale)


def test_a_sketch_of_the_ggn_preconditions_its_systems_at_every_damping(session):
    made = session.sketch("top", rank=25)
    G, B, dense = session.ggn(), sides(4), dense_ggn()
    assert made.converged and made.products == 25
    assert session.vectors()[0] == made.stored
    assert made.stored.values == tuple(made.values)
    largest = np.linalg.eigvalsh(dense)[::-1][: len(made.values)]
    assert np.all(made.values <= largest + 1e-12)
    np.testing.assert_allclose(made.values[0], largest[0], rtol=1e-3)
    for damping in (1e-1, 1e-3):
        plain = G.solve(B, damping=damping, tolerance=1e-8)
        found = G.solve(B, damping=damping, tolerance=1e-8, preconditioner="top")
        np.testing.assert_allclose(
            found.x, exact(dense, damping, B), rtol=1e-6, atol=1e-6 / damping
        )
        assert found.converged and found.iterations < plain.iterations


def test_a_sketch_knows_the_scale_and_damping_of_the_operator_that_uses_it(session):
    session.ggn(scale=3.0, damping=7.0).sketch("top", rank=25)
    np.testing.assert_allclose(
        session.vectors()[0].values[0], np.linalg.eigvalsh(dense_ggn())[-1], rtol=0.05
    )
    G, b = session.ggn(scale=50.0, damping=1e-2), sides(1)[:, 0]
    plain = G.solve(b, damping=1e-2, tolerance=1e-8)
    found = G.solve(b, damping=1e-2, tolerance=1e-8, preconditioner="top")
    np.testing.assert_allclose(
        found.x, exact(50 * dense_ggn(), 2e-2, b), rtol=1e-6, atol=1e-6
    )
    assert found.products < plain.products


@pytest.mark.parametrize("solver", curvd.Solver)
def test_the_ggns_sketch_serves_the_hessian_and_both_solvers(session, solver):
    H, b = session.hessian(), sides(1)[:, 0]
    stored = session.sketch(rank=30).stored
    assert stored.name == "sketch"
    given = {"damping": 1.0, "tolerance": 1e-7, "solver": solver}
    plain = H.solve(b, **given)
    found = H.solve(b, preconditioner=stored, **given)
    np.testing.assert_allclose(
        found.x, exact(H @ np.eye(SIZE), 1.0, b), rtol=1e-5, atol=1e-5
    )
    assert found.converged and found.products < plain.products


def test_stored_eigenvectors_with_values_are_a_preconditioner_too(session):
    G, b = session.ggn(scale=2.0, damping=0.5), sides(1)[:, 0]
    pairs = G.eigsh(15, store="pairs", tolerance=1e-6)
    np.testing.assert_allclose(session.vectors()[0].values, (pairs.values - 0.5) / 2)
    plain = session.ggn().solve(b, damping=1e-3, tolerance=1e-7)
    found = session.ggn().solve(
        b, damping=1e-3, tolerance=1e-7, preconditioner=pairs.stored
    )
    assert found.converged and found.products < plain.products


def trained(net, steps):
    """Take steps of Adam; the values afterwards."""
    x, y = (torch.from_numpy(data()[name]) for name in ("x", "y"))
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        adam.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        adam.step()
    return {k: v.detach().numpy().copy() for k, v in net.state_dict().items()}


def test_a_sketch_serves_thirty_training_steps_later(session):
    net = module()
    assert session.update_parameters(trained(net, 500)) == 2
    old = session.sketch("old", rank=12).stored
    values = trained(net, 30)
    assert session.update_parameters(values) == 3
    session.sketch("new", rank=12)
    assert old.version == 2
    G, b = session.ggn(), sides(1)[:, 0]
    for damping in (1e-1, 1e-2, 1e-3):
        given = {"damping": damping, "tolerance": 1e-6}
        plain = G.solve(b, **given)
        found = G.solve(b, preconditioner="old", **given)
        fresh = G.solve(b, preconditioner="new", **given)
        assert found.version == 3
        np.testing.assert_allclose(
            found.x, exact(dense_ggn(values), damping, b), atol=1e-3
        )
        assert found.iterations <= 1.4 * fresh.iterations
        assert found.iterations < plain.iterations


def test_a_sketch_grows_until_its_damping_is_served(session):
    dampings = (1e-1, 1e-5)
    counts = [len(session.sketch("grown", rank=57, damping=d).values) for d in dampings]
    assert counts[0] < counts[1] <= 57


def test_what_is_known_of_the_largest_eigenvalues_steadies_a_determinant(session):
    session.sketch("top", rank=25)
    G, dense = session.ggn(), dense_ggn()
    truth = np.linalg.slogdet(dense + 1e-3 * np.eye(SIZE))[1]
    given = {"damping": 1e-3, "steps": 57, "probes": 20}
    plain = G.logdet(**given)
    found = G.logdet(preconditioner="top", **given)
    assert found.standard_error < plain.standard_error / 2
    low, high = found.interval
    assert low <= truth <= high


def test_nothing_of_the_length_of_the_parameters_need_travel(session):
    loss, b = session.gradient(store="b")
    assert b == curvd.StoredVector(name="b", shape=(SIZE,), dtype="F64", version=1)
    same, gradient = session.gradient()
    assert loss == same
    np.testing.assert_array_equal(session.get("b"), gradient)
    G = session.ggn()
    found = G.solve("b", damping=0.1, store="x")
    assert found.x is None and found.converged
    assert found.stored in session.vectors() and found.stored.shape == (SIZE,)
    np.testing.assert_allclose(
        session.get("x"), exact(dense_ggn(), 0.1, gradient), atol=1e-5
    )
    # A start that is stored, and a solution that travels.
    again = G.solve(b, damping=0.1, x0="x")
    assert again.products == 1
    np.testing.assert_allclose(again.x, session.get("x"), atol=1e-5)
    kept = G.solve(gradient, damping=0.1, store="y").stored
    assert kept.shape == (SIZE,)
    np.testing.assert_allclose(session.get(kept), session.get("x"), atol=1e-5)


def test_stored_columns_are_solved_and_stored_as_columns(session):
    B, G = sides(5), session.ggn()
    stored = session.put("B", B)
    expected = exact(dense_ggn(), 0.1, B)
    kept = G.solve("B", damping=0.1, tolerance=1e-9, store="X").stored
    assert kept.shape == (5, SIZE)
    np.testing.assert_allclose(session.get("X"), expected, atol=1e-7)
    sent = G.solve(stored, damping=0.1, tolerance=1e-9)
    np.testing.assert_allclose(sent.x, expected, atol=1e-7)
    named = G.solve(B, damping=0.1, tolerance=1e-9, store="Y").stored
    assert named.shape == (5, SIZE)


def test_one_damping_in_place_of_several_is_refused(session):
    with pytest.raises(curvd.InvalidSpec, match=r"got 0\.1: say damping= for one"):
        session.ggn().solve(sides(1)[:, 0], dampings=0.1)


def test_values_that_no_update_can_send_are_refused_before_anything_is_sent(session):
    meta = dict(module().to("meta").named_parameters())
    with pytest.raises(curvd.InvalidTensors, match="meta device and has no values"):
        session.update_parameters(meta)
    with pytest.raises(curvd.InvalidSpec, match=r"got 'ema\.' beside values"):
        session.update_parameters(module(), prefix="ema.")


@pytest.mark.parametrize("columns", [0, 3])
def test_several_dampings_are_solved_in_one_run(session, columns):
    b = sides(columns) if columns else sides(1)[:, 0]
    G, dampings = session.ggn(damping=0.01), (1.0, 1e-3, 1e-1)
    found = G.solve(b, dampings=dampings, tolerance=1e-8)
    each = [G.solve(b, damping=d, tolerance=1e-8).products for d in dampings]
    assert found.converged and found.products < sum(each)
    for x, damping in zip(found.x, dampings, strict=True):
        np.testing.assert_allclose(
            x, exact(dense_ggn(), damping + 0.01, b), rtol=1e-5, atol=1e-5
        )
    assert len(found.residuals) == len(dampings) * max(1, columns)
    kept = G.solve(b, dampings=dampings, tolerance=1e-8, store="X").stored
    assert kept.shape == (3 * max(1, columns), SIZE)
    rows = session.get("X").T.reshape(3, -1, SIZE)
    np.testing.assert_allclose(rows[1], np.atleast_2d(found.x[1].T), atol=1e-9)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda s: s.ggn().solve("no"), curvd.NotFound, "stores no vector 'no'"),
        (
            lambda s: s.ggn().solve(np.ones(SIZE), preconditioner="plain"),
            curvd.InvalidArgument,
            r"'plain' have no eigenvalues.*sketch\(\)",
        ),
        (
            lambda s: s.ggn().solve(np.ones((SIZE, 2)), x0="plain"),
            curvd.InvalidArgument,
            r"stored 'x0' is \[57\]; it must be \[2, 57\]",
        ),
        (
            lambda s: s.ggn(params="3.*").solve("plain"),
            curvd.InvalidArgument,
            "57",
        ),
        (
            lambda s: s.ggn().solve(np.ones(SIZE), dampings=(1, 2), x0="plain"),
            curvd.InvalidArgument,
            r"several dampings in one run .* \['x0'\]; solve them one by one",
        ),
        (
            lambda s: s.ggn().solve(np.ones(SIZE), dampings=[1.0], solver="minres"),
            curvd.InvalidArgument,
            "got minres.*neither of the others",
        ),
        (
            lambda s: s.ggn().solve(np.ones(SIZE), dampings=[], damping=1.0),
            curvd.InvalidArgument,
            "dampings must be at least one",
        ),
        (
            lambda s: s.ggn().solve(np.ones(SIZE), store=""),
            curvd.InvalidArgument,
            "needs? a name",
        ),
        (
            lambda s: s.gradient(store=""),
            curvd.InvalidArgument,
            "needs? a name",
        ),
        (
            lambda s: s.hessian().sketch(rank=20),
            curvd.InvalidArgument,
            "the hessian has an eigenvalue of -.* sketch the ggn",
        ),
        (
            lambda s: s.ggn().sketch(rank=0),
            curvd.InvalidArgument,
            "rank must be at least 1",
        ),
        (
            lambda s: s.ggn().solve(np.ones(SIZE), block=-1),
            curvd.InvalidArgument,
            "block must be at least 0",
        ),
    ],
)
def test_what_cannot_be_solved_is_refused_with_the_remedy(session, ask, error, message):
    session.put("plain", np.ones(SIZE))
    with pytest.raises(error, match=message):
        ask(session)


def test_a_diagonal_and_a_stored_preconditioner_exclude_each_other():
    from curvd.v1 import query_service_pb2 as query_pb
    from curvd_server.service import query_validation

    header = query_pb.SolveHeader(preconditioner="top")
    with pytest.raises(curvd.InvalidSpec, match="'top' and a diagonal exclude"):
        query_validation.solve(
            header, curvd.Solver.CG, {"preconditioner": np.ones(SIZE)}
        )
    assert query_messages.request_type("Solve") is query_pb.SolveHeader


async def test_the_asyncio_client_sketches_and_solves_by_name(live_target):
    async with curvd.aio.connect(live_target) as client:
        dataset = await client.register_dataset(
            data(), inputs=["x"], target="y", batch_size=8
        )
        model = await client.register_model(
            "mlp", {"activation": "tanh", "widths": [5, 6, 3]}, module().state_dict()
        )
        session = await client.create_session(
            model, dataset, loss="cross_entropy", dtype="F64"
        )
        await session.sketch("top", rank=25)
        _, stored = await session.gradient(store="b")
        assert stored.version == 1
        found = await session.ggn().solve(
            "b", damping=0.1, store="x", preconditioner="top"
        )
        assert found.converged
        b = (await session.gradient())[1]
        np.testing.assert_allclose(
            await session.get("x"), exact(dense_ggn(), 0.1, b), rtol=1e-5, atol=1e-6
        )
