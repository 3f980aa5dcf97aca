"""Sessions answer in the first tier, and in the last one as soon as it is there."""

import asyncio

import numpy as np
import pytest
from support.fake_device import middle, put

from curvd.contract.enums import OperatorKind, Tier
from curvd.contract.specs import OperatorSpec
from curvd_server.device import turns
from curvd_server.sessions.operator_cache import REPAID_S
from curvd_server.sessions.session import Update

HESSIAN = OperatorSpec()
GGN = OperatorSpec(kind=OperatorKind.GGN)


@pytest.fixture
def server(tmp_path):
    with middle(tmp_path) as it:
        it.device.has_tiers = True
        yield it


def tier_of(server, session_id, spec=HESSIAN):
    """Which tier answers now."""
    return dict(server.sessions.get(session_id).operators)[spec].tier


async def until(holds):
    """Let others go on until something holds."""
    async with asyncio.timeout(300):
        while not holds():  # noqa: ASYNC110 - threads change it, too
            await asyncio.sleep(0)


async def lease_of(server, session_id, spec=HESSIAN):
    """The operator that a call would have."""
    async with server.sessions.lease(session_id, operator=spec) as lease:
        return lease.operator


async def product(server, operator):
    """Multiply, as a call does."""
    await asyncio.wrap_future(server.batcher.multiply(operator, np.ones((1, 5))))


async def test_the_last_tier_takes_over_when_the_device_is_idle(server):
    info = await server.sessions.create(server.new())
    assert dict(info.operators)[HESSIAN].tier is Tier.FIRST
    first = await lease_of(server, info.id)
    server.device.improving.set()
    await until(lambda: tier_of(server, info.id) is Tier.FINAL)
    await until(lambda: first.closed)
    assert (await lease_of(server, info.id)).report.tier is Tier.FINAL


async def test_a_better_plan_does_not_make_an_operator_used(tmp_path):
    third = OperatorSpec(kind=OperatorKind.EMPIRICAL_FISHER)
    with middle(tmp_path, operators=2) as server:
        server.device.has_tiers = True
        info = await server.sessions.create(server.new(operators=(HESSIAN, GGN)))
        await lease_of(server, info.id, HESSIAN)  # GGN is the longest unused now,
        server.device.improving.set()  # and has its last tier last
        for spec in (HESSIAN, GGN):
            await until(lambda spec=spec: tier_of(server, info.id, spec) is Tier.FINAL)
        await lease_of(server, info.id, third)
        found = [spec for spec, _ in server.sessions.get(info.id).operators]
        assert found == [HESSIAN, third]


async def test_a_call_under_way_keeps_the_tier_that_it_began_with(server):
    info = await server.sessions.create(server.new())
    async with server.sessions.lease(info.id, operator=HESSIAN) as lease:
        server.device.improving.set()
        await until(lambda: tier_of(server, info.id) is Tier.FINAL)
        assert lease.operator.report.tier is Tier.FIRST
        assert not lease.operator.closed
    await until(lambda: lease.operator.closed)


async def test_a_session_that_asked_for_the_last_tier_never_has_another(server):
    info = await server.sessions.create(server.new(plan=Tier.FINAL))
    assert dict(info.operators)[HESSIAN].tier is Tier.FINAL
    assert server.device.improved == []
    assert server.sessions.get(info.id).plan is Tier.FINAL


async def test_an_operator_that_cannot_be_improved_goes_on_as_it_is(server):
    server.device.fails_to_improve = True
    server.device.improving.set()
    info = await server.sessions.create(server.new())
    session = server.sessions._sessions[info.id]
    await until(lambda: server.device.improved)
    await until(lambda: not session.operator_cache._improving)
    operator = await lease_of(server, info.id)
    assert (operator.report.tier, operator.closed) == (Tier.FIRST, False)


async def test_new_parameters_do_not_stop_the_last_tier(server):
    info = await server.sessions.create(server.new())
    await until(lambda: server.device.improved)
    digest = put(server.blobs, {"a": np.full(2, 5.0)})
    with server.blobs.held(digest):
        await server.sessions.update(info.id, Update(digest=digest))
    assert tier_of(server, info.id) is Tier.FIRST
    server.device.improving.set()
    await until(lambda: tier_of(server, info.id) is Tier.FINAL)
    operator = await lease_of(server, info.id)
    assert operator.problem.factor == 13.0
    assert len(server.device.improved) == 1


async def test_a_session_that_ends_stops_what_is_prepared_for_it(server):
    info = await server.sessions.create(server.new())
    await until(lambda: server.device.improved)
    await server.sessions.delete(info.id)
    assert all(operator.closed for operator in server.device.operators)
    assert server.batcher.statistics().waiting == 0


async def test_a_last_tier_has_the_memory_of_the_first(server):
    info = await server.sessions.create(server.new(budget_bytes=100))
    await until(lambda: server.device.improved)
    assert server.device.improved == [(HESSIAN, 100)]
    server.device.improving.set()
    await lease_of(server, info.id, GGN)
    await until(lambda: tier_of(server, info.id, GGN) is Tier.FINAL)
    assert server.device.improved[1] == (GGN, 100 - server.device.kept_bytes)


