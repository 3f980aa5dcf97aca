"""What strangers may take: time of the event loop, connections, memory, patience."""

import contextlib
import json
import logging
import os
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import raw
import trustme
from support.fake_device import FakeDevice
from support.loop_clock import LoopClock
from support.served import server, stub

import curvd
from curvd.http2 import frames
from curvd.http2.frames import Kind, Setting
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig, TlsConfig
from curvd_server.transport.allowance import Allowance
from curvd_server.transport.drops import Drops
from curvd_server.transport.limits import ConnectionLimits

GREETING = frames.PREFACE + frames.settings({Setting.DIRECT: 1})
INFO = session_pb.GetServerInfoRequest()
NEVER_S = 1e6
PATIENT = {"greeting_s": NEVER_S, "idle_connection_s": NEVER_S, "stall_s": NEVER_S}
LIMIT_S = 1000.0
"""What a limit is set to that a test lets pass: no machine is so slow."""


@pytest.fixture
def loop_clock(monkeypatch):
    return LoopClock(monkeypatch)


@contextlib.contextmanager
def serving(tmp_path, limits=None, **options):
    """A real server on a fake device, whose patience ends only where that is asked."""
    config = ServerConfig(
        listen="127.0.0.1:0",
        drain_s=0.0,
        data_dir=tmp_path / "data",
        connections=ConnectionLimits(**PATIENT | (limits or {})),
        **options,
    )
    with serve_in_thread(config, device=FakeDevice()) as target:
        host, _, port = target.rpartition(":")
        yield host, int(port)


@pytest.fixture
def dial():
    """Connections that are closed in the end."""
    with contextlib.ExitStack() as stack:

        def dial(address, data=b""):
            sock = stack.enter_context(socket.create_connection(address, timeout=300))
            sock.sendall(data)
            return sock

        yield dial


def ended(sock):
    """Wait until the server closes."""
    came = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            came += data
    return came


def sent_away(sock, loop_clock):
    """Let time pass until the server closes; return what it said."""
    came = b""
    sock.setblocking(False)
    with contextlib.suppress(ConnectionResetError):
        while True:
            try:
                data = sock.recv(1 << 16)
            except BlockingIOError:
                loop_clock.advance(LIMIT_S)
                continue
            if not data:
                break
            came += data
    return came


def answers(address):
    with curvd.connect(f"{address[0]}:{address[1]}") as client:
        return client.server_info() is not None


def reasons(caplog):
    """Why connections were dropped, by the log."""
    found = [r.getMessage() for r in caplog.records if '"dropped"' in r.getMessage()]
    return {line.split('"reason": "')[1].split('"')[0] for line in found}


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


async def test_strangers_share_a_part_of_the_time_first_come_first_served():
    allowance = Allowance(share=0.25, burst_s=1.0)
    allowance.spend(1.0)
    turns = []

    def work(name):
        turns.append(name)
        allowance.spend(1e-3)

    for name in range(5):
        allowance.wait(lambda name=name: work(name))
    assert allowance.spent and not turns
    allowance.spend(-1.0)
    for _ in range(5):
        await allowance.turn()
    assert turns == list(range(5))


def test_an_allowance_fills_with_time_up_to_what_can_be_saved():
    clock = Clock()
    allowance = Allowance(share=0.25, burst_s=1.0, clock=clock)
    allowance.spend(3.0)
    assert allowance.spent
    clock.now = 8.0
    assert allowance.spent
    clock.now = 8.1
    assert not allowance.spent
    clock.now = 1e6
    allowance.spend(1.0)
    assert allowance.spent


def test_drops_are_counted_and_their_log_is_limited(caplog):
    clock = Clock()
    drops = Drops(clock)
    for number in range(100):
        drops.add("idle", f"peer {number}")
    drops.add("greeting", "peer")
    assert drops.counts == {"idle": 100, "greeting": 1}
    assert len(caplog.records) == 6
    clock.now = 2.0
    drops.add("idle", "another")
    assert '"more": 95' in caplog.records[6].getMessage()
    assert len(caplog.records) == 8


