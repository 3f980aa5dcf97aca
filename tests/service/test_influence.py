"""Influence is that of dense algebra, asked of a real server by both clients."""

import contextlib

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from service.test_systems import dense_ggn, net_at
from support.small_net import data, module, open_session
from torch.nn import functional as F

import curvd
from curvd.cli.commands import main
from curvd_server.service import query_call, query_run

SIZE, POINTS = 57, 24
DAMPING = 0.05


@pytest.fixture(scope="module")
def session(live_target):
    with curvd.connect(live_target) as client, open_session(client) as opened:
        yield opened


def gradients(x, y, values=None):
    """[n, P] of single losses, by plain autograd."""
    net, rows = net_at(values), []
    for a, b in zip(torch.from_numpy(x), torch.from_numpy(y), strict=True):
        loss = F.cross_entropy(net(a[None]), b[None])
        parts = torch.autograd.grad(loss, list(net.parameters()))
        rows.append(torch.cat([p.flatten() for p in parts]))
    return torch.stack(rows).numpy()


def others(count=7):
    rng = np.random.default_rng(9)
    return rng.standard_normal((count, 5)), rng.integers(0, 3, count)


def dense(queries, A=None, damping=DAMPING):
    """[M, N] by an inverse in float64."""
    A = dense_ggn() if A is None else A
    points = data()
    J = gradients(points["x"], points["y"])
    return queries @ np.linalg.inv(A + damping * np.eye(SIZE)) @ J.T


def close(found, expected):
    """To float32, in which scores travel, of the largest score of a query."""
    scale = np.abs(expected).max(1, keepdims=True)
    np.testing.assert_array_less(np.abs(found - expected) / scale, 1e-6)


EXACT = {"damping": DAMPING, "tolerance": 1e-10}


def test_scores_are_those_of_a_dense_inverse(session):
    x, y = others()
    expected = dense(gradients(x, y))
    for queries in (
        (x, y),
        {"x": x, "y": y},
        (torch.from_numpy(x), torch.from_numpy(y)),
    ):
        found = session.influence(queries, **EXACT)
        close(found.scores, expected)
        assert found.converged and found.normaliser == POINTS
        assert found.data_points == POINTS


def test_queries_are_rows_of_the_session_or_stored_vectors(session):
    points, rows = data(), [5, 0, 23, 5]
    G = gradients(points["x"], points["y"])
    close(session.influence(rows, **EXACT).scores, dense(G[rows]))
    close(session.influence(**EXACT).scores, dense(G))
    session.put("g", np.ascontiguousarray(G[rows].T))
    close(session.influence("g", **EXACT).scores, dense(G[rows]))
    session.gradient(store="whole")
    close(session.influence("whole", **EXACT).scores, dense(G.mean(0)[None]))


def test_queries_are_the_data_points_of_a_session_with_the_same_parameters(session):
    x, y = others()
    with session.on({"x": x, "y": y}) as test:
        found = session.influence(test, **EXACT)
        close(found.scores, dense(gradients(x, y)))
        back = test.influence(session, **EXACT)
        assert back.scores.shape == (POINTS, len(x)) and back.normaliser == len(x)


def test_a_session_with_other_parameters_is_refused(session, live_target):
    with curvd.connect(live_target) as client, open_session(client) as other:
        other.update_parameters({"3.bias": np.ones(3)})
        with pytest.raises(curvd.InvalidSpec, match="has other parameters"):
            session.influence(other, **EXACT)


def test_scores_rank_data_points_as_the_dense_answer_at_the_default_tolerance(session):
    from scipy.stats import spearmanr

    x, y = others(16)
    found = session.influence((x, y), damping=1e-3)
    expected = dense(gradients(x, y), damping=1e-3)
    ranks = [
        spearmanr(*pair).statistic for pair in zip(found.scores, expected, strict=True)
    ]
    assert min(ranks) >= 0.999


def test_the_extremes_are_those_of_all_scores(session):
    whole = session.influence(**EXACT).scores
    found = session.influence(top=5, **EXACT)
    assert found.scores is None and found.indices.shape == (POINTS, 2, 5)
    order = np.argsort(-whole, axis=1)
    np.testing.assert_array_equal(found.indices[:, 0], order[:, :5])
    np.testing.assert_array_equal(found.indices[:, 1], order[:, ::-1][:, :5])
    np.testing.assert_array_equal(
        found.top_scores, np.take_along_axis(whole[:, None], found.indices, 2)
    )
    assert session.influence([0], top=100, **EXACT).indices.shape == (1, 2, POINTS)
    with pytest.raises(
        curvd.InvalidSpec, match="index of the 1 queries, from 0, got 7"
    ):
        session.influence([4], **EXACT).ends(query=7)
    helpful, harmful = session.influence([4], **EXACT).ends(k=3)
    np.testing.assert_array_equal(helpful, order[4, :3])
    np.testing.assert_array_equal(harmful, order[4, ::-1][:3])


