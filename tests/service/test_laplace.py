"""A Gaussian posterior is that of dense algebra, asked of a real server by both clients."""

import dataclasses
import fnmatch
import importlib
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from service.test_systems import dense_ggn
from support.small_net import data, module, open_session
from torch import nn
from torch.nn import functional as F

import curvd
from curvd.cli.commands import main

SIZE, POINTS = 57, 24
PRIOR, NOISE = 2.0, 0.3
shifted_determinants = importlib.import_module(
    "curvd_server.linalg.shifted_determinants"
)
X = np.random.default_rng(4).standard_normal((6, 5))


@pytest.fixture(scope="module")
def session(live_target):
    with curvd.connect(live_target) as client, open_session(client) as opened:
        yield opened


def output_jacobian(net, x):
    """[T, C, P] by torch.func."""
    names = {n: p.detach() for n, p in net.named_parameters()}

    def outputs(parameters):
        return torch.func.functional_call(net, parameters, (torch.from_numpy(x),))

    found = torch.func.jacrev(outputs)(names)
    return torch.cat([r.flatten(2) for r in found.values()], -1).numpy()


def precision(prior=PRIOR):
    """Of the classifier: N G is the Hessian of the sum of all losses."""
    return POINTS * dense_ggn() + prior * np.eye(SIZE)


