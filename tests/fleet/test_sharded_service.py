"""Parameters in shards through a real server: two workers, and the public client."""

import threading

import numpy as np
import pytest

pytest.importorskip("torch")
from scipy.sparse.linalg import LinearOperator, eigsh
from support.sharded_server import (
    BATCH,
    CONFIG,
    SMALL,
    Truth,
    kill,
    net,
    serving,
    tokens,
)

import curvd

PATIENT = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=120.0))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("sharded")) as (target, server):
        with curvd.connect(target, config=PATIENT) as client:
            yield client, server


@pytest.fixture(scope="module")
def data(served):
    return served[0].register_dataset(
        tokens(), inputs=["x"], target="y", batch_size=BATCH
    )


@pytest.fixture(scope="module")
def session(served, data):
    model = served[0].register_model("gpt", CONFIG, net().state_dict())
    with served[0].create_session(
        model, data, loss="cross_entropy", dtype="F64"
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def opened_small(served, data):
    values = net(config=SMALL).state_dict()
    model = served[0].register_model("gpt", SMALL, values)
    with served[0].create_session(
        model, data, loss="cross_entropy", dtype="F64"
    ) as opened:
        yield opened


@pytest.fixture
def small(opened_small):
    """A session of a small net, whose products are quick."""
    opened_small.update_parameters(net(config=SMALL))
    return opened_small


def close(got, want):
    return np.linalg.norm(got - want) <= 1e-10 * np.linalg.norm(want)


def check_products(operator, multiply):
    """One column and several are right, and one has the same bits again."""
    V = np.random.default_rng(3).standard_normal((operator.shape[0], 3))
    first = operator @ V[:, 0]
    assert close(first, multiply(V[:, 0]))
    assert close(operator @ V, np.stack([multiply(v) for v in V.T], axis=1))
    np.testing.assert_array_equal(operator @ V[:, 0], first)


def test_products_of_a_transformer_are_those_of_eager_torch(session):
    check_products(session.hessian(), Truth(net()).hessian)


def test_each_worker_holds_little_more_than_half_of_the_parameters(served, session):
    session.hessian() @ np.ones(Truth(net()).size)
    whole = 8 * Truth(net()).size
    for worker in served[0].server_info().workers:
        print(worker)
        assert 0 < worker.parameter_bytes <= 0.52 * whole
        assert worker.whole_bytes > 0
        assert worker.parameter_bytes + worker.whole_bytes <= 0.6 * whole


def test_products_of_the_ggn_are_those_of_eager_torch(small):
    """Of one layer: each operator of ten takes long to verify."""
    check_products(small.ggn(), Truth(net(config=SMALL)).ggn)


def test_eigenvalues_and_gradients_are_those_of_eager_torch(small):
    truth = Truth(net(config=SMALL))
    linear = LinearOperator((truth.size,) * 2, matvec=truth.hessian, dtype=np.float64)
    want = eigsh(linear, 2, which="LA", return_eigenvectors=False, tol=1e-8)
    found = small.hessian().eigsh(k=2)
    np.testing.assert_allclose(np.sort(found.values), np.sort(want), rtol=1e-7)
    assert close(small.gradient()[1], truth.gradient())


def test_products_after_an_update_are_those_of_the_new_version(small):
    operator, v = small.hessian(), np.ones(Truth(net(config=SMALL)).size)
    assert close(operator @ v, Truth(net(config=SMALL)).hessian(v))
    small.update_parameters(net(5, SMALL))
    assert close(operator @ v, Truth(net(5, SMALL)).hessian(v))


def test_a_product_whose_worker_is_killed_is_right_and_has_the_same_bits(served, small):
    client, server = served
    truth, operator = Truth(net(config=SMALL)), small.hessian()
    V = np.random.default_rng(4).standard_normal((truth.size, 8))
    want, found = operator @ V, []
    product = threading.Thread(target=lambda: found.append(operator @ V))
    product.start()
    product.join(0.3)
    assert product.is_alive()
    kill(server)
    product.join(120)
    np.testing.assert_array_equal(found[0], want)
    assert close(found[0][:, 0], truth.hessian(V[:, 0]))
    assert sum(w.restarts for w in client.server_info().workers) >= 1
