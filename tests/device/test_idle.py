"""Work that nobody waits for: it begins on an idle device, and gives way at once."""

import threading

import numpy as np
import pytest
from support.callers import calls_as

from curvd_server.device import turns
from curvd_server.device.batcher import Batcher
from curvd_server.system import Identity, alone, yield_point


class Doubles:
    """Multiplies by two and notes it."""

    shares = True
    is_remote = False

    def __init__(self, log):
        self.log = log

    def apply(self, columns, *, counts=(), cancelled):
        self.log.append("product")
        return columns * 2


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def batcher(clock, monkeypatch):
    monkeypatch.setattr(turns, "IDLE_S", 0.01)
    made = Batcher(
        run_columns=4,
        run_bytes=1 << 20,
        pending_columns=8,
        pending_bytes=1000,
        clock=lambda: clock[0],
    )
    yield made
    made.close()


def steps(log, gates, begun=None):
    """Work of several steps, each of which waits for its gate."""

    def job(cancelled):
        if begun is not None:
            begun.set()
        for gate in gates:
            assert gate.wait(300)
            log.append("step")
            yield_point()
        return "done"

    return job


def opened(count):
    gates = [threading.Event() for _ in range(count)]
    for gate in gates:
        gate.set()
    return gates


V = np.ones((1, 2))


def result(ticket):
    return ticket.result(timeout=300).value


def never():
    return False


def test_a_device_that_nobody_asked_yet_is_idle(batcher):
    log = []
    ticket = batcher.run_when_idle(steps(log, opened(3)), due=never)
    assert result(ticket) == "done"


def test_it_waits_until_nobody_has_asked_for_a_while(batcher, clock):
    log = []
    result(batcher.multiply(Doubles(log), V))
    ticket = batcher.run_when_idle(steps(log, opened(1)), due=never)
    result(batcher.multiply(Doubles(log), V))
    assert (log, ticket.done()) == (["product"] * 2, False)
    clock[0] += 0.02
    assert result(ticket) == "done"


def test_it_gives_way_between_two_steps_and_does_not_come_back_at_once(batcher, clock):
    begun, *gates = [threading.Event() for _ in range(3)]
    log = []
    ticket = batcher.run_when_idle(steps(log, gates, begun), due=never)
    assert begun.wait(300)
    product = batcher.multiply(Doubles(log), V)
    gates[0].set()
    result(product)
    gates[1].set()
    result(batcher.multiply(Doubles(log), V))
    assert log == ["step", "product", "product"]
    clock[0] += 0.02
    assert result(ticket) == "done"


def test_what_is_due_takes_turns_with_products(batcher):
    log, due = [], []
    result(batcher.multiply(Doubles(log), V))
    ticket = batcher.run_when_idle(steps(log, opened(2)), due=lambda: bool(due))
    result(batcher.multiply(Doubles(log), V))
    assert not ticket.done()
    due.append(True)
    result(batcher.multiply(Doubles(log), V))
    assert result(ticket) == "done"


def test_it_counts_as_nobody_who_waits(batcher, clock):
    result(batcher.multiply(Doubles([]), V))
    ticket = batcher.run_when_idle(steps([], opened(1)), due=never)
    assert batcher.statistics().waiting == 0
    ticket.cancel()


def test_short_products_stay_on_their_callers_threads_meanwhile(batcher, clock):
    threads = []

    class Noted(Doubles):
        def apply(self, columns, *, counts=(), cancelled):
            threads.append(threading.current_thread())
            return columns * 2

    operator = Noted([])
    result(batcher.multiply(operator, V))
    ticket = batcher.run_when_idle(steps([], opened(1)), due=never)
    while batcher.multiply_now(operator, V) is None:
        pass
    assert threads[-1] is threading.current_thread()
    assert not ticket.done()
    clock[0] += 0.02
    assert result(ticket) == "done"


@pytest.mark.parametrize("ends", ["runs", "is cancelled"])
def test_a_caller_whose_idle_work_waits_is_away_all_the_same(batcher, clock, ends):
    """Who asks again at once is expected, and his short products stay on his thread."""
    ann = Identity("ann")
    with calls_as(ann):
        ticket = batcher.run_when_idle(steps([], opened(1)), due=never)
        for _ in range(3):
            clock[0] += 1e-3
            result(batcher.multiply(Doubles([]), V))
    presence = batcher._presence
    with batcher._lock:
        assert presence._callers["ann"].requests == 0
        assert "ann" in presence.expected()
    if ends == "runs":
        clock[0] += 0.02
        assert result(ticket) == "done"
    else:
        ticket.cancel()
        with calls_as(ann):
            result(batcher.multiply(Doubles([]), V))
    with batcher._lock:
        assert presence._callers["ann"].requests == 0


def test_a_server_that_stops_ends_it(batcher):
    begun = threading.Event()

    def job(cancelled):
        begun.set()
        while not cancelled():
            pass

    ticket = batcher.run_when_idle(job, due=never)
    assert begun.wait(300)
    batcher.close()
    assert ticket.done()


def test_a_section_that_it_is_in_is_left_while_others_wait_for_that(batcher):
    """Else who waits for the section keeps the device from being idle, for ever."""
    lock, begun, gate, log = threading.Lock(), threading.Event(), threading.Event(), []

    def patient(cancelled):
        with alone(lock):
            begun.set()
            assert gate.wait(300)
            for _ in range(3):
                yield_point()
                log.append("patient")

    def waited_for(cancelled):
        with alone(lock):
            log.append("waited for")

    batcher.run_when_idle(patient, due=never)
    assert begun.wait(300)
    other = batcher.run_in_turns(waited_for, lane="other")
    gate.set()
    other.result(timeout=30)
    assert log == ["patient"] * 3 + ["waited for"]
