"""Configuration is judged once, when it is made, and the message says the remedy."""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import pytest
import raw
from support.served import server

from curvd.errors import InvalidSpec
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.config import (
    LimitsConfig,
    ServerConfig,
    TlsConfig,
    check_libraries,
    is_local,
)
from curvd_server.transport import ConnectionLimits

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


@pytest.mark.parametrize("listen", ["127.0.0.1:65536", "localhost:99999"])
def test_a_port_that_no_machine_has_is_refused(listen):
    with pytest.raises(InvalidSpec, match="at most 65535, got"):
        ServerConfig(listen=listen)


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


def numbers(kind):
    return [f.name for f in dataclasses.fields(kind) if f.type in ("int", "float")]


LIMITS = [(LimitsConfig, name) for name in numbers(LimitsConfig)]
LIMITS += [(ConnectionLimits, name) for name in numbers(ConnectionLimits)]
WRONG = [-1, 2**63, 10**30, math.nan, math.inf, -math.inf, 1e300]


@pytest.mark.parametrize(("kind", "name"), LIMITS)
def test_a_limit_out_of_range_is_refused_and_named(kind, name):
    for value in WRONG:
        got = re.escape(f"got {value!r}")
        with pytest.raises(InvalidSpec, match=rf"^{name} must be .*, {got}"):
            kind(**{name: value})
    if not name.endswith("_s") or kind is LimitsConfig:
        with pytest.raises(InvalidSpec, match="a whole number"):
            kind(**{name: 10.5})


@pytest.mark.parametrize("name", numbers(ServerConfig))
def test_a_number_of_the_server_out_of_range_is_refused(name):
    for value in WRONG:
        with pytest.raises(
            InvalidSpec, match=rf"^{name} must be (at (least|most)|a whole number)"
        ):
            ServerConfig(**{name: value})


def test_an_operator_learns_of_a_library_that_is_missing(monkeypatch):
    with pytest.raises(InvalidSpec, match="must be one of timm, torchvision, trans"):
        check_libraries(["os:*"])
    with pytest.raises(InvalidSpec, match="a colon, and a glob"):
        check_libraries(["timm"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidSpec, match=r"pip install .* '\.\[timm\]'"):
        check_libraries(["timm:*"])


def test_devices_of_workers_are_listed_with_commas():
    assert ServerConfig().workers == ()
    assert ServerConfig(devices="cpu:0, cpu:1,").workers == ("cpu:0", "cpu:1")


def test_workers_are_here_or_on_ray():
    config = ServerConfig(ray="10.0.0.1:6379", ray_workers=3, device="cuda:0")
    assert config.workers == ("cuda:0",) * 3
    with pytest.raises(InvalidSpec, match="give one of them"):
        ServerConfig(ray="auto", devices="cpu:0")


def test_a_server_with_all_limits_at_their_ends_serves(tmp_path):
    """What is published fits the contract, and what is handed on, grpcio."""
    limits = LimitsConfig(**{
        n: largest(LimitsConfig, n) for n in numbers(LimitsConfig)
    })
    ends = {n: largest(ConnectionLimits, n) for n in numbers(ConnectionLimits)}
    connections = ConnectionLimits(**ends)
    with server(tmp_path, limits=limits, connections=connections) as channel:
        info = raw.call(channel, "GetServerInfo", session_pb.GetServerInfoRequest())
        assert info.limits.sessions == limits.sessions == 2**31 - 1
        raw.fake_session(channel)


def largest(kind, name):
    """The largest value that a limit may have, found by asking."""
    low, high = 1, 2**63
    while high - low > 1:
        middle = (low + high) // 2
        try:
            kind(**{name: middle})
        except InvalidSpec:
            high = middle
        else:
            low = middle
    return low
