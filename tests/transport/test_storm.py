"""Each flood and each hoard, for a while: others are served, and nothing stays behind."""

import contextlib
import logging
import os
import resource
import selectors
import shutil
import socket
import subprocess
import sys
import threading

import grpc
import hostile
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from support.fake_device import FakeDevice
from support.served import Channels

import curvd
from curvd.http2 import frames
from curvd.http2.frames import Kind
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.transport import greeting
from curvd_server.transport.interceptors import TokenInterceptor
from curvd_server.transport.limits import ConnectionLimits

CALLS = 4
FOREIGN = 40
DESCRIPTORS = 256


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def attacked(address, pieces, *, hoards):
    """Strangers who go on until the end of the context, and some steps at least."""
    left, steps = threading.Event(), iter(range(20))

    def until():
        return next(steps, None) is not None or not left.is_set()

    count = 40 if hoards else 4
    thread = threading.Thread(
        target=hostile.attack, args=(address, pieces, count, until, hoards)
    )
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


@pytest.mark.parametrize("name", [*hostile.FLOODS, *hostile.HOARDS])
def test_others_are_served_beside_strangers_who_leave_nothing_behind(
    tmp_path, caplog, name
):
    hoards = name in hostile.HOARDS
    bytes_ = hostile.HOARDS.get(name)
    pieces = (lambda: iter([bytes_])) if hoards else hostile.FLOODS[name]
    config = ServerConfig(
        listen="127.0.0.1:0", drain_s=0.0, data_dir=tmp_path, token="secret"
    )
    with serve_in_thread(config, device=FakeDevice()) as target:
        host, _, port = target.rpartition(":")
        with curvd.connect(target, token="secret") as client:
            client.server_info()
            before = descriptors()
            with attacked((host, int(port)), pieces, hoards=hoards):
                for _ in range(CALLS):
                    client.server_info()
            while descriptors() > before:
                client.server_info()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@contextlib.contextmanager
def process(tmp_path, *before):
    """A server in a process of its own: its target."""
    command = [
        *before,
        sys.executable,
        "-c",
        "from curvd.cli.commands import main; main()",
    ]
    command += ["serve", "--listen", "127.0.0.1:0", "--data-dir", tmp_path / "data"]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as server,
    ):
        try:
            yield server.stdout.readline().decode().split()[-1]
        finally:
            server.terminate()
            assert server.wait(300) == 0


