"""Queries through a real server: right, and counted."""

import asyncio
import contextlib
import dataclasses
import signal

import numpy as np
import pytest
import torch
from support.small_net import WIDTHS, data, module, open_session
from torch import nn

import curvd
from curvd.tensors import random_probes
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.service import query_validation


@pytest.fixture(scope="module")
def session(live_target):
    with curvd.connect(live_target) as client, open_session(client) as opened:
        yield opened


@pytest.fixture(scope="module")
def dense():
    """The Hessian by central differences of the gradient, float64: [P, P]."""
    net, points = module(), data()
    x, y = torch.from_numpy(points["x"]), torch.from_numpy(points["y"])
    parameters = list(net.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(theta):
        nn.utils.vector_to_parameters(theta, parameters)
        loss = nn.functional.cross_entropy(net(x), y)
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters))

    step = 1e-5
    rows = [
        (gradient(start + step * e) - gradient(start - step * e)) / (2 * step)
        for e in torch.eye(len(start), dtype=torch.float64)
    ]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("which", curvd.Which)
def test_eigenvalues_match_finite_differences(session, dense, which):
    found = session.hessian().eigsh(4, which=which, tolerance=1e-9)
    exact = np.linalg.eigvalsh(dense)
    expected = {
        "largest": exact[-4:],
        "smallest": exact[:4],
        "both": np.r_[exact[:2], exact[-2:]],
        "largest_magnitude": exact[np.argsort(-np.abs(exact))[:4]],
    }[which]
    np.testing.assert_allclose(found.values, np.sort(expected)[::-1], rtol=1e-6)
    products = session.hessian() @ np.ascontiguousarray(found.vectors)
    recomputed = np.linalg.norm(products - found.vectors * found.values, axis=0)
    np.testing.assert_allclose(found.residuals, recomputed, atol=1e-12)
    assert found.converged
    assert found.version == 1


