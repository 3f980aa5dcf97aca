"""Sessions: warm or cold, versioned, leased, and there again after a crash."""

import asyncio
import threading

import numpy as np
import pytest
from support.fake_device import middle, put

from curvd.contract.enums import Dtype, OperatorKind
from curvd.contract.infos import SessionState
from curvd.contract.specs import OperatorSpec
from curvd.errors import (
    Cancelled,
    InvalidSpec,
    LimitExceeded,
    ModelNotFound,
    RequestIdReused,
    SessionNotFound,
    StateMismatch,
    VersionMismatch,
)
from curvd.tensors import chunks
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.service import listings
from curvd_server.service.session_service import SessionService
from curvd_server.sessions.session import Update

HESSIAN = OperatorSpec()
GGN = OperatorSpec(kind=OperatorKind.GGN)


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def server(tmp_path, clock):
    with middle(tmp_path, clock=clock) as it:
        yield it


async def multiply(server, lease, *values):
    """A product with the operator of a lease, [K, P]."""
    columns = np.array([[v] * lease.info.layout.size for v in values], dtype=float)
    ticket = server.batcher.multiply(lease.operator, columns)
    return (await asyncio.wrap_future(ticket)).value


def values(server, request_id="", expected_version=None, **arrays):
    """An update whose blob is there."""
    digest = put(server.blobs, arrays)
    return Update(
        digest=digest, request_id=request_id, expected_version=expected_version
    )


async def factor(server, session_id, **options):
    """What the fake Hessian multiplies by."""
    async with server.sessions.lease(session_id, operator=HESSIAN, **options) as lease:
        return (await multiply(server, lease, 1.0))[0, 0]


async def test_a_session_is_warm_when_it_is_made(server):
    info = await server.sessions.create(server.new(name="mine"))
    assert (info.name, info.version, info.state) == ("mine", 1, SessionState.READY)
    assert info.layout.names == ("a", "b")
    assert [spec for spec, _ in info.operators] == [HESSIAN]
    assert await factor(server, info.id) == 5.0
    assert len(server.device.built) == 1


async def test_the_digest_is_what_a_client_can_compute(server):
    info = await server.sessions.create(server.new())
    expected, _ = chunks.digest({"a": np.ones(2), "b": np.ones(3)})
    assert info.parameters_digest == expected
    made = await server.sessions.update(info.id, values(server, b=np.zeros(3)))
    expected, _ = chunks.digest({"a": np.ones(2), "b": np.zeros(3)})
    assert made.parameters_digest == expected


async def test_validation_keeps_nothing(server):
    info = await server.sessions.create(server.new(), validate_only=True)
    assert (info.id, info.layout.size) == ("", 5)
    assert [operator.closed for operator in server.device.operators] == [True]
    assert server.sessions.page(limit=10) == ([], "")
    assert server.catalogue.sessions() == ([], {})


async def test_what_is_missing_is_named(server):
    with pytest.raises(ModelNotFound, match="no model 'm'"):
        await server.sessions.create(server.new(model_id="m"))
    with pytest.raises(SessionNotFound, match="no session 's'"):
        server.sessions.get("s")


async def test_the_same_request_makes_one_session(server):
    new = server.new(request_id="r", fingerprint="f")
    first, second = await asyncio.gather(
        server.sessions.create(new), server.sessions.create(new)
    )
    assert first.id == second.id
    assert server.device.loads == 1
    with pytest.raises(RequestIdReused, match="'r' came before with other content"):
        await server.sessions.create(server.new(request_id="r", fingerprint="g"))


async def test_there_is_a_largest_number_of_sessions(tmp_path):
    with middle(tmp_path, sessions=1) as server:
        first = await server.sessions.create(server.new())
        with pytest.raises(LimitExceeded, match="1 sessions are the limit"):
            await server.sessions.create(server.new())
        await server.sessions.delete(first.id)
        await server.sessions.create(server.new())


