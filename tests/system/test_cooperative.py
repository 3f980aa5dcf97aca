"""Long work takes turns with others: who comes waits for one step of it, not for all."""

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest

from curvd.errors import Cancelled, OutOfMemory, Unavailable
from curvd_server.device.batcher import Batcher
from curvd_server.device.lanes import MOST_LONG
from curvd_server.system.cooperative import alone, yield_point


class Clock:
    """Seconds that pass when somebody says so."""

    now_s = 0.0

    def __call__(self):
        return self.now_s


class Doubles:
    """An operator that multiplies by two, and writes down that it did."""

    shares = True

    def __init__(self, log, clock, seconds=1.0):
        self.log, self.clock, self.seconds = log, clock, seconds

    def apply(self, columns, *, counts=(), cancelled):
        self.log.append("product")
        self.clock.now_s += self.seconds
        return 2 * columns


@pytest.fixture
def clock():
    return Clock()


def batcher_of(clock, **options):
    limits = {"pending_columns": 8, "pending_bytes": 1000, "run_columns": 4}
    return Batcher(run_bytes=1 << 20, clock=clock, **limits, **options)


@pytest.fixture
def batcher(clock):
    made = batcher_of(clock)
    yield made
    made.close()


def result(ticket):
    return ticket.result(timeout=300).value


class Passes:
    """An operator that walks over so many mini-batches."""

    shares = True

    def __init__(self, log, clock, count, during=lambda step: None):
        self.log, self.clock, self.count, self.during = log, clock, count, during

    def apply(self, columns, *, counts=(), cancelled):
        for step in range(self.count):
            if cancelled():
                raise Cancelled("stopped between two mini-batches")
            self.log.append("batch")
            self.during(step)
            self.clock.now_s += 1.0
        return 3 * columns


def steps(log, clock, count, *, name="step", seconds=1.0, during=lambda step: None):
    """Long work of so many steps, each of which takes some seconds."""

    def job(cancelled):
        for step in range(count):
            log.append(name)
            during(step)
            clock.now_s += seconds
            if cancelled():
                raise Cancelled("stopped between two steps")
        return count

    return job


def held(batcher):
    """Keep the device busy until all is queued; returns what lets it go."""
    gate = threading.Event()
    batcher.run(lambda cancelled: gate.wait(300))
    return gate.set


def test_a_product_waits_for_the_step_that_runs_and_no_other(batcher, clock):
    log, tickets = [], []
    operator = Doubles(log, clock)

    def ask(step):
        log.append("asked")
        tickets.append(batcher.multiply(operator, np.ones((1, 2))))

    assert result(batcher.run_in_turns(steps(log, clock, 4, during=ask))) == 4
    for ticket in tickets:
        np.testing.assert_array_equal(result(ticket), np.full((1, 2), 2.0))
    assert log == ["step", "asked", "product"] * 4


def test_long_work_that_nobody_waits_for_is_not_interrupted(batcher, clock):
    threads = []

    def job(cancelled):
        for _ in range(3):
            threads.append(threading.current_thread())
            clock.now_s += 1.0
            yield_point()

    result(batcher.run_in_turns(job))
    assert len(set(threads)) == 1
    assert batcher.statistics().runs == 1


def test_a_product_waits_for_one_turn_however_many_openings_go_on(batcher, clock):
    log, tickets = [], []
    operator = Doubles(log, clock)

    def ask(step):
        if step == 0:
            tickets.append(batcher.multiply(operator, np.ones((1, 2))))

    let = held(batcher)
    tickets += [
        batcher.run_in_turns(steps(log, clock, 2, name=n, during=d), lane=n)
        for n, d in (("a", ask), ("b", lambda step: None), ("c", lambda step: None))
    ]
    let()
    for ticket in tickets:
        result(ticket)
    assert log == ["a", "product", "b", "c", "a", "b", "c"]