def test_what_connections_take_is_reported_once_a_minute_if_it_has_changed(caplog):
    caplog.set_level(logging.INFO, "curvd_server")
    clock = Clock()
    drops = Drops(clock)
    drops.add("idle", "peer")
    caplog.clear()
    while clock.now < 300.0:
        clock.now += 0.5
        drops.report({"open": 1 if clock.now < 150.0 else 2})
    first, second = (json.loads(record.getMessage()) for record in caplog.records)
    assert (first["open"], second["open"]) == (1, 2)
    assert second["dropped"] == {"idle": 1}


@pytest.mark.parametrize("field", ConnectionLimits.__slots__)
def test_a_limit_of_nothing_is_refused(field):
    with pytest.raises(curvd.InvalidSpec, match=f"{field} must be"):
        ConnectionLimits(**{field: 0})


def test_a_greeting_that_is_cut_is_waited_for_and_understood(tmp_path, dial):
    with serving(tmp_path) as address:
        sock = dial(address)
        for byte in GREETING:
            sock.sendall(bytes([byte]))
        assert sock.recv(frames.HEAD_BYTES)[3] == Kind.SETTINGS


@pytest.mark.parametrize("beginning", [b"", GREETING[:20], GREETING])
def test_who_makes_no_call_is_sent_away(tmp_path, dial, caplog, loop_clock, beginning):
    with serving(tmp_path, {"greeting_s": LIMIT_S}) as address:
        sock = dial(address, beginning)
        if beginning == GREETING:
            assert sock.recv(frames.HEAD_BYTES)[3] == Kind.SETTINGS
        came = sent_away(sock, loop_clock)
        goodbye = frames.frame(Kind.GOAWAY, 0, 0, bytes(8))
        assert came.endswith(goodbye) is (beginning == GREETING)
        assert answers(address)
    assert reasons(caplog) == {"greeting"}


def test_who_never_ends_a_handshake_is_sent_away(tmp_path, dial, caplog, loop_clock):
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    files = {name: tmp_path / name for name in ("cert", "key")}
    issued.private_key_pem.write_to_path(files["key"])
    issued.cert_chain_pems[0].write_to_path(files["cert"])
    context = ssl.create_default_context()
    context.set_alpn_protocols([frames.RECOGNISED, "h2"])
    sent = ssl.MemoryBIO()
    begun = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        begun.do_handshake()
    hello = sent.read()
    limits = {"greeting_s": LIMIT_S}
    with serving(tmp_path, limits, tls=TlsConfig(**files)) as address:
        for beginning in (hello[:100], hello):
            sent_away(dial(address, beginning), loop_clock)
        ended(dial(address, hello[:5] + bytes(4) + hello[9:]))
    assert reasons(caplog) == {"greeting", "handshake"}


def test_an_idle_connection_is_closed_and_its_client_connects_anew(
    tmp_path, caplog, loop_clock
):
    with serving(tmp_path, {"idle_connection_s": LIMIT_S}) as address:
        with curvd.connect(f"{address[0]}:{address[1]}") as client:
            client.server_info()
            while "idle" not in reasons(caplog):
                loop_clock.advance(LIMIT_S)
            client.server_info()
    assert reasons(caplog) == {"idle"}


@pytest.mark.parametrize("limit", ["connections", "peer_connections"])
def test_who_came_first_and_does_nothing_makes_room(tmp_path, dial, caplog, limit):
    with serving(tmp_path, {limit: 3}) as address:
        with curvd.connect(f"{address[0]}:{address[1]}") as client:
            client.server_info()
            idle = [dial(address, GREETING) for _ in range(4)]
            ended(idle[0])
            ended(idle[1])
            client.server_info()  # who has made a call goes last
            assert answers(address)
            ended(idle[2])
    assert reasons(caplog) == {limit}