async def test_a_failed_creation_gives_its_memory_back(server):
    wrong = OperatorSpec(block_sizes=(5,))
    with pytest.raises(InvalidSpec, match="block_sizes sum to 5"):
        await server.sessions.create(server.new(operators=(HESSIAN, wrong)))
    assert [operator.closed for operator in server.device.operators] == [True]
    assert server.sessions.statistics().ready == 0


async def test_an_operator_is_built_once_for_all_its_uses(server):
    info = await server.sessions.create(server.new())
    shifted = OperatorSpec(damping=0.5, scale=2.0)
    for spec in (GGN, HESSIAN, shifted, GGN):
        async with server.sessions.lease(info.id, operator=spec):
            pass
    assert [spec for spec, _ in server.device.built] == [HESSIAN, GGN]


@pytest.mark.parametrize("same", [True, False])
async def test_who_uses_what_is_there_does_not_wait_for_what_is_built(server, same):
    made = await server.sessions.create(server.new())
    other = await server.sessions.create(server.new(name="other"))
    gate = threading.Event()
    server.device.held_up_by = gate
    server.device.building.clear()

    async def use():
        async with server.sessions.lease(made.id, operator=GGN) as lease:
            return (await multiply(server, lease, 1.0))[0, 0]

    first, second = asyncio.create_task(use()), asyncio.create_task(use())
    assert await asyncio.to_thread(server.device.building.wait, 10)
    session = made if same else other
    assert await factor(server, session.id) == 5.0
    assert not first.done() and not second.done()
    gate.set()
    assert await first == await second == 5.0
    assert len(server.device.built) == 3  # who waited for it built no other


async def test_operators_share_the_budget_of_their_session(server):
    info = await server.sessions.create(
        server.new(budget_bytes=15, operators=(HESSIAN, GGN))
    )
    assert info.budget_bytes == 15
    assert [budget for _, budget in server.device.built] == [15, 5]


async def test_a_budget_is_within_the_device(server):
    total = server.device.describe().total_bytes
    await server.sessions.create(server.new(budget_bytes=total))
    with pytest.raises(LimitExceeded, match=f"fake has {total} bytes in all"):
        await server.sessions.create(server.new(budget_bytes=total + 1))


async def test_the_longest_unused_operator_makes_room(tmp_path):
    with middle(tmp_path, operators=2) as server:
        info = await server.sessions.create(server.new(operators=(HESSIAN, GGN)))
        async with server.sessions.lease(info.id, operator=HESSIAN):
            pass
        third = OperatorSpec(kind=OperatorKind.EMPIRICAL_FISHER)
        async with server.sessions.lease(info.id, operator=third):
            pass
        specs = [spec for spec, _ in server.sessions.get(info.id).operators]
        assert specs == [HESSIAN, third]
        await server.sessions.close()
        assert all(operator.closed for operator in server.device.operators)


async def use(server, session_id, spec):
    """Have an operator, and let go of it."""
    async with server.sessions.lease(session_id, operator=spec):
        pass


@pytest.mark.parametrize("capacity", [1, 2, 3, 9, 10, 16])
async def test_as_many_operators_stay_built_as_there_is_room_for(tmp_path, capacity):
    specs = [OperatorSpec(kind=OperatorKind.GGN, seed=seed) for seed in range(10)]
    with middle(tmp_path, operators=capacity) as server:
        info = await server.sessions.create(server.new(build_later=True))
        kept = []  # the longest unused first
        built = 0
        for spec in [*specs, *specs, specs[3], specs[9], *specs[:4], *specs]:
            if spec in kept:
                kept.remove(spec)
            else:
                built += 1
            kept = [*kept, spec][-capacity:]
            await use(server, info.id, spec)
            found = [spec for spec, _ in server.sessions.get(info.id).operators]
            assert found == kept
            assert len(server.device.built) == built
        await asyncio.wrap_future(server.batcher.run(lambda cancelled: None))
        assert [o.closed for o in server.device.operators].count(False) == len(kept)


async def test_an_update_makes_the_next_version(server):
    info = await server.sessions.create(server.new())
    made = await server.sessions.update(info.id, values(server, b=np.full(3, 2.0)))
    assert made.version == 2
    assert server.sessions.get(info.id).version == 2
    assert await factor(server, info.id) == 8.0
    assert len(server.device.built) == 1  # moved, not built again
    assert server.device.loads == 1


