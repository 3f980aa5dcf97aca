"""One port: our clients are answered without a copy, all others by grpcio."""

import contextlib
import errno
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import trustme
from support.fake_device import FakeDevice

import curvd
from curvd.contract import convert, enums, specs
from curvd.contract.rpcs import RPCS
from curvd.http2 import frames
from curvd.http2.frames import RECOGNISED, Code, Kind, Setting
from curvd.http2.messages import framed
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig, TlsConfig
from curvd_server.transport import addresses, connection, listener
from curvd_server.transport.detect import is_ours

GREETING = frames.PREFACE + frames.settings({Setting.DIRECT: 1})
ONCE = curvd.RetryConfig(give_up_s=0.0)
TRANSPORTS = pytest.mark.parametrize("transport", ["direct", "grpcio"])


@contextlib.contextmanager
def serving(tmp_path, device=None, **options):
    """A real server on a fake device."""
    options = {"listen": "127.0.0.1:0", "drain_s": 0.0} | options
    config = ServerConfig(data_dir=tmp_path / "data", **options)
    with serve_in_thread(config, device=device or FakeDevice()) as target:
        yield target


@pytest.fixture
def connections(monkeypatch):
    """Connections that the port itself answers."""
    made = []

    class Counted(connection.ServerConnection):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(listener, "ServerConnection", Counted)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CA, and what it signed for the server and a client."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, identity in (("server", "localhost"), ("client", "me@example.org")):
        issued = authority.issue_cert(identity)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder


def product(target, transport, **options):
    """Five times a vector, by a fake session."""
    config = curvd.ClientConfig(transport=transport, retry=ONCE)
    with curvd.connect(target, config=config, **options) as client:
        model = client.register_model("two", {}, {"a": np.ones(2), "b": np.ones(3)})
        dataset = client.register_dataset(
            {"x": np.ones((4, 2)), "y": np.ones(4)},
            inputs="x",
            target="y",
            batch_size=4,
        )
        session = client.create_session(model, dataset, loss="mse", dtype="F64")
        return session.hessian() @ np.arange(5.0)


def check(result):
    np.testing.assert_array_equal(result, 5 * np.arange(5.0))


def test_a_client_of_ours_is_known_by_its_first_bytes():
    assert is_ours(GREETING, tls=False) is True
    assert is_ours(GREETING + b"more", tls=False) is True
    for count in range(1, len(GREETING)):
        assert is_ours(GREETING[:count], tls=False) is None
    others = frames.PREFACE + frames.settings({Setting.ENABLE_PUSH: 0})
    for other in (others, b"GET / HTTP/1.1\r\n", GREETING[1:], b"\x16\x03\x01"):
        assert is_ours(other, tls=False) is False


@pytest.mark.parametrize("protocols", [[RECOGNISED, "h2"], ["h2"], None])
def test_a_client_of_ours_is_known_by_how_its_encryption_begins(protocols):
    context = ssl.create_default_context()
    if protocols:
        context.set_alpn_protocols(protocols)
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = sent.read()
    assert is_ours(hello, tls=True) is bool(protocols and RECOGNISED in protocols)
    assert is_ours(hello[:100], tls=True) is None
    assert is_ours(GREETING, tls=True) is False


@TRANSPORTS
def test_both_transports_reach_the_server_over_tcp(tmp_path, connections, transport):
    with serving(tmp_path) as target:
        check(product(target, transport))
    assert bool(connections) is (transport == "direct")


@TRANSPORTS
@pytest.mark.parametrize("mutual", [False, True])
def test_both_transports_reach_the_server_over_tls(
    tmp_path, files, connections, transport, mutual
):
    ca = files / "ca.pem"
    tls = TlsConfig(
        cert=files / "server.pem",
        key=files / "server.key",
        client_ca=ca if mutual else None,
    )
    pair = {"cert": files / "client.pem", "key": files / "client.key"}
    with serving(tmp_path, listen="localhost:0", tls=tls) as target:
        trusting = curvd.TlsConfig(ca=ca, **(pair if mutual else {}))
        check(product(target, transport, tls=trusting))
        assert bool(connections) is (transport == "direct")
        stranger = files.parent / "stranger.pem"
        trustme.CA().cert_pem.write_to_path(stranger)
        for wrong in (stranger, ca if mutual else None, None):
            with pytest.raises(
                curvd.CurvdError, match=r"cannot connect to|no curvd ser"
            ):
                product(target, transport, tls=wrong)