def test_variances_are_those_of_a_dense_inverse(session):
    J = output_jacobian(module(), X)
    covariance = np.einsum("tcp,pq,tdq->tcd", J, np.linalg.inv(precision()), J)
    found = session.predictive(X, prior=PRIOR, tolerance=1e-10)
    np.testing.assert_allclose(
        found.variance, np.diagonal(covariance, 0, 1, 2), rtol=1e-8
    )
    outputs = module()(torch.from_numpy(X)).detach()
    np.testing.assert_allclose(found.mean, outputs, rtol=1e-12)
    assert found.converged and found.scale == POINTS and found.covariance is None
    whole = session.predictive(
        {"x": X}, prior=PRIOR, tolerance=1e-10, covariance=True, block=5
    )
    np.testing.assert_allclose(whole.covariance, covariance, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(whole.variance, found.variance, rtol=1e-7)


def test_numbers_are_those_of_laplace_torch(session):
    """Of laplace-torch 0.3 for this net: full, all weights, GGNInterface and BackPACK."""
    found = session.predictive(X[:2], prior=2.0, tolerance=1e-10)
    theirs = [
        [0.9121367925767767, 1.1089687592730406, 1.1708529494869901],
        [0.6864735561377824, 0.7291062674790276, 0.7686077181283149],
    ]
    np.testing.assert_allclose(found.variance, theirs, rtol=1e-8)
    values = session.marginal_likelihood([0.1, 2.0, 10.0]).values
    theirs = [-47.00665620223701, -34.0009129961944, -44.05280458714161]
    np.testing.assert_allclose(values, theirs, rtol=1e-9)


LAYERS = {"1.weight": 0.5, "*.bias": 3.0, "*": 20.0}


def elements(session, layers=LAYERS):
    """[P] Precisions: the first glob that matches counts."""
    found = np.empty(SIZE)
    for p in session.layout.parameters:
        glob = next(g for g in layers if fnmatch.fnmatchcase(p.name, g))
        found[p.offset : p.offset + p.size] = layers[glob]
    return found


def ways(session):
    """One prior, said by names and element by element."""
    session.put("precisions", elements(session))
    return LAYERS, "precisions", session.vectors()[-1]


def test_a_prior_may_differ_between_parameters(session):
    H = POINTS * dense_ggn() + np.diag(elements(session))
    J = output_jacobian(module(), X)
    covariance = np.einsum("tcp,pq,tdq->tcd", J, np.linalg.inv(H), J)
    theta = nn.utils.parameters_to_vector(module().parameters()).detach().numpy()
    alike = session.marginal_likelihood(1.0)
    value = alike.log_likelihood - np.linalg.slogdet(H)[1] / 2
    d = elements(session)
    value += (np.log(d).sum() - (d * theta**2).sum()) / 2
    for priors in ways(session):
        found = session.predictive(X, priors=priors, tolerance=1e-10, covariance=True)
        np.testing.assert_allclose(found.covariance, covariance, rtol=1e-8, atol=1e-11)
        assert found.converged and found.relative_residuals.max() <= 1e-10
        evidence = session.marginal_likelihood([priors, {"*": 1.0}])
        np.testing.assert_allclose(
            evidence.values, [value, alike.values[0]], rtol=1e-10
        )
        assert evidence.exact and evidence.products == SIZE  # once for both
        assert evidence.best in (priors, {"*": 1.0})
    found = session.predictive(X, priors={"*": PRIOR}, tolerance=1e-10)
    plain = session.predictive(X, prior=PRIOR, tolerance=1e-10)
    np.testing.assert_allclose(found.variance, plain.variance, rtol=1e-8)


THEIRS = {
    "variance": [
        [0.7345434600771574, 1.1516797778525238, 1.501870514542758],
        [0.606151509425676, 0.6588574673662098, 0.8608600491065999],
    ],
    "evidence": -43.53369817150867,
    "variance of steps": [
        [0.5313800706401552, 0.5499411152471588, 0.6100908786624699],
        [0.4558973670794192, 0.37222033025175916, 0.45257662073137883],
    ],
    "evidence of steps": -37.57978478340141,
}


def test_numbers_of_layers_are_those_of_laplace_torch(session):
    """Of laplace-torch 0.3 for this net: full, all weights, GGNInterface and BackPACK, with
    a `prior_precision` for each parameter, and for each element."""
    found = session.predictive(X[:2], priors=LAYERS, tolerance=1e-10)
    np.testing.assert_allclose(found.variance, THEIRS["variance"], rtol=1e-6)
    value = session.marginal_likelihood(LAYERS).values[0]
    assert value == pytest.approx(THEIRS["evidence"], rel=1e-6)
    steps = np.linspace(0.1, 10.0, SIZE)
    session.put("steps", steps)
    found = session.predictive(X[:2], priors="steps", tolerance=1e-10)
    np.testing.assert_allclose(found.variance, THEIRS["variance of steps"], rtol=1e-6)
    value = session.marginal_likelihood("steps").values[0]
    assert value == pytest.approx(THEIRS["evidence of steps"], rel=1e-6)


FOUND = {"scalar": -34.00048451966934, "layerwise": -33.63228027458399}


@pytest.mark.parametrize("start", [1.0, {"*": 1.0}, LAYERS])
def test_a_search_ends_where_the_evidence_is_the_largest(session, start):
    found = session.marginal_likelihood([start], search=1000)
    assert found.exact and found.products == SIZE
    best = found.best
    again = session.marginal_likelihood([best])
    assert again.values[0] == pytest.approx(found.values[0], rel=1e-10)
    assert found.values[0] > session.marginal_likelihood([start]).values[0]
    names = session.layout.names if isinstance(best, dict) else [None]
    assert not isinstance(best, dict) or set(best) == set(session.layout.names)
    for name in names:  # central differences in the logarithm of each precision
        moved = [
            {**best, name: best[name] * factor} if name else best * factor
            for factor in (np.exp(1e-3), np.exp(-1e-3), np.exp(0.3), np.exp(-0.3))
        ]
        values = session.marginal_likelihood(moved).values
        assert abs(values[0] - values[1]) / 2e-3 < 1e-4
        assert values[2:].max() < found.values[0]


def test_a_search_is_at_least_as_good_as_that_of_laplace_torch(session):
    """Of laplace-torch 0.3, 500 steps of Adam at 0.1 on the logarithms, from ones."""
    for start, theirs in ((1.0, FOUND["scalar"]), ({"*": 1.0}, FOUND["layerwise"])):
        value = session.marginal_likelihood([start], search=1000).values[0]
        assert value >= theirs - 1e-6 * abs(theirs)
        assert value == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "priors", "message"),
    [
        ({"max_products": 10}, [1.0], "and 10 are left: choose parameters with params"),
        ({}, ["precisions"], "a prior is a stored vector"),
    ],
)
def test_searches_that_cannot_be_are_refused(session, options, priors, message):
    session.put("precisions", elements(session))
    with pytest.raises(curvd.InvalidSpec, match=message):
        session.marginal_likelihood(priors, search=5, **options)


