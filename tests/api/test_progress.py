"""Whoever looks at an opening hears of its stages, from both clients."""

import numpy as np
import pytest
from support import fake_service

import curvd
from curvd._calls.opening import CreateSession
from curvd.contract import Stage
from curvd.errors import InvalidSpec
from curvd.remote import progress as drawn
from curvd.v1 import session_service_pb2 as session_pb


def test_a_callable_is_told_what_the_server_says(client, service):
    seen = []
    session = client.create_session("m", "d", loss="mse", progress=seen.append)
    assert tuple(seen) == fake_service.OPENING
    assert session.id in service.sessions
    assert service.names() == ["OpenSession"]


def test_nobody_who_does_not_look_is_told(client, service):
    client.create_session("m", "d", loss="mse")
    client.create_session("m", "d", loss="mse", progress=True)  # stderr is no terminal
    assert service.names() == ["CreateSession", "CreateSession"]


def test_a_server_that_knows_of_no_progress_opens_without(client, service):
    service.fail("OpenSession", curvd.Unimplemented("unknown method"))
    seen = []
    session = client.create_session("m", "d", loss="mse", progress=seen.append)
    assert session.id in service.sessions
    assert service.names() == ["OpenSession", "CreateSession"]
    assert seen == []


def test_an_answer_without_a_session_is_a_breach():
    call = CreateSession(session_pb.CreateSessionRequest())
    call.observed(lambda progress: None)
    call.restart()
    list(call.feed(session_pb.OpenSessionResponse()))
    with pytest.raises(curvd.Internal, match="OpenSession breaks the contract"):
        call.conclude()


def test_a_stage_of_a_newer_server_is_passed_over():
    seen = []
    call = CreateSession(session_pb.CreateSessionRequest())
    call.observed(seen.append).restart()
    for stage in (session_pb.STAGE_TUNING, 99):
        progress = session_pb.StageProgress(stage=stage, done=1)
        list(call.feed(session_pb.OpenSessionResponse(progress=progress)))
    assert [p.stage for p in seen] == [Stage.TUNING]


def test_the_client_tells_its_own_stages_like_the_servers(client, service):
    torch = pytest.importorskip("torch")
    seen = []
    net = torch.nn.Linear(4, 2)
    data = np.ones((10, 4), np.float32), np.zeros((10, 2), np.float32)
    client.session_for(
        net, torch.nn.MSELoss(), data, batch_size=5, progress=seen.append
    )
    assert list(dict.fromkeys(p.stage for p in seen)) == [
        Stage.EXPORTING,
        Stage.REGISTERING,
        *(p.stage for p in fake_service.OPENING),
    ]
    for what in ("dataset", "model"):
        sent = [p for p in seen if p.detail == what]
        assert sent[-1].done == sent[-1].total > 0
    assert str(sent[-1]).endswith("bytes")


def test_a_line_is_drawn_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(drawn.sys.stderr, "isatty", lambda: True, raising=False)
    with drawn.opening(True) as observe:
        observe(
            curvd.StageProgress(stage=Stage.TUNING, done=2, total=8, elapsed_s=30.0)
        )
        observe(curvd.StageProgress(stage=Stage.WARMING, detail="", done=0))
    # rich writes its last state where stderr is captured.
    assert "warming" in capsys.readouterr().err


def test_one_line_says_stage_counts_and_what_is_left(monkeypatch):
    bars = pytest.importorskip("rich.progress")
    drawings = []
    monkeypatch.setattr(drawn.sys.stderr, "isatty", lambda: True, raising=False)
    update = bars.Progress.update
    monkeypatch.setattr(
        bars.Progress,
        "update",
        lambda bar, task, **fields: (
            drawings.append(fields),
            update(bar, task, **fields),
        ),
    )
    with drawn.opening(True) as observe:
        observe(
            curvd.StageProgress(stage=Stage.TUNING, done=2, total=8, elapsed_s=30.0)
        )
    (fields,) = drawings
    assert fields["description"] == "tuning, 2 of 8"
    assert (fields["completed"], fields["left"]) == (2, "at most 1:30 left")


@pytest.mark.parametrize("progress", [5, "yes", [print]])
def test_what_nobody_can_be_told_by_is_refused(client, progress):
    said = r"progress is True, False, or a function .*, got "
    session = client.create_session("m", "d", loss="mse")
    torch = pytest.importorskip("torch")
    net = torch.nn.Linear(2, 1)
    data = (np.ones((4, 2)), np.ones((4, 1)))
    for use in (
        lambda: client.session_for(net, "mse", data, batch_size=2, progress=progress),
        lambda: client.create_session("m", "d", loss="mse", progress=progress),
        lambda: client.register_model("mlp", {}, {"a": np.ones(2)}, progress=progress),
        lambda: session.update_parameters({"a": np.ones(2)}, progress=progress),
        lambda: session.hessian().trace(samples=2, progress=progress),
    ):
        with pytest.raises(InvalidSpec, match=said):
            use()