async def test_running_work_finishes_on_its_version(server):
    info = await server.sessions.create(server.new())
    async with server.sessions.lease(info.id, operator=HESSIAN) as lease:
        await server.sessions.update(info.id, values(server, b=np.zeros(3)))
        assert (await multiply(server, lease, 1.0))[0, 0] == 5.0
        assert lease.info.version == 1
        assert not lease.operator.closed
        assert await factor(server, info.id) == 2.0
    await asyncio.wrap_future(server.batcher.run(lambda cancelled: None))
    assert [o.closed for o in server.device.operators] == [True, False]


async def test_another_version_than_expected_is_refused(server):
    info = await server.sessions.create(server.new())
    update = values(server, b=np.zeros(3), expected_version=1)
    await server.sessions.update(info.id, update)
    with pytest.raises(VersionMismatch, match="is at version 2, not 1"):
        await server.sessions.update(info.id, update)
    with pytest.raises(VersionMismatch) as caught:
        await factor(server, info.id, expected_version=1)
    assert caught.value.metadata == {"version": "2", "expected_version": "1"}
    assert await factor(server, info.id, expected_version=2) == 2.0


async def test_the_same_update_makes_one_version(server):
    info = await server.sessions.create(server.new())
    update = values(server, "r", b=np.zeros(3), expected_version=1)
    first = await server.sessions.update(info.id, update)
    assert await server.sessions.update(info.id, update) == first
    assert await server.sessions.made_by(info.id, update) == first
    with pytest.raises(RequestIdReused):
        await server.sessions.update(info.id, values(server, "r", b=np.ones(3)))


async def test_values_that_do_not_fit_change_nothing(server):
    info = await server.sessions.create(server.new())
    with pytest.raises(StateMismatch, match=r"unknown: z; of another shape: b \[2\]"):
        await server.sessions.update(
            info.id, values(server, b=np.ones(2), z=np.ones(1))
        )
    assert server.sessions.get(info.id).version == 1


async def test_values_that_are_not_finite_change_nothing(server):
    info = await server.sessions.create(server.new())
    with pytest.raises(StateMismatch, match=r"parameter 'c' has nan at index \[1\]"):
        await server.sessions.update(
            info.id, values(server, a=np.ones(2), c=np.array([1, np.nan, 1]))
        )
    assert server.sessions.get(info.id).version == 1
    assert await factor(server, info.id) == 5.0


async def test_values_that_the_sessions_type_cannot_hold_are_refused(server):
    info = await server.sessions.create(server.new(dtype=Dtype.FLOAT32))
    with pytest.raises(InvalidSpec, match="infinite in a session of type"):
        await server.sessions.update(info.id, values(server, a=np.full(2, 1e39)))


async def test_a_tied_tensor_is_updated_under_any_of_its_names(server):
    info = await server.sessions.create(server.new())
    await server.sessions.update(info.id, values(server, c=np.zeros(3)))
    assert await factor(server, info.id) == 2.0


async def test_values_that_were_replaced_leave_the_disk(server):
    info = await server.sessions.create(server.new())
    both = values(server, a=np.zeros(2), b=np.zeros(3))
    await server.sessions.update(info.id, both)
    only_a = values(server, a=np.full(2, 7.0))
    await server.sessions.update(info.id, only_a)
    assert server.blobs.has(both.digest)  # still has b
    only_b = values(server, b=np.full(3, 7.0))
    await server.sessions.update(info.id, only_b)
    assert not server.blobs.has(both.digest)
    await server.sessions.delete(info.id)
    assert not server.blobs.has(only_a.digest)
    assert not server.blobs.has(only_b.digest)


