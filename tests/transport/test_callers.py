"""Who calls: read off tokens and certificates, by both of our ways in alike."""

import datetime
import logging
import signal

import numpy as np
import pytest
import trustme
from click.testing import CliRunner
from support.fake_device import FakeDevice
from support.forked import Forked

import curvd
from curvd.cli import main
from curvd.errors import InvalidSpec, Unauthenticated
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig, TlsConfig
from curvd_server.service import endpoint
from curvd_server.system import EVERYBODY
from curvd_server.transport import Callers, Drops, TokenFile
from curvd_server.transport.callers import name_in
from curvd_server.transport.token_file import append, line_of, new_token, read

ONCE = curvd.RetryConfig(give_up_s=0)
TRANSPORTS = pytest.mark.parametrize("transport", ["direct", "grpcio"])


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now


def written(path, *lines, mode=0o600):
    path.write_text("".join(f"{line}\n" for line in lines))
    path.chmod(mode)
    return path


def test_a_line_says_who_what_and_how_long(tmp_path):
    token, clock = new_token(), Clock()
    line = line_of(
        "ann",
        token,
        roles=["user", "operator"],
        groups=["vision", "text"],
        expires_s=2e9,
    )
    assert token not in line
    file = TokenFile(written(tmp_path / "t", "# a comment", "", line), clock)
    entry = file.token(token)
    assert (entry.identity.name, entry.identity.is_operator) == ("ann", True)
    assert entry.identity.groups == {"vision", "text"}
    assert file.token(token + "x") is file.token("") is None
    assert not file.is_over(entry)
    clock.now = 2e9
    assert file.is_over(entry)


def test_a_name_may_have_several_tokens(tmp_path):
    tokens = [new_token(), new_token()]
    assert tokens[0] != tokens[1]
    file = TokenFile(written(tmp_path / "t", *(line_of("ann", t) for t in tokens)))
    assert {file.token(t).identity.name for t in tokens} == {"ann"}


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("ann", r"line 1 of .*expected NAME"),
        ("ann secret", "second word must be sha256"),
        (f"ann sha256:{'0' * 63}", "second word must be sha256"),
        (f"ann sha256:{'0' * 64} roles=root", "unknown role 'root'; known: user, oper"),
        (f"ann sha256:{'0' * 64} role=user", "expected each of roles="),
        (f"ann sha256:{'0' * 64} expires=soon", "expires must be a moment"),
        (f"ann sha256:{'0' * 64} expires=2027-01-01", "must say its time zone"),
        (f"@ann sha256:{'0' * 64}", "does not begin with '@'"),
        (f"* sha256:{'0' * 64}", r"does not begin with '@' or '\*'"),
        (f"{'a' * 129} sha256:{'0' * 64}", "1 to 128 printable"),
        (f"ann sha256:{'0' * 64} groups=", "1 to 128 printable"),
        ('"ann', "line 1 of"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_secret_is_said(tmp_path, line, match):
    with pytest.raises(InvalidSpec, match=match) as caught:
        read(written(tmp_path / "t", line))
    assert "secret" not in str(caught.value)


def test_a_token_has_one_line(tmp_path):
    token = new_token()
    lines = line_of("ann", token), line_of("ben", token)
    with pytest.raises(InvalidSpec, match=r"line 2 of .*has a line already"):
        read(written(tmp_path / "t", *lines))


def test_a_file_that_others_may_write_to_is_refused(tmp_path):
    file = written(tmp_path / "t", line_of("ann", new_token()), mode=0o620)
    with pytest.raises(InvalidSpec, match=r"others may write .*chmod go-w"):
        TokenFile(file)
    with pytest.raises(InvalidSpec, match="cannot read the tokens"):
        TokenFile(tmp_path / "nothing")


def test_the_file_is_read_again_when_it_changes_and_a_broken_one_is_not(
    tmp_path, caplog
):
    old, new, seconds = new_token(), new_token(), Clock()
    file = TokenFile(written(tmp_path / "t", line_of("ann", old)), monotonic=seconds)
    written(tmp_path / "t", line_of("ben", new), "# more")
    assert file.token(old) is not None  # it is not asked of the disk at each call
    seconds.now += 1
    assert file.token(old) is None
    assert file.token(new).identity.name == "ben"
    for breaks in (
        lambda: written(tmp_path / "t", "ben secret-of-ben"),
        lambda: (tmp_path / "t").unlink(),
    ):
        caplog.clear()
        breaks()
        seconds.now += 1
        with caplog.at_level(logging.ERROR):
            assert file.token(new).identity.name == "ben"
            seconds.now += 1
            assert file.token(new).identity.name == "ben"
        assert "secret-of-ben" not in caplog.text


def test_a_signal_reads_it_at_once(tmp_path):
    old, new = new_token(), new_token()
    callers = Callers(tokens=TokenFile(written(tmp_path / "t", line_of("ann", old))))
    written(tmp_path / "t", line_of("ann", new))
    callers.reload()
    callers.admit(f"Bearer {new}")
    assert callers.identify({}).name == "ann"
    with pytest.raises(Unauthenticated, match="a token that it knows"):
        callers.admit(f"Bearer {old}")


def test_a_token_that_is_over_says_so(tmp_path):
    token, clock = new_token(), Clock()
    line = line_of("ann", token, expires_s=clock.now)
    callers = Callers(tokens=TokenFile(written(tmp_path / "t", line), clock))
    with pytest.raises(Unauthenticated, match="'ann' was good until 2001-09-09T01:46"):
        callers.admit(f"Bearer {token}")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEARER "])
def test_the_scheme_has_no_case(tmp_path, scheme):
    """RFC 9110, 11.1, and one blank or several behind it, RFC 6750, 2.1."""
    token = new_token()
    named = TokenFile(written(tmp_path / "t", line_of("ann", token)))
    for callers in (Callers(tokens=named), Callers(token)):
        callers.admit(f"{scheme} {token}")
        with pytest.raises(Unauthenticated):
            callers.admit(f"{scheme}{token}" if scheme[-1] != " " else f"x {token}")


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Basic x", b"\xff", "x"])
def test_what_is_no_token_is_refused(tmp_path, given):
    empty = written(tmp_path / "t", line_of("ann", new_token()))
    with pytest.raises(Unauthenticated):
        Callers(tokens=TokenFile(empty)).admit(given)


def test_nobody_is_told_apart_without_names():
    assert Callers().identify({}) is EVERYBODY
    one = Callers("secret")
    one.admit("Bearer secret")
    assert one.identify({"x509_common_name": [b"ann"]}) is EVERYBODY
    with pytest.raises(Unauthenticated):
        one.admit("Bearer other")


@pytest.mark.parametrize(
    ("alternatives", "common", "name"),
    [
        (["ann@example.org"], ["Ann"], "ann@example.org"),
        (["10.0.0.1", "::1", "host.example"], [], "host.example"),
        (["10.0.0.1"], ["ann"], "ann"),
        ([], ["ann"], "ann"),
    ],
)
def test_a_certificate_names_its_holder(alternatives, common, name):
    assert name_in(alternatives, common) == name


@pytest.mark.parametrize("names", [([], []), (["@vision"], []), ([], ["a\nb"])])
def test_a_certificate_without_a_name_is_refused(names):
    with pytest.raises(Unauthenticated, match="does not say who calls"):
        name_in(*names)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A CA, and what it signed for the server and three clients."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued = {
        "server": authority.issue_cert("localhost"),
        "mail": authority.issue_cert("ann@example.org", "host.example"),
        "address": authority.issue_cert("10.0.0.1", common_name="ben"),
        "common": authority.issue_cert(common_name="ben"),
    }
    for name, one in issued.items():
        one.private_key_pem.write_to_path(folder / f"{name}.key")
        one.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder


