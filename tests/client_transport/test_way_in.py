"""Ways in that cannot work: the cause is named at once, with the option to change.

Every client tries patiently (`PATIENT` gives up after an hour), so a cause that is taken
for a server that is away would never come.
"""

import contextlib
import datetime
import logging
import socket
import ssl
import threading
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from support import fake_service
from support.client_fixtures import QUICK

import curvd
from curvd._transport import connection as _connection

trustme = pytest.importorskip("trustme")

PATIENT = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=3600))
HOUR = datetime.timedelta(hours=1)


@pytest.fixture(scope="module")
def ca():
    return trustme.CA()


def pem(ca):
    return ca.cert_pem.bytes()


def pair(issued):
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    return issued.private_key_pem.bytes(), chain


def of_client(issued, ca, **more):
    key, chain = pair(issued)
    return curvd.TlsConfig(ca=pem(ca), cert=chain, key=key, **more)


@pytest.fixture
def encrypted(service, ca):
    """Serve over TLS; yields the port."""

    @contextlib.contextmanager
    def serve(issued, client_ca=None):
        wanted = None if client_ca is None else pem(client_ca)
        credentials = grpc.ssl_server_credentials(
            [pair(issued)], wanted, require_client_auth=client_ca is not None
        )
        with fake_service.serving(service, credentials=credentials) as target:
            yield target.rpartition(":")[2]

    return serve


def refused(connect, target, tls, match, **options):
    with connect(target, config=PATIENT, tls=tls, **options) as client:
        with pytest.raises(curvd.CannotConnect, match=match):
            client.server_info()


def test_a_ca_that_did_not_sign_is_named(connect, encrypted, ca):
    with encrypted(ca.issue_cert("localhost")) as port:
        other = pem(trustme.CA())
        match = r"not signed by the CA of this client .*TlsConfig\(ca=.*--tls-ca"
        refused(connect, f"localhost:{port}", other, match)
        refused(connect, f"localhost:{port}", True, "not signed by the system's CAs")


def test_a_certificate_of_another_name_is_named(connect, encrypted, ca):
    with encrypted(ca.issue_cert("gpu-7")) as port:
        match = r"another name than '{}' .*server_name.*--tls-server-name"
        target = f"localhost:{port}"
        refused(connect, target, pem(ca), match.format("localhost"))
        refused(connect, f"127.0.0.1:{port}", pem(ca), match.format(r"127\.0\.0\.1"))
        told = curvd.TlsConfig(ca=pem(ca), server_name="gpu-7")
        with connect(target, tls=told) as client:
            client.server_info()


def test_a_certificate_that_expired_is_named(connect, encrypted, ca):
    past = datetime.datetime.now(datetime.UTC) - HOUR
    with encrypted(ca.issue_cert("localhost", not_after=past)) as port:
        refused(connect, f"localhost:{port}", pem(ca), "expired: renew the server's")


def test_a_client_without_its_certificate_is_told(connect, encrypted, ca):
    with encrypted(ca.issue_cert("localhost"), client_ca=ca) as port:
        target = f"localhost:{port}"
        match = r"wants a certificate of its clients, .*cert=.*--tls-client-cert"
        refused(connect, target, pem(ca), match)
        stranger = trustme.CA().issue_cert("me@example.org")
        match = "does not accept this client's certificate"
        refused(connect, target, of_client(stranger, ca), match)
        past = datetime.datetime.now(datetime.UTC) - HOUR
        old = ca.issue_cert("me@example.org", not_after=past)
        refused(connect, target, of_client(old, ca), match)
        right = of_client(ca.issue_cert("me@example.org"), ca)
        with connect(target, tls=right) as client:
            client.server_info()


def test_plain_text_against_tls_is_told(connect, encrypted, ca):
    for client_ca in (None, ca):
        with encrypted(ca.issue_cert("localhost"), client_ca=client_ca) as port:
            match = "speaks TLS, this client plain text: pass tls="
            refused(connect, f"localhost:{port}", None, match)


def test_tls_against_plain_text_is_told(connect, target, ca):
    match = r"speaks plain text, this client TLS: leave tls= \(--tls\) out"
    refused(connect, target, pem(ca), match)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "two..dots"])
