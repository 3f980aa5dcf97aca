"""How far openings are, from a real server, over each way in."""

import contextlib
import json
import threading
import time

import numpy as np
import pytest
import raw
from click.testing import CliRunner
from support.fake_device import FakeDevice
from support.served import server, stub

import curvd
from curvd.cli.commands import main
from curvd.contract import Stage
from curvd.v1 import session_service_pb2 as session_pb

torch = pytest.importorskip("torch")
from curvd_server.service import query_run  # noqa: E402


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)
    )


def points():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 4)), rng.standard_normal((20, 2))
    return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_every_stage_of_a_session_for_a_module_is_told(live_target, transport):
    config = curvd.ClientConfig(transport=transport)
    seen = []
    with curvd.connect(live_target, config=config) as client:
        with client.session_for(
            net(), torch.nn.MSELoss(), points(), batch_size=10,
            operators=["hessian"], progress=seen.append,
        ) as session:  # fmt: skip
            assert session.layout.size == 44
    stages = list(dict.fromkeys(p.stage for p in seen))
    assert stages[:2] == [Stage.EXPORTING, Stage.REGISTERING]
    assert stages[2:] in (
        [Stage.WAITING, Stage.CHECKING, Stage.TUNING, Stage.VERIFYING, Stage.WARMING],
        # where the plan of the same structure is known already
        [Stage.WAITING, Stage.CHECKING, Stage.VERIFYING, Stage.WARMING],
    )
    assert all(p.total is None or p.done <= p.total for p in seen)
    warming = seen[-1]
    assert warming.done == warming.total


async def test_an_awaited_opening_tells_the_same(live_target):
    seen = []
    async with curvd.aio.connect(live_target) as client:
        session = await client.session_for(
            net(), torch.nn.MSELoss(), points(), batch_size=10, progress=seen.append
        )
        await session.delete()
    assert seen[0].stage is Stage.EXPORTING
    checking = seen[-1]
    assert (checking.stage, checking.done, checking.total) == (Stage.CHECKING, 3, 3)


def _held():
    device = FakeDevice()
    device.held_up_by.clear()
    return device


def _asked(channel, **fields):
    model = raw.register_model(
        channel, "two", "{}", raw.file_of({"a": np.ones(2), "b": np.ones(3)})
    ).model
    data = raw.file_of({"x": np.ones((4, 2)), "y": np.ones(4)})
    dataset = raw.register_dataset(channel, data).dataset
    asked = session_pb.CreateSessionRequest(
        model_id=model.id, dataset_id=dataset.id, dtype="DTYPE_FLOAT64", **fields
    )
    asked.loss.name, asked.loss.reduction = "LOSS_NAME_MSE", "REDUCTION_MEAN"
    return session_pb.OpenSessionRequest(session=asked)


def _at_work(channel):
    info = raw.call(channel, "GetServerInfo", session_pb.GetServerInfoRequest())
    return list(info.activities)


def _wait_until_idle(channel):
    end_s = time.monotonic() + 60
    while work := _at_work(channel):
        assert time.monotonic() < end_s, work
        time.sleep(0.01)


@pytest.mark.usefixtures("answers")
def test_a_foreign_client_is_told_and_may_leave(tmp_path):
    device = _held()
    with server(tmp_path, device) as channel:
        answers = stub(channel, "OpenSession")(_asked(channel, name="mine"))
        told = next(a for a in answers if a.progress.detail == "fake")
        assert told.progress.stage == session_pb.STAGE_VERIFYING
        (activity,) = _at_work(channel)
        assert (activity.work, activity.session_name) == (
            session_pb.WORK_OPENING,
            "mine",
        )
        answers.cancel()
        _wait_until_idle(channel)
        assert device.operators == []


def test_the_deadline_of_an_opening_holds_while_it_tells_how_far_it_is(tmp_path):
    device = _held()
    with server(tmp_path, device) as channel:
        with pytest.raises(curvd.DeadlineExceeded):
            raw.call(channel, "OpenSession", _asked(channel), timeout=0.3)
        _wait_until_idle(channel)
        assert device.operators == []


def test_info_shows_what_is_at_work(tmp_path):
    device = _held()
    with server(tmp_path, device) as channel, contextlib.ExitStack() as stack:
        asked = _asked(channel, name="mine")
        opening = threading.Thread(
            target=lambda: raw.call(channel, "OpenSession", asked)
        )
        opening.start()
        stack.callback(opening.join)
        stack.callback(device.held_up_by.set)
        assert device.building.wait(300)
        result = CliRunner().invoke(main, ["info", channel.target])
        assert result.exit_code == 0, result.output
        assert (
            "1 at work\n  opening of 'mine': verifying fake, 1 of 2, " in result.output
        )


def test_a_query_is_listed_with_its_products(live_target, tanh_session, monkeypatch):
    seen = []
    compute = query_run.QueryRun.compute

    def noted(run, job):
        with curvd.connect(live_target) as client:
            seen.append(client.server_info().activities)
        return compute(run, job)

    monkeypatch.setattr(query_run.QueryRun, "compute", noted)
    tanh_session.ggn().trace(samples=10)
    for (activity,) in seen:
        assert (activity.work, activity.subject) == (curvd.Work.QUERY, "Trace")
        assert activity.session_id == tanh_session.id
        assert activity.progress.stage is Stage.MULTIPLYING
        assert activity.progress.total == 10
    with curvd.connect(live_target) as client:
        assert client.server_info().activities == ()


def test_a_query_is_seen_by_top_while_it_multiplies(live_target, tanh_session):
    """The test's callback looks in the middle of the query, and then gives it up."""

    class Seen(Exception):
        pass

    found = []

    def look(progress):
        args = ["top", live_target, "--once", "--json", "--every-s", "0.01"]
        told = json.loads(CliRunner().invoke(main, args).output)
        work = [a for a in told["activities"] if a["work"] == "query"]
        if work and work[0]["progress"]["done"] and told["status"]["query_columns"]:
            found.extend(work)
            raise Seen

    with pytest.raises(Seen):
        tanh_session.hessian().trace(
            estimator="hutchinson",
            samples=100_000,
            max_products=100_000,
            progress=look,
        )
    (query,) = found
    assert (query["subject"], query["session_id"]) == ("Trace", tanh_session.id)
    assert query["progress"]["stage"] == "multiplying"
