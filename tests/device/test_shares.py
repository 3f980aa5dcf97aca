"""Callers share a device by their weights, however much each of them asks for."""

import itertools
import threading

import numpy as np
import pytest
from support.callers import calls_as

from curvd_server.device import paces
from curvd_server.device import turns as turning
from curvd_server.device.batcher import Batcher
from curvd_server.device.lanes import Lanes
from curvd_server.device.requests import Ticket
from curvd_server.device.shares import Shares
from curvd_server.system import Identity

ANN, BEN = Identity("ann"), Identity("ben")


def ticket(caller):
    with calls_as(caller):
        return Ticket(lambda poll: None, None)


def turns(lanes, *, count, seconds, refill):
    """Let lanes have turns; each caller always has more to do. Says who had them."""
    had = []
    for _ in range(count):
        key, lane = lanes.next(idle=False)
        taken = lane.tickets.popleft()
        had.append(taken.caller)
        lanes.charge([taken.caller], seconds[taken.caller.name])
        refill(key, taken.caller)
        lanes.rotate(key, lane, after_long=False)
    return had


def busy(weights, lanes_of):
    """Lanes of callers who always want more, and what refills them."""
    lanes = Lanes(1e9, lambda caller: weights.get(caller.name, 1.0))
    for caller, count in lanes_of:
        for n in range(count):
            lanes.add((caller.name, n), None, ticket(caller))
    return lanes, lambda key, caller: lanes.add(key, None, ticket(caller))


@pytest.mark.parametrize("many", [1, 50])
def test_a_caller_with_many_lanes_has_no_more_of_the_device(many):
    lanes, refill = busy({}, [(BEN, many), (ANN, 1)])
    had = turns(lanes, count=100, seconds={"ann": 1.0, "ben": 1.0}, refill=refill)
    assert had.count(ANN) == had.count(BEN) == 50


def test_shares_are_of_time_not_of_turns():
    lanes, refill = busy({}, [(BEN, 3), (ANN, 1)])
    had = turns(lanes, count=110, seconds={"ann": 1.0, "ben": 10.0}, refill=refill)
    assert 9 <= had.count(ANN) / had.count(BEN) <= 11


def test_weights_divide_the_device():
    lanes, refill = busy({"ann": 3.0}, [(BEN, 5), (ANN, 1)])
    had = turns(lanes, count=100, seconds={"ann": 1.0, "ben": 1.0}, refill=refill)
    assert 74 <= had.count(ANN) <= 76


def test_whoever_comes_waits_for_the_turn_under_way_only():
    lanes, refill = busy({}, [(BEN, 50)])
    turns(lanes, count=7, seconds={"ben": 1.0}, refill=refill)
    lanes.add("new", None, ticket(ANN))
    assert lanes.next(idle=False)[0] == "new"


def test_nobody_saves_up_time_while_away():
    shares = Shares(lambda caller: 1.0)
    shares.had(["ann", "ben"])
    shares.charge([ANN], 1.0)
    for _ in range(100):
        shares.had(["ben"])
        shares.charge([BEN], 1.0)
    had = shares.had(["ann", "ben"])
    assert had["ben"] - had["ann"] <= 1.0


def test_who_has_had_more_waits_for_who_is_expected():
    lanes, refill = busy({}, [(BEN, 3), (ANN, 1)])
    turns(lanes, count=10, seconds={"ann": 1.0, "ben": 2.0}, refill=refill)
    del lanes._lanes["ann", 0]  # her answer has left, and she is away
    assert lanes.is_owed(["ann"], [BEN], 0.0) != lanes.is_owed(["ben"], [ANN], 0.0)
    while lanes.next(idle=False, expected=["ann"])[1] is not None:
        turns(lanes, count=1, seconds={"ben": 1.0}, refill=refill)
    # Now he has had more: without her he would go on.
    assert lanes.next(idle=False)[1].caller == "ben"
    lanes.add("back", None, ticket(ANN))
    assert lanes.next(idle=False, expected=[])[0] == "back"


@pytest.mark.parametrize("aside", [False, True])
def test_nobody_owes_time_that_he_had_alone(aside):
    lanes, refill = busy({}, [(BEN, 1), (ANN, 1)])
    turns(lanes, count=4, seconds={"ann": 1.0, "ben": 1.0}, refill=refill)
    del lanes._lanes["ben", 0]
    if aside:
        for _ in range(100):
            lanes.charge_aside(ANN, 1.0, [])
    else:
        turns(lanes, count=100, seconds={"ann": 1.0}, refill=refill)
    lanes.add(("ben", 0), None, ticket(BEN))
    had = turns(lanes, count=10, seconds={"ann": 1.0, "ben": 1.0}, refill=refill)
    assert 4 <= had.count(ANN) <= 6


