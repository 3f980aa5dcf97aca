"""How long a turn lasts, whom it ends for, and when a device is idle."""

import threading

import pytest
from support.callers import calls_as

from curvd_server.device.lanes import Lanes, Run
from curvd_server.device.presence import Presence
from curvd_server.device.requests import Ticket
from curvd_server.device.turns import _SHARED_TURN_S, _TURN_S, IDLE_S, Turns
from curvd_server.system import Identity, LongWork, Threads

ANN, BEN = Identity("ann"), Identity("ben")
LEAST_S, MOST_S = _TURN_S
SOON_S = 1e-6
"""How far before and after its end a turn is looked at."""


class Device:
    """What turns look at, with a clock that moves when a test says so."""

    def __init__(self):
        self.now_s = 100.0
        self.lanes = Lanes(1e9)
        self.presence = Presence(self.clock)
        self.turns = Turns(self.lanes, self.presence, threading.Lock(), self.clock)

    def clock(self):
        return self.now_s

    def queue(self, caller=ANN, *, waits=None, room_bytes=None):
        """Have somebody wait, and say for what: a run of his alone."""
        with calls_as(caller):
            ticket = Ticket(lambda poll: None, None)
        ticket.waits, ticket.room_bytes = waits, room_bytes
        self.lanes.add(object(), None, ticket)
        work = LongWork(
            lambda poll: [],
            stopped=lambda: False,
            gives_way=self.turns.is_over,
            threads=Threads(),
        )
        return Run(None, [ticket], work, in_turns=True, began_s=self.now_s)

    def take_turn(self, run, seconds):
        """Let a run have the device for so long."""
        self.turns.begin(run)
        self.now_s += seconds
        self.turns.end(run)

    def ends_after(self, run, seconds):
        """Whether the turn of a run is over then, and not before."""
        self.turns.begin(run)
        start_s = self.now_s
        self.now_s = start_s + seconds - SOON_S
        before = self.turns.is_over()
        self.now_s = start_s + seconds + SOON_S
        return self.turns.is_over() and not before


@pytest.fixture
def device():
    return Device()


@pytest.mark.parametrize(
    ("took_s", "turn_s"),
    [(0.0, LEAST_S), (0.02, 0.02), (60.0, MOST_S)],
    ids=["quick", "between", "slow"],
)
def test_a_turn_lasts_as_long_as_the_latest_product_took(device, took_s, turn_s):
    one, _ = device.queue(), device.queue(BEN)
    device.take_turn(one, took_s)
    assert one.spent_s == pytest.approx(took_s)
    # An opening is no product: what it takes says nothing about the next turn.
    device.take_turn(device.queue(room_bytes=10), 0.123)
    assert device.ends_after(one, turn_s)
    assert device.turns.holders == [ANN]


def test_a_turn_that_nobody_waits_for_has_no_end(device):
    one = device.queue()
    device.turns.begin(one)
    device.now_s += 1e6
    assert not device.turns.is_over()
    device.queue(BEN)
    assert device.turns.is_over()


def test_among_callers_with_names_a_turn_lasts_one_step(device):
    one, _ = device.queue(ANN), device.queue(BEN)
    device.presence.came("ann")
    assert not device.turns.is_shared()
    device.presence.came("ben")
    assert device.turns.is_shared()
    assert device.ends_after(one, _SHARED_TURN_S)


def test_a_turn_ends_for_who_is_away_a_moment_and_has_had_less(device):
    one = device.queue(BEN)
    for _ in range(5):  # she comes back after a millisecond each time
        device.presence.came("ann")
        device.presence.ended("ann")
        device.now_s += 1e-3
    # Both were here; since then he has had a second.
    device.lanes.charge_aside(BEN, 1.0, device.presence.expected())
    device.presence.came("ann")
    device.presence.ended("ann")
    device.turns.begin(one)
    device.now_s += _SHARED_TURN_S
    assert not device.turns.is_over()
    device.now_s += LEAST_S - _SHARED_TURN_S
    assert not device.presence.expected()
    assert not device.turns.is_over()  # she has not come back, and he is alone
    device.presence.came("ann")
    device.presence.ended("ann")
    assert device.turns.is_over()


def test_what_waits_for_an_idle_device_gives_way_to_whoever_comes(device):
    is_due = [False]
    patient = device.queue(waits=lambda: not is_due[0])
    device.turns.begin(patient)
    device.now_s += 1e6
    device.queue(waits=lambda: True)
    assert not device.turns.is_over()  # another one that can wait
    device.queue(BEN)
    assert device.turns.is_over()
    # When it is due it has turns as everybody has, so not all of them end at once.
    device.turns.begin(patient)
    assert device.turns.is_over()
    is_due[0] = True
    device.take_turn(device.queue(BEN), 0.0)
    assert device.ends_after(patient, LEAST_S)
    # Likewise in a section that others may wait for.
    is_due[0], patient.work.is_alone = False, True
    assert device.ends_after(patient, LEAST_S)


def test_a_device_is_idle_when_nobody_was_waited_for_lately(device):
    assert device.turns.is_idle()  # nobody has ever come
    device.take_turn(device.queue(), 1.0)
    assert not device.turns.is_idle()
    device.now_s += IDLE_S - SOON_S
    assert not device.turns.is_idle()
    device.now_s += 2 * SOON_S
    assert device.turns.is_idle()
    device.take_turn(device.queue(waits=lambda: True), 1.0)
    assert device.turns.is_idle()  # for that, nobody waited
    device.turns.note_busy()
    assert not device.turns.is_idle()


def test_whoever_waits_is_looked_at_again_when_something_may_have_changed(device):
    assert device.turns.patience_s({"ann": 1e-3}) is None
    device.queue(BEN)
    assert device.turns.patience_s({}) == IDLE_S
    assert device.turns.patience_s({"ann": 1e-3, "eve": 2e-3}) == 1e-3
    assert device.turns.patience_s({"ann": 10 * IDLE_S}) == IDLE_S
