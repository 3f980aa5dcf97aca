"""One caller at his quota is told so, with its name; nobody else notices."""

import functools
import threading
import time

import numpy as np
import pytest
import raw
from support.callers import calls_as
from support.quotas import refused, served, written

from curvd.errors import InvalidSpec, LimitExceeded, Overloaded, StateMismatch
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.device import Batcher
from curvd_server.system import Identity, Quota, Quotas


@pytest.fixture
def serving(tmp_path):
    """Start a server with quotas; gives a channel for each caller by name."""
    return functools.partial(served, tmp_path)


def put(channel, session, name, size=5):
    data = raw.file_of({"v": np.ones(size)})
    header = curvature_pb.PutVectorHeader(session_id=session, name=name)
    first = curvature_pb.PutVectorRequest(header=header)
    return raw.call(channel, "PutVector", [first, memoryview(data)])


def test_sessions(serving):
    with serving("[callers.ann]\nsessions = 2\n") as channels:
        for _ in range(2):
            raw.fake_session(channels["ann"])
        act = lambda: raw.fake_session(channels["ann"])  # noqa: E731
        refused(LimitExceeded, "sessions", 2, act)
        for _ in range(3):
            raw.fake_session(channels["ben"])
        listed = session_pb.ListSessionsRequest()
        first = raw.call(channels["ann"], "ListSessions", listed).sessions[0].id
        end = session_pb.DeleteSessionRequest(session_id=first)
        raw.call(channels["ann"], "DeleteSession", end)
        act()


def test_stored_vectors(serving):
    with serving("[callers.ann]\nvector_bytes = 100\n") as channels:
        sessions = [raw.fake_session(channels["ann"]).id for _ in range(2)]
        put(channels["ann"], sessions[0], "a")
        put(channels["ann"], sessions[1], "a")
        put(channels["ann"], sessions[1], "a")  # in its own place
        refused(
            LimitExceeded,
            "vector_bytes",
            100,
            lambda: put(channels["ann"], sessions[1], "b"),
        )
        his = raw.fake_session(channels["ben"]).id
        for name in "abcdef":
            put(channels["ben"], his, name)
        end = session_pb.DeleteSessionRequest(session_id=sessions[0])
        raw.call(channels["ann"], "DeleteSession", end)
        put(channels["ann"], sessions[1], "b")


def test_disk(serving):
    state = raw.file_of({"a": np.ones(2), "b": np.ones(3)})
    points = raw.file_of({"x": np.ones((400, 2)), "y": np.ones(400)})
    limit = len(state) + 100
    with serving(f"[callers.ann]\ndisk_bytes = {limit}\n") as channels:
        model = raw.register_model(channels["ann"], "two", "{}", state).model.id
        act = lambda: raw.register_dataset(channels["ann"], points)  # noqa: E731
        refused(LimitExceeded, "disk_bytes", limit, act)
        raw.register_dataset(channels["ben"], points)
        refused(LimitExceeded, "disk_bytes", limit, act)  # also of what lies there
        header = session_pb.RegisterDatasetHeader(
            inputs=["x"], target="y", batch_size=4, tensors=raw.upload(points)
        )
        ask = [session_pb.RegisterDatasetRequest(header=header)]
        refused(  # before a byte of it travels
            LimitExceeded,
            "disk_bytes",
            limit,
            lambda: raw.call(channels["ann"], "RegisterDataset", ask),
        )
        go = session_pb.DeleteModelRequest(model_id=model)
        raw.call(channels["ann"], "DeleteModel", go)
        raw.register_model(channels["ann"], "two", "{}", state)


