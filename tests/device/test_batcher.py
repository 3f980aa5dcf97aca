"""Natural batching: who waited together runs together, in turns, and within bounds."""

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest

from curvd.errors import Cancelled, OutOfMemory, Overloaded, Unavailable
from curvd_server.device import joining
from curvd_server.device.batcher import Batcher
from curvd_server.device.paces import _SHORT_S


class Gated:
    """An operator that multiplies by two, when it is let."""

    shares = True
    is_remote = False

    def __init__(self, order=None):
        self.runs, self.requests, self.order = [], [], order
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.polls = 0
        self.fails = None

    def apply(self, columns, *, counts=(), cancelled):
        self.entered.release()
        while not self.gate.acquire(timeout=0.001):
            self.polls += 1
            if cancelled():
                raise Cancelled("stopped between two mini-batches")
        self.runs.append(len(columns))
        self.requests.append(list(counts))
        if self.order is not None:
            self.order.append(self)
        if self.fails is not None:
            self.fails(columns)
        return columns * 2

    def let(self, runs=1):
        self.gate.release(runs)

    def wait_until_running(self):
        assert self.entered.acquire(timeout=300)


@pytest.fixture
def batcher():
    made = Batcher(
        run_columns=4, run_bytes=1 << 20, pending_columns=8, pending_bytes=1000
    )
    yield made
    made.close()


def columns(*values):
    return np.array([[v, v] for v in values], dtype=float)


def result(ticket):
    return ticket.result(timeout=300).value


def occupied(batcher):
    """A busy device: the operator that runs, and its ticket."""
    operator = Gated()
    ticket = batcher.multiply(operator, columns(0))
    operator.wait_until_running()
    return operator, ticket


def test_what_queued_while_the_device_was_busy_runs_as_one_product(batcher):
    operator, first = occupied(batcher)
    waiting = [batcher.multiply(operator, columns(v)) for v in (1, 2, 3)]
    operator.let(2)
    for value, ticket in enumerate([first, *waiting]):
        np.testing.assert_array_equal(result(ticket), columns(2 * value))
    assert operator.runs == [1, 3]
    assert [t.result().run_columns for t in (first, *waiting)] == [1, 3, 3, 3]


def test_an_operator_is_told_whose_columns_run_together(batcher):
    operator, first = occupied(batcher)
    waiting = [batcher.multiply(operator, columns(*v)) for v in ((1, 2), (3,))]
    operator.let(2)
    for ticket in (first, *waiting):
        result(ticket)
    assert operator.requests == [[], [2, 1]]


def test_large_operands_that_share_nothing_run_one_after_the_other(
    batcher, monkeypatch
):
    operator, first = occupied(batcher)
    operator.shares = False
    nbytes = columns(0).nbytes
    monkeypatch.setattr(joining, "_LITTLE_BYTES", 2 * nbytes)
    waiting = [batcher.multiply(operator, columns(v)) for v in (1, 2, 3)]
    operator.let(3)
    for value, ticket in enumerate([first, *waiting]):
        np.testing.assert_array_equal(result(ticket), columns(2 * value))
    assert operator.runs == [1, 2, 1]  # two of them are little


def test_a_lone_request_does_not_wait_for_others(batcher):
    operator = Gated()
    operator.let()
    np.testing.assert_array_equal(
        result(batcher.multiply(operator, columns(1))), columns(2)
    )


def test_a_run_has_a_largest_size(batcher):
    operator, _ = occupied(batcher)
    waiting = [batcher.multiply(operator, columns(1, 2)) for _ in range(3)]
    operator.let(3)
    for ticket in waiting:
        result(ticket)
    assert operator.runs == [1, 4, 2]


def test_a_request_larger_than_a_run_goes_alone(batcher):
    operator, _ = occupied(batcher)
    large = batcher.multiply(operator, columns(*range(9)))
    operator.let(2)
    assert len(result(large)) == 9


def test_operators_take_turns(batcher):
    order = []
    busy, _ = occupied(batcher)
    greedy, modest = Gated(order), Gated(order)
    tickets = [batcher.multiply(greedy, columns(1, 2, 3)) for _ in range(3)]
    tickets.append(batcher.multiply(modest, columns(1)))
    for operator in (greedy, modest):
        operator.let(3)
    busy.let()
    for ticket in tickets:
        result(ticket)
    assert order == [greedy, modest, greedy, greedy]


