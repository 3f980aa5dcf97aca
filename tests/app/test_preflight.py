"""What is wrong with a configuration is said before torch is imported."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from curvd.errors import CurvdError, FailedPrecondition, InvalidSpec
from curvd_server import transport
from curvd_server.cli import preflight
from curvd_server.config import ServerConfig, TlsConfig
from curvd_server.storage import owned

LOCAL = "127.0.0.1:0"


def check(tmp_path, **options):
    base = {"listen": LOCAL, "data_dir": tmp_path / "data"}
    preflight.check(ServerConfig(**(base | options)))


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_configuration_that_is_right_leaves_nothing_taken(tmp_path):
    sock = tmp_path / "socket"
    for _ in range(2):
        check(tmp_path, metrics=LOCAL)
        check(tmp_path, listen=f"unix:{sock}")
    assert not sock.exists()
    with owned(tmp_path / "data"):
        pass


FILES = {
    "tokens": ("tokens", "alice"),
    "issuer": ("issuer", "audience = 'curvd'"),
    "quotas": ("quotas", "[default]\nsessions = -1"),
    "token_file": ("token_file", "two words"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_there_or_makes_no_sense_is_refused(tmp_path, name):
    said, text = FILES[name]
    with pytest.raises(InvalidSpec, match=rf"cannot read .*{said.split('_')[0]}"):
        check(tmp_path, **{name: tmp_path / "nowhere"})
    with pytest.raises(InvalidSpec, match=str(tmp_path)):
        check(tmp_path, **{name: written(tmp_path / "wrong", text)})


def test_keys_that_do_not_fit_are_refused(tmp_path):
    file = written(tmp_path / "pem", "no PEM")
    with pytest.raises(InvalidSpec, match="no PEM"):
        check(tmp_path, tls=TlsConfig(cert=file, key=file))


def test_an_address_that_is_taken_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        taken = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(InvalidSpec, match=f"cannot listen on {taken}: .* is taken"):
            check(tmp_path, listen=taken)
        with pytest.raises(InvalidSpec, match=f"cannot listen on metrics {taken}"):
            check(tmp_path, metrics=taken)


def test_a_data_directory_of_another_server_or_of_others_is_refused(tmp_path):
    with owned(tmp_path / "data"), pytest.raises(FailedPrecondition, match="another"):
        check(tmp_path)
    (tmp_path / "data").chmod(0o777)
    with pytest.raises(FailedPrecondition, match="others may write"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"builders": {"a": "no_such_package.nets:make"}},
            "no module 'no_such_package'",
        ),
        ({"libraries": ("tim:*",)}, "must be one of timm"),
        ({"ray": "auto"}, "needs Ray, which is not installed: pip install"),
        ({"traces": "http://127.0.0.1:1"}, r"needs OpenTelemetry \(opentelemetry"),
    ],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, options, match):
    real = preflight.importlib.util.find_spec

    def hidden(name: str, package: str | None = None):
        return None if name == "ray" else real(name, package)

    monkeypatch.setattr(preflight.importlib.util, "find_spec", hidden)
    for name in [n for n in sys.modules if n.startswith("opentelemetry")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "curvd_server.transport.tracing", raising=False)
    monkeypatch.delattr(transport, "tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(CurvdError, match=match):
        check(tmp_path, **options)


SCRIPT = """
import json, sys
sys.modules.update(torch=None)  # who imports it fails
from click.testing import CliRunner
from curvd.cli.commands import main
print(json.dumps([CliRunner().invoke(main, args).output for args in json.loads(sys.argv[1])]))
"""


def test_the_command_says_what_is_wrong_without_torch(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    locked = tmp_path / "file"
    locked.touch(mode=stat.S_IRUSR)
    wrong = {
        ("--issuer", nowhere): "cannot read the issuer",
        ("--tokens", nowhere): "cannot read the tokens",
        ("--quotas", nowhere): "cannot read the quotas",
        ("--library", "tim:*"): "must be one of timm",
        ("--builder", "a=no_such_package:f"): "there is no module",
        ("--listen", "192.0.2.1:1", "--insecure"): "cannot listen on 192.0.2.1:1",
        ("--metrics", "192.0.2.1:1"): "cannot listen on metrics",
        ("--data-dir", str(locked)): "cannot use data_dir",
    }
    base = ["serve", "--listen", LOCAL, "--data-dir", str(tmp_path / "data")]
    calls = json.dumps([[*base, *args] for args in wrong])
    # The command begins anew where grpcio's log was not silenced yet.
    env = os.environ | {"GRPC_VERBOSITY": "NONE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, calls],
        capture_output=True,
        text=True,
        timeout=100,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    for output, said in zip(json.loads(done.stdout), wrong.values(), strict=True):
        assert said in output, output