async def test_sessions_come_back_cold_and_warm_up_at_their_first_use(tmp_path):
    with middle(tmp_path) as server:
        info = await server.sessions.create(server.new(request_id="r"))
        await server.sessions.update(info.id, values(server, "u", b=np.zeros(3)))
    with middle(tmp_path) as server:
        again = server.sessions.get(info.id)
        assert (again.version, again.state) == (2, SessionState.COLD)
        assert again.layout == info.layout
        assert server.device.loads == 0
        assert await factor(server, info.id) == 2.0
        assert server.sessions.get(info.id).state is SessionState.READY
        # What was idempotent before is so still.
        assert (await server.sessions.create(server.new(request_id="r"))).id == info.id
        update = values(server, "u", b=np.zeros(3))
        assert (await server.sessions.update(info.id, update)).version == 2


async def test_a_cold_session_takes_updates_without_warming_up(tmp_path):
    with middle(tmp_path) as server:
        info = await server.sessions.create(server.new())
    with middle(tmp_path) as server:
        await server.sessions.update(info.id, values(server, a=np.zeros(2)))
        assert server.device.loads == 0
        assert await factor(server, info.id) == 3.0


async def test_a_crowd_warms_a_cold_session_once(tmp_path):
    with middle(tmp_path) as server:
        info = await server.sessions.create(server.new())
    with middle(tmp_path) as server:
        await asyncio.gather(*(factor(server, info.id) for _ in range(8)))
        assert (server.device.loads, len(server.device.built)) == (1, 1)


async def test_a_lease_runs_out_and_any_call_renews_it(server, clock):
    info = await server.sessions.create(server.new(lease_s=10.0))
    assert info.expire_time_s == 1010.0
    clock.now_s += 9
    assert server.sessions.get(info.id).expire_time_s == 1019.0
    clock.now_s += 9
    await factor(server, info.id)
    clock.now_s += 9
    assert await server.sessions.expire() == []
    clock.now_s += 1
    with pytest.raises(SessionNotFound, match="its lease ran out"):
        server.sessions.get(info.id)
    assert await server.sessions.expire() == [info.id]
    assert server.catalogue.sessions() == ([], {})
    assert all(operator.closed for operator in server.device.operators)


async def test_a_session_in_use_does_not_run_out(server, clock):
    info = await server.sessions.create(server.new(lease_s=10.0))
    async with server.sessions.lease(info.id):
        clock.now_s += 100
        assert await server.sessions.expire() == []
    assert server.sessions.get(info.id).expire_time_s == clock.now_s + 10


async def test_a_new_lease_survives_a_restart(tmp_path):
    with middle(tmp_path, lease_s=0) as server:
        info = await server.sessions.create(server.new())
        assert info.expire_time_s is None
        renewed = await server.sessions.renew(info.id, 60.0)
        assert renewed.expire_time_s == 1060.0
    with middle(tmp_path) as server:
        assert server.sessions.get(info.id).expire_time_s == 1060.0


async def test_deleting_cancels_running_work_and_frees_memory(server):
    info = await server.sessions.create(server.new())
    (operator,) = server.device.operators
    operator.gate.clear()
    running = asyncio.create_task(factor(server, info.id))
    await asyncio.to_thread(operator.started.wait)
    await server.sessions.delete(info.id)
    assert operator.closed
    with pytest.raises(Cancelled, match="was deleted while the call ran"):
        await running
    with pytest.raises(SessionNotFound):
        server.sessions.get(info.id)


async def test_who_gives_up_stops_the_device(server):
    info = await server.sessions.create(server.new())
    (operator,) = server.device.operators
    operator.gate.clear()
    running = asyncio.create_task(factor(server, info.id))
    await asyncio.to_thread(operator.started.wait)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.wrap_future(server.batcher.run(lambda cancelled: None))
    assert server.batcher.statistics().cancelled == 1


async def test_a_page_that_would_not_fit_into_a_message_ends_sooner(
    server, monkeypatch
):
    service = SessionService(
        registry=server.registry,
        sessions=server.sessions,
        blobs=server.blobs,
        mounts=None,
        checkpoints=None,
        limits=server.limits,
        describe=None,
        try_model=server.device.try_model,
    )
    made = [(await server.sessions.create(server.new())).id for _ in range(3)]
    request = session_pb.ListSessionsRequest()
    whole = await service.list_sessions(request)
    assert [s.id for s in whole.sessions] == made
    monkeypatch.setattr(listings, "_BYTES", whole.sessions[0].ByteSize())
    seen = []
    for _ in made:
        page = await service.list_sessions(request)
        seen += [s.id for s in page.sessions]
        request.page_token = page.next_page_token
    assert seen == made and not request.page_token