def test_draws_of_layers_have_the_covariance_of_a_dense_inverse(session):
    count = 1000
    H = POINTS * dense_ggn() + np.diag(elements(session))
    found = session.posterior_samples(count, priors=LAYERS, seed=3, tolerance=1e-8)
    whitened = found.samples @ np.linalg.cholesky(H)
    covariance = whitened.T @ whitened / count
    gap = np.abs(covariance - np.eye(SIZE))
    assert gap.max() <= 6 * math.sqrt(2 / count)
    assert found.converged
    same = session.posterior_samples(3, priors={"*": PRIOR}, seed=1, tolerance=1e-10)
    plain = session.posterior_samples(3, prior=PRIOR, seed=1, tolerance=1e-10)
    np.testing.assert_allclose(same.samples, plain.samples, rtol=1e-6, atol=1e-9)


def test_a_sketch_saves_products_for_layers_too(session):
    session.sketch("top", rank=25)
    layers = {"1.*": 1e-2, "*": 3e-2}
    plain = session.predictive(X[:1], priors=layers, tolerance=1e-8)
    found = session.predictive(
        X[:1], priors=layers, tolerance=1e-8, preconditioner="top"
    )
    np.testing.assert_allclose(found.variance, plain.variance, rtol=1e-5)
    assert found.products < plain.products


def test_larger_operators_have_the_determinants_of_layers_estimated(
    session, monkeypatch
):
    priors = [LAYERS, {"*": 1.0}]
    exact = session.marginal_likelihood(priors)
    monkeypatch.setattr(shifted_determinants, "_DENSE", 0)
    found = session.marginal_likelihood(priors, probes=40, steps=SIZE)
    assert not found.exact
    gap = np.abs(found.values - exact.values)
    assert np.all(gap <= 5 * found.standard_errors) and np.all(gap > 0)


def test_factors_and_chosen_parameters_have_priors_of_layers(session):
    K = session.kfac(fisher="type-2")
    H = POINTS * (K @ np.eye(SIZE)) + np.diag(elements(session))
    J = output_jacobian(module(), X)
    found = K.predictive(X, priors=LAYERS, tolerance=1e-10)
    expected = np.einsum("tcp,pq,tcq->tc", J, np.linalg.inv(H), J)
    np.testing.assert_allclose(found.variance, expected, rtol=1e-8)
    evidence = K.marginal_likelihood([LAYERS])
    log = np.linalg.slogdet(H)[1]
    assert evidence.log_determinants[0] == pytest.approx(log, rel=1e-10)
    part = slice(session.layout.parameters[2].offset, SIZE)
    G = session.ggn(params="3.*")
    inverse = np.linalg.inv(
        POINTS * dense_ggn()[part, part] + np.diag(elements(session)[part])
    )
    found = G.predictive(X, priors={"*.bias": 3.0, "*": 20.0}, tolerance=1e-10)
    expected = np.einsum("tcp,pq,tcq->tc", J[..., part], inverse, J[..., part])
    np.testing.assert_allclose(found.variance, expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.predictive(X, priors={"1.*": 1.0}), "no precision for 3.weight"),
        (lambda s: s.predictive(X, priors={"5.*": 1.0, "*": 1}), "'5.*' matches no"),
        (
            lambda s: s.predictive(X, priors={"*": 0.0}),
            r"number in \[1e-100, 1e\+100\]",
        ),
        (lambda s: s.predictive(X, priors=np.ones(SIZE)), "is stored first"),
        (lambda s: s.predictive(X, priors="nothing"), "nothing"),
        (
            lambda s: s.predictive(X, prior=1.0, priors={"*": 2.0}),
            "prior=1 and priors= exclude each other",
        ),
        (
            lambda s: s.posterior_samples(1, prior=0.5, priors="steps"),
            "prior=0.5 and priors= exclude each other",
        ),
        (lambda s: s.predictive(X, priors="negative"), "elements from -1 to -1"),
        (lambda s: s.predictive(X, priors="two"), "has 2 columns"),
        (lambda s: s.marginal_likelihood(["two"]), "has 2 columns"),
        (lambda s: s.posterior_samples(1, priors={"*": "a"}), "got 'a' for '1.weight'"),
    ],
)
def test_priors_that_do_not_fit_are_refused(session, ask, message):
    session.put("negative", -np.ones(SIZE))
    session.put("two", np.ones((SIZE, 2)))
    with pytest.raises(curvd.CurvdError, match=message):
        ask(session)


