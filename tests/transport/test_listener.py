"""What the port takes it gives back, however early its visitors and itself end."""

import asyncio
import gc
import socket

import pytest

from curvd_server.transport.drops import Drops
from curvd_server.transport.limits import ConnectionLimits
from curvd_server.transport.listener import Front, _Visit

WITHIN_S = 60


def front(**limits):
    return Front(None, "/no/such/socket", None, ConnectionLimits(**limits), Drops())


async def test_who_is_sent_away_before_he_begins_leaves_nothing_behind():
    """His task is cancelled before its first step, so nothing in it is ever run."""
    port, pairs = front(connections=1), [socket.socketpair() for _ in range(3)]
    for ours, _ in pairs:
        port._admit(_Visit(ours, "127.0.0.1:1"))
    gone = [visit.task for visit in port._visits if visit.dropped]
    await asyncio.wait(gone, timeout=WITHIN_S)
    await asyncio.sleep(0)  # what waits for their ends
    assert [ours.fileno() >= 0 for ours, _ in pairs] == [False, False, True]
    assert port.usage["open"] == 1
    assert port._drops.counts == {"connections": 2}
    await port.stop(0.0)
    assert port.usage["open"] == 0
    for ours, other in pairs:
        assert ours.fileno() < 0 and other.recv(1) == b""
        other.close()


@pytest.mark.parametrize("steps", range(8))
async def test_a_port_that_closes_loses_nobody_whom_it_has_just_taken(steps):
    port = front()
    async with port.listening("127.0.0.1:0") as target:
        host, _, number = target.rpartition(":")
        await asyncio.sleep(0.01)  # it waits
        with socket.create_connection((host, int(number))) as caller:
            for _ in range(steps):
                await asyncio.sleep(0)
            caller.settimeout(WITHIN_S)
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            gc.collect()  # a socket that nobody closed warns
    await port.stop(0.0)
    assert port.usage["open"] == 0