def test_scale_damping_and_blocks_of_the_operator_are_in_the_result(session, dense):
    found = session.hessian(scale=2.0, damping=0.5).eigsh(1)
    assert found.values[0] == pytest.approx(2 * np.linalg.eigvalsh(dense)[-1] + 0.5)
    sizes = [p.size for p in session.layout.parameters]
    inside = np.zeros_like(dense)
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        inside[start : start + size, start : start + size] = 1
    blocks = session.hessian(block_sizes=[1] * len(sizes))
    found = blocks.eigsh(2, which="smallest")
    exact = np.linalg.eigvalsh(dense * inside)[:2][::-1]
    np.testing.assert_allclose(found.values, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", curvd.OperatorKind)
@pytest.mark.parametrize("blocks", [None, [2, 2]])
def test_every_operator_answers_every_query(session, kind, blocks):
    if kind.is_factored and blocks is not None:
        with pytest.raises(curvd.InvalidSpec, match="has blocks of its own"):
            curvd.OperatorSpec(kind=kind, block_sizes=blocks)
        return
    spec = curvd.OperatorSpec(kind=kind, damping=0.2, block_sizes=blocks, seed=1)
    A = session.operator(spec)
    size = A.shape[0]
    dense = A @ np.eye(size)
    values, vectors = np.linalg.eigh(dense)
    np.testing.assert_allclose(A.eigsh(3).values, values[:-4:-1], rtol=1e-6)
    low, high = A.trace(samples=2 * size).interval
    assert low - 1e-9 <= np.trace(dense) <= high + 1e-9
    elements = A.diagonal(samples=2 * size).values
    np.testing.assert_allclose(elements, np.diag(dense), atol=1e-8)
    low, high = A.frobenius_norm(samples=200).interval
    assert low <= np.linalg.norm(dense) <= high
    density = A.spectral_density(probes=2, steps=size)
    assert np.nanmax(density.nodes) == pytest.approx(values[-1])
    b = np.ones(size)
    solved = A.solve(b, damping=3.0, tolerance=1e-9)
    exact = vectors @ ((vectors.T @ b) / (values + 3))
    np.testing.assert_allclose(solved.x, exact, rtol=1e-6, atol=1e-9)
    low, high = A.logdet(damping=3.0, steps=size, probes=30).interval
    assert low <= np.log(values + 3).sum() <= high


def test_every_estimate_holds_the_truth(session, dense):
    H, P = session.hessian(), len(dense)
    for estimator in curvd.Estimator:
        found = H.trace(estimator=estimator, samples=2 * P)
        low, high = found.interval
        assert low - 1e-7 <= np.trace(dense) <= high + 1e-7
    diagonal = H.diagonal(samples=2 * P)
    np.testing.assert_allclose(diagonal.values, np.diag(dense), atol=1e-7)
    norm = H.frobenius_norm(samples=200)
    low, high = norm.interval
    assert low <= np.linalg.norm(dense) <= high
    logdet = H.logdet(damping=1.0, steps=40, probes=40)
    low, high = logdet.interval
    assert low <= np.linalg.slogdet(dense + np.eye(P))[1] <= high
    density = H.spectral_density(probes=4, steps=30)
    assert np.trapezoid(density.density, density.grid) == pytest.approx(1, abs=1e-3)
    assert density.products == 4 * 30


def test_the_client_can_repeat_an_estimate_from_its_seed(session):
    H = session.hessian()
    found = H.trace(estimator="hutchinson", samples=16, seed=11)
    W = random_probes.probes("rademacher", 11, range(16), H.shape[0], H.dtype)
    repeated = np.mean(np.sum(W * (W @ H), axis=1))
    assert found.value == pytest.approx(repeated, rel=1e-10)


@pytest.mark.parametrize("layout", ["vector", "columns", "dict"])
def test_solutions_come_in_the_layout_of_b_with_true_residuals(session, layout):
    G = session.ggn()
    rng = np.random.default_rng(1)
    if layout == "dict":
        b = {p.name: rng.standard_normal(p.shape) for p in G.layout.parameters}
    else:
        b = rng.standard_normal((G.shape[0],) + ((3,) if layout == "columns" else ()))
    found = G.solve(b, damping=0.1, tolerance=1e-8)
    back = session.ggn(damping=0.1) @ found.x

    def flat(v):
        if layout != "dict":
            return v
        return np.concatenate([np.ravel(part) for part in v.values()])

    residual = np.linalg.norm(flat(b) - flat(back), axis=0)
    np.testing.assert_allclose(
        found.residuals, np.atleast_1d(residual), rtol=1e-4, atol=1e-14
    )
    assert found.converged
    again = G.solve(b, damping=0.1, tolerance=1e-7, x0=found.x)
    assert again.products == len(found.residuals)


def test_preconditioners_come_from_the_client(session, dense):
    H, b = session.hessian(damping=2.0), np.ones(len(dense))
    exact = np.linalg.solve(dense + 2 * np.eye(len(dense)), b)
    diagonal = np.diag(dense) + 2
    found = H.solve(b, preconditioner=diagonal, tolerance=1e-9)
    np.testing.assert_allclose(found.x, exact, rtol=1e-6)


def test_indefinite_systems_are_reported(session, dense):
    b = np.linalg.eigh(dense)[1][:, 0]
    found = session.hessian().solve(b)
    assert not found.converged
    assert found.column_stops == (curvd.Stop.NEGATIVE_CURVATURE,)
    assert found.indefinite == (True,)
    shifted = session.hessian().solve(b + 1, solver="minres", damping=1e-2)
    assert shifted.indefinite == (True,)
    assert np.isnan(session.hessian().logdet(damping=1e-9).value)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda H: H.eigsh(0), "k must be at least 1, got 0"),
        (lambda H: H.eigsh(58), r"k must be in \[1, 57\], got 58"),
        (lambda H: H.eigsh(5, basis_size=3), r"basis_size must be in \[7, 57\], got 3"),
        (lambda H: H.eigsh(1, tolerance=-1.0), "tolerance must be more than 0"),
        (
            lambda H: H.eigsh(1, which="middle"),
            "unknown which 'middle'; known: largest",
        ),
        (lambda H: H.trace(samples=-1), "samples must be at least 1, got -1"),
        (
            lambda H: H.trace(relative_error=float("nan")),
            "relative_error must be at least 0, got nan",
        ),
        (
            lambda H: H.diagonal(estimator="hutch++"),
            "hutch\\+\\+ estimates traces only",
        ),
        (
            lambda H: H.solve(np.ones(57), solver="minres", preconditioner=np.ones(57)),
            "for cg, not minres",
        ),
        (
            lambda H: H.solve(np.ones(57), preconditioner=20),
            r"must be a diagonal, \[P\], or .* got 20: .* leave it out",
        ),
        (
            lambda H: H.solve(np.ones(57), preconditioner=np.zeros(57)),
            "must be positive",
        ),
        (lambda H: H.logdet(damping=float("inf")), "damping must be finite"),
        (lambda H: H.solve(np.ones(57), dampings="ab"), "numbers in a list, got 'ab'"),
        (lambda H: H.solve(np.ones(57), dampings=[None]), r"in a list, got \[None\]"),
        (lambda H: H.solve(curvd.Probe()), "a Probe is an operand of products alone"),
        (lambda H: H.trace(time_limit_s=0.0), "time_limit_s must be more than 0"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_value_and_limit(session, ask, message):
    with pytest.raises(curvd.InvalidArgument, match=message):
        ask(session.hessian())


def test_products_and_time_end_a_query_with_the_best_so_far(session):
    H = session.hessian()
    few = H.eigsh(3, tolerance=1e-12, max_products=7)
    assert few.info.stopped is curvd.Stop.PRODUCTS
    assert few.products == 7
    assert len(few.values) == 3
    late = H.trace(estimator="hutchinson", samples=100_000, time_limit_s=1e-4)
    assert late.info.stopped is curvd.Stop.TIME
    assert late.products < 100_000


def test_warm_starts_follow_the_parameters(live_target):
    with curvd.connect(live_target) as client, open_session(client) as session:
        H = session.hessian()
        cold = H.eigsh(2, tolerance=1e-3, warm_start=True)
        assert not cold.warm
        state = {n: v + 1e-4 for n, v in module().state_dict().items()}
        session.update_parameters(state)
        warm = H.eigsh(2, tolerance=1e-3, warm_start=True)
        again = H.eigsh(2, tolerance=1e-3)
        assert warm.warm and warm.version == 2
        assert warm.products < again.products
        np.testing.assert_allclose(warm.values, again.values, rtol=1e-4)


def test_eigenvectors_stay_in_the_session_and_begin_the_next_query(live_target):
    with curvd.connect(live_target) as client, open_session(client) as session:
        H = session.hessian()
        found = H.eigsh(3, tolerance=1e-3, store="top")
        assert found.vectors is None
        assert found.stored.values == tuple(found.values)
        put = session.put("top", session.get(found.stored))
        assert dataclasses.replace(found.stored, values=()) == put
        assert found.stored.shape == (3, H.shape[0])
        vectors = session.get("top")
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
        left = np.linalg.norm(H @ vectors - vectors * found.values, axis=0)
        np.testing.assert_allclose(found.residuals, left, atol=1e-12)
        # It has converged already: nothing but the start is multiplied.
        again = H.eigsh(3, tolerance=1e-3, start=found.stored, store="top")
        assert again.warm and again.products < found.products
        np.testing.assert_allclose(again.values, found.values, rtol=1e-9)
        (listed,) = session.vectors()
        assert listed == again.stored


def test_one_stored_vector_is_a_start_for_several_pairs(session):
    H = session.hessian()
    start = session.put("gradient", session.gradient()[1])
    found = H.eigsh(3, start=start, vectors=False)
    assert found.warm and found.converged and found.vectors is None
    np.testing.assert_allclose(found.values, H.eigsh(3).values, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": "nobody"}, curvd.VectorNotFound, "stores no vector 'nobody'"),
        (
            {"start": "known", "warm_start": True},
            curvd.InvalidArgument,
            r"warm_start and start \('known'\) exclude each other",
        ),
        ({"start": "known", "params": "*bias"}, curvd.InvalidVector, "57 elements"),
        ({"store": ""}, curvd.InvalidSpec, "need a name"),
        ({"store": "x" * 200}, curvd.InvalidSpec, "store_as has 200 characters"),
    ],
)
def test_starts_and_names_that_do_not_fit_are_refused(session, options, error, message):
    session.put("known", np.ones(57))
    H = session.hessian(params=options.pop("params", None))
    with pytest.raises(error, match=message):
        H.eigsh(1, **options)


