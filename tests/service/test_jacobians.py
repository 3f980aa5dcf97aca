"""Jacobians of data points, asked of a real server by both clients."""

import numpy as np
import pytest
import torch
from support.small_net import data, module, open_session

import curvd

SIZE, POINTS, CLASSES = 57, 24, 3


@pytest.fixture(scope="module")
def session(live_target):
    with curvd.connect(live_target) as client, open_session(client) as opened:
        yield opened


@pytest.fixture(scope="module")
def rows():
    """[N, P] of the losses, and [N C, P] of the outputs, by torch.func."""
    net, points = module(), data()
    x, y = torch.from_numpy(points["x"]), torch.from_numpy(points["y"])
    parameters = {n: p.detach() for n, p in net.named_parameters()}

    def outputs(parameters):
        return torch.func.functional_call(net, parameters, (x,))

    def losses(parameters):
        return torch.nn.functional.cross_entropy(
            outputs(parameters), y, reduction="none"
        )

    def flat(function, axes):
        found = torch.func.jacrev(function)(parameters)
        return torch.cat([r.flatten(axes) for r in found.values()], -1).numpy()

    return flat(losses, 1), flat(outputs, 2).reshape(-1, SIZE)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def test_both_jacobians_multiply_in_both_directions(session, rows):
    for J, dense in zip(
        (session.loss_jacobian(), session.output_jacobian()), rows, strict=True
    ):
        v, V = normal(SIZE), normal(SIZE, 3)
        w, W = normal(len(dense)), normal(len(dense), 20)
        np.testing.assert_allclose(J @ v, dense @ v, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(J @ V, dense @ V, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(J.T @ w, dense.T @ w, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(J.T @ W, dense.T @ W, rtol=1e-10, atol=1e-12)
        assert (J @ np.empty((SIZE, 0))).shape == (len(dense), 0)


def test_chosen_parameters_are_a_jacobian_of_their_own(session, rows):
    names = session.layout.names
    start = session.layout.parameters[2].offset
    J = session.loss_jacobian(params="3.*")
    assert names[2].startswith("3.")
    v = normal(SIZE - start)
    np.testing.assert_allclose(J @ v, rows[0][:, start:] @ v, rtol=1e-10)
    parts = {n: v[i : i + s] for n, i, s in (("3.weight", 0, 18), ("3.bias", 18, 3))}
    parts["3.weight"] = parts["3.weight"].reshape(3, 6)
    np.testing.assert_allclose(J @ parts, J @ v, rtol=1e-12)
    np.testing.assert_allclose(
        J.T @ np.ones(POINTS), rows[0][:, start:].sum(0), rtol=1e-10
    )


def test_a_jacobian_says_its_shape_where_the_client_knows_it(session):
    J = session.loss_jacobian()
    assert J.shape == (POINTS, SIZE) and J.T.shape == (SIZE, POINTS)
    part = session.loss_jacobian(params="3.*")
    assert part.shape == (POINTS, 21) and len(part @ normal(21)) == POINTS
    with pytest.raises(curvd.InvalidSpec, match="read row_shape"):
        _ = session.output_jacobian().shape


def test_tensors_come_back_as_tensors(session, rows):
    found = session.loss_jacobian() @ torch.from_numpy(normal(SIZE, 2))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found, rows[0] @ normal(SIZE, 2), rtol=1e-10)


def test_a_product_says_what_its_rows_are_and_what_it_took(session, rows):
    found = session.jacobian_product(normal(SIZE, 2), of="outputs")
    assert found.row_shape == (CLASSES,) and found.converged
    assert found.by_point.shape == (POINTS, CLASSES, 2)
    assert found.plan in ("forward", "transposed") and found.products == POINTS
    few = session.jacobian_product(normal(SIZE), max_products=5)
    assert few.info.stopped is curvd.Stop.PRODUCTS
    np.testing.assert_allclose(few.result, rows[0][:5] @ normal(SIZE), rtol=1e-10)


def test_operands_and_transposed_products_stay_in_the_session(session, rows):
    session.put("v", normal(SIZE))
    np.testing.assert_allclose(
        session.jacobian_product("v").result, rows[0] @ normal(SIZE), rtol=1e-10
    )
    kept = session.jacobian_product(np.ones((POINTS, 2)), transposed=True, store="sum")
    assert kept.result is None and kept.stored == session.vectors()[-1]
    expected = np.outer(rows[0].sum(0), np.ones(2))
    np.testing.assert_allclose(session.get("sum"), expected, rtol=1e-10)
    x = session.ggn().solve("sum", damping=1.0).x
    assert x.shape == (SIZE, 2)


def test_a_sum_over_data_points_that_is_cut_short_is_nan_and_not_stored(session):
    ones = np.ones(POINTS)
    cut = session.jacobian_product(ones, transposed=True, max_products=5)
    assert cut.info.stopped is curvd.Stop.PRODUCTS
    assert cut.result.shape == (SIZE,) and np.isnan(cut.result).all()
    assert "a sum over all data points, which was cut short" in str(cut)
    cut.plot()
    with pytest.raises(
        curvd.InvalidSpec, match=r"all 24 data points .*'half' is not stored: raise"
    ):
        session.jacobian_product(ones, transposed=True, max_products=5, store="half")
    assert "half" not in {v.name for v in session.vectors()}


def test_gram_and_squares_are_those_of_the_rows(session, rows):
    J = rows[0]
    found = session.gradient_gram()
    np.testing.assert_allclose(found.gram, J @ J.T, rtol=1e-10, atol=1e-12)
    sizes = np.linalg.norm(J, axis=1)
    cosines = J @ J.T / np.outer(sizes, sizes)
    np.testing.assert_allclose(found.cosines, cosines, rtol=1e-9, atol=1e-12)
    squares = session.gradient_squares()
    np.testing.assert_allclose(squares.squares, (J**2).sum(0), rtol=1e-10)
    fisher = session.empirical_fisher() @ np.eye(SIZE)
    np.testing.assert_allclose(
        squares.squares / squares.normaliser, np.diag(fisher), rtol=1e-9
    )


async def test_the_asynchronous_client_multiplies_the_same(session, live_target, rows):
    async with curvd.aio.connect(live_target) as client:
        same = await client.session(session.id)
        found = await (same.loss_jacobian() @ normal(SIZE))
        np.testing.assert_allclose(found, rows[0] @ normal(SIZE), rtol=1e-10)
        back = await (same.output_jacobian().T @ normal(POINTS * CLASSES))
        np.testing.assert_allclose(
            back, rows[1].T @ normal(POINTS * CLASSES), rtol=1e-10
        )


@pytest.mark.parametrize(
    ("v", "options", "message"),
    [
        (np.ones(5), {}, r"expected \[57\] or \[57, K\]"),
        (np.ones(SIZE), {"transposed": True}, "a row for each of the 24 data points"),
        (
            np.ones(48),
            {"transposed": True, "of": "outputs"},
            r"takes \[72\] or \[K, 72\]",
        ),
        (np.full(SIZE, np.nan), {}, "every value must be finite"),
        ("nothing", {}, "stores no vector 'nothing'"),
        (np.ones(SIZE), {"store": "x"}, "only a product with the transpose"),
        (np.ones(SIZE), {"store": ""}, "need a name"),
        (np.ones(SIZE), {"params": "none.*"}, "none"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(session, v, options, message):
    with pytest.raises(curvd.CurvdError, match=message):
        session.jacobian_product(v, **options)


def test_batch_statistics_are_refused(live_target):
    rng = np.random.default_rng(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)).double()
    points = torch.from_numpy(rng.normal(size=(8, 5))), torch.zeros(8, 4).double()
    with (
        curvd.connect(live_target) as client,
        client.session_for(
            net, "mse", points, batch_size=4, mode="batch_statistics"
        ) as own,
    ):
        for ask in (
            lambda: own.loss_jacobian() @ np.ones(own.layout.size),
            own.gradient_gram,
            own.gradient_squares,
        ):
            with pytest.raises(curvd.InvalidSpec, match="mode='eval'"):
                ask()


def test_an_exported_module_and_float32_multiply_too(live_target):
    net, points = module().float(), data()
    x, y = torch.from_numpy(points["x"]).float(), torch.from_numpy(points["y"])
    with (
        curvd.connect(live_target) as client,
        client.session_for(net, "cross_entropy", (x, y), batch_size=7) as own,
    ):
        _, gradient = own.gradient()
        total = own.loss_jacobian().T @ np.ones(POINTS, np.float32)
        np.testing.assert_allclose(total / POINTS, gradient, rtol=1e-4, atol=1e-6)
