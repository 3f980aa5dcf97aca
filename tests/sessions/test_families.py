"""Sessions that share parameters: one memory, one lock, one transaction."""

import asyncio

import numpy as np
import pytest
from support.fake_device import middle, put

from curvd.contract.specs import OperatorSpec
from curvd.errors import DiskFull, RequestIdReused, SessionNotFound
from curvd_server.sessions import NewSession
from curvd_server.sessions.session import Update

HESSIAN = OperatorSpec()


@pytest.fixture
def server(tmp_path):
    with middle(tmp_path) as it:
        yield it


async def pair(server, **options):
    """Two sessions on the same parameters."""
    first = await server.sessions.create(server.new())
    new = NewSession(dataset_id=first.dataset_id, shares_with=first.id, **options)
    return first.id, (await server.sessions.create(new)).id


def update(server, request_id="", **arrays):
    return Update(digest=put(server.blobs, arrays), request_id=request_id)


def problems(server):
    return [s.operator_cache.problem for s in server.sessions._sessions.values()]


async def test_parameters_are_in_memory_once(server):
    first, second = await pair(server)
    a, b = problems(server)
    assert all(a.state[name] is b.state[name] for name in ("a", "b"))
    await server.sessions.update(second, update(server, a=np.full(2, 3.0)))
    moved, also = problems(server)
    assert moved is not a
    assert also is not b
    assert all(moved.state[name] is also.state[name] for name in ("a", "b"))
    assert moved.state["a"][0] == 3.0
    assert server.sessions.get(first).version == server.sessions.get(second).version


async def test_what_warms_up_after_a_restart_shares_too(server, tmp_path):
    ids = await pair(server)
    await server.sessions.update(ids[0], update(server, a=np.full(2, 3.0)))
    server.close()
    with middle(tmp_path) as again:
        assert problems(again) == [None, None]
        await again.sessions.update(ids[1], update(again, b=np.full(3, 2.0)))
        for session_id in ids:
            async with again.sessions.lease(session_id, operator=HESSIAN) as lease:
                assert lease.info.version == 3
                assert lease.problem.factor == 12.0
        a, b = problems(again)
        assert all(a.state[name] is b.state[name] for name in ("a", "b"))


async def test_a_repeated_update_makes_one_version_of_both_whichever_is_asked(server):
    first, second = await pair(server)
    asked = update(server, "r", a=np.full(2, 3.0))
    made = await server.sessions.update(first, asked)
    assert await server.sessions.update(first, asked) == made
    assert await server.sessions.update(second, asked) == made
    with pytest.raises(RequestIdReused):
        await server.sessions.update(second, update(server, "r", a=np.full(2, 4.0)))
    assert server.sessions.get(second).version == 2


async def test_updates_of_both_at_once_come_one_after_the_other(server):
    first, second = await pair(server)
    made = await asyncio.gather(
        *(
            server.sessions.update(i, update(server, a=np.full(2, float(n))))
            for n, i in enumerate([first, second] * 5)
        )
    )
    assert sorted(version.version for version in made) == list(range(2, 12))
    assert server.sessions.get(first).version == server.sessions.get(second).version


async def test_a_version_that_cannot_be_written_moves_neither(server, monkeypatch):
    first, second = await pair(server)
    before = problems(server)

    def full(*statements):
        msg = "no space"
        raise DiskFull(msg)

    with monkeypatch.context() as patch:
        patch.setattr(server.catalogue._db, "write", full)
        with pytest.raises(DiskFull):
            await server.sessions.update(first, update(server, a=np.full(2, 3.0)))
    assert (
        server.sessions.get(first).version == server.sessions.get(second).version == 1
    )
    assert problems(server) == before


async def test_values_stay_as_long_as_one_of_them_needs_them(server):
    first, second = await pair(server)
    values = update(server, a=np.full(2, 3.0))
    await server.sessions.update(first, values)
    await server.sessions.delete(first)
    assert server.blobs.has(values.digest)
    await server.sessions.delete(second)
    assert not server.blobs.has(values.digest)


async def test_a_session_that_is_not_there_has_no_parameters_to_share(server):
    first = await server.sessions.create(server.new())
    new = NewSession(dataset_id=first.dataset_id, shares_with="nowhere")
    with pytest.raises(SessionNotFound):
        await server.sessions.create(new)