def test_an_unknown_host_is_named(connect, host):
    refused(connect, f"{host}:50551", None, f"host '{host}' is unknown")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a server of HTTP/1 answers there"),
        (b"<!DOCTYPE HTML>", r"what answers there \(b'<!DOCTYPE'…\) is no server of"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "what answers there .* is no server of curvd"),
    ],
    ids=["HTTP/1", "HTTP/0.9", "SSH"],
)
def test_a_server_of_something_else_is_told(connect, words, match):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accept = threading.Thread(target=answer_with, args=(listener, words))
        accept.start()
        port = listener.getsockname()[1]
        refused(connect, f"127.0.0.1:{port}", None, f"{match}.*check the port")
        listener.shutdown(socket.SHUT_RDWR)
        accept.join()


def answer_with(listener, words):
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.recv(1)
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass


def test_a_token_that_is_missing_or_old_is_told(connect, target, service):
    service.fail("GetServerInfo", curvd.Unauthenticated("bring a token"), times=2)
    for token, match in (
        (None, "sends none: pass token="),
        ("old", "not the server's"),
    ):
        with connect(target, config=PATIENT, token=token) as client:
            with pytest.raises(
                curvd.Unauthenticated, match=f"bring a token; .*{match}"
            ):
                client.server_info()


def test_a_port_that_refuses_is_tried_again_until_a_server_is_there(connect, service):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"127.0.0.1:{port}"
    with connect(address, config=QUICK) as client, contextlib.ExitStack() as stack:

        def start_server(record):
            if record.msg == "%s; again in %.1f s" and not started:
                started.append(record.getMessage())
                stack.enter_context(fake_service.serving(service, address=address))

        started = []
        handler = logging.Handler()
        handler.emit = start_server
        logging.getLogger("curvd").addHandler(handler)
        stack.callback(logging.getLogger("curvd").removeHandler, handler)
        client.server_info()
    assert "no curvd server answers" in started[0]


def test_who_had_an_answer_waits_for_the_server_whatever_stands_there(
    connect, service, target, monkeypatch
):
    with connect(target, config=QUICK) as client:
        client.server_info()
        monkeypatch.setattr(_connection, "diagnosis", None)
        service.fail("GetServerInfo", curvd.Unavailable("away"))
        client.server_info()


def bad_files(ca, tmp_path):
    issued, other = ca.issue_cert("a"), ca.issue_cert("b")
    key, chain = pair(issued)
    other_key, _ = pair(other)
    der = ssl.PEM_cert_to_DER_cert(pem(ca).decode())
    missing = tmp_path / "missing.pem"
    return {
        "missing": ({"ca": missing}, "cannot read .*ca=.*missing.pem.*No such file"),
        "folder": ({"ca": tmp_path}, "cannot read .*ca=.*Is a directory"),
        "empty": ({"ca": b""}, r"TlsConfig\(ca=…\) is not certificates in PEM"),
        "words": ({"ca": b"hello"}, r"TlsConfig\(ca=…\) is not certificates in PEM"),
        "DER": ({"ca": der}, r"TlsConfig\(ca=…\) is not certificates in PEM"),
        "key": ({"ca": key}, r"TlsConfig\(ca=…\) is not certificates in PEM"),
        "swapped": ({"cert": key, "key": chain}, "cert/key=…. is not a chain"),
        "other key": ({"cert": chain, "key": other_key}, "cert/key.*MISMATCH"),
        "no name": ({"server_name": ""}, "server_name must be a name"),
    }


@pytest.mark.parametrize("case", bad_files(trustme.CA(), Path("/nowhere")))
def test_tls_files_that_cannot_be_used_are_refused_at_once(connect, case, ca, tmp_path):
    given, match = bad_files(ca, tmp_path)[case]
    with pytest.raises(curvd.InvalidSpec, match=match):
        connect("localhost:50551", tls=curvd.TlsConfig(**given))


def test_a_key_with_a_password_is_refused_and_not_asked_for(connect, ca):
    key, chain = pair(ca.issue_cert("me"))
    loaded = serialization.load_pem_private_key(key, None)
    locked = loaded.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(curvd.InvalidSpec, match="the key is encrypted"):
        connect("localhost:1", tls=curvd.TlsConfig(cert=chain, key=locked))


@pytest.mark.parametrize("target", ["a:0", "a:65536", "dns:a:99999", "[::1]:123456"])
def test_ports_that_cannot_be_are_refused(connect, target):
    with pytest.raises(curvd.InvalidSpec, match=r"port .* must be from 1 to 65535"):
        connect(target)


@pytest.mark.parametrize("token", ["", " a", "a\n", "schlüssel", "a\rb"])
def test_tokens_that_no_header_carries_are_refused(token):
    with pytest.raises(curvd.InvalidSpec, match="token must be visible ASCII"):
        curvd.ClientConfig(token=token)