def healthy(target):
    """Ask by a connection of grpcio's own."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.insecure_channel(target, own)
    stub = health_pb2_grpc.HealthStub(channel)
    stub.Check(health_pb2.HealthCheckRequest(), timeout=300)
    return channel


def _without_rights():
    """What a command begins with that has no capability."""
    drop = ["setpriv", "--no-new-privs"]
    if os.geteuid() == 0:
        drop += ["--bounding-set=-all", "--inh-caps=-all"]
    return drop


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_foreign_clients_fit_where_no_capability_is_held(tmp_path):
    with (
        process(tmp_path, *_without_rights()) as target,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(FOREIGN):
            stack.enter_context(healthy(target))
    assert '"reason"' not in (tmp_path / "log").read_text()


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4 * DESCRIPTORS,
    reason="needs descriptors for both ends",
)
def test_few_descriptors_are_kept_for_those_who_are_served(tmp_path):
    limit = ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"]
    with process(tmp_path, *limit) as target, contextlib.ExitStack() as stack:
        host, _, port = target.rpartition(":")
        with curvd.connect(target) as client:
            client.server_info()
            for bytes_ in (b"", hostile.GREETING, hostile.HOARDS["foreign idle"]):
                for _ in range(DESCRIPTORS // 2):
                    sock = socket.create_connection((host, int(port)), 60)
                    stack.enter_context(sock).sendall(bytes_)
            client.server_info()
            with curvd.connect(target) as another:
                another.server_info()
            client.register_dataset(
                {"x": np.ones((1, 1)), "y": np.ones(1)},
                inputs="x",
                target="y",
                batch_size=1,
            )
    log = (tmp_path / "log").read_text()
    assert '"reason": "descriptors"' in log
    assert '"reason": "relayed_connections"' in log
    assert '"level": "error"' not in log


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4 * DESCRIPTORS
    or not shutil.which("setpriv"),
    reason="needs descriptors for both ends, and setpriv",
)
def test_what_was_acknowledged_without_rights_and_descriptors_is_not_lost(tmp_path):
    pytest.importorskip("torch")
    from support.requests import Requests

    poor = ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", *_without_rights()]
    with process(tmp_path, *poor) as target, contextlib.ExitStack() as stack:
        host, _, port = target.rpartition(":")
        channel = stack.enter_context(Channels(target))
        requests = Requests(channel)
        requests.product()
        for _ in range(DESCRIPTORS):
            sock = socket.create_connection((host, int(port)), 60)
            stack.enter_context(sock).sendall(hostile.GREETING)
        message, chunks = requests.right("UpdateParameters")
        assert requests.send("UpdateParameters", message, chunks).version.version == 2
        with curvd.connect(target) as another:
            loss, gradient = another.session(requests.session).gradient()
    with process(tmp_path) as target, curvd.connect(target) as client:
        session = client.session(requests.session)
        assert session.refresh().version == 2
        assert session.gradient()[0] == loss
        np.testing.assert_array_equal(session.gradient()[1], gradient)


def test_what_strangers_say_fills_no_log(tmp_path):
    said = frames.frame(Kind.GOAWAY, 0, 0, bytes(7) + b"\2" + b"words" * 1000)
    ping = frames.frame(Kind.PING, 0, 0, bytes(8))
    with process(tmp_path) as target:
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port)), 300) as sock:
            sock.sendall(frames.PREFACE + frames.settings({}) + said * 20 + ping)
            came = b""
            while frames.frame(Kind.PING, frames.ACK, 0, bytes(8)) not in came:
                came += sock.recv(1 << 16)
    assert "words" not in (tmp_path / "log").read_text()


def test_calls_that_nobody_takes_up_yet_are_few(tmp_path, monkeypatch):
    taken, go_on = threading.Event(), threading.Event()
    intercept = TokenInterceptor.intercept_service

    async def busy(*args):
        taken.set()
        go_on.wait()  # and the event loop with it
        return await intercept(*args)

    monkeypatch.setattr(TokenInterceptor, "intercept_service", busy)
    calls = [hostile.headers(n, flags=frames.END_STREAM) for n in range(1, 200, 2)]
    begin = frames.PREFACE + frames.settings({}) + b"".join(calls)
    config = ServerConfig(
        listen="127.0.0.1:0",
        drain_s=0.0,
        data_dir=tmp_path,
        token="secret",
        transport="grpcio",
    )
    with (
        serve_in_thread(config, device=FakeDevice()) as target,
        contextlib.ExitStack() as stack,
        selectors.DefaultSelector() as selector,
    ):
        stack.callback(go_on.set)
        host, _, port = target.rpartition(":")
        for _ in range(8):
            sock = stack.enter_context(socket.create_connection((host, int(port))))
            sock.sendall(begin)
            selector.register(sock, selectors.EVENT_READ)
        assert taken.wait(300)
        heard = b""
        while b"CANCELLED" not in heard:
            for key, _ in selector.select():
                heard += key.fileobj.recv(1 << 16)
        assert b"needs a token" not in heard


def test_watching_the_health_takes_nobodys_place(tmp_path, monkeypatch):
    monkeypatch.setattr(greeting, "is_ours", lambda beginning, *, tls: True)
    config = ServerConfig(
        listen="127.0.0.1:0",
        drain_s=0.0,
        data_dir=tmp_path,
        token="secret",
        connections=ConnectionLimits(connections=3),
    )
    watched = []
    with (
        serve_in_thread(config, device=FakeDevice()) as target,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(3):
            stub = health_pb2_grpc.HealthStub(stack.enter_context(healthy(target)))
            watched.append(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60))
            assert next(watched[-1]).status
        with curvd.connect(target, token="secret") as client:
            client.server_info()
        for call in watched:
            call.cancel()


def test_a_token_is_needed_for_all_but_the_questions_of_probes(tmp_path):
    config = ServerConfig(
        listen="127.0.0.1:0", drain_s=0.0, data_dir=tmp_path, token="secret"
    )
    with (
        serve_in_thread(config, device=FakeDevice()) as target,
        healthy(target) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        assert next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=300)).status
        paths = [f"/grpc.health.v1.Health/{name}" for name in ("List", "Check/", "")]
        for path in [*paths, "/grpc.reflection.v1alpha.ServerReflection/Info"]:
            with pytest.raises(grpc.RpcError, match="needs a token"):
                channel.unary_unary(path)(b"", timeout=300)
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError, match="needs a token"):
            next(stub.ServerReflectionInfo(iter([]), timeout=300))