@TRANSPORTS
@pytest.mark.parametrize("scheme", ["unix", "unix-abstract"])
def test_both_transports_reach_the_server_over_unix_sockets(
    tmp_path, connections, transport, scheme
):
    listen = f"{scheme}:{tmp_path / 'socket'}"
    with serving(tmp_path, listen=listen) as target:
        assert target == listen
        check(product(target, transport))
    assert bool(connections) is (transport == "direct")


@TRANSPORTS
def test_both_transports_need_the_token(tmp_path, transport):
    with serving(tmp_path, token="secret") as target:
        check(product(target, transport, token="secret"))
        for wrong in ("other", None):
            with pytest.raises(curvd.Unauthenticated):
                product(target, transport, token=wrong)


def test_calls_in_a_row_share_a_connection(tmp_path, connections):
    with serving(tmp_path) as target:
        check(product(target, "direct"))
    assert len(connections) == 1


def test_calls_at_once_have_a_connection_each(tmp_path, connections):
    import asyncio

    async def ask(target):
        async with curvd.aio.connect(target) as client:
            await asyncio.gather(*(client.server_info() for _ in range(12)))

    with serving(tmp_path) as target:
        asyncio.run(ask(target))
    assert 1 < len(connections) <= 12


def registered(target, seeds, **options):
    """Register large datasets at once, and one after the other: ids by seed."""

    def register(seed):
        x = np.random.default_rng(seed).standard_normal((4, 1 << 18))
        with curvd.connect(target, **options) as client:
            data = {"x": x, "y": np.ones(4)}
            return client.register_dataset(
                data, inputs="x", target="y", batch_size=4
            ).id

    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(register, seeds))
    return together, [register(seed) for seed in seeds]


def test_large_requests_at_once_all_arrive(tmp_path, connections):
    with serving(tmp_path) as target:
        together, apart = registered(target, range(6))
    assert together == apart and len(set(apart)) == 6 and connections


def test_large_requests_at_once_all_arrive_encrypted(tmp_path, files, connections):
    tls = TlsConfig(cert=files / "server.pem", key=files / "server.key")
    with serving(tmp_path, listen="localhost:0", tls=tls) as target:
        trusting = curvd.TlsConfig(ca=files / "ca.pem")
        together, apart = registered(target, range(6), tls=trusting)
    assert together == apart and len(set(apart)) == 6 and connections


def test_who_stops_in_the_middle_of_a_large_request_is_in_nobodys_way(
    tmp_path, connections
):
    headers = frames.literals((
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/curvd.v1.CurvatureService/Multiply"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ))
    head = frames.header_frames(1, headers, 0, frames.DEFAULT_LONGEST)
    message = bytes([0]) + (4 << 20).to_bytes(4, "big") + bytes(2 << 20)
    with serving(tmp_path) as target:
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port))) as sock:
            for piece in (GREETING, head, frames.frame(Kind.DATA, 0, 1, message)):
                sock.sendall(piece)
            together, apart = registered(target, range(3))
            assert not connections[0].gone.is_set()
            assert connections[0].bytes_received > 2 << 20
    assert together == apart


