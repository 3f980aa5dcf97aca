"""Several datasets, one set of parameters: train and test move together, or not at all."""

import asyncio
import contextlib
import copy
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import parameters_to_vector  # noqa: E402

import curvd  # noqa: E402
from curvd_server.app import serve_in_thread  # noqa: E402
from curvd_server.config import ServerConfig  # noqa: E402

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
TRAIN = torch.randn(24, 6).double(), torch.randint(0, 3, (24,))
TEST = torch.randn(9, 6).double(), torch.randint(0, 3, (9,))
P = sum(p.numel() for p in NET.parameters())
V = np.random.default_rng(0).standard_normal(P)


def moved(amount):
    """The net, further along."""
    net = copy.deepcopy(NET)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += amount * torch.sin(torch.arange(parameter.numel())).reshape(
                parameter.shape
            )
    return net


def product(net, data):
    """Hv by torch's own double backward."""
    parameters = list(net.parameters())
    loss = nn.CrossEntropyLoss()(net(data[0]), data[1])
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    along = torch.autograd.grad(flat @ torch.from_numpy(V), parameters)
    return parameters_to_vector(along).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def config(folder):
    return ServerConfig(listen="127.0.0.1:0", data_dir=folder)


@pytest.fixture
def client(live_target):
    with curvd.connect(live_target) as connected:
        yield connected


@pytest.fixture
def train(client):
    with client.session_for(NET, nn.CrossEntropyLoss(), TRAIN, batch_size=10) as opened:
        yield opened


def test_each_dataset_has_operators_of_its_own(train):
    with train.on(TEST) as test:
        assert (test.info.data_points, train.info.data_points) == (9, 24)
        assert test.layout == train.layout
        for session, data in ((train, TRAIN), (test, TEST)):
            np.testing.assert_allclose(
                session.hessian() @ V, product(NET, data), rtol=1e-10, atol=1e-12
            )
        both = (0.9 * train.hessian() + 0.1 * test.hessian()) @ V
        expected = 0.9 * product(NET, TRAIN) + 0.1 * product(NET, TEST)
        np.testing.assert_allclose(both, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("through", ["train", "test"])
def test_one_update_moves_both(train, through):
    with train.on(TEST) as test:
        test.hessian() @ V  # built, and moved with its session
        updated = {"train": train, "test": test}[through]
        net = moved(0.1)
        assert updated.update_parameters(net) == 2
        assert train.refresh().version == test.refresh().version == 2
        assert train.info.parameters_digest == test.info.parameters_digest
        for session, data in ((train, TRAIN), (test, TEST)):
            H = session.hessian(expected_version=2)
            np.testing.assert_allclose(
                H @ V, product(net, data), rtol=1e-10, atol=1e-12
            )


def test_what_is_refused_moves_none(train):
    with train.on(TEST) as test:
        with pytest.raises(curvd.StateMismatch):
            test.update_parameters({"0.bias": np.full(5, np.nan)})
        with pytest.raises(curvd.VersionMismatch):
            train.update_parameters(NET, expected_version=3)
        assert train.refresh().version == test.refresh().version == 1


def test_a_third_joins_at_the_version_that_the_others_have(train):
    net = moved(0.2)
    train.update_parameters(net)
    with train.on(TEST) as test, test.on(TRAIN, batch_size=7) as third:
        assert third.info.version == test.info.version == 2
        assert third.info.parameters_of == test.info.parameters_of == train.id
        np.testing.assert_allclose(
            third.hessian() @ V, product(net, TRAIN), rtol=1e-10, atol=1e-12
        )
        third.update_parameters(NET)
        assert train.refresh().version == test.refresh().version == 3


def test_one_may_end_before_the_others(client):
    train = client.session_for(NET, nn.CrossEntropyLoss(), TRAIN, batch_size=10)
    train.update_parameters(moved(0.1))
    with train.on(TEST) as test:
        train.delete()
        np.testing.assert_allclose(
            test.hessian() @ V, product(moved(0.1), TEST), rtol=1e-10, atol=1e-12
        )
        assert test.update_parameters(NET) == 3
        with pytest.raises(curvd.SessionNotFound):
            train.refresh()


def test_both_come_back_together_after_a_restart(config):
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        train = client.session_for(NET, nn.CrossEntropyLoss(), TRAIN, batch_size=10)
        test = train.on(TEST)
        train.update_parameters(moved(0.1))
        ids = train.id, test.id
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        train, test = map(client.session, ids)
        assert train.info.version == test.info.version == 2
        net = moved(0.1)
        for session, data in ((train, TRAIN), (test, TEST)):
            np.testing.assert_allclose(
                session.hessian() @ V, product(net, data), rtol=1e-10, atol=1e-12
            )
        test.update_parameters(NET)
        assert train.refresh().version == 3
        np.testing.assert_allclose(
            train.hessian() @ V, product(NET, TRAIN), rtol=1e-10, atol=1e-12
        )
        train.delete()
        test.delete()


def test_products_beside_updates_belong_to_one_version_of_both(train):
    """The sum asks both, and asks again what was of an older version."""
    nets = {version: moved(0.05 * version) for version in range(2, 8)}

    async def run():
        async with curvd.aio.connect(train._connection.target) as client:
            first = await client.session(train.id)
            second = await first.on(dataset)

            async def update():
                for version, net in nets.items():
                    assert await first.update_parameters(net) == version

            total = first.hessian() + second.hessian()
            updating = asyncio.ensure_future(update())
            while not updating.done():
                with contextlib.suppress(curvd.VersionMismatch):  # they moved too often
                    value = await (total @ V)
                    found.append((value, {last.version for last in total.last}))
            await updating
            await second.delete()

    with curvd.connect(train._connection.target) as client:
        dataset = client.register_dataset(
            TEST, inputs=["input"], target="target", batch_size=10
        )
    found = []
    asyncio.run(run())
    nets[1] = NET
    for value, versions in found:
        (version,) = versions
        net = nets[version]
        expected = product(net, TRAIN) + product(net, TEST)
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-11)