def mutual(certificates):
    return TlsConfig(
        cert=certificates / "server.pem",
        key=certificates / "server.key",
        client_ca=certificates / "ca.pem",
    )


def as_holder(target, certificates, name, transport, token=None):
    """A client with a certificate."""
    pair = {"cert": certificates / f"{name}.pem", "key": certificates / f"{name}.key"}
    tls = curvd.TlsConfig(ca=certificates / "ca.pem", **pair)
    config = curvd.ClientConfig(transport=transport, retry=ONCE)
    return curvd.connect(
        target.replace("127.0.0.1", "localhost"), config=config, tls=tls, token=token
    )


def owner_of_a_model(client):
    """Who the server says has registered it."""
    state = {"a": np.ones(2), "b": np.ones(3)}
    return client.register_model("two", {}, state).owner


@TRANSPORTS
@pytest.mark.parametrize("front", ["direct", "grpcio"])
def test_certificates_say_who_calls(tmp_path, certificates, transport, front):
    config = ServerConfig(
        listen="localhost:0",
        tls=mutual(certificates),
        data_dir=tmp_path,
        transport=front,
    )
    with serve_in_thread(config, device=FakeDevice()) as target:
        for name, owner in (
            ("mail", "ann@example.org"),
            ("address", "ben"),
            ("common", "ben"),
        ):
            with as_holder(target, certificates, name, transport) as client:
                assert owner_of_a_model(client) == owner


@TRANSPORTS
def test_a_certificate_needs_a_token_unless_it_has_a_line(
    tmp_path, certificates, transport
):
    token = new_token()
    lines = line_of("carol", token), "ann@example.org certificate groups=vision"
    config = ServerConfig(
        listen="localhost:0",
        tls=mutual(certificates),
        data_dir=tmp_path / "data",
        tokens=written(tmp_path / "tokens", *lines),
    )
    with serve_in_thread(config, device=FakeDevice()) as target:
        with as_holder(target, certificates, "mail", transport) as client:
            assert owner_of_a_model(client) == "ann@example.org"
        with as_holder(target, certificates, "common", transport) as client:
            with pytest.raises(
                Unauthenticated, match="'ben' alone does not let you in"
            ):
                client.server_info()
        with as_holder(target, certificates, "common", transport, token) as client:
            assert owner_of_a_model(client) == "carol"
        with as_holder(target, certificates, "mail", transport, "wrong") as client:
            with pytest.raises(Unauthenticated):
                client.server_info()