def test_a_product_over_much_data_gives_way_between_mini_batches(batcher, clock):
    log, tickets = [], []
    short = Doubles(log, clock, seconds=0.0)

    def ask(step):
        if step == 1:
            tickets.append(batcher.multiply(short, np.ones((1, 2))))

    long = batcher.multiply(Passes(log, clock, 4, ask), np.ones((1, 2)))
    np.testing.assert_array_equal(result(long), np.full((1, 2), 3.0))
    np.testing.assert_array_equal(result(tickets[0]), np.full((1, 2), 2.0))
    assert log == ["batch", "batch", "product", "batch", "batch"]
    assert long.result().compute_s == 4.0  # of its own


def test_a_product_that_is_known_to_be_short_keeps_its_thread(batcher, clock):
    threads = []
    operator = Doubles([], clock, seconds=0.01)

    def ask():
        apply = operator.apply
        here = threading.current_thread
        batcher.run(lambda c: threads.append(here()))
        operator.apply = lambda *a, **k: (threads.append(here()), apply(*a, **k))[1]
        result(batcher.multiply(operator, np.ones((1, 2))))
        operator.apply = apply

    ask()  # it is not known yet
    ask()
    assert threads[0] is not threads[1]
    assert threads[2] is threads[3] is threads[0]


def test_products_that_give_way_have_one_thread_as_long_as_they_come_singly(
    batcher, clock
):
    threads = set()
    note = lambda step: threads.add(threading.current_thread())  # noqa: E731
    for _ in range(5):
        result(batcher.multiply(Passes([], clock, 2, note), np.ones((1, 2))))
    assert len(threads) == 1


def test_a_product_that_everybody_left_stops_while_it_gives_way(batcher, clock):
    log, tickets = [], []

    def leave(step):
        if step == 1:
            tickets[0].cancel()

    let = held(batcher)
    tickets.append(batcher.multiply(Passes(log, clock, 9, leave), np.ones((1, 2))))
    tickets.append(batcher.run_in_turns(steps(log, clock, 2), lane=1))
    let()
    assert result(tickets[1]) == 2
    with pytest.raises(Cancelled, match="between two mini-batches"):
        result(tickets[0])
    assert log.count("batch") == 2


def test_long_products_that_do_not_fit_together_run_one_by_one(batcher, clock):
    class Narrow(Passes):
        def apply(self, columns, *, counts=(), cancelled):
            if len(columns) > 1:
                raise OutOfMemory("does not fit")
            return super().apply(columns, cancelled=cancelled)

    log = []
    operator = Narrow(log, clock, 2)
    let = held(batcher)
    tickets = [batcher.multiply(operator, np.full((1, 2), v)) for v in (1.0, 2.0)]
    let()
    for value, ticket in zip((3.0, 6.0), tickets, strict=True):
        np.testing.assert_array_equal(result(ticket), np.full((1, 2), value))
    assert log == ["batch"] * 4


def test_short_steps_share_a_turn_as_long_as_the_latest_product_took(batcher, clock):
    log, tickets = [], []
    operator = Doubles(log, clock, seconds=0.1)

    def ask(step):
        if step in (0, 1):
            tickets.append(batcher.multiply(operator, np.ones((1, 2))))

    result(batcher.run_in_turns(steps(log, clock, 9, seconds=0.03, during=ask)))
    for ticket in tickets:
        result(ticket)
    # Nothing had run before the first, and 0.1 s before the second.
    assert log == ["step", "product", *["step"] * 4, "product", *["step"] * 4]


def test_openings_share_the_device_fairly(batcher, clock):
    log = []
    let = held(batcher)
    tickets = [
        batcher.run_in_turns(steps(log, clock, 3, name=name), lane=name)
        for name in "abc"
    ]
    let()
    for ticket in tickets:
        result(ticket)
    assert log == list("abcabcabc")


def test_work_of_one_lane_is_done_in_order(batcher, clock):
    log = []
    let = held(batcher)
    first = batcher.run_in_turns(steps(log, clock, 2, name="a"), lane=1)
    second = batcher.run(lambda cancelled: log.append("b"), lane=1)
    third = batcher.run_in_turns(steps(log, clock, 1, name="c"), lane=1)
    other = batcher.run_in_turns(steps(log, clock, 9, name="."), lane=2)
    let()
    for ticket in (first, second, third, other):
        result(ticket)
    assert [what for what in log if what != "."] == ["a", "a", "b", "c"]


