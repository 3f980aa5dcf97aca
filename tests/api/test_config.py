"""What is wrong in a configuration is said at once; what is right reaches gRPC."""

import stat

import grpc
import pytest
from support import fake_service

import curvd
from curvd.config import check_target, is_local
from curvd.remote.client import configured


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:1",
        "gpu-7:50551",
        "[::1]:50551",
        "unix:/tmp/s",
        "dns:///a:1",
        "ipv4:1.2.3.4:5",
    ],
)
def test_targets_with_a_port_or_a_scheme_are_taken(target):
    assert check_target(target) == target


@pytest.mark.parametrize("target", ["gpu-7", ":50551", "gpu-7:", "::1:50551", "h:port"])
def test_other_targets_are_refused_with_the_usual_port(target):
    with pytest.raises(
        curvd.InvalidSpec, match=r"neither host:port .* the usual port is 50551"
    ):
        curvd.connect(target)


@pytest.mark.parametrize("target", ["", None, 50551])
def test_what_names_no_server_is_refused(target):
    with pytest.raises(curvd.InvalidSpec, match=r"target names a server.*got"):
        curvd.connect(target)


def test_local_is_what_cannot_leave_the_machine():
    local = [
        "unix:/s",
        "127.0.0.1:1",
        "127.9.9.9:1",
        "localhost:1",
        "[::1]:1",
        "ipv4:127.0.0.1:1",
    ]
    assert all(map(is_local, local))
    assert not any(map(is_local, ["10.0.0.1:1", "gpu-7:1", "dns:///localhost.evil:1"]))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"deadline_s": 0}, "deadline_s must be positive, got 0"),
        ({"keepalive_s": -1}, "keepalive_s must be positive"),
        ({"keepalive_timeout_s": float("nan")}, "keepalive_timeout_s must be positive"),
    ],
)
def test_numbers_out_of_range_are_named(wrong, text):
    with pytest.raises(curvd.InvalidSpec, match=text):
        curvd.ClientConfig(**wrong)


def test_retries_and_tls_are_checked_as_wholes():
    with pytest.raises(curvd.InvalidSpec, match="first_s <= longest_s"):
        curvd.RetryConfig(first_s=2, longest_s=1)
    with pytest.raises(curvd.InvalidSpec, match="needs both cert and key"):
        curvd.TlsConfig(cert=b"x")
    with pytest.raises(
        curvd.InvalidSpec, match="cannot read the TLS file ca='/nowhere'"
    ):
        curvd.connect("h:1", tls="/nowhere")


def test_the_options_of_the_channel_are_what_the_server_expects():
    options = dict(curvd.ClientConfig(keepalive_s=20).channel_options())
    assert options["grpc.keepalive_time_ms"] == 20_000
    assert options["grpc.keepalive_timeout_ms"] == 10_000
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert options["grpc.enable_retries"] == 0


def test_arguments_of_connect_override_the_config():
    base = curvd.ClientConfig(token="old", deadline_s=1, keepalive_s=7)
    config = configured(base, "new", True, 2)
    assert (config.token, config.deadline_s, config.keepalive_s) == ("new", 2, 7)
    assert config.tls == curvd.TlsConfig()
    assert configured(config, None, None, None) == config
    assert configured(config, None, False, None).tls is None
    assert configured(None, None, "ca.pem", None).tls == curvd.TlsConfig(ca="ca.pem")


def test_a_token_is_not_shown_and_not_sent_in_plain_text_to_others():
    config = curvd.ClientConfig(token="secret")
    assert "secret" not in repr(config)
    with pytest.raises(
        curvd.InvalidSpec, match="would travel to gpu-7:1 in plain text"
    ):
        curvd.connect("gpu-7:1", config=config)
    trusted = curvd.ClientConfig(token="secret", plaintext_token=True)
    assert trusted.metadata("gpu-7:1") == (("authorization", "Bearer secret"),)


def test_the_token_comes_with_every_call(connect, target, service):
    with connect(target, token="secret") as client:
        client.create_session("m", "d", loss="mse").gradient()
    assert [m["authorization"] for _, _, m in service.calls] == ["Bearer secret"] * 2


def test_unix_sockets_work(connect, service, tmp_path):
    path = tmp_path / "socket"
    with fake_service.serving(service, address=f"unix:{path}") as target:
        assert stat.S_ISSOCK(path.stat().st_mode)
        with connect(target) as client:
            assert client.healthy()


def test_tls_and_mutual_tls_work(connect, service, tmp_path):
    trustme = pytest.importorskip("trustme")
    ca = trustme.CA()
    ours, theirs = ca.issue_cert("localhost"), ca.issue_cert("client@example.org")
    ca_file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(ca_file)
    chain = b"".join(b.bytes() for b in ours.cert_chain_pems)
    credentials = grpc.ssl_server_credentials(
        [(ours.private_key_pem.bytes(), chain)],
        ca.cert_pem.bytes(),
        require_client_auth=True,
    )
    once = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=0))
    mutual = curvd.TlsConfig(
        ca=ca_file,
        cert=theirs.cert_chain_pems[0].bytes(),
        key=theirs.private_key_pem.bytes().decode(),
        server_name="localhost",
    )
    with fake_service.serving(service, credentials=credentials) as target:
        with connect(target, tls=mutual, token="secret") as client:
            assert client.healthy()
        name = curvd.TlsConfig(ca=ca_file, server_name="localhost")
        for wrong, option in ((name, "cert=…"), (True, "ca=…")):
            with connect(target, config=once, tls=wrong) as client:
                with pytest.raises(curvd.CannotConnect, match=option):
                    client.healthy()