def test_an_update_that_does_not_fit_leaves_nothing_on_the_disk(serving, tmp_path):
    blobs = tmp_path / "data" / "blobs"
    with serving("") as channels:
        session = raw.fake_session(channels["ann"]).id
        before = {path.name for path in blobs.iterdir()}
        values = raw.file_of({"a": np.ones(7)})
        header = session_pb.UpdateParametersHeader(
            session_id=session, values=raw.upload(values)
        )
        first = session_pb.UpdateParametersRequest(header=header)
        with pytest.raises(StateMismatch):
            raw.call(channels["ann"], "UpdateParameters", [first, memoryview(values)])
        assert {path.name for path in blobs.iterdir()} == before


def begun(value):
    """The first part of a request to register a model, and the bytes of its state."""
    state = raw.file_of({"a": np.full(2, value), "b": np.ones(3)})
    header = session_pb.RegisterModelHeader(
        builder="two", config_json="{}", state=raw.upload(state)
    )
    return session_pb.RegisterModelRequest(header=header), memoryview(state)


def begin(channel, value):
    """Send some bytes of a model, and break off; tell how many had arrived before."""
    first, state = begun(value)
    asked = raw.call(channel, "RegisterModel", [first]).upload_needed.committed_bytes
    raw.call(channel, "RegisterModel", [first, state[:30]])
    return asked


def parts(folder):
    return len(list((folder / "data" / "blobs").glob("*.part")))