async def test_sessions_are_listed_in_pages_oldest_first(server):
    made = [(await server.sessions.create(server.new())).id for _ in range(5)]
    first, after = server.sessions.page(limit=2)
    await server.sessions.delete(first[-1].id)
    second, after = server.sessions.page(after=after, limit=2)
    third, end = server.sessions.page(after=after, limit=2)
    assert [info.id for info in (*first, *second, *third)] == made
    assert end == ""


async def test_a_store_reports_itself(server):
    info = await server.sessions.create(server.new())
    async with server.sessions.lease(info.id, operator=GGN):
        found = server.sessions.statistics()
    assert (found.ready, found.cold, found.users, found.operators) == (1, 0, 1, 2)


@pytest.mark.parametrize("step_s", [2 * 3600.0, 24 * 3600.0])
@pytest.mark.parametrize("sign", [1, -1])
async def test_a_step_of_the_clock_ends_no_lease_early_and_keeps_none_for_ever(
    tmp_path, step_s, sign
):
    wall, monotonic = Clock(), Clock()
    wall.now_s = 1e6

    def tick(seconds):
        wall.now_s += seconds
        monotonic.now_s += seconds

    with middle(tmp_path, clock=wall, monotonic=monotonic) as server:
        early = await server.sessions.create(server.new(lease_s=3600.0))
        tick(600)
        wall.now_s += sign * step_s
        late = await server.sessions.create(server.new(lease_s=3600.0))
        assert await server.sessions.expire() == []
        # What people are told is on their clock.
        assert server.sessions.get(late.id).expire_time_s == wall.now_s + 3600
        tick(3599)
        assert await server.sessions.expire() == [early.id]
        await server.sessions.close()
    monotonic.now_s = 5.0  # another process, perhaps another machine
    wall.now_s += sign * step_s
    with middle(tmp_path, clock=wall, monotonic=monotonic) as server:
        assert await server.sessions.expire() == []
        made = await server.sessions.create(server.new())
        ids = [s.id for s in server.sessions.page(limit=9)[0]]
        assert ids == [late.id, made.id]  # in the order in which they were made
        tick(2)
        assert await server.sessions.expire() == [late.id]


async def test_restarts_do_not_keep_a_session_that_nobody_uses(tmp_path):
    monotonic = Clock()
    with middle(tmp_path, monotonic=monotonic) as server:
        info = await server.sessions.create(server.new(lease_s=3600.0))
    for _ in range(8):
        with middle(tmp_path, monotonic=monotonic) as server:
            monotonic.now_s += 400
            assert await server.sessions.expire() == []  # and then it is killed
    with middle(tmp_path, monotonic=monotonic) as server:
        monotonic.now_s += 400
        assert await server.sessions.expire() == [info.id]


async def test_a_crash_does_not_end_a_session_early_that_was_used_again(tmp_path):
    monotonic = Clock()
    with middle(tmp_path, monotonic=monotonic) as server:
        info = await server.sessions.create(server.new(lease_s=3600.0))
        monotonic.now_s += 3500
        await server.sessions.expire()
        server.sessions.get(info.id)
        await server.sessions.expire()
    with middle(tmp_path, monotonic=monotonic) as server:
        monotonic.now_s += 3599
        assert await server.sessions.expire() == []


async def test_a_new_lease_counts_from_when_it_was_given(tmp_path):
    monotonic = Clock()
    with middle(tmp_path, monotonic=monotonic) as server:
        info = await server.sessions.create(server.new(lease_s=3600.0))
        monotonic.now_s += 3000
        await server.sessions.expire()
        await server.sessions.renew(info.id, 100.0)
    with middle(tmp_path, monotonic=monotonic) as server:
        assert server.sessions.get(info.id).expire_time_s == 1100.0
        monotonic.now_s += 100
        assert await server.sessions.expire() == [info.id]
