"""An opening tells how far it is, in its stream and in the list of what goes on."""

import asyncio

import numpy as np
import pytest
from support.fake_device import middle

from curvd.contract import Stage, Work, convert_enums
from curvd.contract.specs import OperatorSpec
from curvd.errors import RequestIdReused, Unavailable
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.service.session_service import SessionService

HESSIAN = OperatorSpec()


@pytest.fixture
def server(tmp_path):
    with middle(tmp_path) as it:
        yield it


@pytest.fixture
def service(server):
    return SessionService(
        registry=server.registry,
        sessions=server.sessions,
        blobs=server.blobs,
        mounts=None,
        checkpoints=None,
        limits=server.limits,
        describe=None,
        try_model=server.device.try_model,
    )


def request(server, **changes):
    """A right request on the one model and the one dataset."""
    new = server.new()
    asked = session_pb.CreateSessionRequest(
        model_id=new.model_id, dataset_id=new.dataset_id, dtype="DTYPE_FLOAT32"
    )
    asked.loss.name, asked.loss.reduction = "LOSS_NAME_MSE", "REDUCTION_MEAN"
    asked.MergeFrom(session_pb.CreateSessionRequest(**changes))
    return session_pb.OpenSessionRequest(session=asked)


class Parts(list):
    """What was sent."""

    async def send(self, part):
        self.append(part)

    @property
    def stages(self):
        """The stages that were told, each once, in order."""
        told = [convert_enums.stage_from_proto(p.progress.stage)
                for p in self if p.HasField("progress")]  # fmt: skip
        return list(dict.fromkeys(told))


async def until(holds):
    """Let others go on until something holds."""
    async with asyncio.timeout(300):
        while not holds():  # noqa: ASYNC110 - threads change it, too
            await asyncio.sleep(0)


async def test_stages_come_in_order_and_the_session_last(server, service):
    parts = Parts()
    await service.open_session(request(server, name="mine"), parts.send)
    assert parts.stages == [Stage.WAITING, Stage.CHECKING, Stage.VERIFYING]
    assert all(part.HasField("progress") for part in parts[:-1])
    made = parts[-1].session
    assert server.sessions.get(made.id).name == "mine"
    verifying = parts[-2].progress
    assert (verifying.detail, verifying.done, verifying.total) == ("fake", 1, 2)


async def test_a_session_without_operators_is_checked_in_three_steps(server, service):
    parts = Parts()
    await service.open_session(request(server, build_later=True), parts.send)
    checking = parts[-2].progress
    assert parts.stages == [Stage.WAITING, Stage.CHECKING]
    assert (checking.done, checking.total) == (3, 3)
    assert server.device.built == []


async def test_either_call_finds_the_session_of_the_other(server, service):
    asked = request(server, request_id="r")
    made = await service.create_session(asked.session)
    parts = Parts()
    await service.open_session(asked, parts.send)
    assert parts[-1].session.id == made.session.id
    assert server.device.loads == 1
    other = request(server, request_id="r", name="another")
    with pytest.raises(RequestIdReused):
        await service.open_session(other, parts.send)


async def test_an_opening_is_listed_until_it_is_over(server, service):
    server.device.held_up_by.clear()
    parts = Parts()
    opening = asyncio.ensure_future(
        service.open_session(request(server, name="mine"), parts.send)
    )
    await until(lambda: Stage.VERIFYING in parts.stages)
    (activity,) = server.sessions.activities.listed()
    assert (activity.work, activity.session_id) == (Work.OPENING, "")
    assert (activity.session_name, activity.progress.done) == ("mine", 1)
    server.device.held_up_by.set()
    await opening
    assert server.sessions.activities.listed() == ()


async def test_who_gives_up_ends_the_opening(server, service):
    server.device.held_up_by.clear()
    parts = Parts()
    opening = asyncio.ensure_future(service.open_session(request(server), parts.send))
    await until(server.device.building.is_set)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert server.sessions.activities.listed() == ()
    assert server.sessions.page(limit=10) == ([], "")
    # It has stopped though nobody let it go on.
    await asyncio.wrap_future(server.batcher.run(lambda cancelled: None))
    assert server.device.operators == []


async def test_a_caller_who_is_gone_is_noticed_when_something_is_told(server, service):
    server.device.held_up_by.clear()

    async def gone(part):
        raise Unavailable("the line is dead")

    with pytest.raises(Unavailable, match="the line is dead"):
        await service.open_session(request(server), gone)
    assert server.sessions.activities.listed() == ()
    assert server.sessions.page(limit=10) == ([], "")


async def test_an_operator_that_a_call_waits_for_is_listed(server):
    info = await server.sessions.create(server.new(build_later=True, name="mine"))
    server.device.held_up_by.clear()

    async def use():
        async with server.sessions.lease(info.id, operator=HESSIAN):
            pass

    using = asyncio.ensure_future(use())
    await until(server.device.building.is_set)
    (activity,) = server.sessions.activities.listed()
    assert (activity.work, activity.subject) == (Work.BUILDING, "hessian")
    assert (activity.session_id, activity.session_name) == (info.id, "mine")
    server.device.held_up_by.set()
    await using
    assert server.sessions.activities.listed() == ()


async def test_a_last_tier_is_listed_while_it_waits_and_while_it_is_made(server):
    server.device.has_tiers = True
    info = await server.sessions.create(server.new())
    listed = server.sessions.activities.listed
    await until(lambda: listed() and listed()[0].progress.stage is Stage.TUNING)
    (activity,) = listed()
    assert (activity.work, activity.session_id) == (Work.IMPROVING, info.id)
    server.device.improving.set()
    await until(lambda: not listed())
    async with server.sessions.lease(info.id, operator=HESSIAN) as lease:
        ticket = server.batcher.multiply(lease.operator, np.ones((1, 5)))
        await asyncio.wrap_future(ticket)