def test_chosen_parameters_have_a_posterior_of_their_own(session):
    part = slice(session.layout.parameters[2].offset, SIZE)
    J = output_jacobian(module(), X)[:, :, part]
    inverse = np.linalg.inv(precision()[part, part])
    G = session.ggn(params="3.*")
    found = G.predictive(X, prior=PRIOR, tolerance=1e-10)
    expected = np.einsum("tcp,pq,tcq->tc", J, inverse, J)
    np.testing.assert_allclose(found.variance, expected, rtol=1e-8)
    value = G.marginal_likelihood(PRIOR)
    log = np.linalg.slogdet(precision()[part, part])[1]
    assert value.log_determinants[0] == pytest.approx(log, rel=1e-10)


def regression(client):
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    y = np.random.default_rng(5).standard_normal((POINTS, 2))
    x = data()["x"]
    session = client.session_for(
        net, "mse", (torch.from_numpy(x), torch.from_numpy(y)), batch_size=7
    )
    return net, x, y, session


def test_regression_divides_by_the_noise(live_target):
    with curvd.connect(live_target) as client:
        net, x, y, session = regression(client)
        with session:
            J = output_jacobian(net, x).reshape(2 * POINTS, -1)
            A = J.T @ J / NOISE**2 + PRIOR * np.eye(J.shape[1])
            found = session.predictive(X, prior=PRIOR, noise=NOISE, tolerance=1e-10)
            Z = output_jacobian(net, X)
            expected = np.einsum("tcp,pq,tcq->tc", Z, np.linalg.inv(A), Z)
            np.testing.assert_allclose(found.variance, expected, rtol=1e-7)
            with pytest.raises(curvd.InvalidSpec, match="no logits of classes"):
                found.probabilities()
            value = session.marginal_likelihood([PRIOR], noise=NOISE)
            z = net(torch.from_numpy(x)).detach().numpy()
            theta = nn.utils.parameters_to_vector(net.parameters()).detach().numpy()
            log = -((y - z) ** 2).sum() / (2 * NOISE**2)
            log -= y.size * math.log(NOISE * math.sqrt(2 * math.pi))
            log -= (
                np.linalg.slogdet(A)[1]
                - len(A) * math.log(PRIOR)
                + PRIOR * theta @ theta
            ) / 2
            assert value.values[0] == pytest.approx(log, rel=1e-10)


def test_marginal_likelihoods_of_many_priors_share_their_products(session):
    priors = np.logspace(-2, 2, 9)
    found = session.marginal_likelihood(priors)
    net, points = module(), data()
    loss = F.cross_entropy(
        net(torch.from_numpy(points["x"])),
        torch.from_numpy(points["y"]),
        reduction="sum",
    ).item()
    theta = nn.utils.parameters_to_vector(net.parameters()).detach().numpy()
    expected = [
        -loss
        - np.linalg.slogdet(precision(prior))[1] / 2
        + SIZE * math.log(prior) / 2
        - prior * theta @ theta / 2
        for prior in priors
    ]
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    assert found.exact and found.products == SIZE
    assert found.best == priors[np.argmax(expected)]