def until(holds):
    for _ in range(6_000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("nobody noticed in a minute")


def test_uploads(serving, tmp_path):
    """Those that are being sent count; those that broke off make room."""
    with serving("[callers.ann]\nuploads = 2\n") as channels:
        sent = [begun(value) for value in (1.0, 2.0)]
        feeds = [raw.Feed(first, state[:30]) for first, state in sent]
        calls = [
            threading.Thread(
                target=raw.call, args=(channels["ann"], "RegisterModel", feed)
            )
            for feed in feeds
        ]
        for call in calls:
            call.start()
        try:
            until(lambda: parts(tmp_path) == 2)
            refused(LimitExceeded, "uploads", 2, lambda: begin(channels["ann"], 3.0))
            for value in range(5):
                begin(channels["ben"], value)
        finally:
            for feed, (_, state) in zip(feeds, sent, strict=True):
                feed.add(state[30:60])
                feed.end()
            for call in calls:
                call.join(60)
        # The client is gone, and the bytes perhaps with it.
        assert parts(tmp_path) == 7
        assert [begin(channels["ann"], v) for v in (3.0, 4.0, 3.0)] == [0, 0, 30]
        assert parts(tmp_path) == 7
        raw.register_model(channels["ann"], "two", "{}", sent[1][1].tobytes())


def test_disk_of_uploads_that_broke_off_makes_room_the_oldest_first(serving, tmp_path):
    size = len(begun(0.0)[1])
    limit = 2 * size + 40
    with serving(f"[callers.ann]\ndisk_bytes = {limit}\n") as channels:
        for value in (1.0, 2.0):
            begin(channels["ann"], value)
        for value in (3.0, 4.0):
            state = begun(value)[1].tobytes()
            raw.register_model(channels["ann"], "two", "{}", state)
        assert parts(tmp_path) == 1
        # What cannot be had even so drives out nothing.
        act = lambda: begin(channels["ann"], 5.0)  # noqa: E731
        refused(LimitExceeded, "disk_bytes", limit, act)
        assert parts(tmp_path) == 1


def test_columns_under_way(tmp_path):
    quotas = Quotas(written(tmp_path / "q", "[callers.ann]\ncolumns = 3\n"))
    batcher = Batcher(
        run_columns=4,
        run_bytes=1 << 20,
        pending_columns=100,
        pending_bytes=1 << 20,
        quotas=quotas,
    )
    try:
        with calls_as(Identity("ann")), batcher.reserve(2, 10):
            error = refused(
                Overloaded, "columns", 3, lambda: batcher.reserve(2, 10).__enter__()
            )
            assert error.retry_after_s > 0
            with calls_as(Identity("ben")), batcher.reserve(50, 10):
                pass
        with calls_as(Identity("ann")), batcher.reserve(3, 10):
            pass
        assert quotas.usage() == {}
    finally:
        batcher.close()


class Feed(raw.Feed):
    """A request that says when its parts are wanted."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.wanted = threading.Event()

    def __next__(self):
        if not self._parts:
            self.wanted.set()
        return super().__next__()


def test_calls_at_once(serving):
    with serving("[callers.ann]\ncalls = 1\n") as channels:
        mine, his = (raw.fake_session(channels[name]).id for name in ("ann", "ben"))
        data = raw.file_of({"v": np.ones(5)})
        act = lambda: raw.call(  # noqa: E731
            channels["ann"], "MatVec", raw.product("MatVec", mine, data)
        )
        state = raw.file_of({"a": np.full(2, 7.0), "b": np.ones(3)})
        header = session_pb.RegisterModelHeader(
            builder="two", config_json="{}", state=raw.upload(state)
        )
        first = session_pb.RegisterModelRequest(header=header)
        feed, answers = Feed(first), []
        slow = threading.Thread(
            target=lambda: answers.append(
                raw.call(channels["ann"], "RegisterModel", feed)
            )
        )
        slow.start()
        try:
            assert feed.wanted.wait(300)
            with pytest.raises(Overloaded) as caught:
                for _ in range(10_000):  # what was sent comes to be read soon
                    act()
            assert caught.value.metadata["owner"] == "ann"
            for _ in range(3):
                raw.call(channels["ben"], "MatVec", raw.product("MatVec", his, data))
        finally:
            feed.add(memoryview(state))
            feed.end()
            slow.join()
        assert answers[0].model.owner == "ann"
        act()


def test_the_last_table_that_says_something_counts(tmp_path):
    quotas = Quotas(
        written(
            tmp_path / "q",
            "[default]\nsessions = 3\ncalls = 4\n[roles.operator]\nsessions = 9\n"
            "[callers.ann]\ncalls = 1\nweight = 2.5\n",
        )
    )
    ann = Identity("ann", frozenset({"user", "operator"}))
    assert quotas.of(ann) == Quota(sessions=9, calls=1, weight=2.5)
    assert quotas.of(Identity("ben")) == Quota(sessions=3, calls=4)
    assert quotas.of(Identity()) == Quota()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[default]\nsession = 1", r"\[default\] of .* has 'session'; known: calls"),
        ("[default]\nsessions = -1", "sessions in .default. of .* at least 0, got -1"),
        ("[default]\nsessions = true", "whole number"),
        ("[callers.ann]\nweight = 0", "weight in .callers.ann. .* more than 0"),
        ("[roles.root]\nsessions = 1", "has 'roles.root'; it may have"),
        ("[other]\nsessions = 1", "has 'other'; it may have"),
        ("sessions = 1", "has 'sessions'; it may have"),
        ("callers = 1", "callers must be tables"),
        ("[", "is no TOML"),
    ],
)
def test_a_file_that_says_what_it_must_not_is_refused(tmp_path, text, match):
    with pytest.raises(InvalidSpec, match=match):
        Quotas(written(tmp_path / "q", text))


def test_a_broken_file_leaves_the_quotas_as_they_were(tmp_path):
    quotas = Quotas(written(tmp_path / "q", "[default]\nsessions = 3\n"))
    written(tmp_path / "q", "[")
    quotas.reload()
    assert quotas.of(Identity("ann")).sessions == 3
    written(tmp_path / "q", "[default]\nsessions = 4\n")
    quotas.reload()
    assert quotas.of(Identity("ann")).sessions == 4


def test_what_is_given_back_may_be_taken_again(tmp_path):
    quotas = Quotas(written(tmp_path / "q", "[default]\ncalls = 1\n"))
    for _ in range(3):
        with (
            calls_as(Identity("ann")),
            quotas.held("calls", 1),
            pytest.raises(Overloaded),
        ):
            quotas.take("calls", 1)
    assert quotas.usage() == {}
