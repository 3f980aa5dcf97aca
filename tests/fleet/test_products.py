"""Products of a fleet: right whatever the shards, and the same bits whoever computes them."""

import functools
import threading

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from support.fleets import (
    N,
    arrays,
    device_of,
    eager,
    eager_hessian,
    fleet_of,
    load,
    never,
    state,
)

from curvd.contract.enums import LossName, OperatorKind, Tier
from curvd.contract.specs import LossSpec, OperatorSpec
from curvd.errors import (
    Cancelled,
    InvalidSpec,
    InvalidVector,
    OutOfMemory,
    Unavailable,
)
from curvd_server.device.torch_device import TorchDevice
from curvd_server.engine.batch_product import BatchProduct
from curvd_server.fleet import fleet as fleets
from curvd_server.fleet import holdings, keeper, messages
from curvd_server.fleet.seats import Lost, Request

BUDGET = 1 << 30


def built(problem, tier=Tier.FIRST, **spec):
    return problem.build(
        OperatorSpec(**spec), budget_bytes=BUDGET, cancelled=never, tier=tier
    )


def dense(operator):
    return operator.apply(np.eye(operator.size), cancelled=never)


@pytest.fixture
def two():
    with fleet_of(2) as fleet:
        yield fleet


def test_the_hessian_is_eager_torchs_and_has_the_same_bits_on_any_number_of_workers():
    """Class weights and ignored targets are in it: the normaliser is that of all data."""
    found = []
    for workers in (1, 2, 3, 4):
        with fleet_of(workers) as fleet:
            problem = load(device_of(fleet, shards=4))
            found.append(dense(built(problem)))
            loss, gradient = problem.gradient(cancelled=never)
    want = eager_hessian()
    np.testing.assert_allclose(found[0], want, atol=1e-13)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    function, theta = eager()
    theta.requires_grad_()
    value = function(theta)
    value.backward()
    assert loss == pytest.approx(value.item(), rel=1e-13)
    np.testing.assert_allclose(gradient, theta.grad.numpy(), atol=1e-14)


def test_twenty_repetitions_have_the_same_bits(two):
    operator = built(load(device_of(two)))
    v = np.random.default_rng(2).standard_normal((3, operator.size))
    want = operator.apply(v, cancelled=never).copy()
    for _ in range(20):
        np.testing.assert_array_equal(operator.apply(v, cancelled=never), want)


@pytest.mark.parametrize("kind", list(OperatorKind))
def test_every_operator_is_that_of_one_device(two, kind):
    """Sampled targets too: they belong to data points, wherever these are."""
    want = dense(built(load(TorchDevice({}, "cpu")), kind=kind, seed=3))
    got = dense(built(load(device_of(two)), kind=kind, seed=3))
    np.testing.assert_allclose(got, want, atol=1e-13)


def test_the_last_tier_is_as_right(two):
    problem = load(device_of(two))
    first = built(problem)
    final = problem.improve(first, budget_bytes=BUDGET, cancelled=never)
    assert (first.report.tier, final.report.tier) == (Tier.FIRST, Tier.FINAL)
    assert final.report.batches == 9
    np.testing.assert_allclose(dense(final), eager_hessian(), atol=1e-13)
    np.testing.assert_allclose(dense(first), eager_hessian(), atol=1e-13)


def test_a_shard_whose_targets_are_all_ignored_is_exact(two):
    """The first one, on which plans would be decided otherwise."""
    data = arrays()
    data["y"][:9] = -1
    operator = built(load(device_of(two, shards=4), data=data))
    np.testing.assert_allclose(dense(operator), eager_hessian(data=data), atol=1e-13)


def test_targets_that_are_all_ignored_are_refused_and_nothing_stays(two):
    data = arrays()
    data["y"][:] = -1
    with pytest.raises(InvalidSpec, match="no target counts"):
        load(device_of(two), data=data)
    built(load(device_of(two)))
    for held in two.launcher.holdings.values():
        assert len(held._problems) <= 2


def test_weight_decay_scale_and_damping_are_applied_once(two):
    loss = LossSpec(name=LossName.CROSS_ENTROPY, ignore_index=-1, weight_decay=0.5)
    data = arrays()
    one = load(TorchDevice({}, "cpu"), loss=loss, data=data)
    several = load(device_of(two), loss=loss, data=data)
    np.testing.assert_allclose(
        dense(built(several, scale=-2.0, damping=0.25)),
        dense(built(one, scale=-2.0, damping=0.25)),
        atol=1e-13,
    )
    want, got = (p.gradient(cancelled=never) for p in (one, several))
    assert got[0] == pytest.approx(want[0], rel=1e-13)
    np.testing.assert_allclose(got[1], want[1], atol=1e-14)


