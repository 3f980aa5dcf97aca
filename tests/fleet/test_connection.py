"""What travels between front and workers: typed values, arrays, and nothing for strangers."""

import dataclasses
import json
import math
import mmap
import os
import socket
import threading

import numpy as np
import pytest

pytest.importorskip("torch")
from support.fleets import fleet_of

from curvd.contract.enums import LossName, Tier
from curvd.contract.specs import LossSpec, OperatorSpec, SerializedGraph
from curvd.errors import Cancelled, Internal
from curvd_server.engine.tuning import Choice, Plan
from curvd_server.engine.verification import Evidence
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Connection, Took
from curvd_server.fleet.shards import cut, deal
from curvd_server.fleet.values import plain, typed
from curvd_server.storage import Snapshot, region_of

CHOICE = Choice(
    Plan("program", 8), Evidence(1e-9, math.inf, ()), Tier.FIRST, plainer="double"
)


@pytest.fixture
def pair():
    ends = [Connection(end) for end in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


def both(first, second):
    """Run both at once; what each raised, or None."""
    raised = {}

    def run(name, call):
        try:
            call()
        except (EOFError, OSError) as error:
            raised[name] = error

    threads = [
        threading.Thread(target=run, args=pair)
        for pair in (("first", first), ("second", second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize(
    "value",
    [
        LossSpec(name=LossName.MSE, weight_decay={"a.*": 0.5}),
        LossSpec(name=LossName.CUSTOM, graph=SerializedGraph(b"\x00\xff")),
        OperatorSpec(block_sizes=(1, 2), parameters=("a", "b"), damping=1),
        CHOICE,
        messages.Build(
            operator=1,
            problem=2,
            spec=OperatorSpec(),
            budget_bytes={"0": 5},
            choice=CHOICE,
            verified=frozenset({2, 3}),
        ),
    ],
)
def test_values_come_back_as_they_were(value):
    assert typed(type(value), plain(value)) == value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, "1"),
        (int, True),
        (str, 1),
        (bytes, "not base64!"),
        (Tier, "last"),
        (tuple[int, ...], {"a": 1}),
        (tuple[str, float], ["a"]),
        (OperatorSpec, {"kind": "hessian", "run": "this"}),
        (messages.Part, {"index": 0}),
        (messages.Part, [0, 1, 2]),
    ],
)
def test_what_is_of_another_type_is_refused(kind, value):
    with pytest.raises(Internal, match="between front and worker"):
        typed(kind, value)


def test_arrays_travel_with_a_message(pair):
    arrays = [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.zeros((0, 4)),
        np.array(True),
        np.arange(5, dtype=np.uint16),
    ]
    took = Took(0.25, 2.0, 1.5)
    pair[0].send(7, messages.Product(operator=3, counts=(2,)), arrays, took=took)
    frame = pair[1].receive()
    assert (frame.number, frame.took) == (7, took)
    assert frame.message == messages.Product(operator=3, counts=(2,))
    for a, b in zip(frame.arrays, arrays, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_others_send_between_the_pieces_of_a_large_message(pair):
    large = np.arange(3 << 20, dtype=np.float64)
    answers, got = [], []

    def receive():
        while len(got) < 2:
            got.append(pair[1].receive())

    receiver = threading.Thread(target=receive)
    receiver.start()

    def between():
        if not answers:
            pair[0].send(2, messages.Arrived(), [np.ones(2)])
            answers.append(1)
        return False

    small = np.ones(0)
    pair[0].send(1, messages.Arrived(), [small, large, large[:5]], cancelled=between)
    receiver.join()
    assert [frame.number for frame in got] == [2, 1]
    for a, b in zip(got[1].arrays, [small, large, large[:5]], strict=True):
        np.testing.assert_array_equal(a, b)


def test_of_a_message_that_is_given_up_nothing_is_heard(pair):
    large = np.zeros(3 << 20)
    polls = iter([False, False, True])
    got = []
    receiver = threading.Thread(target=lambda: got.append(pair[1].receive()))
    receiver.start()
    with pytest.raises(Cancelled, match="while a worker was sent what it needs"):
        pair[0].send(1, messages.Arrived(), [large], cancelled=lambda: next(polls))
    pair[0].send(2, messages.Done())
    receiver.join()
    assert (got[0].number, got[0].message) == (2, messages.Done())
    assert pair[1]._arriving == {}


@pytest.mark.parametrize(
    "at", [[7, 0, 0, 1], [1, 1, 0, 1], [1, -1, 0, 1], [1, 0, 8, 9]]
)
def test_a_piece_that_lies_nowhere_is_refused(at):
    ours, theirs = socket.socketpair()
    head = {
        "number": 1,
        "kind": "Arrived",
        "fields": {},
        "arrays": [["<f8", [2], None]],
        "transfer": 1,
    }
    with ours, theirs:
        for each in (head, {"piece": at}):
            data = json.dumps(each).encode()
            ours.sendall(len(data).to_bytes(4, "little") + data)
        with pytest.raises(Internal):
            Connection(theirs).receive()


def snapshot_of(path, array):
    path.write_bytes(b"12345678" + array.tobytes())
    return Snapshot(path, digest=False).view()[8:].view(array.dtype)


def test_what_lies_in_blobs_is_mapped_and_does_not_travel(pair, tmp_path):
    """Nobody receives, and far more than a socket holds is sent at once."""
    n = 2 << 20
    one = snapshot_of(tmp_path / "one", np.arange(n, dtype=np.float64))
    other = snapshot_of(tmp_path / "other", np.arange(n, dtype=np.float32))
    small = np.ones(3)
    arrays = [one.reshape(4, -1)[1:3], small, other, one[n // 2 :]]
    pair[0].send(1, messages.Product(operator=3, counts=()), arrays)
    got = pair[1].receive().arrays
    for a, b in zip(got, arrays, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    got[0][:] = 0  # stays with who writes
    assert arrays[0][0, 0] == n // 4
    pair[0].send(2, messages.Arrived(), arrays)
    np.testing.assert_array_equal(pair[1].receive().arrays[0], arrays[0])


def test_the_memory_of_a_blob_cannot_be_written_by_who_is_handed_it(tmp_path):
    view = snapshot_of(tmp_path / "one", np.ones(1 << 14))
    memory = region_of(view).memory
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"0", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(memory, 0)  # shared, to write
    assert region_of(np.ones(3)) is None


def test_over_a_network_the_bytes_of_blobs_travel(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ends = Connection(ours), Connection(theirs)
    array = snapshot_of(tmp_path / "one", np.arange(1 << 14, dtype=np.float64))
    sender = threading.Thread(
        target=ends[0].send, args=(1, messages.Arrived(), [array])
    )
    sender.start()
    (got,) = ends[1].receive().arrays
    sender.join()
    np.testing.assert_array_equal(got, array)
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (b"[]", "cannot be read"),
        (
            b'{"number": 1, "kind": "object", "fields": {}, "arrays": [], "transfer": 0}',
            "cannot be",
        ),
        (
            b'{"number": 1, "kind": "Done", "fields": {"a": 1}, "arrays": [], "transfer": 0}',
            "no Done",
        ),
        (
            b'{"number": 1, "kind": "Done", "fields": {}, "transfer": 0, '
            b'"arrays": [["|O", [1], null]]}',
            "does not travel",
        ),
        (
            b'{"number": 1, "kind": "Done", "fields": {}, "transfer": 0, '
            b'"arrays": [["<f8", [-1], null]]}',
            "does not travel",
        ),
    ],
)
def test_what_is_no_message_is_refused(head, match):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(len(head).to_bytes(4, "little") + head)
        with pytest.raises(Internal, match=match):
            Connection(theirs).receive()


def test_both_ends_prove_that_they_know_the_secret(pair):
    secrets = b"one", b"another"
    for second in secrets:
        ends = [Connection(end) for end in socket.socketpair()]
        raised = both(
            lambda ends=ends: ends[0].prove(b"one", role=b"front", timeout_s=60),
            lambda ends=ends, s=second: ends[1].prove(s, role=b"worker", timeout_s=60),
        )
        assert bool(raised) == (second != b"one")
        for end in ends:
            end.close()


def test_a_proof_that_is_sent_back_is_none(pair):
    """A stranger who only repeats what he hears knows nothing."""
    ours, theirs = socket.socketpair()
    raised = {}

    def prove():
        try:
            Connection(ours).prove(b"secret", role=b"front", timeout_s=60)
        except EOFError as error:
            raised["front"] = error

    thread = threading.Thread(target=prove)
    thread.start()
    with theirs:
        theirs.sendall(theirs.recv(32, socket.MSG_WAITALL))
        theirs.sendall(theirs.recv(32, socket.MSG_WAITALL))
        thread.join()
    ours.close()
    assert "does not know the secret" in str(raised["front"])


def test_strangers_at_the_door_hold_nobody_up():
    with fleet_of(1) as fleet:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(fleet._keeper._listener.address)
            stranger.sendall(b"x" * 64)
            assert len(stranger.recv(64, socket.MSG_WAITALL)) == 64
            assert not stranger.recv(1)
        assert fleet.seats[0].is_ready


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_shards_cover_the_data_in_order_and_workers_the_shards(shards, workers):
    parts = cut(9, shards)
    covered = [b for part in parts for b in range(part.start, part.stop)]
    assert covered == list(range(9))
    dealt = deal(parts, workers)
    assert [p for rank in sorted(dealt) for p in dealt[rank]] == list(parts)
    sizes = [len(own) for own in dealt.values()]
    assert max(sizes) - min(sizes) <= 1


def test_all_messages_can_be_written():
    for kind in messages.KINDS.values():
        assert dataclasses.is_dataclass(kind)