def test_self_influence_is_the_diagonal_and_takes_no_scores(session):
    whole = session.influence(**EXACT)
    alone = session.influence(self_only=True, **EXACT)
    np.testing.assert_allclose(alone.self_influence, np.diag(whole.scores), rtol=1e-6)
    np.testing.assert_allclose(alone.self_influence, whole.self_influence, rtol=1e-9)
    assert alone.scores is None and alone.indices is None
    with pytest.raises(curvd.InvalidSpec, match="without self_only"):
        alone.ends()


def test_groups_are_summed_over(session):
    groups = np.arange(POINTS) % 3
    whole = session.influence([1, 2], **EXACT).scores
    found = session.influence([1, 2], groups=groups, **EXACT).scores
    sums = np.stack([whole[:, groups == g].sum(1) for g in range(3)], 1)
    np.testing.assert_allclose(found, sums, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_scores_do_not_depend_on_how_many_queries_go_together(session, block):
    whole = session.influence(**EXACT)
    found = session.influence(block=block, **EXACT)
    close(found.scores, whole.scores)
    assert len(found.residuals) == POINTS


def test_chosen_parameters_and_other_operators_have_scores_of_their_own(session):
    points = data()
    G = gradients(points["x"], points["y"])
    part = slice(session.layout.parameters[2].offset, SIZE)
    inverse = np.linalg.inv(dense_ggn()[part, part] + DAMPING * np.eye(21))
    expected = G[:, part] @ inverse @ G[:, part].T
    close(session.ggn(params="3.*").influence(None, **EXACT).scores, expected)
    E = session.empirical_fisher(damping=0.1)
    dense_fisher = G.T @ G / POINTS + 0.1 * np.eye(SIZE)
    close(E.influence(None, **EXACT).scores, dense(G, dense_fisher))


def test_a_sketch_saves_products_and_changes_no_score(session):
    session.sketch("top", rank=25)
    x, y = others(2)
    plain = session.influence((x, y), damping=1e-3, tolerance=1e-8)
    found = session.influence(
        (x, y), damping=1e-3, tolerance=1e-8, preconditioner="top"
    )
    scale = np.abs(plain.scores).max()
    np.testing.assert_allclose(found.scores, plain.scores, atol=1e-5 * scale)
    assert found.products < plain.products


def test_a_part_of_the_data_is_drawn_by_its_seed(session):
    points, count = data(), 12
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randperm(POINTS, generator=generator)[:count].sort().values.numpy()
    net, x = module(), torch.from_numpy(points["x"][drawn])
    p = net(x).softmax(-1).detach()
    names = {n: q.detach() for n, q in net.named_parameters()}
    found = torch.func.jacrev(lambda q: torch.func.functional_call(net, q, (x,)))(names)
    J = torch.cat([r.flatten(2) for r in found.values()], -1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    A = (torch.einsum("ncp,ncd,ndq->pq", J, metric, J) / count).numpy()
    rows = gradients(points["x"], points["y"])
    some = session.influence([0, 1], part=count, part_seed=3, **EXACT)
    close(some.scores, dense(rows[:2], A))
    assert some.data_points == count
    again = session.influence([0, 1], part=count, part_seed=3, **EXACT)
    np.testing.assert_array_equal(some.scores, again.scores)


def minimum(x, y, weights, damping):
    """Of softmax regression, convex, by Newton's method: [5, 3]."""
    w = torch.zeros(15, dtype=torch.float64)

    def objective(w):
        losses = F.cross_entropy(x @ w.view(5, 3), y, reduction="none")
        return (weights * losses).sum() / POINTS + damping / 2 * w.square().sum()

    for _ in range(30):
        step = torch.func.hessian(objective)(w), torch.func.grad(objective)(w)
        w = w - torch.linalg.solve(*step)
    return w.view(5, 3)


def test_weighing_a_data_point_less_moves_a_loss_as_its_score_says(live_target):
    x, y = (torch.from_numpy(array) for array in data().values())
    a, b = (torch.from_numpy(array) for array in others(1))
    net = torch.nn.Linear(5, 3, bias=False).double()
    net.weight.data = minimum(
        x, y, torch.ones(POINTS, dtype=torch.float64), DAMPING
    ).T.contiguous()
    with (
        curvd.connect(live_target) as client,
        client.session_for(net, "cross_entropy", (x, y), batch_size=8) as own,
    ):
        found = own.influence((a, b), **EXACT)
    before, moved = F.cross_entropy(net(a), b).item(), []
    for n in range(POINTS):
        weights = torch.ones(POINTS, dtype=torch.float64)
        weights[n] = 1 - 1e-4
        w = minimum(x, y, weights, DAMPING)
        moved.append((F.cross_entropy(a @ w, b).item() - before) / 1e-4)
    predicted = found.scores[0] / found.normaliser
    np.testing.assert_allclose(predicted, moved, atol=1e-3 * np.abs(moved).max())


def test_only_scores_and_ten_kilobytes_travel(session, monkeypatch):
    from curvd._calls.query import QueryCall

    received = []
    feed = QueryCall.feed

    def counted(self, part):
        size = part.nbytes if isinstance(part, memoryview) else part.ByteSize()
        received.append(size)
        return feed(self, part)

    monkeypatch.setattr(QueryCall, "feed", counted)
    session.influence(**EXACT)
    assert sum(received) <= 4 * POINTS * POINTS + 10_000
    received.clear()
    session.influence(top=2, **EXACT)
    assert sum(received) <= POINTS * 2 * 2 * 12 + 10_000


def test_progress_says_how_much_is_done_and_what_time_is_left(session, monkeypatch):
    monkeypatch.setattr(query_run, "_REPORT_S", 1e-4)
    seen = []
    session.influence(block=2, progress=seen.append, **EXACT)
    shares = [p.share for p in seen]
    assert shares and shares == sorted(shares) and 0 <= shares[0] <= shares[-1] <= 1
    assert all(len(p.residuals) <= 1 for p in seen)
    for p in seen:
        if p.share:
            assert p.left_s == pytest.approx(p.elapsed_s * (1 / p.share - 1))
            assert f"{p.share:.0%} done" in str(p)


def test_messages_of_progress_become_rare():
    """An hour of it, every 50 ms: less than ten kilobytes."""
    from curvd_server.linalg import Progress
    from curvd_server.service.query_run import Cost

    sent = []

    async def send(part):
        sent.append(part.ByteSize())

    call = query_call.QueryCall("Influence", *[None] * 6, send=send)
    call.begin_part(0.0, 1.0, tolerance=1e-3)
    for tick in range(20 * 3600):
        cost = Cost(products=tick, elapsed_s=tick / 20, queue_s=0.0, compute_s=0.0)
        progress = Progress(iteration=tick, products=tick, residuals=(0.5,) * 1000)
        with contextlib.suppress(StopIteration):
            call._progress(progress, cost).send(None)
    assert 100 < len(sent) and sum(sent) < 10_000
    assert query_call.Share(0.5, 1.0, 1e-4).done([1e-9, 1e-2]) == pytest.approx(0.75)


def test_a_query_that_runs_out_says_which_scores_are_missing(session):
    found = session.influence(block=4, max_products=12, **EXACT)
    assert found.info.stopped is curvd.Stop.PRODUCTS and not found.converged
    begun = np.isfinite(found.residuals)
    assert begun[:4].all() and not begun[-4:].any()
    np.testing.assert_array_equal(np.isfinite(found.scores).all(1), begun)
    assert f"{(~begun).sum()} of them not begun" in str(found)
    late = session.influence(time_limit_s=1e-9, block=4, top=2, **EXACT)
    assert late.info.stopped is curvd.Stop.TIME and (late.indices[-1] == -1).all()


@pytest.mark.parametrize(
    "limit", [{"max_products": 1}, {"time_limit_s": 1e-9}], ids=str
)
@pytest.mark.parametrize(
    "how",
    [{}, {"top": 3}, {"self_only": True}, {"block": 1}, {"groups": True}],
    ids=str,
)
def test_queries_that_were_not_begun_have_no_scores_and_no_ranks(session, limit, how):
    if how.get("groups"):
        how = {"groups": np.arange(session.info.data_points) % 3}
    found = session.influence([0, 1], **how, **limit)
    assert not found.converged and found.products == 0
    for name in ("scores", "top_scores", "self_influence", "residuals"):
        values = getattr(found, name)
        assert values is None or np.isnan(values).all(), name
    assert np.isnan(found.relative_residuals).all()
    if found.indices is not None:
        assert (found.indices == -1).all()
    if "self_only" not in how:
        for end in found.ends(query=1, k=3):
            np.testing.assert_array_equal(end, [-1, -1, -1])
    assert "nothing was computed: raise max_products" in str(found)
    found.plot(k=3)


def test_float32_residuals_are_true(live_target):
    with (
        curvd.connect(live_target) as client,
        open_session(client, dtype="F32") as own,
    ):
        x, y = others()
        found = own.influence((x, y), damping=DAMPING, tolerance=1e-5)
        expected = dense(gradients(x, y))
        scale = np.abs(expected).max(1, keepdims=True)
        assert np.all(np.abs(found.scores - expected) <= 1e-4 * scale)
        # A recurrence would claim what float32 cannot reach.
        found = own.influence((x, y), damping=DAMPING, tolerance=1e-12)
        assert set(found.column_stops) == {curvd.Stop.STAGNATED}
        assert np.all(found.relative_residuals > 1e-9)
        assert np.all(np.abs(found.scores - expected) <= 1e-4 * scale)


def test_the_command_line_names_the_least_likely_points(session, live_target):
    args = ["influence", session.id, live_target, "--tolerance", "1e-8"]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    own = session.influence(self_only=True, tolerance=1e-8).self_influence
    first, *_ = np.argsort(-own)
    assert f"query {first}: {own[first]:.3e} on itself" in done.output


async def test_the_asynchronous_client_asks_the_same(session, live_target):
    async with curvd.aio.connect(live_target) as client:
        same = await client.session(session.id)
        found = await same.influence([1, 2], **EXACT)
        close(found.scores, session.influence([1, 2], **EXACT).scores)


X, Y = others(2)


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        ([24], {}, "row 24 is beyond the session's 24 data points"),
        ([-1], {}, "must not be negative"),
        ([], {}, "at least one"),
        ("nothing", {}, "stores no vector 'nothing'"),
        ((X, Y[:1]), {}, "one common length"),
        ((X[:, :4], Y), {}, r"a data point of the dataset is .* \[5\]"),
        ((X, Y + 5), {}, "class"),
        ({"x": X}, {}, r"have the tensors \['x', 'y'\]"),
        ((X * np.nan, Y), {}, "data points must be finite"),
        (X, {}, r"got float64 \[2, 5\] alone: pass \(inputs, targets\)"),
        ((X[0], Y[:1]), {}, "one common length"),
        ((X.tolist(), Y), {}, r"a list, not an array: pass a NumPy array"),
        (({"x": X}, Y), {}, r"a mapping \('x'\) and targets: pass one mapping"),
        ((X, Y, Y), {}, r"have the tensors \['x', 'y'\]"),
        ([0], {"groups": [0, 1]}, r"groups are I64 \[24\]"),
        ([0], {"groups": np.full(24, 30)}, "from 0 to 23 at most"),
        ([0], {"groups": np.zeros(24, int), "top": 1}, "groups exclude top"),
        ([0], {"tolerance": 0}, "tolerance must be more than 0"),
    ],
)
def test_what_does_not_fit_is_refused(session, queries, options, message):
    with pytest.raises(curvd.CurvdError, match=message):
        session.influence(queries, **options)


