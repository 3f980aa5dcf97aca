"""A disk that is really full: nothing is lost, everything says so, and it goes on after."""

import functools
import signal
from unittest import mock

import numpy as np
import pytest
import raw
from app.test_survival import child
from support.disks import filled
from support.quotas import served
from support.served import server

from curvd.errors import (
    DiskFull,
    FailedPrecondition,
    LimitExceeded,
    ModelNotFound,
    SessionNotFound,
)
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.storage.partial_upload import Partial

V = raw.file_of({"v": np.arange(5.0)})


def test_a_full_disk_loses_nothing_and_the_server_goes_on(small_disk):
    update = session_pb.RenewSessionRequest(lease={"seconds": 60})
    with server(small_disk) as channel:
        made = raw.fake_session(channel)
        filler = filled(small_disk)
        update.session_id = made.id
        with pytest.raises(DiskFull, match=r"full.*free some space"):
            for _ in range(300):  # until the pages that SQLite has are used up
                raw.call(channel, "RenewSession", update)
                raw.fake_session(channel)
        with pytest.raises(DiskFull):
            raw.register_dataset(channel, bytes(1 << 20))
        found = raw.call(channel, "ListSessions", session_pb.ListSessionsRequest())
        before = {s.id for s in found.sessions}
        assert made.id in before
    with server(small_disk) as channel:  # it starts on a full disk, too
        found = raw.call(channel, "ListSessions", session_pb.ListSessionsRequest())
        assert {s.id for s in found.sessions} == before
        filler.unlink()
        assert raw.fake_session(channel).id not in before


def test_a_start_on_a_full_disk_that_holds_nothing_is_one_error(small_disk):
    filled(small_disk)
    with pytest.raises((DiskFull, FailedPrecondition), match="full"):
        with server(small_disk):
            pass


def sessions(channel):
    """Ids and versions of all sessions."""
    found = raw.call(channel, "ListSessions", session_pb.ListSessionsRequest())
    return {s.id: s.version for s in found.sessions}


def product(channel, session, **fields):
    """The Hessian times V."""
    parts = raw.product("MatVec", session, V, **fields)
    return raw.joined(raw.call(channel, "MatVec", parts))[1]


def updated(channel, session, value):
    """Move a session to other parameters."""
    data = raw.file_of({"a": np.full(2, value), "b": np.ones(3)})
    header = session_pb.UpdateParametersHeader(
        session_id=session, values=raw.upload(data)
    )
    first = session_pb.UpdateParametersRequest(header=header)
    return raw.call(channel, "UpdateParameters", [first, memoryview(data)]).version


def large_points(seed, count=400):
    """A dataset, by default of 320 kB."""
    rng = np.random.default_rng(seed)
    return raw.file_of({"x": rng.standard_normal((count, 100)), "y": np.ones(count)})


def begun(channel, data, nbytes):
    """Send the beginning of a dataset, or say how much the server has of it."""
    header = session_pb.RegisterDatasetHeader(
        inputs=["x"], target="y", batch_size=4, tensors=raw.upload(data)
    )
    parts = [session_pb.RegisterDatasetRequest(header=header)]
    if nbytes:
        parts.append(memoryview(data)[:nbytes])
    return raw.call(channel, "RegisterDataset", parts).upload_needed.committed_bytes


def rest_of(channel, data, offset):
    """Send the rest."""
    return raw.register_dataset(
        channel, data[offset:], announced=raw.upload(data, offset=offset)
    ).dataset


def test_what_is_in_memory_goes_on_and_an_update_happens_or_does_not(small_disk):
    with server(small_disk) as channel:
        session = raw.fake_session(channel).id
        assert updated(channel, session, 2.0).version == 2
        want = product(channel, session)
        filler = filled(small_disk)
        with pytest.raises(DiskFull, match="free"):
            for value in range(300):  # until what SQLite and blobs have is used up
                version = updated(channel, session, 3.0 + value)
                want = product(channel, session)
                assert sessions(channel)[session] == version.version
        # The refused one has left no trace: neither a version nor other values.
        kept = sessions(channel)[session]
        np.testing.assert_array_equal(product(channel, session), want)
        # Stored vectors and kept results are in memory.
        header = curvature_pb.PutVectorHeader(session_id=session, name="v")
        first = curvature_pb.PutVectorRequest(header=header)
        raw.call(channel, "PutVector", [first, memoryview(V)])
        for _ in range(2):
            kept_result = product(channel, session, request_id="once")
            np.testing.assert_array_equal(kept_result, want)
    with server(small_disk) as channel:
        assert sessions(channel) == {session: kept}
        np.testing.assert_array_equal(product(channel, session), want)
        filler.unlink()
        assert updated(channel, session, 1000.0).version == kept + 1


