"""A worker's turns: what is short goes first, and what is long gives way to it."""

import dataclasses
import socket
import threading
import time

import pytest

pytest.importorskip("torch")
import numpy as np
from support.fleets import invite

from curvd.contract.specs import OperatorSpec
from curvd.errors import Internal, OutOfMemory, Unavailable
from curvd_server.device.torch_device import TorchDevice
from curvd_server.fleet import Fleet, LocalLauncher, messages
from curvd_server.fleet.connection import Connection, Frame
from curvd_server.fleet.seats import raised
from curvd_server.fleet.worker import Worker

LONG = messages.Recall(problem=1, part=0, spec=OperatorSpec())
SHORT = messages.Product(operator=1, counts=())
PATIENCE_S = 120.0


class Waiting:
    """Holdings whose long command ends when a product was computed meanwhile."""

    device = TorchDevice({}, "cpu")
    in_step = frozenset()

    def __init__(self):
        self.multiplied, self.begun = threading.Event(), threading.Event()

    def alive(self):
        return messages.Alive()

    def expected_s(self, message, columns):
        return 0.0

    def took(self, message, columns, seconds):
        pass

    def answer(self, message, arrays, cancelled):
        if isinstance(message, messages.Product):
            self.multiplied.set()
            return messages.Arrived(), arrays
        self.begun.set()
        until_s = time.monotonic() + PATIENCE_S
        while not self.multiplied.is_set() and time.monotonic() < until_s:
            if cancelled():
                raise OutOfMemory("stopped")
        return messages.Key(key=str(self.multiplied.is_set())), ()


@pytest.fixture
def worker():
    """A worker, and the front's end of its connection."""
    ours, theirs = socket.socketpair()
    holdings = Waiting()
    made = Worker(Connection(theirs), holdings, lambda: None)
    thread = threading.Thread(target=made.run)
    thread.start()
    front = Connection(ours)
    yield front, holdings
    front.close()
    thread.join()


def answers(front, count):
    """So many answers by their numbers; that it is alive is none."""
    found = {}
    while len(found) < count:
        frame = front.receive()
        if not isinstance(frame.message, messages.Alive):
            found[frame.number] = frame.message
    return found


def test_a_short_product_is_computed_while_long_work_goes_on(worker):
    front, holdings = worker
    front.send(1, LONG)
    holdings.begun.wait()
    front.send(2, SHORT, [np.ones((1, 2))])
    assert answers(front, 2) == {1: messages.Key(key="True"), 2: messages.Arrived()}


def test_long_work_stops_when_it_is_cancelled_and_says_so(worker):
    front, holdings = worker
    front.send(1, LONG)
    holdings.begun.wait()
    front.send(0, messages.Cancel(asked=1))
    refused = answers(front, 1)[1]
    assert (refused.reason, refused.message) == ("OUT_OF_MEMORY", "stopped")


def test_a_worker_says_that_it_lives_while_it_computes(worker):
    front, holdings = worker
    front.send(1, LONG)
    holdings.begun.wait()
    assert isinstance(front.receive().message, messages.Alive)
    holdings.multiplied.set()


def test_a_device_that_is_not_there_is_named_at_once():
    """No worker is started a second time for it."""

    def elsewhere(*given):
        return dataclasses.replace(invite(*given), device="cuda:7")

    fleet = Fleet(LocalLauncher(), elsewhere, ("cuda:7",), patience_s=60.0)
    try:
        with pytest.raises(Unavailable, match="torch cannot use device 'cuda:7'"):
            fleet.wait()
        assert fleet.seats[0].incarnation == 1
    finally:
        fleet.close()


def test_what_fails_by_a_defect_is_told_without_its_trace(worker):
    front, holdings = worker
    holdings.answer = lambda *given: 1 / 0
    front.send(1, LONG)
    failed = answers(front, 1)[1]
    assert failed.message == "ZeroDivisionError: division by zero"
    error = raised(Frame(1, failed, []))
    assert isinstance(error, Internal)
    assert "Traceback" not in str(error)
