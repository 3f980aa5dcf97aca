"""Updates in parts: kept until one commit names them, which changes all or nothing."""

import hashlib

import numpy as np
import pytest
import raw
from support.served import server

from curvd.errors import (
    CurvdError,
    FailedPrecondition,
    InvalidSpec,
    InvalidTensors,
    RequestIdReused,
    SessionNotFound,
    StateMismatch,
    VersionMismatch,
)
from curvd.tensors import Box, chunks, dump_boxes, safetensors_header
from curvd.v1 import session_service_pb2 as session_pb


def part_of(boxes=None, **arrays):
    """A safetensors file of boxes."""
    header = safetensors_header.header_of(arrays)
    first = safetensors_header.dump_header(header, dump_boxes(boxes or {}))
    return first + b"".join(bytes(chunks.bytes_of(a)) for a in arrays.values())


FIRST = part_of({"b": Box((3,), (0,))}, b=np.array([1.0, 2.0]), a=np.zeros(2))
SECOND = part_of({"b": Box((3,), (2,))}, b=np.array([3.0]))
WHOLE = raw.file_of({"a": np.zeros(2), "b": np.array([1.0, 2.0, 3.0])})


def digest(data):
    return hashlib.sha256(data).hexdigest()


def send(channel, data=None, **fields):
    """One UpdateParameters with a file, or without."""
    if data is not None:
        fields["values"] = raw.upload(data)
    header = session_pb.UpdateParametersHeader(**fields)
    first = session_pb.UpdateParametersRequest(header=header)
    parts = [] if data is None else chunks.pieces(memoryview(data))
    return raw.call(channel, "UpdateParameters", [first, *parts])


@pytest.fixture
def channel(tmp_path):
    with server(tmp_path) as it:
        yield it


@pytest.fixture
def session(channel):
    return raw.fake_session(channel)


def version_of(channel, session):
    request = session_pb.GetSessionRequest(session_id=session.id)
    session = raw.call(channel, "GetSession", request).session
    session.ClearField("expire_time")  # every call renews the lease
    return session


def keep(channel, session, *parts):
    for part in parts:
        kept = send(channel, part, session_id=session.id, as_part=True)
        assert kept.part.digest == digest(part)
    return [digest(part) for part in parts]


def test_parts_change_nothing_until_they_are_named_together(channel, session, tmp_path):
    digests = keep(channel, session, FIRST, SECOND)
    assert version_of(channel, session).version == 1
    made = send(channel, session_id=session.id, parts=digests).version
    assert made.version == 2
    send(channel, WHOLE, session_id=session.id)
    now = version_of(channel, session)
    assert (now.version, now.parameters_digest) == (3, made.parameters_digest)
    left = {file.name for file in (tmp_path / "blobs").iterdir()}
    assert not left & set(digests)


def test_a_part_is_asked_for_and_goes_on_like_any_upload(channel, session):
    header = session_pb.UpdateParametersHeader(
        session_id=session.id, as_part=True, values=raw.upload(FIRST)
    )
    asked = [session_pb.UpdateParametersRequest(header=header)]
    found = raw.call(channel, "UpdateParameters", asked)
    assert found.upload_needed.committed_bytes == 0
    raw.call(channel, "UpdateParameters", [*asked, memoryview(FIRST[:40])])
    found = raw.call(channel, "UpdateParameters", asked)
    assert found.upload_needed.committed_bytes == 40
    header.values.offset = 40
    rest = [session_pb.UpdateParametersRequest(header=header), memoryview(FIRST[40:])]
    assert raw.call(channel, "UpdateParameters", rest).part.digest == digest(FIRST)


def test_a_commit_that_is_repeated_makes_one_version(channel, session):
    digests = keep(channel, session, FIRST, SECOND)
    fields = {"session_id": session.id, "parts": digests, "request_id": "r"}
    first = send(channel, **fields)
    assert send(channel, **fields) == first  # the parts are gone by now
    with pytest.raises(RequestIdReused):
        send(channel, **fields | {"parts": digests[::-1]})


@pytest.mark.parametrize(
    ("parts", "error", "text"),
    [
        (
            [FIRST],
            InvalidTensors,
            "2 elements of tensor 'b' .* has 3: a part is missing",
        ),
        ([part_of(b=np.full(3, np.nan))], StateMismatch, "'b' has nan at index"),
        ([part_of(z=np.ones(1))], StateMismatch, "unknown: z"),
    ],
)
def test_parts_that_do_not_fit_leave_the_old_version(
    channel, session, tmp_path, parts, error, text
):
    before = version_of(channel, session)
    digests = keep(channel, session, *parts)
    blobs = set((tmp_path / "blobs").iterdir())
    with pytest.raises(error, match=text):
        send(channel, session_id=session.id, parts=digests)
    assert version_of(channel, session) == before
    # What the server put together in vain is not kept; the parts are, for another try.
    assert set((tmp_path / "blobs").iterdir()) == blobs


def test_a_part_that_is_not_there_is_named_and_the_next_attempt_succeeds(
    channel, session
):
    digests = [*keep(channel, session, FIRST), digest(SECOND)]
    with pytest.raises(FailedPrecondition, match=f"part {digest(SECOND)} .*send the"):
        send(channel, session_id=session.id, parts=digests)
    with pytest.raises(VersionMismatch):
        keep(channel, session, SECOND)
        send(channel, session_id=session.id, parts=digests, expected_version=7)
    assert send(channel, session_id=session.id, parts=digests).version.version == 2


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "got none"),
        ({"as_part": True}, "got none of a part"),
        ({"parts": [digest(FIRST)], "as_part": True}, "got parts of a part"),
        (
            {"parts": [digest(FIRST)], "values": raw.upload(SECOND)},
            "got values, parts",
        ),
        ({"parts": ["../../etc/passwd"]}, "64 lower-case hexadecimal digits"),
    ],
)
def test_there_is_one_way_to_say_what_the_values_are(channel, session, fields, text):
    with pytest.raises(InvalidSpec, match=text):
        send(channel, session_id=session.id, **fields)


def test_a_session_that_is_not_there_keeps_no_part(channel):
    with pytest.raises(SessionNotFound):
        send(channel, FIRST, session_id="nowhere", as_part=True)


def test_the_contract_says_how_many_parts_there_may_be(channel, session):
    with pytest.raises(CurvdError, match="parts has 10001 values; the limit is 10000"):
        send(channel, session_id=session.id, parts=["0" * 64] * 10_001)
