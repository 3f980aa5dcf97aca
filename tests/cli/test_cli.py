"""The command line, without a server's dependencies where it needs none."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

import curvd
from curvd.cli.commands import main


def run(*args, env=None):
    return CliRunner(env=env).invoke(main, [str(a) for a in args])


@pytest.fixture
def file(tmp_path):
    def write(text, name="file"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_help_needs_nothing_but_the_base_install():
    code = (
        "import sys; sys.modules.update(torch=None, curvd_server=None); "
        "from curvd.cli.commands import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serve Run a server until SIGTERM or Ctrl-C." in " ".join(
        done.stdout.split()
    )


def test_serving_without_the_server_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvd_server.cli", None)
    result = run("serve")
    assert result.exit_code == 1
    assert "pip install -c constraints.txt '.[server]'" in result.output


def test_health_is_the_exit_status(target, service):
    assert run("health", target).output == "serving\n"
    service.serving = False
    result = run("health", target)
    assert (result.exit_code, "is not serving" in result.output) == (1, True)
    result = run("health", "127.0.0.1:1")
    assert (result.exit_code, "no curvd server answers" in result.output) == (1, True)
    assert run("health", env={"CURVD_TARGET": target}).exit_code == 1


def test_info_shows_server_sessions_and_plans(target):
    with curvd.connect(target) as client:
        client.create_session("m", "d", loss="mse", name="mine")
    result = run("info", target)
    assert result.exit_code == 0, result.output
    for text in ("curvd 0.0.0", "cpu: a fake", "1 session\n", "s0 'mine': P=27 N=100 F32 mse",
                 "hessian: known_matrix", "4 of 4 batches kept"):  # fmt: skip
        assert text in result.output
    facts = json.loads(run("info", target, "--json").output)
    assert facts["server"]["devices"][0]["name"] == "cpu"
    assert facts["sessions"][0]["operators"][0][1]["mode"] == "known_matrix"


def test_the_token_of_a_file_is_sent(target, service, file):
    assert run("info", target, "--token-file", file("secret\n")).exit_code == 0
    assert service.calls[0][2]["authorization"] == "Bearer secret"


def test_a_token_for_another_machine_needs_tls():
    result = run("health", "gpu-7:1", env={"CURVD_TOKEN": "secret"})
    assert result.exit_code == 1
    assert "plain text" in result.output


def test_the_demo_is_the_servers(monkeypatch):
    demo = types.ModuleType("curvd_server.demo")
    demo.main = lambda picture: 3 if picture == Path("p.png") else 4
    monkeypatch.setitem(sys.modules, "curvd_server.demo", demo)
    assert run("demo", "--picture", "p.png").exit_code == 3


@pytest.mark.parametrize("command", [["info"], ["health", "gpu-7:1"]])
def test_a_token_on_the_command_line_is_refused_and_not_repeated(command):
    result = run(*command, "--token", "secret")
    assert result.exit_code == 2
    assert "--token-file" in result.output and "CURVD_TOKEN" in result.output
    assert "secret" not in result.output