def test_progress_names_products_estimates_and_residuals(session):
    seen = []
    found = session.hessian().trace(
        estimator="hutchinson", samples=3000, progress=seen.append
    )
    assert seen
    assert [p.products for p in seen] == sorted(p.products for p in seen)
    assert seen[-1].products <= found.products == 3000
    assert all(len(p.estimates) == len(p.residuals) == 1 for p in seen)


async def test_the_asynchronous_client_asks_the_same(live_target):
    async with curvd.aio.connect(live_target) as client:
        dataset = await client.register_dataset(
            data(), inputs=["x"], target="y", batch_size=8
        )
        model = await client.register_model("mlp", WIDTHS, module().state_dict())
        async with await client.create_session(
            model, dataset, loss="cross_entropy", dtype="F64"
        ) as session:
            H = session.hessian()
            pairs, trace = await asyncio.gather(H.eigsh(2), H.trace())
            assert pairs.converged
            assert trace.products <= 100
            solved = await H.solve(np.ones(H.shape[0]), damping=3.0)
            assert solved.converged


def interrupt(progress):
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_stops_the_work_and_says_how_far_it_was(session):
    H = session.hessian()
    with pytest.raises(KeyboardInterrupt) as stopped:
        H.trace(estimator="hutchinson", samples=10**5, progress=interrupt)
    (note,) = stopped.value.__notes__
    assert "Trace had" in note and "products, estimates" in note and "errors" in note
    # Another query of the same lane ends: the first does not go on.
    assert H.trace(samples=20).products == 20