def test_jobs_of_one_lane_run_in_order_and_alone(batcher):
    operator, _ = occupied(batcher)
    seen = []
    jobs = [batcher.run(lambda c, i=i: seen.append(i), lane="a") for i in range(3)]
    operator.let()
    for job in jobs:
        assert job.result(timeout=300).run_columns == 0
    assert seen == [0, 1, 2]


def test_the_cancelled_are_skipped_and_counted(batcher):
    operator, _ = occupied(batcher)
    given_up = batcher.multiply(operator, columns(1))
    kept = batcher.multiply(operator, columns(2))
    assert given_up.cancel()
    operator.let(2)
    np.testing.assert_array_equal(result(kept), columns(4))
    assert operator.runs == [1, 1]
    assert batcher.statistics().cancelled == 1
    with pytest.raises(CancelledError):
        given_up.result()


def test_a_run_stops_when_all_its_members_gave_up(batcher):
    operator, ticket = occupied(batcher)
    ticket.cancel()
    with pytest.raises(Cancelled):
        ticket.result(timeout=300)
    assert operator.runs == []


def test_a_run_goes_on_while_one_member_still_wants_it(batcher):
    operator, first = occupied(batcher)
    members = [batcher.multiply(operator, columns(v)) for v in (1, 2)]
    operator.let()
    result(first)
    operator.wait_until_running()
    members[0].cancel()
    before = operator.polls
    while operator.polls < before + 3:
        pass
    operator.let()
    np.testing.assert_array_equal(result(members[1]), columns(4))


def test_a_failing_run_reaches_every_member(batcher):
    operator, first = occupied(batcher)
    members = [batcher.multiply(operator, columns(v)) for v in (1, 2)]
    operator.let()
    result(first)

    def fail(_):
        raise ZeroDivisionError

    operator.fails = fail
    operator.let()
    for member in members:
        with pytest.raises(ZeroDivisionError):
            member.result(timeout=300)


def test_one_request_out_of_memory_does_not_take_others_with_it(batcher):
    operator, first = occupied(batcher)

    def only_small(V):
        if len(V) > 2:
            raise OutOfMemory("does not fit")

    operator.fails = only_small
    small = batcher.multiply(operator, columns(1))
    large = batcher.multiply(operator, columns(1, 2, 3))
    operator.let(4)
    result(first)
    np.testing.assert_array_equal(result(small), columns(2))
    with pytest.raises(OutOfMemory):
        large.result(timeout=300)


def test_the_queue_is_bounded_in_columns_and_says_when_to_come_back(batcher):
    with batcher.reserve(6, 10), batcher.reserve(2, 10):
        with pytest.raises(Overloaded, match="8 columns and 20 bytes") as caught:
            batcher.reserve(1, 10).__enter__()
        assert caught.value.retry_after_s > 0
    assert batcher.statistics().reserved_columns == 0


def test_the_queue_is_bounded_in_bytes(batcher):
    with (
        batcher.reserve(1, 900),
        pytest.raises(Overloaded, match="limits of 8 and 1000"),
    ):
        batcher.reserve(1, 101).__enter__()


def test_a_request_alone_is_never_turned_away(batcher):
    with batcher.reserve(1000, 1 << 40):
        pass


def test_closing_cancels_what_runs_and_refuses_what_waits():
    batcher = Batcher(run_columns=4, run_bytes=99, pending_columns=8, pending_bytes=99)
    operator, running = occupied(batcher)
    waiting = batcher.multiply(operator, columns(1, 2, 3, 4))
    batcher.close()
    for ticket in (running, waiting):
        with pytest.raises(Unavailable, match="shutting down"):
            ticket.result(timeout=300)
    with pytest.raises(Unavailable, match="shutting down"):
        batcher.multiply(operator, columns(1))


def test_statistics_count_runs_requests_and_columns(batcher):
    operator, first = occupied(batcher)
    waiting = [batcher.multiply(operator, columns(1, 2)) for _ in range(2)]
    assert batcher.statistics().waiting == 2
    operator.let(2)
    for ticket in (first, *waiting):
        result(ticket)
    batcher.run(lambda c: None).result(timeout=300)
    found = batcher.statistics()
    assert (found.requests, found.columns, found.waiting) == (4, 5, 0)


