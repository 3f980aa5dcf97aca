"""HTTP/2 as gRPC uses it: what is sent is what arrives, and no bytes do harm."""

import itertools
import socket
import threading
from collections import deque

import hpack
import http2_cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curvd.contract.rpcs import RPCS, Framed
from curvd.errors import CurvdError, InvalidVector
from curvd.http2 import frames
from curvd.http2.connection import H2Connection
from curvd.http2.frames import Code, Kind, Setting
from curvd.http2.glitches import Glitches
from curvd.http2.messages import Reader, framed, joined
from curvd.http2.peer import LONGEST_CHUNK, SERVER_WINDOW
from curvd.http2.stream import ProtocolError
from curvd.tensors import chunks as tensors

PATH = [(":method", "POST"), (":scheme", "http"), (":path", "/a/B")]
CODEC = RPCS["MatVec"].request
MESSAGE = CODEC.message(header={"session_id": "s" * 10})


class Pair:
    """A client's and a server's connection, joined by a socket pair."""

    def __init__(self, accept=lambda stream: None):
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
        self.ours = H2Connection(ends[0], client=True)
        self.theirs = H2Connection(ends[1], client=False, accept=accept)

    def settle(self, rounds=6):
        """Let everything arrive that can."""
        for _ in range(rounds):
            for connection in (self.ours, self.theirs):
                connection.push()
                connection.pull()

    def close(self):
        self.ours.sock.close()
        self.theirs.sock.close()


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def wire():
    """A server's connection, and the bare socket of its client."""
    bare, end = socket.socketpair()
    end.setblocking(False)
    connection = H2Connection(end, client=False)
    connection.push()
    yield bare, connection
    bare.close()
    end.close()


def begin(*more, number=1, flags=frames.END_HEADERS):
    """The bytes of a client that begins a call."""
    block = hpack.Encoder().encode(PATH)
    return b"".join((
        frames.PREFACE,
        frames.settings({Setting.DIRECT: 1}),
        frames.frame(Kind.HEADERS, flags, number, block),
        *more,
    ))


def call(number):
    """A further call."""
    return frames.frame(
        Kind.HEADERS, frames.END_HEADERS, number, frames.literals(tuple(PATH))
    )


def given_up(number):
    """The client wants no answer any more."""
    return frames.frame(Kind.RST_STREAM, 0, number, frames.number(Code.CANCEL))


def nowhere(nbytes):
    return None


@given(st.lists(st.tuples(st.text(max_size=300), st.text(max_size=300)), max_size=20))
def test_headers_mean_to_others_what_they_mean_to_us(headers):
    read = hpack.Decoder().decode(frames.literals(tuple(headers)))
    assert [tuple(pair) for pair in read] == headers


def test_long_headers_are_continued():
    block = bytes(range(256)) * 10
    data, pieces, kinds = frames.header_frames(3, block, 1, 1000), [], []
    while data:
        length, kind, flags, number = frames.read_head(memoryview(data)[:9])
        kinds.append((kind, flags, number))
        pieces.append(data[9 : 9 + length])
        data = data[9 + length :]
    assert b"".join(pieces) == block
    assert kinds == [(1, 1, 3), (9, 0, 3), (9, frames.END_HEADERS, 3)]