def test_a_line_may_be_about_all_certificates(tmp_path):
    file = TokenFile(
        written(tmp_path / "t", "* certificate groups=lab", "ann certificate")
    )
    assert file.certificate("ben").identity.groups == {"lab"}
    assert file.certificate("ben").identity.name == "ben"
    assert not file.certificate("ann").identity.groups


@TRANSPORTS
def test_callers_who_are_refused_are_counted_and_not_repeated(
    tmp_path, transport, monkeypatch
):
    told = []

    class Told(Drops):
        def add(self, *args, **facts):
            told.append((*args, facts))
            super().add(*args, **facts)

    monkeypatch.setattr(endpoint, "Drops", Told)
    tokens = written(tmp_path / "tokens", line_of("ann", new_token()))
    config = ServerConfig(
        listen="127.0.0.1:0", data_dir=tmp_path / "data", tokens=tokens
    )
    with serve_in_thread(config, device=FakeDevice()) as target:
        wrong = curvd.ClientConfig(transport=transport, retry=ONCE)
        for _ in range(8):
            with curvd.connect(target, config=wrong, token="hush-hush") as client:
                with pytest.raises(Unauthenticated):
                    client.server_info()
    refused = [drop for drop in told if drop[0] == "unauthenticated"]
    assert len(refused) == 8
    assert "hush" not in str(told)


MORE = ["--role", "operator", "--group", "vision", "--expires", "90d"]


def test_the_command_makes_a_token_and_keeps_only_its_hash(tmp_path):
    file = tmp_path / "tokens"
    for name in ("ann", "ben"):
        run = CliRunner().invoke(
            main,
            ["token", name, "--file", str(file), *MORE],
        )
        assert run.exit_code == 0, run.output
        token = run.stdout.strip()
        assert token not in file.read_text()
        entry = TokenFile(file).token(token)
        assert entry.identity.name == name
        assert entry.identity.groups == {"vision"}
        left = datetime.timedelta(seconds=entry.expires_s) - datetime.timedelta(
            seconds=datetime.datetime.now(datetime.UTC).timestamp()
        )
        assert left > datetime.timedelta(days=89)
    assert file.stat().st_mode & 0o777 == 0o600
    for words in (["@x"], ["x", "--expires", "soon"], ["x", "--role", "root"]):
        run = CliRunner().invoke(main, ["token", *words, "--file", str(file)])
        assert run.exit_code != 0


def test_a_line_is_added_behind_one_without_its_end(tmp_path):
    token = new_token()
    (tmp_path / "t").write_text("# no end of line")
    append(tmp_path / "t", line_of("ann", token))
    assert TokenFile(tmp_path / "t").token(token).identity.name == "ann"


def test_a_running_server_reads_its_tokens_again_at_a_signal(tmp_path):
    old, new = new_token(), new_token()
    tokens = written(tmp_path / "tokens", line_of("ann", old))
    words = [
        *("serve", "--listen", "127.0.0.1:0", "--tokens", tokens),
        *("--data-dir", tmp_path / "data", "--compile-after-s", "0"),
        *("--log-level", "info", "--log-style", "json"),
    ]
    program = "from curvd.cli.commands import main; main()"
    with Forked(program, *words, stderr=tmp_path / "log") as server:
        target = server.stdout.readline().split()[-1]
        with curvd.connect(target, token=old) as client:
            client.server_info()
            written(tokens, line_of("ann", new))
            server.send_signal(signal.SIGHUP)
            with pytest.raises(Unauthenticated):
                for _ in range(100_000):  # until the signal has come
                    client.server_info()
        with curvd.connect(target, token=new) as client:
            client.server_info()
        server.terminate()
        assert server.wait() == 0
    for token in (old, new):
        assert token not in (tmp_path / "log").read_text()


def test_a_server_that_has_nothing_to_read_again_goes_on_at_the_signal(tmp_path):
    words = ["serve", "--listen", "127.0.0.1:0", "--data-dir", tmp_path / "data"]
    program = (
        "import os, signal\n"
        "from curvd_server.cli import preflight\n"
        "check = preflight.check\n"
        "def early(config):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    check(config)\n"
        "preflight.check = early\n"
        "from curvd.cli.commands import main; main()"
    )
    with Forked(program, *words, stderr=tmp_path / "log") as server:
        target = server.stdout.readline().split()[-1]
        with curvd.connect(target) as client:
            for _ in range(3):
                server.send_signal(signal.SIGHUP)
                client.server_info()
        server.terminate()
        assert server.wait() == 0


def test_a_token_is_not_added_to_what_is_no_text(tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSpec, match="is no file of tokens: it is no UTF-8"):
        append(path, line_of("ann", new_token()))
    assert path.read_bytes() == b"\xff\xfe"