class Quick:
    """An operator that multiplies by two, and says on which thread."""

    shares = True
    is_remote = False

    def __init__(self):
        self.threads, self.inside = [], lambda: None

    def apply(self, columns, *, counts=(), cancelled):
        self.threads.append(threading.current_thread())
        self.inside()
        return columns * 2


def known_to_be_quick(batcher):
    operator = Quick()
    result(batcher.multiply(operator, columns(1)))
    idle(batcher)
    # The machine may be busy; how slow it was is forgotten by and by.
    for _ in range(50):
        batcher._paces.count(operator, 1, 0.0, complete=True)
    return operator


def idle(batcher):
    """Wait until the device's thread sleeps."""
    while not batcher._asleep:
        time.sleep(0.001)


def test_a_short_product_of_a_lone_caller_wakes_nobody(batcher):
    operator = known_to_be_quick(batcher)
    done = batcher.multiply_now(operator, columns(3, 4))
    np.testing.assert_array_equal(done.value, columns(6, 8))
    assert (done.queue_s, done.run_columns) == (0.0, 2)
    assert operator.threads[1] is threading.current_thread()
    assert operator.threads[0] is not threading.current_thread()
    statistics = batcher.statistics()
    assert (statistics.runs, statistics.requests, statistics.columns) == (2, 2, 3)
    # What it took counts, also as the quickest of so many columns.
    assert batcher._paces.slowest_s[operator] > 0
    assert [*batcher._paces._quickest[operator]] == [1, 2]


def test_what_is_not_known_to_be_short_belongs_in_the_queue(batcher):
    operator = Quick()
    idle(batcher)
    assert batcher.multiply_now(operator, columns(1)) is None


def test_what_others_compute_belongs_in_the_queue(batcher):
    """They may fall silent, and the caller's thread is that of all calls."""
    operator = known_to_be_quick(batcher)
    operator.is_remote = True
    assert batcher.multiply_now(operator, columns(1)) is None


def test_many_columns_of_a_short_product_are_not_short(batcher):
    operator = known_to_be_quick(batcher)
    batcher._paces.slowest_s[operator] = _SHORT_S / 2
    assert batcher.multiply_now(operator, columns(1, 2, 3)) is None
    assert batcher.multiply_now(operator, columns(1, 2)) is not None


def test_nobody_overtakes_a_busy_device(batcher):
    quick = known_to_be_quick(batcher)
    operator, first = occupied(batcher)
    assert batcher.multiply_now(quick, columns(1)) is None
    operator.let()
    result(first)


def test_what_comes_meanwhile_runs_afterwards(batcher):
    operator = known_to_be_quick(batcher)
    other, tickets = Quick(), []
    operator.inside = lambda: tickets.append(batcher.multiply(other, columns(5)))
    batcher.multiply_now(operator, columns(1))
    np.testing.assert_array_equal(result(tickets[0]), columns(10))
    assert len(other.threads) == 1


def test_an_error_on_the_way_leaves_the_device_to_others(batcher):
    operator = known_to_be_quick(batcher)
    operator.inside = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        batcher.multiply_now(operator, columns(1))
    operator.inside = lambda: None
    np.testing.assert_array_equal(
        result(batcher.multiply(operator, columns(2))), columns(4)
    )


def test_a_closed_device_has_no_short_products():
    batcher = Batcher(
        run_columns=4, run_bytes=1 << 20, pending_columns=8, pending_bytes=1000
    )
    operator = known_to_be_quick(batcher)
    batcher.close()
    assert batcher.multiply_now(operator, columns(1)) is None


def test_paces_of_operators_that_are_gone_are_forgotten(batcher):
    operator = known_to_be_quick(batcher)
    assert len(batcher._paces.slowest_s) == 1
    del operator
    assert not batcher._paces.slowest_s


@pytest.fixture
def no_collections():
    """Nobody looks for circles of references."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("how", ["given up", "fails"])
def test_what_a_run_worked_with_is_free_when_it_failed(batcher, no_collections, how):
    operator = Gated()

    def fail(columns):
        raise Cancelled("as the engine says it")

    operator.fails = fail
    ticket = batcher.multiply(operator, columns(0))
    operator.wait_until_running()
    if how == "given up":
        ticket.cancel()
    operator.let()
    with pytest.raises((Cancelled, CancelledError)):
        result(ticket)
    result(batcher.run(lambda poll: None))  # the device has let go of the run
    gone = weakref.ref(operator)
    del operator, fail
    assert gone() is None  # the ticket is held still