class Sum(torch.nn.Module):
    """Takes two inputs."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, a, b):
        return self.net(a + b)


def test_several_inputs_are_given_flat_or_as_the_session_was(live_target):
    x = torch.from_numpy(others(12)[0])
    y = torch.from_numpy(others(12)[1])
    loss = torch.nn.CrossEntropyLoss()
    with (
        curvd.connect(live_target) as client,
        client.session_for(Sum(), loss, ((x, 2 * x), y), batch_size=4) as own,
    ):
        rows = own.influence([0, 1], **EXACT).scores
        for queries in (
            ((x[:2], 2 * x[:2]), y[:2]),
            (x[:2], 2 * x[:2], y[:2]),
        ):
            np.testing.assert_allclose(own.influence(queries, **EXACT).scores, rows)


def test_queries_whose_targets_do_not_count_have_no_influence(live_target):
    x, y = map(torch.from_numpy, others(12))
    y[:2] = -100
    net = torch.nn.Linear(5, 3, dtype=torch.float64)
    loss = torch.nn.CrossEntropyLoss()
    with (
        curvd.connect(live_target) as client,
        client.session_for(net, loss, (x, y), batch_size=4) as own,
    ):
        for queries in ([0, 1], (x[:2], y[:2])):
            found = own.influence(queries, **EXACT)
            assert (found.scores == 0).all() and (found.self_influence == 0).all()
        mixed = own.influence((x[1:4], y[1:4]), **EXACT).scores
        np.testing.assert_allclose(mixed, own.influence([1, 2, 3], **EXACT).scores)