@settings(deadline=None)
@given(st.data())
def test_messages_arrive_however_their_bytes_are_cut(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sizes = data.draw(st.lists(st.integers(0, 9000), max_size=6))
    parts = [memoryview(rng.bytes(size)) for size in sizes]
    if data.draw(st.booleans()):
        parts.insert(0, MESSAGE)
    stream = b"".join(v for part in parts for v in framed(CODEC, part))
    inbox, places = deque(), []

    def room(nbytes):
        places.append(memoryview(bytearray(nbytes)))
        return places[-1]

    reader = Reader(CODEC, 1 << 20, inbox, room)
    at, arrived = 0, []
    while at < len(stream):
        count = data.draw(st.integers(1, len(stream) - at))
        reader.feed(memoryview(stream)[at : at + count])
        at += count
        arrived += inbox
        inbox.clear()
    assert reader.between
    assert [part for part, _ in arrived] == parts
    assert sum(nbytes for _, nbytes in arrived) == len(stream)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 1 << 20, 2 << 20]), max_size=6),
    st.lists(st.sampled_from([0.0, 0.001, 0.1]), min_size=1, max_size=6),
    st.integers(0, 5 << 20),
)
def test_joined_chunks_are_the_same_bytes_and_no_longer_than_allowed(
    sizes, steps, longest
):
    now = itertools.accumulate(itertools.cycle(steps))
    chunks = [memoryview(bytes([i]) * size) for i, size in enumerate(sizes)]
    inbox = deque()
    reader = Reader(CODEC, 3 << 20, inbox, nowhere, longest_chunk=longest)
    for part in joined([MESSAGE, *chunks], lambda: longest, lambda: next(now)):
        if isinstance(part, tuple):
            assert 1 < len(part) and sum(view.nbytes for view in part) <= longest
        for view in framed(CODEC, part):
            reader.feed(view)
    message, *arrived = [part for part, _ in inbox]
    assert message == MESSAGE
    assert b"".join(arrived) == b"".join(chunks)


def test_chunks_are_joined_while_they_leave_quickly():
    chunk, now = memoryview(bytes(2 << 20)), [0.0]
    ways = joined([MESSAGE, *[chunk] * 12], lambda: 6 << 20, lambda: now[0])
    counts = []
    for part in ways:
        counts.append(len(part) if isinstance(part, tuple) else 1)
        now[0] += 1.0 if len(counts) == 4 else 0.001
    # The message, one chunk, three, then three that take their time, one, and so on.
    assert counts == [1, 1, 3, 3, 1, 3, 1]


def test_only_chunks_may_be_longer_than_messages(pair):
    stream = pair.ours.open(PATH)
    pair.settle()
    assert pair.ours.longest_chunk == pair.theirs.longest_chunk == LONGEST_CHUNK
    server = pair.theirs.stream
    server.read(CODEC, 100, nowhere, longest_chunk=5000)
    pair.ours.send_data(stream, framed(CODEC, memoryview(bytes(5000))))
    pair.settle()
    assert [part.nbytes for part, _ in server.inbox] == [5000]
    message = CODEC.message(header={"session_id": "s" * 200})
    pair.ours.send_data(stream, framed(CODEC, message))
    pair.settle()
    assert "at most 100 are accepted" in str(server.failure)


def test_a_chunk_has_a_limit_too(pair):
    stream = pair.ours.open(PATH)
    pair.settle()
    server = pair.theirs.stream
    server.read(CODEC, 100, nowhere, longest_chunk=5000)
    pair.ours.send_data(stream, framed(CODEC, memoryview(bytes(5004))))
    pair.settle()
    assert "a message of 5007 bytes; at most 5006 are accepted" in str(server.failure)


def test_a_chunk_is_received_where_it_belongs(pair):
    stream = pair.ours.open(PATH)
    pair.settle()
    target = np.zeros(1 << 20, np.uint8)
    pair.theirs.stream.read(CODEC, 4 << 20, lambda nbytes: target[:nbytes].data)
    source = np.random.default_rng(0).integers(0, 255, 1 << 20, np.uint8)
    pair.ours.send_data(stream, framed(CODEC, source.data), end=True)
    pair.settle(400)
    ((part, _),) = pair.theirs.stream.inbox
    assert np.shares_memory(np.frombuffer(part, np.uint8), target)
    np.testing.assert_array_equal(target, source)
    assert pair.theirs.stream.ended


def test_what_lands_is_refused_at_once_and_not_held(pair):
    stream = pair.ours.open(PATH)
    pair.settle()
    target, landed = np.zeros(1 << 20, np.uint8), []

    def look(nbytes):
        landed.append(nbytes)
        if nbytes > 1 << 19:
            msg = "not this"
            raise InvalidVector(msg)

    server = pair.theirs.stream
    server.read(CODEC, 4 << 20, lambda nbytes: target[:nbytes].data, landed=look)
    pair.ours.send_data(stream, framed(CODEC, target.data))
    pair.settle(400)
    assert isinstance(server.failure, InvalidVector)
    assert server.failure.__traceback__ is None  # its frames refer to the target
    assert server.reader is None and not server.inbox
    assert landed == sorted(landed) and landed[-1] < target.nbytes