async def test_nothing_is_built_that_nobody_asked_for(server):
    info = await server.sessions.create(server.new(build_later=True))
    assert (info.operators, server.device.built) == ((), [])
    await lease_of(server, info.id, GGN)
    assert [spec for spec, _ in server.device.built] == [GGN]


async def test_what_was_used_enough_does_not_wait_for_an_idle_device(
    server, monkeypatch
):
    monkeypatch.setattr(turns, "IDLE_S", 1e6)
    info = await server.sessions.create(server.new())
    operator = await lease_of(server, info.id)
    await product(server, operator)
    assert server.device.improved == []
    server.device.improving.set()
    operator.spent_s = REPAID_S
    await product(server, operator)
    await until(lambda: tier_of(server, info.id) is Tier.FINAL)


async def busily(server, **changes):
    """A session whose plan was chosen on a busy machine, and its first operator."""
    server.device.has_tiers, server.device.is_busy = False, True
    info = await server.sessions.create(server.new(**changes))
    server.device.is_busy = False
    return info, await lease_of(server, info.id)


async def test_a_plan_of_a_busy_machine_is_chosen_anew_and_the_better_one_kept(server):
    info, doubtful = await busily(server, budget_bytes=100)
    server.sessions.choose_again()
    await until(lambda: doubtful.closed)
    operator = await lease_of(server, info.id)
    assert (operator.report.tier, operator.report.revision) == (Tier.FINAL, 1)
    assert server.device.chosen_again == [(HESSIAN, 100)]
    server.sessions.choose_again()  # it is in doubt no more
    await product(server, operator)
    assert len(server.device.chosen_again) == 1


async def test_a_plan_that_stands_another_choice_stays(server):
    server.device.has_better_plans = False
    info, operator = await busily(server)
    server.sessions.choose_again()
    await until(lambda: not operator.is_in_doubt)
    session = server.sessions._sessions[info.id]
    await until(lambda: not session.operator_cache._improving)
    assert await lease_of(server, info.id) is operator
    assert not operator.closed


async def test_a_machine_that_is_busy_still_is_asked_again_later(server):
    server.device.is_quiet = False
    info, operator = await busily(server)
    session = server.sessions._sessions[info.id]
    for attempt in (1, 2):
        server.sessions.choose_again()
        server.sessions.choose_again()  # one attempt at a time
        await until(lambda: not session.operator_cache._improving)
        assert len(server.device.chosen_again) == attempt
    server.device.is_quiet = True
    server.sessions.choose_again()
    await until(lambda: operator.closed)


async def test_who_asked_for_one_set_of_bits_keeps_a_plan_in_doubt(server):
    info, operator = await busily(server, plan=Tier.FINAL)
    server.sessions.choose_again()
    await product(server, operator)
    assert server.device.chosen_again == []
    assert await lease_of(server, info.id) is operator


async def test_a_call_under_way_keeps_the_plan_that_it_began_with(server):
    info, _ = await busily(server)
    async with server.sessions.lease(info.id, operator=HESSIAN) as lease:
        server.sessions.choose_again()
        await until(lambda: len(server.device.operators) == 2)
        session = server.sessions._sessions[info.id]
        await until(lambda: not session.operator_cache._improving)
        assert not lease.operator.closed
        assert (await lease_of(server, info.id)).report.revision == 1
    await until(lambda: lease.operator.closed)


async def test_who_holds_an_operator_for_long_may_exchange_it(server):
    info = await server.sessions.create(server.new())
    async with server.sessions.lease(info.id, operator=HESSIAN) as lease:
        assert lease.latest() is lease.operator
        server.device.improving.set()
        await until(lambda: tier_of(server, info.id) is Tier.FINAL)
        final = lease.latest()
        assert final.report.tier is Tier.FINAL
        await until(lambda: lease.operator.closed)  # nobody holds it any more
        assert lease.latest() is final
    await product(server, await lease_of(server, info.id))
    assert not final.closed


async def test_what_is_held_stays_at_its_version(server):
    info = await server.sessions.create(server.new())
    async with server.sessions.lease(info.id, operator=HESSIAN) as lease:
        server.device.improving.set()
        await until(lambda: tier_of(server, info.id) is Tier.FINAL)
        digest = put(server.blobs, {"a": np.full(2, 5.0)})
        with server.blobs.held(digest):
            await server.sessions.update(info.id, Update(digest=digest))
        assert lease.latest() is lease.operator
        assert lease.operator.problem.factor == 5.0
        assert not lease.operator.closed
    await until(lambda: lease.operator.closed)


async def test_an_operator_that_was_exchanged_is_let_go_at_the_end(server):
    info = await server.sessions.create(server.new())
    async with server.sessions.lease(info.id, operator=HESSIAN) as lease:
        server.device.improving.set()
        await until(lambda: tier_of(server, info.id) is Tier.FINAL)
        final = lease.latest()
        assert not final.closed
    await server.sessions.delete(info.id)
    assert final.closed