def test_larger_operators_have_their_determinants_estimated(session, monkeypatch):
    exact = session.marginal_likelihood([0.1, 1.0, 10.0])
    monkeypatch.setattr(shifted_determinants, "_DENSE", 0)
    found = session.marginal_likelihood([0.1, 1.0, 10.0], probes=40, steps=SIZE)
    assert not found.exact and found.products <= 40 * SIZE
    gap = np.abs(found.values - exact.values)
    assert np.all(gap <= 5 * found.standard_errors) and np.all(gap > 0)


def test_draws_have_the_covariance_of_a_dense_inverse(session):
    count = 500
    found = session.posterior_samples(count, prior=PRIOR, seed=3, tolerance=1e-8)
    S = found.samples
    whitened = S @ np.linalg.cholesky(precision())  # covariance I
    covariance = whitened.T @ whitened / count
    # Each element has a standard error of sqrt(1 / n), of sqrt(2 / n) on the diagonal.
    gap = np.abs(covariance - np.eye(SIZE))
    assert gap.max() <= 6 * math.sqrt(2 / count)
    # Of their mean, which knows the scale, the error is that of all numbers drawn.
    assert abs(np.trace(covariance) / SIZE - 1) <= 6 * math.sqrt(2 / count / SIZE)
    assert np.abs(whitened.mean(0)).max() <= 6 / math.sqrt(count)
    assert found.converged and found.scale == POINTS


def test_draws_depend_on_the_seed_and_not_on_the_cut(session, live_target):
    found = session.posterior_samples(3, seed=1, tolerance=1e-10).samples
    again = session.posterior_samples(3, seed=1, tolerance=1e-10).samples
    np.testing.assert_allclose(found, again, rtol=1e-6, atol=1e-8)
    one = session.posterior_samples(1, seed=1, tolerance=1e-10).samples
    np.testing.assert_allclose(one[0], found[0], rtol=1e-6, atol=1e-8)
    assert not np.allclose(found, session.posterior_samples(3, seed=2).samples)
    with curvd.connect(live_target) as client:
        model = client.register_model(
            "mlp",
            {"activation": "tanh", "widths": [5, 6, 3]},
            module().state_dict(),
        )
        cut = client.register_dataset(data(), inputs=["x"], target="y", batch_size=5)
        with client.create_session(
            model, cut, loss="cross_entropy", dtype="F64"
        ) as other:
            same = other.posterior_samples(3, seed=1, tolerance=1e-10).samples
    np.testing.assert_allclose(same, found, rtol=1e-6, atol=1e-8)


def test_draws_stay_in_the_session_and_are_operands(session):
    kept = session.posterior_samples(2, prior=PRIOR, seed=5, store="draws")
    assert kept.samples is None and kept.stored == session.vectors()[-1]
    sent = session.posterior_samples(2, prior=PRIOR, seed=5)
    np.testing.assert_allclose(
        session.get("draws").T, sent.samples, rtol=1e-6, atol=1e-9
    )
    moved = session.jacobian_product("draws", of="outputs")
    assert moved.result.shape == (3 * POINTS, 2)


def test_a_sketch_saves_products(session):
    session.sketch("top", rank=25)
    options = {"prior": 1e-2, "tolerance": 1e-8}
    plain = session.predictive(X[:1], **options)
    found = session.predictive(X[:1], preconditioner="top", **options)
    np.testing.assert_allclose(found.variance, plain.variance, rtol=1e-5)
    assert found.products < plain.products


@pytest.mark.parametrize(
    ("loss", "target"),
    [("bce_with_logits", np.ones((POINTS, 3))), ("cross_entropy", data()["y"])],
)
def test_the_root_of_a_metric_squares_to_it(loss, target):
    from curvd.contract import DatasetSpec, Dtype, LossSpec
    from curvd_server.engine.objective import Problem, loss_hessian

    spec = DatasetSpec(inputs=("x",), target="y", batch_size=8)
    arrays = {"x": data()["x"], "y": target}
    problem = Problem.load(
        module(), {}, arrays, spec, LossSpec(name=loss), dtype=Dtype.FLOAT64
    )
    batch = problem.data[0]
    z = problem.outputs(problem.parameters, batch).detach()
    metric = loss_hessian(problem, z, batch)
    unit = torch.eye(z.numel(), dtype=torch.float64).reshape(-1, *z.shape)
    root = metric.root(unit).flatten(1).T
    np.testing.assert_allclose(root @ root.T, metric(unit).flatten(1), atol=1e-14)