def test_a_chunk_fits_into_the_window_beside_what_is_not_given_back_yet():
    assert LONGEST_CHUNK + SERVER_WINDOW // 4 + (1 << 20) < SERVER_WINDOW


@pytest.mark.parametrize("size", [250, 251, 75_000])
def test_a_small_vector_is_aligned_where_it_arrives(pair, size):
    vector = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    codec = RPCS["Multiply"].request
    message = codec.message(header={"session_id": "s" * (size % 7)})
    file = tuple(tensors.chunks({"v": vector}))
    stream = pair.ours.open(PATH)
    pair.settle()
    pair.theirs.stream.read(codec, 4 << 20, nowhere)
    pair.ours.send_data(stream, framed(codec, Framed(message, file)), end=True)
    pair.settle(100)
    ((part, _),) = pair.theirs.stream.inbox
    _, payload = tensors.whole(part.tensors[0])
    values = tensors.values_of(payload, vector.dtype, allocate=None)  # copies nothing
    np.testing.assert_array_equal(values, vector)
    assert values.flags.aligned and values.flags.writeable


@pytest.mark.parametrize("nbytes", [0, 10, 60_000])
def test_the_end_of_a_request_comes_with_its_last_bytes(nbytes):
    bare, end = socket.socketpair()
    end.setblocking(False)
    ours = H2Connection(end, client=True)
    stream = ours.open(PATH)
    ours.send_data(stream, [memoryview(bytes(nbytes))], end=True)
    ours.push()
    end.close()
    data = b"".join(iter(lambda: bare.recv(1 << 20), b""))[len(frames.PREFACE) :]
    seen = []
    while data:
        length, kind, flags, _ = frames.read_head(memoryview(data)[:9])
        seen += [(flags, length)] if kind == Kind.DATA else []
        data = data[9 + length :]
    bare.close()
    assert [flags for flags, _ in seen] == [0] * (len(seen) - 1) + [frames.END_STREAM]
    assert sum(length for _, length in seen) <= nbytes
    assert all(length for _, length in seen) or not nbytes