def test_nobody_waits_for_who_has_had_more():
    lanes, refill = busy({}, [(BEN, 1), (ANN, 1)])
    turns(lanes, count=4, seconds={"ann": 5.0, "ben": 1.0}, refill=refill)
    del lanes._lanes["ann", 0]
    assert lanes.next(idle=False, expected=["ann"])[1].caller == "ben"
    assert not lanes.is_owed(["ann"], [BEN], 1.0)
    assert lanes.is_owed(["ann"], [BEN], 20.0)


def test_a_run_of_several_is_paid_by_all_of_them():
    shares = Shares(lambda caller: 1.0)
    shares.had(["ann", "ben"])
    shares.charge([ANN, ANN, ANN, BEN], 4.0)
    assert shares.had(["ann", "ben"]) == {"ann": 3.0, "ben": 1.0}


def test_one_caller_alone_has_the_order_of_lanes():
    lanes, refill = busy({}, [(ANN, 3)])
    keys = []
    for _, _ in zip(range(6), itertools.count(), strict=False):
        key, lane = lanes.next(idle=False)
        keys.append(key[1])
        taken = lane.tickets.popleft()
        lanes.charge([taken.caller], 1.0)
        refill(key, ANN)
        lanes.rotate(key, lane, after_long=False)
    assert keys == [0, 1, 2, 0, 1, 2]


class Stepping:
    """An operator of several steps, each of which waits until it is let."""

    shares = True

    def __init__(self, name, steps, order):
        self.name, self.steps, self.order = name, steps, order
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def apply(self, columns, *, counts=(), cancelled):
        for _ in range(self.steps):
            self.entered.release()
            assert self.gate.acquire(timeout=300)
            self.order.append(self.name)
            cancelled()
        return columns


class Doubles:
    """An operator whose products take no time, and are noted."""

    shares = True

    def __init__(self, name, order):
        self.name, self.order = name, order

    def apply(self, columns, *, counts=(), cancelled):
        self.order.append(self.name)
        return 2 * columns


def test_the_device_waits_a_moment_for_who_comes_back_at_once():
    now, had = [0.0], []
    batcher = Batcher(
        run_columns=4,
        run_bytes=1 << 20,
        pending_columns=8,
        pending_bytes=1000,
        clock=lambda: now[0],
    )
    hers, his = Doubles("ann", had), Doubles("ben", had)

    def ask(operator, caller):
        with calls_as(caller):
            return batcher.multiply(operator, np.ones((1, 2)))

    try:
        for _ in range(3):  # she comes back after a millisecond each time
            ask(hers, ANN).result(timeout=300)
            now[0] += 1e-3
        ask(his, BEN).result(timeout=300)
        with batcher._lock:
            batcher._lanes.charge([BEN], 1.0)  # he has had a second more
        ask(hers, ANN).result(timeout=300)
        had.clear()
        waiting = ask(his, BEN)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)  # the clock stands still, and he with it
        ask(hers, ANN).result(timeout=300)
        assert had == ["ann"]
        now[0] += 1.0  # this time she stays away
        waiting.result(timeout=300)
        assert had == ["ann", "ben"]
    finally:
        batcher.close()


@pytest.mark.parametrize(
    ("callers", "order"),
    [
        ((BEN, ANN), ["ben", "ann", "ben", "ben"]),
        ((Identity(), Identity()), ["ben", "ben", "ben", "ann"]),
    ],
)
def test_a_caller_with_a_name_waits_for_one_step_of_another(
    monkeypatch, callers, order
):
    monkeypatch.setattr(paces, "LONG_S", 1e9)
    monkeypatch.setattr(paces, "SHARED_LONG_S", -1.0)
    monkeypatch.setattr(turning, "_SHARED_TURN_S", 0.0)
    had = []
    long, short = Stepping("ben", 3, had), Stepping("ann", 1, had)
    # Every look at the clock is a microsecond: the machine decides nothing.
    ticks = itertools.count()
    batcher = Batcher(
        run_columns=4,
        run_bytes=1 << 20,
        pending_columns=8,
        pending_bytes=1000,
        clock=lambda: next(ticks) * 1e-6,
    )

    def ask(operator, caller):
        with calls_as(caller):
            return batcher.multiply(operator, np.ones((1, 2)))

    try:
        for operator, caller in zip((long, short), callers, strict=True):
            operator.gate.release(operator.steps)  # so that its pace is known
            ask(operator, caller).result(timeout=300)
            for _ in range(operator.steps):
                assert operator.entered.acquire(timeout=300)
        had.clear()
        tickets = [ask(long, callers[0])]
        assert long.entered.acquire(timeout=300)
        tickets.append(ask(short, callers[1]))
        short.gate.release()
        long.gate.release(3)
        for ticket in tickets:
            ticket.result(timeout=300)
        assert had == order
    finally:
        batcher.close()