def test_when_all_are_busy_a_new_connection_is_closed(tmp_path, dial, caplog):
    headers = frames.literals((
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/curvd.v1.CurvatureService/MatVec"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ))
    call = frames.header_frames(1, headers, 0, frames.DEFAULT_LONGEST)
    ping = frames.frame(Kind.PING, 0, 0, b"12345678")
    answer = frames.frame(Kind.PING, frames.ACK, 0, b"12345678")
    with serving(tmp_path, {"connections": 2}) as address:
        for _ in range(2):
            sock, came = dial(address, GREETING + call + ping), b""
            while answer not in came:
                came += sock.recv(1 << 16)
        assert ended(dial(address, GREETING)) == b""
    assert reasons(caplog) == {"connections"}


def test_foreign_clients_have_half_of_the_room(tmp_path, dial, caplog):
    foreign = frames.PREFACE + frames.settings({})
    with serving(tmp_path, {"connections": 6}) as address:
        held = [dial(address, foreign) for _ in range(3)]
        for sock in held:
            assert sock.recv(frames.HEAD_BYTES)[3] == Kind.SETTINGS
        assert ended(dial(address, foreign)) == b""
        assert answers(address)
    assert reasons(caplog) == {"relayed_connections"}


def useless():
    """Frames that need no answer, one kind after the other."""
    yield frames.frame(0xBB, 0, 0)
    yield frames.frame(Kind.PRIORITY, 0, 1, bytes(4) + b"\1")
    yield frames.frame(Kind.PING, frames.ACK, 0, bytes(8))
    yield frames.frame(Kind.SETTINGS, frames.ACK, 0)
    yield frames.frame(Kind.WINDOW_UPDATE, 0, 0, frames.number(1))
    yield frames.settings({})
    yield frames.frame(Kind.PING, 0, 0, bytes(8))


@pytest.mark.parametrize("frame", list(useless()))
def test_floods_of_useless_frames_let_others_be_served(tmp_path, dial, frame):
    stop = threading.Event()

    def flood(sock):
        with contextlib.suppress(OSError):
            sock.sendall(GREETING)
            for _ in range(200):
                if stop.is_set():
                    break
                sock.sendall(frame * 1000)

    with serving(tmp_path) as address:
        floods = []
        for _ in range(3):
            floods.append(threading.Thread(target=flood, args=(dial(address),)))
            floods[-1].start()
        for _ in range(5):
            assert answers(address)
        stop.set()
    for thread in floods:
        thread.join()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_come_back_after_a_crowd(tmp_path, dial):
    foreign = frames.PREFACE + frames.settings({})
    with serving(tmp_path) as address:
        assert answers(address)
        before = descriptors()
        crowd = [dial(address, g) for g in (b"", GREETING, foreign) * 20]
        for sock in crowd[1::3]:
            assert sock.recv(1)
        for sock in crowd:
            sock.close()
        for _ in range(1000):
            if descriptors() <= before:
                break
            assert answers(address)
        assert descriptors() <= before


def reader_that_stops(channel, session):
    """A call whose client reads one part and no more."""
    file = raw.file_of({"v": np.ones((400_000, 5))})
    request = raw.product("MatMat", session.id, file)
    answers = stub(channel, "MatMat")(iter(request), timeout=NEVER_S)
    next(answers)
    return answers


ON_BOTH_WAYS_IN = pytest.mark.parametrize(
    "answers", ["grpcio", "direct"], indirect=True
)


@ON_BOTH_WAYS_IN
def test_who_does_not_read_is_given_up(tmp_path, caplog, loop_clock, answers):
    limits = ConnectionLimits(**PATIENT | {"stall_s": LIMIT_S})
    with server(tmp_path, connections=limits) as channel:
        session = raw.fake_session(channel)
        results = reader_that_stops(channel, session)
        ask = session_pb.DeleteSessionRequest(session_id=session.id)
        while "stalled" not in reasons(caplog):
            assert raw.call(channel, "GetServerInfo", INFO)
            loop_clock.advance(LIMIT_S)
        raw.call(channel, "DeleteSession", ask)  # waits for leases
        results.cancel()
    assert reasons(caplog) == {"stalled"}


@ON_BOTH_WAYS_IN
def test_who_does_not_go_on_with_a_request_is_told(tmp_path, loop_clock, answers):
    limits = ConnectionLimits(**PATIENT | {"stall_s": LIMIT_S})
    with (
        server(tmp_path, connections=limits) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        session = raw.fake_session(channel)
        parts = raw.product("MatMat", session.id, raw.file_of({"v": np.ones((9, 5))}))
        for count in (0, 1):
            feed = raw.Feed(*parts[:count])
            told = pool.submit(raw.call, channel, "MatMat", feed, timeout=NEVER_S)
            while not told.done():
                loop_clock.advance(LIMIT_S)
            with pytest.raises(curvd.Unavailable, match=r"did not go on .*stall_s"):
                told.result()
            feed.end()