def test_a_socket_that_a_dead_server_left_is_in_nobodys_way(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serving(tmp_path, listen=f"unix:{path}") as target:
        check(product(target, "direct"))
    assert not path.exists()


def test_a_name_is_served_at_those_of_its_addresses_that_there_are(
    tmp_path, monkeypatch
):
    def without_ipv6(address, *, family, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "there is no IPv6")
        return create(address, family=family, **options)

    create = socket.create_server
    monkeypatch.setattr(addresses.socket, "create_server", without_ipv6)
    with serving(tmp_path, listen="localhost:0") as target:
        check(product(target, "direct"))
    with pytest.raises(curvd.InvalidSpec, match="not of this machine"):
        with serving(tmp_path, listen="[::1]:0"):
            pass


def test_a_file_that_is_no_socket_is_not_removed(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(curvd.InvalidSpec, match="the address is taken"):
        with serving(tmp_path, listen=f"unix:{path}"):
            pass
    assert path.read_text() == "data"


@pytest.mark.parametrize(
    "bytes_",
    [
        GREETING + frames.frame(Kind.DATA, 0, 9, b"x"),
        GREETING + b"\xff" * 3 + bytes([Kind.PING]) + b"\xff" * 100,
        GREETING + frames.frame(Kind.HEADERS, 5, 1, b"\xff\xff\xff\xff\xff"),
    ],
)
def test_who_breaks_the_protocol_harms_nobody_else(tmp_path, bytes_):
    with serving(tmp_path) as target:
        host, port = target.split(":")
        with socket.create_connection((host, int(port)), timeout=300) as hostile:
            hostile.sendall(bytes_)
            while hostile.recv(1 << 16):
                pass
        check(product(target, "direct"))


def creations(model_id, dataset_id, numbers):
    """Calls that make a session each and are reset at once."""
    loss = convert.loss_to_proto(specs.LossSpec(name=enums.LossName.MSE))
    request = session_pb.CreateSessionRequest(
        model_id=model_id, dataset_id=dataset_id, loss=loss, dtype="DTYPE_FLOAT64"
    )
    rpc = RPCS["CreateSession"]
    message = b"".join(framed(rpc.request, request))
    headers = frames.literals((
        (":method", "POST"),
        (":scheme", "http"),
        (":path", rpc.path),
        ("content-type", "application/grpc"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ))
    for number in numbers:
        yield frames.header_frames(number, headers, 0, frames.DEFAULT_LONGEST)
        yield frames.frame(Kind.DATA, frames.END_STREAM, number, message)
        yield frames.frame(Kind.RST_STREAM, 0, number, frames.number(Code.CANCEL))


def test_calls_that_are_reset_in_the_same_read_do_nothing(tmp_path):
    device = FakeDevice()
    with serving(tmp_path, device) as target, curvd.connect(target) as client:
        model = client.register_model("two", {}, {"a": np.ones(2), "b": np.ones(3)})
        dataset = client.register_dataset(
            {"x": np.ones((4, 2)), "y": np.ones(4)},
            inputs="x",
            target="y",
            batch_size=4,
        )
        calls = b"".join(creations(model.id, dataset.id, range(1, 41, 2)))
        ping = frames.frame(Kind.PING, 0, 0, b"all read")
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=300) as sock:
            sock.sendall(GREETING + calls + ping)
            heard = b""
            while b"all read" not in heard:
                heard += sock.recv(1 << 16)
        assert client.sessions() == []
    assert device.loads == 0


@pytest.mark.parametrize(
    ("request_", "code"),
    [(b"\0" * (5 << 20), "RESOURCE_EXHAUSTED"), (b"\x0a\xff\xff", "INTERNAL")],
)
def test_a_request_that_cannot_be_read_is_refused(
    tmp_path, caplog, answers, request_, code
):
    with serving(tmp_path) as target, grpc.insecure_channel(target) as channel:
        for name, shape in (
            ("SessionService/GetServerInfo", "unary_unary"),
            ("SessionService/RegisterModel", "stream_unary"),
            ("CurvatureService/MatMat", "stream_stream"),
        ):
            sent = request_ if shape == "unary_unary" else iter([request_])
            with pytest.raises(grpc.RpcError) as caught:
                answer = getattr(channel, shape)(f"/curvd.v1.{name}")(sent, timeout=300)
                list(answer)
            assert caught.value.code().name == code
            if code == "INTERNAL":
                assert "none of its kind" in caught.value.details()
    assert "defect" not in caplog.text


def test_a_method_that_is_not_there_is_named(tmp_path):
    with serving(tmp_path) as target, grpc.insecure_channel(target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/curvd.v1.SessionService/Nothing")(b"", timeout=300)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