def test_a_sum_over_both_asks_again_what_is_of_an_older_version(train):
    """The parameters move between the product of the first term and the second's."""
    net, multiplied = moved(0.1), threading.Event()
    with train.on(TEST) as test:
        total = train.hessian() + test.hessian()
        first, second = total.terms
        products = {first: first.matvec, second: second.matvec}

        def of_the_first(v):
            result = products[first](v)
            multiplied.set()
            return result

        def of_the_second(v):
            assert multiplied.wait(60)
            if test.refresh().version == 1:
                train.update_parameters(net)
            return products[second](v)

        first.matvec, second.matvec = of_the_first, of_the_second
        value = total.matvec(V)
        assert [last.version for last in total.last] == [2, 2]
    expected = product(net, TRAIN) + product(net, TEST)
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-11)


def test_a_session_found_by_its_id_needs_a_registered_dataset(client, train):
    found = client.session(train.id)
    with pytest.raises(curvd.InvalidSpec, match=r"pass what client\.register_dataset"):
        found.on(TEST)
    dataset = client.register_dataset(
        TEST, inputs=["input"], target="target", batch_size=4
    )
    with found.on(dataset) as by_info, found.on(dataset.id) as by_id:
        assert by_info.info.batches == by_id.info.batches == 3


def test_what_cannot_be_brought_together_leaves_nothing(client):
    train = client.session_for(NET, nn.CrossEntropyLoss(), TRAIN, batch_size=10)
    before = len(client.sessions())
    with pytest.raises(curvd.InvalidSpec):
        train.on((TEST[0][:, :5], TEST[1]))
    with pytest.raises(curvd.DatasetNotFound):
        train.on("nowhere")
    assert len(client.sessions()) == before
    gone = client.session(train.id)
    train.delete()
    with pytest.raises(curvd.SessionNotFound):
        gone.on(client.register_dataset(TEST, inputs="x", target="y", batch_size=4))
