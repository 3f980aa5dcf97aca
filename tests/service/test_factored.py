"""KFAC and EKFAC through a real server: products, functions, closed forms, versions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.small_net import WIDTHS, data, module, open_session
from torch import nn

import curvd
from curvd.cli.commands import main
from curvd.errors import InvalidSpec, OutOfMemory

kfac = pytest.importorskip("curvlinops.kfac")
ekfac = pytest.importorskip("curvlinops.ekfac")

SIZE = 57


@pytest.fixture(scope="module")
def session(live_target):
    with curvd.connect(live_target) as client, open_session(client) as opened:
        yield opened


def peer(kind: str, fisher: str, net: nn.Module | None = None) -> np.ndarray:
    """The dense matrix that curvlinops makes of the same net and data."""
    net, arrays = net or module(), data()
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    classes = {"kfac": kfac.KFACLinearOperator, "ekfac": ekfac.EKFACLinearOperator}
    operator = classes[kind](
        net,
        nn.CrossEntropyLoss(),
        list(net.parameters()),
        list(zip(x.split(8), y.split(8), strict=True)),
        fisher_type=fisher,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    return (operator @ torch.eye(SIZE, dtype=torch.float64)).numpy()


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_products_over_the_wire_are_those_of_curvlinops(session, kind, fisher):
    K = getattr(session, kind)(fisher=fisher)
    exact = peer(kind, fisher)
    assert error(K @ np.eye(SIZE), exact) < 1e-10
    v = np.arange(SIZE) / SIZE
    np.testing.assert_allclose(K.matvec(v), exact @ v, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        (3.0 * K + 0.5 * curvd.Identity()) @ v, 3 * exact @ v + v / 2
    )


def test_sampled_factors_are_exact_in_expectation_and_fixed_by_their_seed(session):
    exact = peer("kfac", "type-2")
    K = session.kfac(mc_samples=2000, seed=3)
    found = K @ np.eye(SIZE)
    assert error(found, exact) < 0.05
    assert np.array_equal(found, session.kfac(mc_samples=2000, seed=3) @ np.eye(SIZE))
    assert error(session.kfac(seed=4) @ np.eye(SIZE), exact) > 0.05


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_functions_of_it_are_those_of_the_dense_matrix(session, kind):
    K = getattr(session, kind)(fisher="type-2", scale=24.0, damping=0.1)
    dense = 24 * peer(kind, "type-2") + 0.3 * np.eye(SIZE)
    inverse = np.linalg.inv(dense)
    assert error(K.inverse(damping=0.2) @ np.eye(SIZE), inverse) < 1e-10
    root = K.inverse_root(damping=0.2) @ np.eye(SIZE)
    assert error(root @ root.T, inverse) < 1e-10
    twice = (2 * K.inverse(damping=0.2) + curvd.Identity()) @ np.eye(SIZE)
    assert error(twice, 2 * inverse + np.eye(SIZE)) < 1e-10
    values = np.linalg.eigvalsh(dense)
    found = K.logdet(damping=0.2)
    assert found.value == pytest.approx(np.log(values).sum(), rel=1e-12)
    assert K.inverse(damping=0.2).logdet().value == pytest.approx(-found.value)
    trace = K.trace()
    assert trace.value == pytest.approx(values.sum() - 0.2 * SIZE, rel=1e-12)
    assert (found.products, trace.products) == (0, 0)


def test_draws_have_the_covariance_of_the_posterior(session):
    K = session.kfac(fisher="type-2", scale=24.0, damping=2.0)
    noise = session.probe("normal", seed=5, columns=4000)
    draws = K.inverse_root().multiply(noise)
    exact = np.linalg.inv(24 * peer("kfac", "type-2") + 2 * np.eye(SIZE))
    found = draws @ draws.T / draws.shape[1]
    # The error of a covariance of S draws is sqrt(P / S) of its size, about.
    assert error(found, exact) < 2 * np.sqrt(SIZE / draws.shape[1])


@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_singular_one_has_no_determinant_whatever_rounding_makes_of_zero(
    session, kind, fisher
):
    """Gradients of a softmax add up to 0 over the classes."""
    K = getattr(session, kind)(fisher=fisher)
    values = np.linalg.eigvalsh(K.to_dense())
    assert values[0] < 1e-14 * values[-1]
    found = K.logdet()
    assert np.isnan(found.value) and not found.converged
    assert K.logdet(damping=1e-3).converged


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "fisher"])
def test_targets_are_sampled_at_least_once(session, kind):
    with pytest.raises(curvd.InvalidSpec, match="mc_samples must be at least 1, got 0"):
        getattr(session, kind)(mc_samples=0)


def test_systems_and_influence_of_it_are_closed_forms_with_true_residuals(session):
    K = session.ekfac(fisher="type-2", scale=3.0)
    dense = 3 * peer("ekfac", "type-2") + 0.1 * np.eye(SIZE)
    b = np.arange(SIZE) / SIZE
    found = K.solve(b, damping=0.1, tolerance=1e-10)
    np.testing.assert_allclose(found.x, np.linalg.solve(dense, b), rtol=1e-9)
    assert found.converged and found.products == 1  # that of the residual
    assert 0 < found.relative_residuals[0] < 1e-12
    J = session.loss_jacobian() @ np.eye(SIZE)
    scores = K.influence(None, damping=0.1, tolerance=1e-10)
    np.testing.assert_allclose(
        scores.scores, J @ np.linalg.solve(dense, J.T), rtol=1e-5, atol=1e-7
    )
    assert scores.products == len(J)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_singular_one_has_no_influence_without_damping(session, kind):
    """Iterations would converge, to what rounding makes of the null space."""
    K = getattr(session, kind)(fisher="empirical")
    for refused in (
        lambda: K.influence(None, damping=0.0),
        lambda: K.solve(np.ones(SIZE)),
        lambda: K.solve(np.ones(SIZE), dampings=[1.0, 0.0]),
    ):
        with pytest.raises(InvalidSpec, match="a damping of 0 it has no inverse in"):
            refused()
    small = K.solve(np.ones(SIZE), damping=1e-6)
    dense = peer(kind, "empirical") + 1e-6 * np.eye(SIZE)
    np.testing.assert_allclose(
        small.x, np.linalg.solve(dense, np.ones(SIZE)), rtol=1e-8
    )
    least = K.solve(np.ones(SIZE), solver="minres", max_products=400)
    assert least.relative_residuals[0] <= 1 + 1e-9  # it needs no inverse


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_influence_by_factors_of_a_part_of_the_data_has_factors_of_that_part(
    session, kind
):
    K = getattr(session, kind)(fisher="empirical")
    drawn = torch.randperm(24, generator=torch.Generator().manual_seed(3))[:12]
    arrays = {name: value[drawn.sort().values] for name, value in data().items()}
    with session.on(arrays) as few:
        dense = getattr(few, kind)(fisher="empirical") @ np.eye(SIZE)
    J = session.loss_jacobian() @ np.eye(SIZE)
    found = K.influence(None, part=12, part_seed=3, damping=0.1, tolerance=1e-10)
    exact = J @ np.linalg.solve(dense + 0.1 * np.eye(SIZE), J.T)
    np.testing.assert_allclose(found.scores, exact, rtol=1e-5, atol=1e-6)
    assert found.data_points == 12


def test_a_posterior_of_it_is_that_of_the_dense_matrix(session):
    K = session.kfac(fisher="type-2")
    found = K.marginal_likelihood([0.5, 2.0])
    logs = [
        np.linalg.slogdet(24 * peer("kfac", "type-2") + prior * np.eye(SIZE))[1]
        for prior in (0.5, 2.0)
    ]
    np.testing.assert_allclose(found.log_determinants, logs, rtol=1e-10)
    assert found.exact and found.products == 0


def test_the_command_line_names_them_and_what_they_are_made_of(session, live_target):
    run = CliRunner()
    options = ["--operator", "ekfac", "--fisher", "type-2", "--json"]
    found = run.invoke(main, ["trace", session.id, live_target, *options])
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)["value"]
    assert value == pytest.approx(np.trace(peer("ekfac", "type-2")))
    wrong = ["trace", session.id, live_target, "--fisher", "mc"]
    refused = run.invoke(main, wrong)
    assert refused.exit_code != 0
    assert "belong to kfac and ekfac, not hessian" in refused.output


def test_an_inverse_that_does_not_exist_names_the_damping_that_it_takes(session):
    K = session.kfac(fisher="empirical")
    with pytest.raises(InvalidSpec, match="take a damping above"):
        K.inverse() @ np.ones(SIZE)
    assert np.isnan(K.logdet().value)
    with pytest.raises(InvalidSpec, match="a scale above 0, got -1"):
        (-1.0 * K).inverse()
    with pytest.raises(InvalidSpec, match="no inverse in closed form"):
        session.ggn().inverse()
    with pytest.raises(InvalidSpec, match="no inverse in closed form"):
        K.inverse(damping=1.0).inverse()


def test_new_parameters_have_factors_of_their_own(live_target):
    with curvd.connect(live_target) as client, open_session(client) as session:
        K, v = session.kfac(fisher="type-2"), np.ones(SIZE)
        inverse = K.inverse(damping=0.1)
        before, inverted = K @ v, inverse @ v
        net = module()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.5)
        session.update_parameters({n: p.numpy() for n, p in net.state_dict().items()})
        exact = peer("kfac", "type-2", net)
        assert error(before, peer("kfac", "type-2") @ v) < 1e-10
        assert error(K @ v, exact @ v) < 1e-10
        assert error(inverse @ v, np.linalg.solve(exact + 0.1 * np.eye(SIZE), v)) < 1e-9
        assert not np.allclose(inverted, inverse @ v)


def test_blocks_are_said_and_their_memory_is_counted_once(live_target):
    with curvd.connect(live_target) as client, open_session(client) as session:
        K = session.kfac(fisher="type-2")
        _ = K @ np.ones(SIZE)
        plan = dict(session.refresh().operators)[K.spec]
        assert [b.kind for b in plan.blocks] == ["kronecker", "kronecker"]
        assert [(b.inputs, b.outputs) for b in plan.blocks] == [(6, 6), (7, 3)]
        assert plan.blocks[0].parameters == tuple(session.layout.names[:2])
        # Two bases and eigenvalues of each block, and where their elements are.
        expected = 8 * (36 + 36 + 49 + 9 + 2 * SIZE)
        assert plan.kept_bytes == expected
        _ = K.inverse(damping=1.0) @ np.ones(SIZE)
        reports = [p for s, p in session.refresh().operators if s.kind == "kfac"]
        assert len(reports) == 2
        assert sum(p.kept_bytes for p in reports) == expected


def test_factors_that_do_not_fit_are_refused_with_their_bytes(live_target):
    with (
        curvd.connect(live_target) as client,
        open_session(client, budget_bytes=100) as session,
        pytest.raises(
            OutOfMemory, match=r"the factors take 1952 bytes, and 100 are left"
        ),
    ):
        session.kfac() @ np.ones(SIZE)


def test_what_belongs_to_other_operators_is_refused():
    with pytest.raises(InvalidSpec, match="belong to kfac and ekfac, not hessian"):
        curvd.OperatorSpec(kind="hessian", fisher="mc")
    with pytest.raises(InvalidSpec, match="has blocks of its own"):
        curvd.OperatorSpec(kind="kfac", block_sizes=(1, 1))
    with pytest.raises(InvalidSpec, match="mc_samples=3 does not fit operator kfac"):
        curvd.OperatorSpec(kind="kfac", fisher="empirical", mc_samples=3)
    with pytest.raises(InvalidSpec, match="unknown fisher type 'true'"):
        curvd.OperatorSpec(kind="kfac", fisher="true")
    with pytest.raises(InvalidSpec, match="without one say damping"):
        curvd.OperatorSpec(kind="kfac", shift=1.0)


async def test_the_asyncio_client_has_the_same(live_target):
    async with curvd.aio.connect(live_target) as client:
        model = await client.register_model("mlp", WIDTHS, module().state_dict())
        dataset = await client.register_dataset(
            data(), inputs=["x"], target="y", batch_size=8
        )
        session = await client.create_session(
            model, dataset, loss="cross_entropy", dtype="F64", operators=None
        )
        K = session.ekfac(fisher="type-2")
        found = await (K @ np.eye(SIZE))
        assert error(found, peer("ekfac", "type-2")) < 1e-10
        v = np.ones(SIZE)
        back = await (K.inverse(damping=0.1) @ (found @ v + 0.1 * v))
        np.testing.assert_allclose(back, v, rtol=1e-8)
