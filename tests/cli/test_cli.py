"""The command line, without a server's dependencies where it needs none."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

import curvd
from curvd.cli.commands import main
from curvd.cli.options import LIMITS


@pytest.fixture
def served(monkeypatch):
    """What `curvd serve` hands to the server, which is not there."""
    seen = []
    config = types.ModuleType("curvd_server.config")
    config.ServerConfig = lambda **settings: settings
    config.TlsConfig = config.LimitsConfig = config.ServerConfig
    app = types.ModuleType("curvd_server.app")
    app.serve = seen.append
    trials = types.ModuleType("curvd_server.trials.pool")
    trials.start = lambda: None
    for module in (types.ModuleType("curvd_server"), config, trials, app):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("curvd.cli.commands.tune_allocator", lambda: True)
    return seen


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
        "from curvd.cli.commands import main; main(['serve', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CURVD_DATA_DIR" in done.stdout


def test_serving_without_the_server_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvd_server.config", None)
    result = run("serve")
    assert result.exit_code == 1
    assert "pip install 'curvd[server]'" in result.output


def test_options_that_are_not_given_are_left_to_the_server(served):
    assert run("serve").exit_code == 0
    assert served == [{"builders": {}}]


def test_options_reach_the_server(served, file):
    pem, token = file("pem"), file("secret", "token")
    args = f"""
        --datasets-root {token.parent} --listen unix:/s --data-dir /d --device cpu
        --drain-s 1.5 --insecure
        --tls-cert {pem} --tls-key {pem} --tls-client-ca {pem} --token-file {token}
        --builder a=m:f --builder b=m.n:g --log-level error
        --library timm:vit_* --library transformers:gpt2
        --upload-bytes 123 --default-budget-bytes 4GiB --sessions 3
    """
    result = run("serve", *args.split())
    assert result.exit_code == 0, result.output
    assert served == [
        {
            "listen": "unix:/s",
            "data_dir": Path("/d"),
            "datasets_root": token.parent,
            "device": "cpu",
            "tls": {"cert": pem, "key": pem, "client_ca": pem},
            "token_file": token,
            "insecure": True,
            "builders": {"a": "m:f", "b": "m.n:g"},
            "libraries": ("timm:vit_*", "transformers:gpt2"),
            "limits": {
                "upload_bytes": 123,
                "sessions": 3,
                "default_budget_bytes": 4 << 30,
            },
            "drain_s": 1.5,
            "log_level": "error",
        }
    ]


def test_flag_beats_environment_beats_file(served, file):
    config = file(
        'listen = "h:1"\ndata-dir = "/file"\nsessions = 1\nblock_bytes = "1GiB"\n'
        'insecure = true\nlibraries = ["timm:*", "torchvision:resnet18"]\n'
        '[builders]\na = "m:f"\n'
    )
    env = {"CURVD_DATA_DIR": "/env", "CURVD_SESSIONS": "2"}
    result = run("serve", "--config", config, "--sessions", 3, env=env)
    assert result.exit_code == 0, result.output
    (settings,) = served
    assert settings["listen"] == "h:1"
    assert settings["data_dir"] == Path("/env")
    assert settings["limits"] == {"sessions": 3, "block_bytes": 1 << 30}
    assert settings["insecure"] is True
    assert settings["builders"] == {"a": "m:f"}
    assert settings["libraries"] == ("timm:*", "torchvision:resnet18")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--tls-cert", __file__], "TLS needs both --tls-cert and --tls-key"),
        (["--tls-client-ca", __file__], "TLS needs both"),
        (["--builder", "name"], "expected NAME=module:callable"),
        (["--upload-bytes", "4GB"], "is not a size such as"),
        (["--config", __file__], "--config"),
    ],
)
def test_mistakes_are_usage_errors(served, args, text):
    result = run("serve", *args)
    assert result.exit_code == 2
    assert text in " ".join(result.output.split())
    assert served == []


def test_an_unknown_setting_in_a_file_is_named(served, file):
    result = run("serve", "--config", file("lisen = 'h:1'\n"))
    assert result.exit_code == 2
    assert "lisen" in result.output


def test_an_error_of_ours_is_one_line(served, monkeypatch):
    def refuse(**settings):
        raise curvd.InvalidSpec("refusing to listen on 0.0.0.0:1 in plain text")

    monkeypatch.setattr(sys.modules["curvd_server.config"], "ServerConfig", refuse)
    result = run("serve", "--listen", "0.0.0.0:1")
    assert result.exit_code == 1
    assert result.output == "Error: refusing to listen on 0.0.0.0:1 in plain text\n"


def test_every_setting_of_the_server_has_an_option():
    from curvd_server.config import LimitsConfig, ServerConfig, TlsConfig

    options = {p.name for p in main.commands["serve"].params}
    settings = {f.name for f in dataclasses.fields(ServerConfig)}
    assert settings - {"tls", "limits", "builders", "libraries"} <= options
    assert {"builder", "library"} <= options
    assert {f"tls_{f.name}" for f in dataclasses.fields(TlsConfig)} <= options
    assert {f.name for f in dataclasses.fields(LimitsConfig)} == set(LIMITS)


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


@pytest.mark.parametrize("command", [["serve"], ["info"], ["health", "gpu-7:1"]])
def test_a_token_on_the_command_line_is_refused_and_not_repeated(served, command):
    result = run(*command, "--token", "secret")
    assert result.exit_code == 2
    assert "--token-file" in result.output and "CURVD_TOKEN" in result.output
    assert "secret" not in result.output and served == []
