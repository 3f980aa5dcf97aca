"""Models and datasets go when nothing needs them, and never before."""

import contextlib
import json
import threading

import numpy as np
import pytest
import raw
from click.testing import CliRunner
from support.fake_device import FakeDevice
from support.served import Channels, server

import curvd
from curvd.cli import main
from curvd.errors import DatasetNotFound, ModelNotFound, StillInUse
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.app import serve_in_thread
from curvd_server.config import LimitsConfig, ServerConfig

STATE = raw.file_of({"a": np.ones(2), "b": np.ones(3)})
POINTS = raw.file_of({"x": np.ones((4, 2)), "y": np.ones(4)})


def registered(channel):
    model = raw.register_model(channel, "two", "{}", STATE).model.id
    return model, raw.register_dataset(channel, POINTS).dataset.id


def delete(channel, *, model="", dataset="", session=""):
    if session:
        end = session_pb.DeleteSessionRequest(session_id=session)
        raw.call(channel, "DeleteSession", end)
    if model:
        go = session_pb.DeleteModelRequest(model_id=model)
        raw.call(channel, "DeleteModel", go)
    if dataset:
        go = session_pb.DeleteDatasetRequest(dataset_id=dataset)
        raw.call(channel, "DeleteDataset", go)


def blobs(folder):
    return {path.name for path in (folder / "blobs").iterdir()}


def test_what_nothing_needs_is_deleted_with_its_bytes(tmp_path):
    with server(tmp_path) as channel:
        model, dataset = registered(channel)
        assert len(blobs(tmp_path)) == 2
        delete(channel, model=model)
        with pytest.raises(ModelNotFound):
            delete(channel, model=model)
        delete(channel, dataset=dataset)
        with pytest.raises(DatasetNotFound):
            delete(channel, dataset=dataset)
        assert blobs(tmp_path) == set()
        # The same content again is the same model, and has to be sent again.
        assert registered(channel) == (model, dataset)


def test_what_a_session_needs_stays_and_the_session_is_named(tmp_path):
    with server(tmp_path) as channel:
        model, dataset = registered(channel)
        session = raw.create(channel, model, dataset).id
        for what in ({"model": model}, {"dataset": dataset}):
            with pytest.raises(StillInUse, match=f"session {session} still needs"):
                delete(channel, **what)
        delete(channel, session=session, model=model, dataset=dataset)
        assert blobs(tmp_path) == set()


def test_what_a_session_needs_that_came_back_stays(tmp_path):
    with server(tmp_path) as channel:
        model, dataset = registered(channel)
        session = raw.create(channel, model, dataset).id
    with server(tmp_path) as channel:
        with pytest.raises(StillInUse, match=session):
            delete(channel, model=model)


class Waiting(FakeDevice):
    """Opens a session when it is told to."""

    def __init__(self):
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def load(self, *args, **kwargs):
        self.begun.set()
        assert self.go_on.wait(300)
        return super().load(*args, **kwargs)


def test_what_a_session_needs_that_is_being_made_stays(tmp_path):
    device = Waiting()
    with server(tmp_path, device) as channel:
        model, dataset = registered(channel)
        making = threading.Thread(target=raw.create, args=(channel, model, dataset))
        making.start()
        try:
            assert device.begun.wait(300)
            for what in ({"model": model}, {"dataset": dataset}):
                with pytest.raises(StillInUse, match="1 more still needs"):
                    delete(channel, **what)
        finally:
            device.go_on.set()
            making.join()


def test_bytes_that_something_else_needs_stay(tmp_path):
    with server(tmp_path) as channel:
        _, dataset = registered(channel)
        other = raw.register_dataset(channel, POINTS, batch_size=2).dataset.id
        delete(channel, dataset=dataset)
        assert len(blobs(tmp_path)) == 2
        delete(channel, dataset=other)
        assert len(blobs(tmp_path)) == 1


def test_bytes_that_are_being_uploaded_stay(tmp_path):
    with server(tmp_path) as channel, contextlib.ExitStack() as stack:
        model, _ = registered(channel)
        part = raw.file_of({"a": np.ones(2), "b": np.full(3, 2.0)})
        header = session_pb.RegisterModelHeader(
            builder="two", config_json="{}", state=raw.upload(part)
        )
        first = session_pb.RegisterModelRequest(header=header)
        feed = raw.Feed(first, memoryview(part)[:20])
        stack.callback(feed.end)
        answers = []
        sending = threading.Thread(
            target=lambda: answers.append(raw.call(channel, "RegisterModel", feed))
        )
        sending.start()
        delete(channel, model=model)
        feed.add(memoryview(part)[20:])
        feed.end()
        sending.join()
        assert answers[0].model.id != model


def test_a_session_without_a_lease_has_the_servers(tmp_path):
    for lease_s, has_end in ((3600, True), (0, False)):
        limits = LimitsConfig(lease_s=lease_s)
        with server(tmp_path / str(lease_s), limits=limits) as channel:
            made = raw.fake_session(channel)
            assert made.HasField("expire_time") is has_end
            if has_end:
                assert made.expire_time.seconds == pytest.approx(
                    made.create_time.seconds + lease_s, abs=60
                )
            longer = raw.fake_session(channel, lease={"seconds": 9 * 365 * 86400})
            assert longer.expire_time.seconds - longer.create_time.seconds > 8e8 / 3


def test_the_command_line_lists_and_deletes(tmp_path):
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path, drain_s=0.0)
    with (
        serve_in_thread(config, device=FakeDevice()) as target,
        Channels(target) as channel,
        curvd.connect(target) as client,
    ):
        model, dataset = registered(channel)
        session = raw.create(channel, model, dataset, name="mine").id
        run = CliRunner().invoke(main, ["sessions", target])
        assert session in run.output and "'mine'" in run.output
        for command, name, what in (
            ("models", model, "'two' of 2 tensors, 0.000 MiB, "),
            ("datasets", dataset, "N=4 B=4, 0.000 MiB, "),
        ):
            run = CliRunner().invoke(main, [command, target])
            first, *rest = run.output.splitlines()
            assert first == f"1 {command.removesuffix('s')}", run.output
            assert rest[0].strip() == name and what in rest[1]
            assert rest[1].endswith(f" old, needed by {session}")
            run = CliRunner().invoke(main, [command, target, "--json"])
            (facts,) = json.loads(run.output)
            assert (facts["id"], facts["session_ids"]) == (name, [session])
        words = ["delete", target, "--model", model]
        refused = CliRunner().invoke(main, words)
        assert refused.exit_code == 1 and "delete the sessions first" in refused.output
        unknown = [*words[:2], "--session", session, "--model", "f" * 64]
        half = CliRunner().invoke(main, unknown)
        assert half.exit_code == 1
        assert f"; deleted before that: {session}" in half.output
        gone = CliRunner().invoke(
            main, [*words, "--model", model, "--dataset", dataset, "--json"]
        )
        assert gone.exit_code == 0, gone.output  # a name that is said twice is one
        assert json.loads(gone.output) == {
            "sessions": [],
            "models": [model],
            "datasets": [dataset],
        }
        assert client.sessions() == []
        assert CliRunner().invoke(main, ["delete", target]).exit_code == 2