async def test_a_cancelled_call_says_how_far_it_was(session, live_target):
    async with curvd.aio.connect(live_target) as client:
        H, begun = (await client.session(session.id)).hessian(), asyncio.Event()
        query = asyncio.create_task(
            H.trace(
                estimator="hutchinson",
                samples=10**5,
                progress=lambda progress: begun.set(),
            )
        )
        await begun.wait()
        query.cancel()
        with pytest.raises(asyncio.CancelledError) as stopped:
            await query
        assert "Trace had" in stopped.value.__notes__[0]


def test_ctrl_c_on_the_command_line_prints_the_best_so_far(
    session, live_target, monkeypatch
):
    from click.testing import CliRunner

    from curvd.cli.commands import main
    from curvd.remote import asking

    @contextlib.contextmanager
    def interrupted(progress, what):
        yield interrupt

    monkeypatch.setattr(asking, "watched", interrupted)
    args = ["trace", session.id, live_target, "--samples", "100000"]
    done = CliRunner().invoke(
        main, [*args, "--estimator", "hutchinson", "--relative-error", "0"]
    )
    assert done.exit_code != 0
    assert "Trace had" in done.output and "products" in done.output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["eigs", "-k", "3"], ["residual", "converged"]),
        (["trace", "--operator", "ggn"], ["95 % interval", "products"]),
        (["norm", "--samples", "50"], ["95 % interval", "50 products"]),
        (["logdet", "--damping", "5"], ["95 % interval", "converged"]),
        (["logdet", "--damping", "1e-9"], ["not positive definite", "Ritz value is -"]),
        (["density", "--steps", "20", "--log"], ["Ritz values", "160 products"]),
    ],
)
def test_the_command_line_asks_and_draws(
    session, live_target, tmp_path, command, words
):
    from click.testing import CliRunner

    from curvd.cli.commands import main

    picture = tmp_path / "out.png"
    name, *options = command
    args = [name, session.id, live_target, *options, "--plot", str(picture)]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in words), done.output
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_every_result_can_be_drawn(session):
    H = session.hessian()
    b = np.ones(H.shape[0])
    results = [
        H.eigsh(3),
        H.trace(),
        H.diagonal(),
        H.spectral_density(probes=2, steps=10, logarithmic=True),
        H.solve(b, damping=5.0),
    ]
    for result in results:
        assert result.plot().get_ylabel()


def test_a_diagonal_from_samples_is_refused_whoever_asks():
    header = query_pb.SolveHeader(diagonal_samples=20)
    with pytest.raises(curvd.InvalidSpec, match="diagonal_samples must be 0, got 20"):
        query_validation.solve(header, curvd.Solver.CG, {})


def test_repeated_eigenvalues_of_a_session_are_all_found(live_target):
    rng = np.random.default_rng(0)
    state = {"1.weight": rng.normal(size=(3, 5)), "1.bias": np.zeros(3)}
    data = {"x": rng.normal(size=(40, 5)), "y": rng.normal(size=(40, 3))}
    with curvd.connect(live_target) as client:
        model = client.register_model("mlp", {"widths": [5, 3]}, state)
        dataset = client.register_dataset(data, inputs=["x"], target="y", batch_size=20)
        with client.create_session(
            model, dataset, loss="mse", dtype="F64", operators=["ggn", "hessian"]
        ) as session:
            for H in (session.hessian(), session.ggn(damping=0.5, scale=2.0)):
                exact = np.linalg.eigvalsh(np.asarray(H @ np.eye(18)))
                for k in (2, 4, 8):
                    for which, wanted in (
                        ("largest", exact[::-1][:k]),
                        ("smallest", exact[:k][::-1]),
                    ):
                        found = H.eigsh(k, which=which)
                        assert found.converged
                        np.testing.assert_allclose(found.values, wanted, rtol=1e-6)