def test_inputs_that_were_not_begun_have_no_variance(session):
    found = session.predictive(X, block=3, max_products=10, tolerance=1e-10)
    assert found.info.stopped is curvd.Stop.PRODUCTS
    begun = np.isfinite(found.relative_residuals)
    assert begun[0] and not begun[-1]
    np.testing.assert_array_equal(np.isfinite(found.variance).all(1), begun)


@pytest.mark.parametrize(
    "limit", [{"max_products": 1}, {"max_products": 2}, {"time_limit_s": 1e-9}], ids=str
)
@pytest.mark.parametrize("covariance", [False, True])
def test_what_was_not_begun_is_nan_and_says_so(session, limit, covariance):
    found = session.predictive(X, covariance=covariance, **limit)
    assert not found.converged and found.products == 0
    moments = [found.mean, found.variance, found.relative_residuals]
    for moment in [*moments, found.covariance] if covariance else moments:
        assert np.isnan(moment).all()
    draws = session.posterior_samples(2, **limit)
    assert np.isnan(draws.samples).all() and np.isnan(draws.relative_residuals).all()
    for result in (found, draws):
        assert "nothing was computed: raise max_products" in str(result)
    found.plot()
    evidence = session.marginal_likelihood([1.0, 2.0], **limit)
    assert np.isnan(evidence.values).all()
    with pytest.raises(curvd.InvalidSpec, match="no best prior: nothing was computed"):
        _ = evidence.best
    with pytest.raises(
        curvd.InvalidSpec, match=r"2 of 2 draws .* 'half' is not stored"
    ):
        session.posterior_samples(2, store="half", **limit)
    assert "half" not in {v.name for v in session.vectors()}


def test_a_variance_cut_short_is_no_larger_than_the_dense_one(session):
    J = output_jacobian(module(), X[:1])[0]
    right = np.diag(J @ np.linalg.inv(precision(1.0)) @ J.T)
    found = session.predictive(X[:1], max_products=9)
    assert 0.01 < found.relative_residuals[0] < 1
    assert (found.variance[0] > 0).all() and (found.variance[0] <= right).all()


def test_the_command_line_says_the_evidence_of_nine_priors(session, live_target):
    args = ["evidence", session.id, live_target]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    value = session.marginal_likelihood(0.1).values[0]
    assert f"{value:.6e} ± 0.0e+00 at a prior precision of 0.1" in done.output
    assert done.output.count("at a prior precision of") == 9


async def test_the_asynchronous_client_asks_the_same(session, live_target):
    async with curvd.aio.connect(live_target) as client:
        same = await client.session(session.id)
        found = await same.predictive(X, prior=PRIOR)
        ours = session.predictive(X, prior=PRIOR)
        np.testing.assert_allclose(found.variance, ours.variance, rtol=1e-5)
        drawn = await same.posterior_samples(2, seed=1)
        np.testing.assert_allclose(
            drawn.samples, session.posterior_samples(2, seed=1).samples, rtol=1e-6
        )
        value = await same.marginal_likelihood(1.0)
        assert value.values[0] == session.marginal_likelihood([1.0]).values[0]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.predictive(X[:, :4]), r"a data point of the dataset is .* \[5\]"),
        (lambda s: s.predictive(X[0]), r"n of them have a leading axis: .* x\[None\]"),
        (lambda s: s.predictive({"z": X}), r"have the tensors \['x'\], got \['z'\]"),
        (lambda s: s.predictive(X * np.inf), "must be finite"),
        (lambda s: s.predictive("x"), "not an array"),
        (lambda s: s.predictive(X, prior=0), "prior must be at least 1e-100, got 0"),
        (lambda s: s.marginal_likelihood([1.0, 0.0]), "priors must be positive"),
        (lambda s: s.marginal_likelihood([]), "at least one"),
        (lambda s: s.posterior_samples(0), "k must be at least 1"),
        (lambda s: s.posterior_samples(1, store=""), "need a name"),
        (
            lambda s: s.ggn(damping=1.0).posterior_samples(1),
            "say prior instead of damping",
        ),
        (lambda s: s.hessian().posterior_samples(1), "posterior of the exact ggn"),
        (lambda s: s.jacobian_gram().predictive(X), "got jacobian_gram"),
        (lambda s: s.jacobian_gram().marginal_likelihood(1.0), "got jacobian_gram"),
        (lambda s: s.ggn(damping=0.5).marginal_likelihood(1.0), "damping 0.5"),
        (lambda s: s.ggn(scale=3.0).marginal_likelihood(1.0), "scale 3.0"),
    ],
)
def test_what_does_not_fit_is_refused(session, ask, message):
    with pytest.raises(curvd.CurvdError, match=message):
        ask(session)


