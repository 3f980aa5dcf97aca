"""Workers that share parameters: right, in step, and together again after whatever happens."""

import os
import signal
import threading

import numpy as np
import pytest

pytest.importorskip("torch")
from support import failing_worker
from support.fleets import (
    ForkedLauncher,
    arrays,
    eager,
    eager_hessian,
    fleet_of,
    load,
    never,
    state,
)
from support.zoo import REFUSED

from curvd.contract.enums import Dtype, Mode
from curvd.contract.specs import DatasetSpec, ModelSpec, OperatorSpec
from curvd.errors import Cancelled, CurvatureUnverified, NotFinite, OutOfMemory
from curvd_server.device.torch_device import TorchDevice
from curvd_server.fleet import ShardedDevice
from curvd_server.fleet.slices import Slices

ZOO = {"zoo": "support.zoo:build"}
CODE = "from support.failing_worker import main; main()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("failing")
        patch.setenv(failing_worker.FOLDER, str(made))
        yield made


@pytest.fixture(scope="module")
def device(folder):
    launcher = ForkedLauncher(CODE)
    with fleet_of(2, launcher=launcher, patience_s=5.0, world=2, builders=ZOO) as two:
        yield ShardedDevice(two, TorchDevice(ZOO, "cpu"), {})


@pytest.fixture(scope="module")
def problem(device):
    return load(device)


@pytest.fixture(scope="module")
def hessian(problem):
    return problem.build(OperatorSpec(), budget_bytes=1 << 30, cancelled=never)


def dense(operator, cancelled=never):
    return operator.apply(np.eye(operator.size), cancelled=cancelled)


def test_products_are_eager_torchs_with_the_same_bits_each_time(problem, hessian):
    """Nine mini-batches, so one worker has five; ignored targets and class weights."""
    want = dense(hessian)
    np.testing.assert_allclose(want, eager_hessian(), atol=1e-13)
    for _ in range(5):
        np.testing.assert_array_equal(dense(hessian), want)
    function, theta = eager()
    theta.requires_grad_()
    value = function(theta)
    value.backward()
    loss, gradient = problem.gradient(cancelled=never)
    assert loss == pytest.approx(value.item(), rel=1e-13)
    np.testing.assert_allclose(gradient, theta.grad.numpy(), atol=1e-14)
    problem.check(cancelled=never)


def test_some_parameters_and_blocks_of_them_are_those_of_the_whole(problem):
    names = problem.layout.names[1:]
    spec = OperatorSpec(parameters=names, block_sizes=(1, len(names) - 1))
    some = problem.build(spec, budget_bytes=1 << 30, cancelled=never)
    first, second, *_ = problem.layout.parameters
    want = eager_hessian()[first.size :, first.size :]
    want[: second.size, second.size :] = want[second.size :, : second.size] = 0.0
    np.testing.assert_allclose(dense(some), want, atol=1e-13)


def test_another_version_is_beside_the_old_one(problem, hessian):
    moved = problem.with_parameters(state(seed=5))
    new = moved.move(hessian)
    np.testing.assert_allclose(dense(new), eager_hessian(state(5)), atol=1e-13)
    np.testing.assert_allclose(dense(hessian), eager_hessian(), atol=1e-13)


def test_a_cancelled_product_stops_everywhere_and_leaves_all_together(device, hessian):
    group, asked = dict(device.in_step._joined), []

    def cancelled():
        asked.append(None)
        return len(asked) > 2

    with pytest.raises(Cancelled):
        hessian.apply(np.ones((3000, hessian.size)), cancelled=cancelled)
    assert device.in_step._joined == group
    np.testing.assert_allclose(dense(hessian), eager_hessian(), atol=1e-13)


def test_a_product_that_overflows_is_refused_and_leaves_all_together(hessian):
    huge = np.full((1, hessian.size), np.finfo(np.float64).max)
    with pytest.raises(NotFinite, match=r"(NaN|infinite) at \S+ \(index \d+ of"):
        hessian.apply(np.sign(dense(hessian)[:1]) * huge, cancelled=never)
    np.testing.assert_allclose(dense(hessian), eager_hessian(), atol=1e-13)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_without_memory_frees_the_other_and_all_meet_again(
    device, hessian, folder, rank
):
    processes = [seat.hello.pid for seat in device.fleet.seats]
    (folder / f"fail-{rank}").touch()
    with pytest.raises(OutOfMemory):
        dense(hessian)
    (folder / f"fail-{rank}").unlink()
    np.testing.assert_allclose(dense(hessian), eager_hessian(), atol=1e-13)
    assert [seat.hello.pid for seat in device.fleet.seats] == processes


def test_a_wrong_layer_is_refused_by_name_and_all_meet_again(device, hessian):
    module = REFUSED.module()
    values = {n: t.detach().numpy() for n, t in module.state_dict().items()}
    wrong = device.load(
        ModelSpec(builder="zoo", config={"animal": REFUSED.name}),
        values,
        {name: t.numpy() for name, t in REFUSED.arrays().items()},
        DatasetSpec(inputs=("x",), target="y", batch_size=3),
        REFUSED.loss,
        Mode.EVAL,
        Dtype.FLOAT64,
    )
    with pytest.raises(CurvatureUnverified, match="direction") as refused:
        wrong.build(OperatorSpec(), budget_bytes=1 << 30, cancelled=never)
    assert refused.value.metadata["parameters"] == "direction"
    np.testing.assert_allclose(dense(hessian), eager_hessian(), atol=1e-13)


@pytest.mark.parametrize(
    ("rank", "signal_number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_a_worker_that_is_killed_or_frozen_in_a_product_is_replaced(
    device, hessian, rank, signal_number
):
    want, found = dense(hessian), []
    product = threading.Thread(target=lambda: found.append(dense(hessian)))
    product.start()
    os.kill(device.fleet.seats[rank].hello.pid, signal_number)
    product.join(300)
    np.testing.assert_array_equal(found[0], want)


def test_slices_put_together_are_the_vector(problem):
    for world in (2, 3, 64):
        slices = Slices(problem.layout, world)
        V = np.random.default_rng(0).standard_normal((2, problem.layout.size))
        cut = {rank: slices.of(V, rank) for rank in range(world)}
        assert {part.shape for part in cut.values()} == {(2, slices.size)}
        np.testing.assert_array_equal(slices.whole(cut), V)


def test_data_is_whole_on_one_worker_where_there_is_one_mini_batch(device):
    data = {name: a[:3] for name, a in arrays().items()}
    one = load(device, data=data)
    operator = one.build(OperatorSpec(), budget_bytes=1 << 30, cancelled=never)
    np.testing.assert_allclose(dense(operator), eager_hessian(data=data), atol=1e-13)
