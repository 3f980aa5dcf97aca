"""The command line, without a server's dependencies where it needs none."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import click
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


def test_a_file_that_may_not_be_read_is_named_with_the_user_who_may_not(
    file, monkeypatch
):
    path = str(file("secret\n"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read all
    result = run("info", "127.0.0.1:1", "--token-file", path)
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert f"user {os.geteuid()}, as whom this runs, may not read {path!r}" in said
    assert "chown" in said and "secret" not in said


def test_a_token_file_that_is_no_text_is_named(tmp_path):
    place = tmp_path / "token"
    place.write_bytes(b"\xff\xfe")
    result = run("info", "127.0.0.1:1", "--token-file", place)
    assert result.exit_code == 2, result.exc_info
    said = " ".join(result.output.split())
    assert "cannot read --token-file" in said and "invalid start byte" in said


def test_a_token_for_another_machine_needs_tls():
    result = run("health", "gpu-7:1", env={"CURVD_TOKEN": "secret"})
    assert result.exit_code == 1
    assert "plain text" in result.output


def test_the_demo_is_the_servers(monkeypatch):
    demo = types.ModuleType("curvd_server.demo")
    demo.main = lambda picture, as_json: (picture == Path("p.png")) + 2 * as_json
    monkeypatch.setitem(sys.modules, "curvd_server.demo", demo)
    assert run("demo", "--picture", "p.png").exit_code == 1
    assert run("demo", "--json").exit_code == 2


@pytest.mark.parametrize("command", [["info"], ["health", "gpu-7:1"]])
def test_a_token_on_the_command_line_is_refused_and_not_repeated(command):
    result = run(*command, "--token", "secret")
    assert result.exit_code == 2
    assert "--token-file" in result.output and "CURVD_TOKEN" in result.output
    assert "secret" not in result.output


def commands():
    """All commands; those of the server as they are when they are asked for."""
    pytest.importorskip("curvd_server.cli")
    from curvd_server.cli import serve, token

    return {**main.commands, "serve": serve, "token": token}


def test_help_shows_every_default():
    for name, command in commands().items():
        for option in command.params:
            if isinstance(option, click.Option) and not option.is_flag:
                told = "[default: " in (option.help or "") or option.show_default
                none = option.default is None or "UNSET" in repr(option.default)
                assert told or (none and name != "serve") or option.is_eager or (
                    option.name in ("token", "token_file")
                ), (name, option.name)  # fmt: skip


def test_every_command_prints_json_if_asked():
    assert {*commands()} > {"info", "health", "demo", "eigs", "trace", "density"}
    for name, command in commands().items():
        flags = {flag for option in command.params for flag in option.opts}
        assert ("--json" in flags) is (name != "serve"), name  # its lines are JSON
        assert name != "serve" or "--log-style" in flags


def test_health_in_json_says_what_the_exit_status_says(target, service):
    result = run("health", target, "--json")
    assert json.loads(result.stdout) == {"target": target, "serving": True}
    service.serving = False
    result = run("health", target, "--json")
    assert (result.exit_code, json.loads(result.stdout)["serving"]) == (1, False)


def test_a_query_in_json_is_its_result(live_target, tanh_session):
    words = (tanh_session.id, live_target, "--operator", "ggn", "--samples", 10)
    told = json.loads(run("trace", *words, "--json").stdout)
    found = tanh_session.ggn().trace(samples=10)
    assert (told["value"], told["half_width"]) == (found.value, found.half_width)
    assert told["info"]["products"] == 10
    assert f"{found.value:.6e}" in run("trace", *words).stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("density.xyz", "end its name in one of .*png"),
        ("density", "no picture is written as such a file"),
        ("gone/density.png", "gone is no folder that can be written to"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_computed(
    name, said, tmp_path
):
    pytest.importorskip("matplotlib")
    result = run("density", "s", "127.0.0.1:1", "--plot", tmp_path / name)
    assert result.exit_code == 2
    assert re.search(said, " ".join(result.output.split()).replace("│ ", ""))
    assert "no curvd server answers" not in result.output  # nobody was asked
    assert not list(tmp_path.iterdir())


def test_a_picture_is_known_to_be_impossible_before_anything_is_computed(
    monkeypatch, tmp_path
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    picture = tmp_path / "density.png"
    result = run("density", "s", "127.0.0.1:1", "--plot", picture)
    assert result.exit_code == 1
    assert "--plot needs matplotlib: pip install" in result.output
    assert "no curvd server answers" not in result.output  # nobody was asked
    assert not picture.exists()


@pytest.mark.parametrize("transport", curvd.config.Transport)
def test_a_transport_is_chosen_by_the_name_that_documents_have(target, transport):
    result = run("health", target, "--transport", transport.value)
    assert result.output == "serving\n"


def test_an_update_says_where_the_parameters_are(target, file):
    path = file("")
    for given, got in ([], "neither"), (["--file", path, "--checkpoint", "a"], "both"):
        result = run("update", "s0", target, *given)
        assert result.exit_code == 2
        assert f"--file or --checkpoint, got {got}" in result.output


def test_a_picture_of_the_demo_needs_its_folder_before_anything_is_trained(tmp_path):
    result = run("demo", "--picture", str(tmp_path / "gone" / "x.png"))
    assert result.exit_code == 2
    assert "gone is no folder that can be written to; make it first" in result.output
    assert not (tmp_path / "gone").exists()