def test_a_loss_that_is_no_likelihood_is_refused(live_target):
    x, y = data()["x"], np.zeros((POINTS, 3))
    with (
        curvd.connect(live_target) as client,
        client.session_for(
            module(),
            "smooth_l1",
            (torch.from_numpy(x), torch.from_numpy(y)),
            batch_size=8,
        ) as own,
        pytest.raises(curvd.InvalidSpec, match="no negative log-likelihood"),
    ):
        own.predictive(X)


def test_a_weight_decay_is_no_second_prior_of_draws_and_evidence(live_target):
    x, y = (torch.from_numpy(data()[name]) for name in ("x", "y"))
    with (
        curvd.connect(live_target) as client,
        client.session_for(
            module(), nn.CrossEntropyLoss(), (x, y), batch_size=8, weight_decay=0.1
        ) as own,
    ):
        for ask in (
            lambda: own.posterior_samples(1),
            lambda: own.marginal_likelihood(1.0),
        ):
            with pytest.raises(curvd.InvalidSpec, match=r"weight_decay of up to 0\.1"):
                ask()
        # The decay is in the GGN, so variances are those of both priors together.
        found = own.predictive(X, prior=PRIOR, tolerance=1e-10).variance
    J = output_jacobian(module(), X)
    inverse = np.linalg.inv(precision(PRIOR + 0.1 * POINTS))
    np.testing.assert_allclose(
        found, np.einsum("tcp,pq,tcq->tc", J, inverse, J), rtol=1e-8
    )


def test_what_means_nothing_is_refused_with_what_to_do(live_target):
    with curvd.connect(live_target) as client, open_session(client) as session:
        with pytest.raises(curvd.InvalidSpec, match=r"leave noise=0\.3 out"):
            session.predictive(X, noise=NOISE)
        with pytest.raises(curvd.InvalidSpec, match="ask the ggn"):
            session.hessian().marginal_likelihood([1e-8])


def test_fishers_have_an_evidence_beside_a_weight_decay(live_target):
    decayed = curvd.LossSpec(name="cross_entropy", weight_decay=0.5)
    with curvd.connect(live_target) as client, open_session(client) as plain:
        want = plain.empirical_fisher().marginal_likelihood([PRIOR])
        with open_session(client, loss=decayed) as session:
            found = session.empirical_fisher().marginal_likelihood([PRIOR])
            np.testing.assert_allclose(found.values, want.values, rtol=1e-10)
            with pytest.raises(curvd.InvalidSpec, match="a prior of its own"):
                session.ggn().marginal_likelihood([PRIOR])


