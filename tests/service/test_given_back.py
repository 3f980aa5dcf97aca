"""What a session has had of memory is given back with it, without a look for garbage.

Whatever was asked of it and however that ended: no circle of objects may hold its data, or
they stay until a full collection, which on an idle server never comes.
"""

import contextlib
import gc
import math
import threading
import time
import weakref

import numpy as np
import pytest
import raw
from support.requests import STATE, Requests, serving
from support.served import Channels

import curvd
from curvd.contract.rpcs import RPCS
from curvd.errors import Cancelled, CurvdError, LimitExceeded, SessionNotFound
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.storage import sound_files
from curvd_server.storage.blob_store import BlobStore
from curvd_server.storage.snapshots import Snapshot
from curvd_server.system import HostMemory, garbage

ABOUT_SESSIONS = [
    name
    for name in RPCS
    if name not in ("DeleteSession", "DeleteModel", "DeleteDataset")
]


@pytest.fixture
def held(monkeypatch):
    """Copies of files that anything holds; garbage is not looked for."""
    alive = weakref.WeakSet()

    class Watched(Snapshot):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            alive.add(self)

    monkeypatch.setattr(sound_files, "Snapshot", Watched)
    gc.collect()
    gc.disable()
    try:
        yield alive
    finally:
        gc.enable()


def delete_all(channel):
    listed = session_pb.ListSessionsRequest()
    for session in raw.call(channel, "ListSessions", listed).sessions:
        end = session_pb.DeleteSessionRequest(session_id=session.id)
        raw.call(channel, "DeleteSession", end)


def gone(held):
    """Wait for what runs at the end of a call, beside its answer."""
    until_s = time.monotonic() + 5
    while held and time.monotonic() < until_s:
        time.sleep(0.01)
    return not held


def spoil(name, message, chunks):
    """Make a request that is refused, late rather than early."""
    header = getattr(message, "header", message)
    if hasattr(header, "query"):
        header.query.operator.damping = float("nan")
    elif hasattr(message, "session") or hasattr(message, "params"):
        getattr(message, "session", message).params.append("none")
    return [memoryview(bytes(80))] if chunks else ()


def test_with_a_session_its_memory_goes_whatever_was_asked_of_it(held, tmp_path):
    left, refused = [], []
    with serving(tmp_path) as target, Channels(target) as channel:
        requests = Requests(channel)
        for names in (
            ABOUT_SESSIONS[n : n + 4] for n in range(0, len(ABOUT_SESSIONS), 4)
        ):
            requests.session = requests.create()
            for name in names:
                message, chunks = requests.right(name)
                with contextlib.suppress(CurvdError):  # some name vectors of no session
                    requests.send(name, message, chunks)
                try:
                    requests.send(name, message, spoil(name, message, chunks))
                except CurvdError:
                    refused.append(name)
            delete_all(channel)
            if not gone(held):
                left.append(names)
                gc.collect()
    assert not left
    assert {"Eigsh", "MatVec", "CreateSession", "OpenSession"} <= set(refused)


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_with_a_session_its_memory_goes_under_a_query(held, tmp_path, transport):
    config = curvd.ClientConfig(transport=transport)
    began, ended = threading.Event(), []

    def ask(session):
        try:
            while True:
                session.hessian().spectral_density(probes=64, steps=8)
                began.set()
        except (Cancelled, SessionNotFound) as error:
            ended.append(error.code)

    with (
        serving(tmp_path) as target,
        Channels(target) as channel,
        curvd.connect(target, config=config) as client,
    ):
        session = client.session(Requests(channel).session)
        asking = threading.Thread(target=ask, args=(session,))
        asking.start()
        assert began.wait(60)
        session.delete()
        asking.join(60)
        assert ended
        assert gone(held)


def kept(blobs, data):
    with blobs.upload(
        raw.upload(data).digest, offset=0, total_bytes=len(data)
    ) as upload:
        upload.write(memoryview(data))
        assert upload.finish()
    return raw.upload(data).digest


class Circle:
    """What only a look for garbage finds."""

    def __init__(self, content):
        self.content, self.itself = content, self


def test_garbage_is_looked_for_before_memory_is_refused(held, tmp_path, monkeypatch):
    monkeypatch.setattr(garbage, "_looked_s", -math.inf)
    blobs = BlobStore(tmp_path / "blobs", memory=HostMemory(len(STATE) + 10))
    digest, other = kept(blobs, STATE), kept(blobs, raw.file_of({"x": np.ones(5)}))
    Circle(blobs.open(digest))
    assert len(held) == 1
    opened = blobs.open(other)  # there would be no room for both
    assert len(held) == 1
    with pytest.raises(LimitExceeded, match="datasets and states"):
        blobs.open(digest)  # what is in use is not given away
    assert opened.arrays["x"].sum() == 5
    # Whoever asks again and again has nobody held up for it each time.
    del opened
    Circle(blobs.open(digest))
    with pytest.raises(LimitExceeded, match="datasets and states"):
        blobs.open(other)