def test_more_workers_than_mini_batches_leave_some_idle():
    with fleet_of(4) as fleet:
        data = {name: array[:5] for name, array in arrays().items()}
        operator = built(load(device_of(fleet, shards=0), data=data))
        np.testing.assert_allclose(
            dense(operator), eager_hessian(data=data), atol=1e-13
        )


def test_columns_of_the_wrong_shape_are_refused(two):
    operator = built(load(device_of(two)))
    with pytest.raises(InvalidVector, match=r"\[K, P=21\], got float64 \[2, 3\]"):
        operator.apply(np.ones((2, 3)), cancelled=never)


def test_a_new_version_lies_beside_the_old_one(two):
    problem = load(device_of(two))
    old = built(problem)
    moved = problem.with_parameters(state(seed=5))
    new = moved.move(old)
    np.testing.assert_allclose(dense(new), eager_hessian(state(5)), atol=1e-13)
    np.testing.assert_allclose(dense(old), eager_hessian(), atol=1e-13)


def test_another_dataset_takes_the_parameters_of_the_first(two):
    first = load(device_of(two)).with_parameters(state(seed=5))
    data = {name: array[:20] for name, array in arrays().items()}
    other = load(device_of(two), data=data)
    operator = built(other)
    shared = other.sharing(first)
    np.testing.assert_allclose(
        dense(shared.move(operator)), eager_hessian(state(5), data=data), atol=1e-13
    )


def test_an_update_that_one_worker_refuses_changes_none(two, monkeypatch):
    problem = load(device_of(two))
    operator = built(problem)
    want = dense(operator)
    move = holdings.Holdings._move
    refuses = two.launcher.holdings[1]

    def once(self, *given):
        if self is refuses:
            raise InvalidSpec("not here", parameter="1.weight")
        return move(self, *given)

    table = refuses._methods
    monkeypatch.setitem(
        table, holdings.messages.Move, lambda *given: once(refuses, *given)
    )
    with pytest.raises(InvalidSpec, match="not here"):
        problem.with_parameters(state(seed=5))
    np.testing.assert_array_equal(dense(operator), want)
    assert len(two.registry.numbers()) == 2


def test_a_lost_worker_comes_back_and_the_bits_stay(two):
    """Whatever it held is made anew: two versions, and an operator of each."""
    problem = load(device_of(two))
    moved = problem.with_parameters(state(seed=5))
    old = built(problem)
    new = moved.move(old)
    want = dense(old), dense(new)
    for rank in (0, 1, 0):
        two.launcher.end(rank)
        np.testing.assert_array_equal(dense(old), want[0])
        np.testing.assert_array_equal(dense(new), want[1])
    assert two.launcher.starts == 5
    assert [seat.restarts for seat in two.seats] == [2, 1]


def test_a_worker_that_is_lost_in_a_product_computes_it_again(two, monkeypatch):
    operator = built(load(device_of(two)))
    want = dense(operator)
    add, lost = BatchProduct.add, []

    def dies(self, *given):
        if not lost:
            lost.append(1)
            two.launcher.end(1)
        add(self, *given)

    monkeypatch.setattr(BatchProduct, "add", dies)
    np.testing.assert_array_equal(dense(operator), want)
    assert lost


def test_a_worker_that_is_lost_again_and_again_is_an_error_that_says_so(
    two, monkeypatch
):
    operator = built(load(device_of(two)))
    monkeypatch.setattr(fleets, "ATTEMPTS", 2)
    apply = two.launcher.holdings[0]._product.__func__

    def dies(self, *given):
        two.launcher.end(0)
        return apply(self, *given)

    monkeypatch.setattr(holdings.Holdings, "_product", dies)
    for held in two.launcher.holdings.values():
        held._methods[holdings.messages.Product] = held._product
    with pytest.raises(Unavailable, match="worker 0 was lost 2 times"):
        dense(operator)


def test_a_worker_for_which_there_is_no_place_is_waited_for_so_long_and_no_longer(
    two, monkeypatch
):
    """A cluster may say nothing, for ever."""
    operator = built(load(device_of(two)))
    want = dense(operator)
    monkeypatch.setattr(keeper, "_BACKOFF_S", 1.0)
    monkeypatch.setattr(two.launcher, "start", lambda invitation: None)
    monkeypatch.setattr(two.launcher, "ended", lambda rank: None)
    monkeypatch.setattr(two._roster, "start_s", 0.5)
    two.launcher.end(1)
    with pytest.raises(Unavailable, match=r"worker 1 .* above --worker-start-s 0\.5"):
        dense(operator)
    monkeypatch.undo()
    np.testing.assert_array_equal(dense(operator), want)