def test_a_sender_stops_at_the_window_and_goes_on_when_parts_were_used(pair):
    stream = pair.ours.open(PATH)
    pair.settle()
    server = pair.theirs.stream
    server.read(CODEC, 4 << 20, nowhere)
    chunk = np.zeros(2 << 20, np.uint8).data
    total = SERVER_WINDOW + (16 << 20)
    for _ in range(total // chunk.nbytes):
        pair.ours.send_data(stream, framed(CODEC, chunk))
    pair.settle(4000)
    held = sum(nbytes for _, nbytes in server.inbox)
    assert held <= SERVER_WINDOW
    assert stream.outbox
    arrived = 0
    while stream.outbox or server.inbox:
        while server.inbox:
            _, nbytes = server.inbox.popleft()
            arrived += nbytes
            pair.theirs.acknowledge(server, nbytes)
        pair.settle(50)
    assert arrived > total


def test_the_windows_of_a_stream_and_its_connection_are_widened_together(
    pair, monkeypatch
):
    """Each update may wake the sender; what calls before have left makes them no more."""
    widened = []
    widen = pair.theirs._sender.widen
    monkeypatch.setattr(
        pair.theirs._sender, "widen", lambda *to: (widened.append(to), widen(*to))
    )
    chunk = np.zeros(2 << 20, np.uint8).data
    for count in (1, 20):
        stream = pair.ours.open(PATH)
        pair.ours.send_data(stream, framed(CODEC, MESSAGE))
        pair.settle()
        server = pair.theirs.stream
        server.read(CODEC, 4 << 20, nowhere)
        widened.clear()
        for _ in range(count):
            pair.ours.send_data(stream, framed(CODEC, chunk))
        while stream.outbox or server.inbox:
            pair.settle(50)
            while server.inbox:
                pair.theirs.acknowledge(server, server.inbox.popleft()[1])
        pair.ours.reset(stream, Code.CANCEL)
        pair.settle()
    assert [number for number, _ in widened] == [stream.number, 0] * (len(widened) // 2)
    assert len(widened) >= 4


def test_calls_follow_each_other_on_one_connection():
    streams = []
    pair = Pair(accept=streams.append)
    for _ in range(3):
        stream = pair.ours.open(PATH)
        pair.ours.send_data(stream, (), end=True)
        pair.settle()
        answer = [(":status", "200"), ("grpc-status", "0")]
        pair.theirs.send_headers(streams[-1], answer, end=True)
        pair.settle()
        assert stream.over
        assert stream.trailers == dict(answer)
    assert [s.number for s in streams] == [1, 3, 5]
    pair.close()


def test_a_ping_is_answered(pair):
    pair.ours.ping()
    before = pair.ours.bytes_received
    pair.settle()
    assert pair.ours.bytes_received > before


def test_padding_and_priority_are_taken_off(wire):
    bare, connection = wire
    block = hpack.Encoder().encode(PATH)
    headers = b"\2" + bytes(5) + block + b"\0\0"
    flags = frames.END_HEADERS | frames.PADDED | frames.PRIORITISED
    message = b"".join(framed(CODEC, MESSAGE))
    data = b"\3" + message + b"\0\0\0"
    bare.sendall(
        frames.PREFACE
        + frames.settings({})
        + frames.frame(Kind.HEADERS, flags, 1, headers)
    )
    connection.pull()
    assert connection.stream.headers == dict(PATH)
    connection.stream.read(CODEC, 1 << 20, nowhere)
    flags = frames.PADDED | frames.END_STREAM
    bare.sendall(frames.frame(Kind.DATA, flags, 1, data))
    connection.pull()
    assert [part for part, _ in connection.stream.inbox] == [MESSAGE]
    assert connection.stream.ended


@pytest.mark.parametrize(
    "useless",
    [
        frames.frame(0xBB, 0, 0),
        frames.frame(Kind.PING, frames.ACK, 0, bytes(8)),
        frames.frame(Kind.DATA, 0, 1, b"\0"),
    ],
)
def test_frames_that_nobody_needs_are_read_a_few_at_a_time(wire, useless):
    bare, connection = wire
    bare.sendall(begin() + useless * 200)
    before, pulls = connection.stream, 0
    connection.pull()
    assert before is None and connection.more
    while connection.more:
        connection.pull()
        pulls += 1
    assert 2 <= pulls <= 10
    bare.sendall(frames.frame(Kind.PING, 0, 0, b"12345678"))
    connection.pull()
    connection.push()
    assert bare.recv(1 << 16).endswith(
        frames.frame(Kind.PING, frames.ACK, 0, b"12345678")
    )


def test_a_second_call_at_once_is_refused(wire):
    bare, connection = wire
    bare.sendall(begin(call(3)))
    connection.pull()
    connection.push()
    refusal = frames.frame(Kind.RST_STREAM, 0, 3, frames.number(Code.REFUSED_STREAM))
    assert refusal in bare.recv(1 << 16)
    assert connection.stream.number == 1


def test_a_message_that_is_too_long_ends_its_call_only(wire):
    bare, connection = wire
    bare.sendall(begin())
    connection.pull()
    connection.stream.read(CODEC, 100, nowhere)
    chunk = memoryview(bytes(200))
    bare.sendall(frames.frame(Kind.DATA, 0, 1, b"".join(framed(CODEC, chunk))))
    connection.pull()
    assert "at most 100" in str(connection.stream.failure)
    bare.sendall(frames.frame(Kind.PING, 0, 0, b"12345678"))
    connection.pull()
    connection.push()
    assert frames.frame(Kind.PING, frames.ACK, 0, b"12345678") in bare.recv(1 << 16)


def test_a_request_that_ends_within_a_message_ends_its_call_only(wire):
    bare, connection = wire
    bare.sendall(begin())
    connection.pull()
    connection.stream.read(CODEC, 100, nowhere)
    bare.sendall(frames.frame(Kind.DATA, frames.END_STREAM, 1, b"\0\0\0"))
    connection.pull()
    assert "ends within a message" in str(connection.stream.failure)


def test_a_message_that_is_malformed_ends_its_call_only(wire):
    bare, connection = wire
    bare.sendall(begin())
    connection.pull()
    connection.stream.read(CODEC, 100, nowhere)
    bare.sendall(frames.frame(Kind.DATA, 0, 1, b"\0\0\0\0\3\x0a\xff\xff"))
    connection.pull()
    assert "none of its kind" in str(connection.stream.failure)


GREETING = frames.PREFACE + frames.settings({})
HOSTILE = {
    "not HTTP/2": b"GET / HTTP/1.1\r\n\r\n",
    "which is not open": begin(frames.frame(Kind.DATA, 0, 7, b"x")),
    "were not continued": begin(frames.frame(Kind.PING, 0, 0, bytes(8)), flags=0),
    "nobody asked for": begin(frames.frame(Kind.CONTINUATION, 4, 1, b"")),
    "of which nobody needs": begin(frames.head(600, Kind.SETTINGS, 0, 0)),
    "more padding than frame": begin(frames.frame(Kind.DATA, 8, 1, b"\xff")),
    "more padding than headers": GREETING + frames.frame(Kind.HEADERS, 12, 1, b"\xff"),
    "longest frame of 1": begin(frames.settings({Setting.MAX_FRAME_SIZE: 1})),
    "initial window of": begin(frames.settings({Setting.INITIAL_WINDOW_SIZE: 1 << 31})),
    "widened by 0": begin(frames.frame(Kind.WINDOW_UPDATE, 0, 0, bytes(4))),
    "widened by 2147483647": begin(
        frames.frame(Kind.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff")
    ),
    "cannot be read": (
        GREETING + frames.frame(Kind.HEADERS, 4, 1, b"\xff\xff\xff\xff\xff")
    ),
    "more than 65536 bytes of headers": (
        GREETING
        + frames.frame(Kind.HEADERS, 0, 1, bytes(1 << 14))
        + frames.frame(Kind.CONTINUATION, 0, 1, bytes(1 << 14)) * 20
    ),
}
EMPTY = frames.frame(Kind.DATA, 0, 1)
FLOODS = {
    "unknown types": frames.frame(99, 0, 1, b"x"),
    "priorities": frames.frame(Kind.PRIORITY, 0, 7, bytes(5)),
    "pings": frames.frame(Kind.PING, 0, 0, bytes(8)),
    "acknowledged pings": frames.frame(Kind.PING, frames.ACK, 0, bytes(8)),
    "settings": frames.settings({}),
    "acknowledged settings": frames.frame(Kind.SETTINGS, frames.ACK, 0),
    "empty data": EMPTY,
    "padded data": frames.frame(Kind.DATA, frames.PADDED, 1, b"\7" + bytes(7)),
    "data of one byte": frames.frame(Kind.DATA, 0, 1, b"\0"),
    "small windows": frames.frame(Kind.WINDOW_UPDATE, 0, 1, frames.number(1)),
    "resets again": given_up(1),
    "goodbyes": frames.frame(Kind.GOAWAY, 0, 0, bytes(8)),
    "goodbyes for a reason": frames.frame(Kind.GOAWAY, 0, 0, bytes(7) + b"\2why"),
    "priorities of another kind": frames.frame(0x10, 0, 0, bytes(4) + b"u=1"),
    "calls that are refused": b"",
    "calls that are reset": b"",
    "empty continuations": b"",
}
CALLS = range(3, 3000, 2)


def flood(name):
    """The bytes of a client that has nothing better to do."""
    if name == "calls that are refused":
        return begin(*(call(number) for number in CALLS))
    if name == "calls that are reset":
        return begin(given_up(1), *(call(n) + given_up(n) for n in CALLS))
    if name == "empty continuations":
        more = frames.frame(Kind.CONTINUATION, 0, 1)
        return begin(more * 1500, flags=0)
    return begin(FLOODS[name] * 1500)


@pytest.mark.parametrize("why", HOSTILE)
def test_what_breaks_the_protocol_ends_the_connection(wire, why):
    bare, connection = wire
    threading.Thread(target=_send, args=(bare, HOSTILE[why]), daemon=True).start()

    def accept(stream):
        stream.read(CODEC, 1 << 20, nowhere)

    connection._accept = accept
    connection.sock.settimeout(10)
    with pytest.raises(ProtocolError, match=why):
        while True:
            connection.pull()


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_what_brings_nothing_ends_the_connection(wire, name):
    bare, connection = wire
    connection._accept = lambda stream: stream.read(CODEC, 1 << 20, nowhere)
    threading.Thread(target=_send, args=(bare, flood(name)), daemon=True).start()
    connection.sock.settimeout(10)
    with pytest.raises(ProtocolError, match="that bring nothing") as caught:
        while True:
            connection.pull()
            connection.push()
    assert caught.value.code is Code.ENHANCE_YOUR_CALM


def test_one_pull_decodes_few_fields_however_few_bytes_they_take(wire):
    bare, connection = wire
    remembered, again = b"\x40\x01x\x01v", b"\xbe" * 250
    blocks = [frames.frame(Kind.HEADERS, 5, n, again) for n in range(3, 131, 2)]
    bare.sendall(begin(frames.frame(Kind.HEADERS, 5, 3, remembered)))
    connection.pull()
    decode, decoded = connection._blocks._decoder.decode, []

    def counted(block, raw):
        pairs = decode(block, raw=raw)
        decoded.append(len(pairs))
        return pairs

    connection._blocks._decoder.decode = counted
    bare.sendall(b"".join(blocks[1:]))
    pulls = [0]
    while sum(decoded) < 63 * 250:
        connection.pull()
        pulls.append(sum(decoded))
    assert max(b - a for a, b in itertools.pairwise(pulls)) <= 3 * 250


def test_useful_work_and_time_pay_for_glitches():
    now = 0.0
    glitches = Glitches(limit=100, clock=lambda: now)
    glitches.add(100)
    glitches.calls = 5
    glitches.add(40)  # the calls paid for them
    with pytest.raises(ProtocolError, match="more than 100 frames"):
        glitches.add(1)
    now = 10.0
    glitches.add(99)  # time did
    glitches.sent, glitches.received = 32 * 50, 4096 * 50
    glitches.add(100)
    with pytest.raises(ProtocolError):
        glitches.add(1)


def test_answers_that_are_provoked_and_not_read_are_bounded(wire):
    bare, connection = wire
    connection._glitches._limit = 10**6
    ping = frames.frame(Kind.PING, 0, 0, bytes(8))
    threading.Thread(target=_send, args=(bare, begin(ping * 2000)), daemon=True).start()
    connection.sock.settimeout(10)
    with pytest.raises(ProtocolError, match="provokes answers"):
        while True:
            connection.pull()


def test_a_long_conversation_is_no_flood(pair):
    for _ in range(300):
        stream = pair.ours.open(PATH)
        pair.ours.send_data(stream, framed(CODEC, MESSAGE), end=True)
        for _ in range(3):
            pair.ours.ping()
        pair.settle(2)
        theirs = pair.theirs.stream
        pair.theirs.send_headers(
            theirs, [(":status", "200"), ("grpc-status", "0")], end=True
        )
        pair.settle(2)
        assert stream.over and theirs.over


@pytest.mark.parametrize("name", http2_cases.BEGINNINGS)
def test_a_connection_begins_with_preface_and_settings(wire, name):
    bare, connection = wire
    data, reaction = http2_cases.BEGINNINGS[name]
    bare.sendall(data)
    with pytest.raises(ProtocolError) as caught:
        connection.pull()
    assert f"goaway {caught.value.code.name}" == reaction


def _send(bare, data):
    try:
        bare.sendall(data)
    except OSError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 2000), st.binary(max_size=50))
def test_random_bytes_do_no_harm(data, at, more):
    """Nothing but the errors that are meant for it."""
    message = b"".join(framed(CODEC, memoryview(bytes(300))))
    honest = begin(
        frames.frame(Kind.DATA, 0, 1, message),
        frames.frame(Kind.WINDOW_UPDATE, 0, 1, frames.number(10)),
        frames.frame(Kind.DATA, 1, 1, b""),
    )
    mutated = honest[:at] + more + honest[at + len(more) :] + data
    bare, end = socket.socketpair()
    end.setblocking(False)
    connection = H2Connection(end, client=False)

    def accept(stream):
        stream.read(CODEC, 1 << 20, nowhere)

    connection._accept = accept
    try:
        bare.sendall(mutated)
        for _ in range(5):
            connection.pull()
            connection.push()
    except (ProtocolError, CurvdError):
        pass
    finally:
        bare.close()
        end.close()
