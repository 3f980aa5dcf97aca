"""Who may call, and how: the token, TLS, mutual TLS, Unix sockets."""

import grpc
import numpy as np
import pytest
import raw
import trustme
from support.fake_device import FakeDevice
from support.served import SERVING, healthy, server

import curvd
from curvd.errors import (
    Unauthenticated,
)
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig, TlsConfig

pytestmark = pytest.mark.usefixtures("answers")


def test_calls_need_the_token_and_health_does_not(tmp_path):
    ask = session_pb.GetServerInfoRequest()
    with server(tmp_path, token="secret") as channel:
        for wrong in ((), (("authorization", "Bearer other"),)):
            with pytest.raises(Unauthenticated, match="Bearer <token>"):
                raw.call(channel, "GetServerInfo", ask, metadata=wrong)
        right = (("authorization", "Bearer secret"),)
        raw.call(channel, "GetServerInfo", ask, metadata=right)
        assert healthy(channel) == SERVING
        data = raw.file_of({"v": np.ones(5)})
        with pytest.raises(Unauthenticated):
            raw.call(channel, "MatMat", raw.product("MatMat", "s", data))


@pytest.fixture
def certificates(tmp_path):
    """A CA, and files of certificates it signed for the server and a client."""
    authority = trustme.CA()
    for name, identity in (("server", "localhost"), ("client", "me@example.org")):
        issued = authority.issue_cert(identity)
        (tmp_path / f"{name}.key").write_bytes(issued.private_key_pem.bytes())
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        (tmp_path / f"{name}.pem").write_bytes(chain)
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    return tmp_path


def connect(target, files, *, client=False):
    """Health over TLS."""
    port = target.rpartition(":")[2]
    read = lambda name: (files / name).read_bytes()  # noqa: E731
    pair = (read("client.key"), read("client.pem")) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(read("ca.pem"), *pair)
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        return healthy(channel)


def test_tls_encrypts(certificates, tmp_path):
    tls = TlsConfig(cert=certificates / "server.pem", key=certificates / "server.key")
    config = ServerConfig(listen="localhost:0", tls=tls, data_dir=tmp_path / "data")
    with serve_in_thread(config, device=FakeDevice()) as target:
        assert connect(target, certificates) == SERVING
        with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError):
            healthy(channel)


def test_mutual_tls_asks_for_a_certificate(certificates, tmp_path):
    tls = TlsConfig(
        cert=certificates / "server.pem",
        key=certificates / "server.key",
        client_ca=certificates / "ca.pem",
    )
    config = ServerConfig(listen="localhost:0", tls=tls, data_dir=tmp_path / "data")
    with serve_in_thread(config, device=FakeDevice()) as target:
        assert connect(target, certificates, client=True) == SERVING
        with pytest.raises(grpc.RpcError):
            connect(target, certificates)


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_our_clients_name_what_keeps_them_out(certificates, tmp_path, transport):
    patient = curvd.ClientConfig(
        transport=transport, retry=curvd.RetryConfig(give_up_s=3600)
    )
    files = {"cert": certificates / "server.pem", "key": certificates / "server.key"}
    ca = certificates / "ca.pem"
    plain = ServerConfig(listen="localhost:0", data_dir=tmp_path / "a", token="new")
    tls = TlsConfig(**files, client_ca=ca)
    mutual = ServerConfig(listen="localhost:0", tls=tls, data_dir=tmp_path / "b")
    with (
        serve_in_thread(plain, device=FakeDevice()) as open_target,
        serve_in_thread(mutual, device=FakeDevice()) as closed_target,
    ):
        closed = closed_target.replace("127.0.0.1", "localhost")
        for target, options, kind, match in (
            (open_target, {"tls": ca}, curvd.CannotConnect, "speaks plain text"),
            (open_target, {"token": "old"}, Unauthenticated, "not the server's"),
            (closed, {}, curvd.CannotConnect, "the server speaks TLS"),
            (closed, {"tls": ca}, curvd.CannotConnect, "wants a certificate"),
        ):
            with curvd.connect(target, config=patient, **options) as client:
                with pytest.raises(kind, match=match):
                    client.server_info()


def test_a_unix_socket_is_for_its_owner(tmp_path):
    path = tmp_path / "curvd.sock"
    with server(tmp_path / "data", listen=f"unix:{path}") as channel:
        assert healthy(channel) == SERVING
        assert path.stat().st_mode & 0o777 == 0o600