def test_an_opening_whose_caller_left_ends_at_its_next_step(batcher, clock):
    log, tickets = [], []

    def leave(step):
        if step == 1:
            tickets[0].cancel()

    let = held(batcher)
    tickets.append(batcher.run_in_turns(steps(log, clock, 9, during=leave), lane=1))
    tickets.append(batcher.run_in_turns(steps(log, clock, 2, name="."), lane=2))
    let()
    with pytest.raises(Cancelled, match="between two steps"):
        result(tickets[0])
    assert log.count("step") == 2
    assert result(tickets[1]) == 2


def test_an_opening_whose_caller_left_before_it_began_never_begins(batcher, clock):
    log = []
    let = held(batcher)
    ticket = batcher.run_in_turns(steps(log, clock, 2))
    ticket.cancel()
    let()
    with pytest.raises(CancelledError):
        result(ticket)
    result(batcher.run(lambda cancelled: None))
    assert not log
    assert batcher.statistics().cancelled == 1


def test_large_openings_do_not_go_on_at_once_and_begin_as_they_came(clock):
    batcher, log = batcher_of(clock, long_bytes=10), []
    let = held(batcher)
    sizes = {"a": 8, "b": 8, "c": 2, "d": 100}
    tickets = [
        batcher.run_in_turns(
            steps(log, clock, 2, name=name), lane=name, room_bytes=sizes[name]
        )
        for name in sizes
    ]
    let()
    for ticket in tickets:
        result(ticket)
    batcher.close()
    assert log == list("aabcbcdd")


def test_only_so_many_openings_go_on_at_once(batcher, clock):
    begun, most = set(), []

    def job(cancelled, name):
        begun.add(name)
        for _ in range(3):
            most.append(len(begun))
            clock.now_s += 1.0
            assert not cancelled()
        begun.remove(name)

    let = held(batcher)
    tickets = [
        batcher.run_in_turns(lambda c, name=name: job(c, name), lane=name, room_bytes=0)
        for name in range(3 * MOST_LONG)
    ]
    let()
    for ticket in tickets:
        result(ticket)
    assert max(most) == MOST_LONG


def test_an_error_of_long_work_reaches_its_caller(batcher):
    with pytest.raises(ZeroDivisionError):
        result(batcher.run_in_turns(lambda cancelled: 1 / 0))
    assert result(batcher.run(lambda cancelled: 1)) == 1


def test_closing_ends_long_work_wherever_it_pauses(clock):
    batcher, log, ended = batcher_of(clock), [], []

    def job(cancelled):
        try:
            while True:
                clock.now_s += 1.0
                yield_point()
        finally:
            ended.append(True)

    started = threading.Event()
    let = held(batcher)
    paused = batcher.run_in_turns(job, lane=1)

    def block(cancelled):
        started.set()
        while not cancelled():
            pass
        raise Cancelled("closed")

    batcher.run(block, lane=2)
    waiting = batcher.run_in_turns(steps(log, clock, 1), lane=3)
    let()
    assert started.wait(300)
    batcher.close()
    for ticket in (paused, waiting):
        with pytest.raises((Unavailable, Cancelled)):
            result(ticket)
    assert ended == [True]


def test_a_section_that_others_must_not_enter_is_waited_for_in_turns(batcher, clock):
    lock, log = threading.Lock(), []

    def job(cancelled, name):
        with alone(lock):
            for _ in range(3):
                log.append(name)
                clock.now_s += 1.0
                yield_point()

    let = held(batcher)
    tickets = [
        batcher.run_in_turns(lambda c, name=name: job(c, name), lane=name)
        for name in "ab"
    ]
    let()
    for ticket in tickets:
        result(ticket)
    assert log == list("aaabbb")


def test_outside_of_long_work_there_is_nothing_to_yield_to():
    yield_point()
    lock = threading.Lock()
    with lock, alone(lock):
        pass