def test_an_upload_goes_on_from_where_the_disk_was_full(small_disk):
    data = large_points(0)
    with server(small_disk) as channel:
        assert begun(channel, data, 100_000) == 100_000
        filler = filled(small_disk)
        for _ in range(2):
            with pytest.raises(DiskFull):
                rest_of(channel, data, 100_000)
            assert begun(channel, data, 0) == 100_000
    with server(small_disk) as channel:
        assert begun(channel, data, 0) == 100_000
        filler.unlink()
        assert rest_of(channel, data, 100_000).data_points == 400


def test_who_deletes_makes_room_also_on_a_full_disk(small_disk):
    def deleted(name, **fields):
        request = getattr(session_pb, f"{name}Request")(**fields)
        raw.call(channel, name, request)

    with server(small_disk) as channel:
        ids = [raw.fake_session(channel).id for _ in range(3)]
        made = [
            raw.register_dataset(channel, large_points(seed)).dataset.id
            for seed in range(2)
        ]
        filled(small_disk)
        with pytest.raises(DiskFull):
            raw.register_dataset(channel, large_points(7))
        for session in ids[:2]:
            deleted("DeleteSession", session_id=session)
        filled(small_disk)  # somebody else is quicker
        deleted("DeleteDataset", dataset_id=made[0])
        raw.register_dataset(channel, large_points(7, 200))
        filled(small_disk)
        deleted("DeleteDataset", dataset_id=made[1])
        raw.register_dataset(channel, large_points(8, 200))
        with pytest.raises(SessionNotFound):
            product(channel, ids[0])
    with server(small_disk) as channel:
        assert list(sessions(channel)) == ids[2:]
        deleted("DeleteSession", session_id=ids[2])


def test_under_a_quota_each_limit_says_which_it_is(small_disk, tmp_path):
    data = large_points(1)
    quotas = f"[callers.ann]\ndisk_bytes = {len(data) + 1000}\n"
    # The files of quotas and tokens lie on another disk than the data directory.
    (tmp_path / "data").symlink_to(small_disk)
    serving = functools.partial(served, tmp_path, quotas)
    with serving() as channels:
        ann, ben = channels["ann"], channels["ben"]
        filler = filled(small_disk)
        for channel in (ann, ben):
            with pytest.raises(DiskFull):
                raw.register_dataset(channel, data)
        filler.unlink()
        hers = raw.register_dataset(ann, data).dataset.id
        filled(small_disk)
        # Her quota is told before the disk, which is not hers to mend.
        with pytest.raises(LimitExceeded, match="disk_bytes") as told:
            raw.register_dataset(ann, large_points(2))
        assert told.value.metadata["owner"] == "ann"
        with pytest.raises(DiskFull):
            raw.register_dataset(ben, large_points(2))
        raw.call(ann, "DeleteDataset", session_pb.DeleteDatasetRequest(dataset_id=hers))
        # He has the room that she has made; journals need some of it.
        raw.register_dataset(ben, large_points(2, 200))


def test_what_was_acknowledged_on_a_full_disk_survives_kill_9(small_disk):
    pytest.importorskip("torch")
    state = raw.file_of({"1.weight": np.ones((2, 3)), "1.bias": np.ones(2)})
    points = raw.file_of({"x": np.ones((4, 3)), "y": np.ones((4, 2))})
    with child(small_disk) as (process, channel):
        config = '{"widths": [3, 2]}'
        model = raw.register_model(channel, "mlp", config, state).model
        dataset = raw.register_dataset(channel, points).dataset
        first = raw.create(channel, model.id, dataset.id).id
        filled(small_disk, but=1 << 16)
        acknowledged = {first}
        with pytest.raises(DiskFull):
            for _ in range(100):
                made = raw.create(channel, model.id, dataset.id)
                acknowledged.add(made.id)
        deleted = acknowledged.pop() if len(acknowledged) > 1 else ""
        if deleted:
            request = session_pb.DeleteSessionRequest(session_id=deleted)
            raw.call(channel, "DeleteSession", request)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    with server(small_disk) as channel:
        assert set(sessions(channel)) == acknowledged
        with pytest.raises(ModelNotFound):
            raw.call(
                channel,
                "DeleteModel",
                session_pb.DeleteModelRequest(model_id="never there"),
            )


def test_a_file_that_takes_no_byte_is_not_written_to_for_ever(tmp_path):
    """As some file systems of users' own answer where others raise."""
    partial = Partial(tmp_path / "upload.part")
    partial.append(memoryview(b"first"))
    whole, partial.file = partial.file, mock.Mock(wraps=partial.file)
    partial.file.write = lambda data: 0
    with pytest.raises(FailedPrecondition, match="cannot write its data directory"):
        partial.append(memoryview(b"second"))
    partial.file = whole
    partial.append(memoryview(b" and last"))
    assert (tmp_path / "upload.part").read_bytes() == b"first and last"
    partial.close()