def test_who_gives_up_stops_all_workers_within_one_mini_batch(two, monkeypatch):
    operator = built(load(device_of(two)))
    want = dense(operator)
    begun, add = [], BatchProduct.add

    def waits(self, *given):
        begun.append(1)
        cancelled = given[-1]
        while not cancelled():
            threading.Event().wait(0.001)
        add(self, *given)

    monkeypatch.setattr(BatchProduct, "add", waits)
    with pytest.raises(Cancelled, match="all workers stopped"):
        operator.apply(np.eye(operator.size), cancelled=lambda: len(begun) == 2)
    assert len(begun) == 2
    monkeypatch.undo()
    np.testing.assert_array_equal(dense(operator), want)


def test_memory_that_runs_out_on_one_worker_stops_all_and_is_told(two, monkeypatch):
    operator = built(load(device_of(two)))
    want = dense(operator)
    short, others = two.launcher.holdings[0], []

    def product(self, m, given, cancelled):
        if self is short:
            raise MemoryError
        while not cancelled():
            threading.Event().wait(0.001)
        others.append(1)
        raise Cancelled("stopped")

    for held in two.launcher.holdings.values():
        bound = functools.partial(product, held)
        monkeypatch.setitem(held._methods, holdings.messages.Product, bound)
    with pytest.raises(OutOfMemory, match="use a smaller batch_size"):
        dense(operator)
    assert others == [1]
    monkeypatch.undo()
    np.testing.assert_array_equal(dense(operator), want)


def test_what_is_closed_is_forgotten_by_all(two):
    problem = load(device_of(two))
    operator = built(problem)
    assert len(two.registry.numbers()) == 2
    operator.close()
    for held in two.launcher.holdings.values():
        assert not held._operators
    assert len(two.registry.numbers()) == 1


@pytest.mark.parametrize("way", ["all", "together"])
def test_a_command_for_a_worker_that_is_gone_leaves_nothing_behind(two, way):
    number = built(load(device_of(two))).entry.build.problem
    check = Request(messages.Check(problem=number, part=0))
    ask = getattr(two, way)
    with pytest.raises(Lost, match="worker 1 was lost"):
        ask({0: check, 1: check}, only={0: 1, 1: 7}, cancelled=lambda: False)
    assert not two._roster.wanted
    assert not any(seat.answers for seat in two.seats)


def test_what_is_closed_waits_for_no_worker_that_is_gone(two, monkeypatch):
    """It would be waited for on the device's thread, by everybody."""
    operator = built(load(device_of(two)))
    monkeypatch.setattr(keeper, "_BACKOFF_S", 0.5)
    monkeypatch.setattr(two.launcher, "start", lambda invitation: None)
    two.launcher.end(1)
    while two.seats[1].is_ready:
        threading.Event().wait(0.01)
    asked, ask = [], two.all

    def noted(requests, **options):
        asked.extend(requests)
        return ask(requests, **options)

    monkeypatch.setattr(two, "all", noted)
    operator.close()
    assert asked == [0]


def test_a_fleet_of_one_has_the_memory_of_one_device():
    """Budgets are shared among shards, so that all of them together keep to it."""
    with fleet_of(1) as fleet:
        problem = load(device_of(fleet, shards=3))
        assert sum(problem._budgets(900).values()) == 900
        operator = problem.build(OperatorSpec(), budget_bytes=0, cancelled=never)
        assert operator.report.kept_batches == 0
        np.testing.assert_allclose(dense(operator), eager_hessian(), atol=1e-13)


def test_data_points_are_gone_through_in_front(two):
    points = load(device_of(two)).points(
        lambda job: job(never), limit=None, expired=never
    )
    assert sum(len(b.targets) for b in points.problem.data) == N
    assert isinstance(points.problem.parameters[0], torch.Tensor)


def test_sessions_on_other_data_share_parameters(two):
    """The other one has fewer mini-batches than there are shards, and idle workers."""
    device, few = device_of(two), {n: a[:3] for n, a in arrays().items()}
    small = load(device, data=few)
    moved = load(device).with_parameters(state(seed=5))
    for problem, other, data in ((small, moved, few), (moved, small, arrays())):
        values = state(seed=5) if other is moved else state()
        shared = problem.sharing(other)
        want = eager_hessian(values, data)
        np.testing.assert_allclose(dense(built(shared)), want, atol=1e-13)
    one, where = two.launcher.holdings[0], small.sharing(moved).entry.number
    parameters = [
        one._problems[number].whole.parameters[0]
        for number in (where, moved.entry.number)
    ]
    assert parameters[0] is parameters[1]


def test_workers_are_described(two):
    found, generation = device_of(two, shards=3).workers()
    assert [(w.rank, w.device, w.shards, w.ready) for w in found] == [
        (0, "cpu:0", 1, True),
        (1, "cpu:1", 2, True),
    ]
    assert (generation, found[1].restarts, found[1].lost) == (2, 0, "")
    two.launcher.end(1)
    built(load(device_of(two)))
    found, generation = device_of(two).workers()
    assert (generation, found[1].restarts) == (3, 1)
    assert "connection ended" in found[1].lost