class OneNumber(nn.Module):
    """A regression as most are written: outputs [B], and a scale without axes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.hidden, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, x):
        return self.scale * self.last(torch.tanh(self.hidden(x))).squeeze(-1)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=repr)
def test_one_number_per_data_point_and_parameters_without_axes(live_target, loss):
    net = OneNumber()
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((12, 3)))
    y = (x.sum(1) > 0).double()
    J = output_jacobian_of(net, x)
    z = net(x).detach()
    p = torch.sigmoid(z)
    slopes, curvature = (p - y, p * (1 - p))
    if isinstance(loss, nn.MSELoss):
        slopes, curvature = 2 * (z - y), torch.full_like(z, 1 / NOISE**2)
    noise = {"noise": NOISE} if isinstance(loss, nn.MSELoss) else {}
    H = (J.T * curvature.numpy()) @ J + PRIOR * np.eye(J.shape[1])
    gradients = slopes.numpy()[:, None] * J
    with curvd.connect(live_target) as client:
        session = client.session_for(net, loss, (x, y), batch_size=5, dtype="F64")
        for covariance in (False, True):
            found = session.predictive(
                x[:4], prior=PRIOR, covariance=covariance, tolerance=1e-10, **noise
            )
            right = np.einsum("ip,pq,iq->i", J[:4], np.linalg.inv(H), J[:4])
            np.testing.assert_allclose(found.variance, right, rtol=1e-7)
            assert found.variance.shape == found.mean.shape == (4,)
        found = session.gradient_norms(by_parameter=True)
        np.testing.assert_allclose(
            found.norms, np.linalg.norm(gradients, axis=1), rtol=1e-9
        )
        column = session.layout.names.index("scale")
        offset = session.layout.parameters[column].offset
        np.testing.assert_allclose(
            found.parameter_norms[:, column], abs(gradients[:, offset]), rtol=1e-9
        )
        gram = session.gradient_gram().gram
        np.testing.assert_allclose(gram, gradients @ gradients.T, rtol=1e-8, atol=1e-12)
        squares = session.gradient_squares().squares
        np.testing.assert_allclose(squares, (gradients**2).sum(0), rtol=1e-9)
        G = session.ggn().to_dense() + 0.1 * np.eye(J.shape[1])
        scores = session.influence([0, 1], damping=0.1, tolerance=1e-10).scores
        right = gradients[:2] @ np.linalg.solve(G, gradients.T)
        np.testing.assert_allclose(scores, right, rtol=1e-5, atol=1e-6)


def output_jacobian_of(net, x):
    """[N, P] by plain autograd, a data point after the other."""
    rows = []
    for one in x:
        found = torch.autograd.grad(net(one[None])[0], list(net.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows).numpy()


class Segments(nn.Module):
    """Logits [B, 3, 4, 2], classes in torch's axis, or in the last."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(6)
        self.layer, self.last = nn.Linear(4, 24).double(), last

    def forward(self, x):
        z = self.layer(x).reshape(-1, 3, 4, 2)
        return z.movedim(1, -1) if self.last else z


@pytest.mark.parametrize("last", [False, True])
def test_probabilities_are_over_the_classes_wherever_they_are(live_target, last):
    net = Segments(last)
    generator = np.random.default_rng(7)
    x = torch.from_numpy(generator.standard_normal((8, 4)))
    y = torch.from_numpy(generator.integers(0, 3, (8, 4, 2)))
    axis = -1 if last else 1

    with curvd.connect(live_target) as client:
        session = client.session_for(
            net,
            "cross_entropy" if last else nn.CrossEntropyLoss(),
            (x, y),
            batch_size=3,
        )
        sure = session.predictive(x[:3], prior=1e9)
        right = net(x[:3]).detach().softmax(axis)
        np.testing.assert_allclose(sure.probabilities(), right, atol=1e-6)
        found = session.predictive(x[:3], prior=0.1)
        z = found.mean / np.sqrt(1 + np.pi / 8 * found.variance)
        np.testing.assert_allclose(
            found.probabilities(), torch.from_numpy(z).softmax(axis), rtol=1e-12
        )
        found.plot(targets=y[:3].numpy())
        older = dataclasses.replace(found, class_axis=0)
        with pytest.raises(curvd.InvalidSpec, match=r"which axis .* has the classes"):
            older.probabilities()
        with pytest.raises(
            curvd.InvalidSpec, match=r"\[3, 4, 2\], one for each.*\[2, 4"
        ):
            found.plot(targets=y[:2])
