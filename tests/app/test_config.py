"""Configuration is judged once, when it is made, and the message says the remedy."""

from pathlib import Path

import pytest

from curvd.errors import InvalidSpec
from curvd_server.config import LimitsConfig, ServerConfig, TlsConfig, is_local

TLS = TlsConfig(cert=Path("cert.pem"), key=Path("key.pem"))
MTLS = TlsConfig(cert=Path("cert.pem"), key=Path("key.pem"), client_ca=Path("ca.pem"))


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:0", "localhost:50551", "[::1]:50551", "unix:/run/curvd.sock"],
)
def test_this_machine_is_served_in_plain_text(listen):
    assert ServerConfig(listen=listen).credentials() is None


@pytest.mark.parametrize("listen", ["0.0.0.0:50551", "[::]:1", "10.0.0.1:1", "gpu:1"])
def test_plain_text_elsewhere_is_refused_with_the_remedy(listen):
    with pytest.raises(InvalidSpec, match=r"configure TLS.*unix: socket.*--insecure"):
        ServerConfig(listen=listen)
    ServerConfig(listen=listen, insecure=True)


def test_encryption_alone_lets_anyone_in_and_is_refused_elsewhere():
    with pytest.raises(InvalidSpec, match="configure a token or a client CA"):
        ServerConfig(listen="0.0.0.0:1", tls=TLS)
    ServerConfig(listen="0.0.0.0:1", tls=TLS, token="secret")
    ServerConfig(listen="0.0.0.0:1", tls=MTLS)


@pytest.mark.parametrize("listen", ["50551", "host", ":50551", "::1:50551", "a:b"])
def test_what_is_no_address_is_refused(listen):
    with pytest.raises(InvalidSpec, match="listen must be host:port"):
        is_local(listen)


def test_a_token_comes_from_one_place_and_is_stripped(tmp_path):
    file = tmp_path / "token"
    file.write_text("  secret\n")
    assert ServerConfig(token_file=file).bearer_token() == "secret"
    assert ServerConfig(token="secret").bearer_token() == "secret"
    assert ServerConfig().bearer_token() is None
    with pytest.raises(InvalidSpec, match="not both"):
        ServerConfig(token="secret", token_file=file)


def test_a_token_that_no_header_can_carry_is_refused(tmp_path):
    (tmp_path / "token").write_text("\n")
    with pytest.raises(InvalidSpec, match="printable ASCII"):
        ServerConfig(token_file=tmp_path / "token").bearer_token()
    with pytest.raises(InvalidSpec, match="printable ASCII"):
        ServerConfig(token="two words")


def test_a_token_is_not_printed():
    assert "secret" not in repr(ServerConfig(token="secret"))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(InvalidSpec, match=r"cannot read key .*key\.pem"):
        ServerConfig(tls=TLS).credentials()


def test_limits_are_positive_and_published():
    with pytest.raises(InvalidSpec, match="columns must be at least 1, got 0"):
        LimitsConfig(columns=0)
    assert LimitsConfig(sessions=7).published().sessions == 7


@pytest.mark.parametrize("wrong", [{"drain_s": -1.0}, {"log_level": "loud"}])
def test_a_value_out_of_range_is_named(wrong):
    with pytest.raises(InvalidSpec, match=next(iter(wrong))):
        ServerConfig(**wrong)
