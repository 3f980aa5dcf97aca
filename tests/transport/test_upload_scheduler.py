"""Large requests are read one after the other, and nobody slow is in the way."""

import asyncio

import pytest

from curvd_server.transport import upload_scheduler
from curvd_server.transport.upload_scheduler import Turns


class Upload:
    """Somebody who sends; counts how often it was told to read again."""

    def __init__(self):
        self.heard = self.resumed = 0

    def resume(self):
        self.resumed += 1


@pytest.fixture
def soon(monkeypatch):
    """Looks follow each other quickly."""
    monkeypatch.setattr(upload_scheduler, "_LOOK_S", 0.001)


async def looks(condition, send=lambda: None):
    """Let time pass until something holds."""
    async with asyncio.timeout(10.0):
        while not condition():
            send()
            await asyncio.sleep(0)


def queue(*uploads):
    order = Turns()
    for upload in uploads:
        order.join(upload)
    return order


async def test_the_first_is_read_and_the_others_wait():
    first, second, third = Upload(), Upload(), Upload()
    order = queue(first, second, third)
    assert [order.waits(u) for u in (first, second, third)] == [False, True, True]
    order.leave(first)
    assert [order.waits(u) for u in (first, second, third)] == [False, False, True]
    assert second.resumed == 1


async def test_who_is_not_in_the_queue_never_waits():
    order = queue(Upload(), Upload())
    stranger = Upload()
    assert not order.waits(stranger)
    order.leave(stranger)
    assert stranger.resumed == 0


async def test_one_that_gives_up_while_it_waits_is_not_read_again():
    first, second, third = Upload(), Upload(), Upload()
    order = queue(first, second, third)
    order.leave(second)
    order.leave(first)
    assert second.resumed == 0 and not order.waits(third)


async def test_who_sends_slowly_holds_nobody_up(soon):
    slow, second, third = Upload(), Upload(), Upload()
    order = queue(slow, second, third)
    await looks(lambda: not order.waits(second))
    assert not order.waits(slow)  # it is read whenever something comes
    await looks(lambda: not order.waits(third))


async def test_who_sends_for_long_gives_way_to_the_next(soon):
    long, second = Upload(), Upload()
    order = queue(long, second)

    def send():
        long.heard += 1 << 20

    await looks(lambda: order.waits(long), send)
    assert not order.waits(second) and second.resumed == 1
    order.leave(second)
    assert not order.waits(long)


async def test_a_long_request_alone_is_not_looked_at(soon):
    alone = Upload()
    order = queue(alone)
    await asyncio.sleep(0.01)
    late = Upload()
    order.join(late)
    assert not order.waits(alone) and order.waits(late)


async def test_one_that_is_left_alone_is_not_looked_at_any_more(soon):
    first, second, late = Upload(), Upload(), Upload()
    order = queue(first, second)
    order.leave(second)
    await asyncio.sleep(0.05)  # in which it sends nothing
    order.join(late)
    assert not order.waits(first) and order.waits(late)
