"""Ctrl-C while a command imports ends it at once, and without a word."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WITHIN_S = 60

HALTED = """
import sys, time

class Halted:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.stdout.write("here\\n")
            sys.stdout.flush()
            try:
                time.sleep({seconds})
            except KeyboardInterrupt:
                raise ImportError("as libraries in C do") from None

sys.meta_path.insert(0, Halted())
sys.argv[0] = "curvd"
from curvd_command import main
main()
"""


def interrupted(tmp_path, name, *words):
    """Halt the command at an import, interrupt it there; its status and what it said."""
    code = HALTED.format(name=name, seconds=WITHIN_S)
    said = tmp_path / "said"
    with said.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.PIPE,
            stderr=err,
            start_new_session=True,
            env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        )
        with process:
            assert process.stdout.readline() == b"here\n"
            # As a terminal does: to all of its processes.
            os.killpg(process.pid, signal.SIGINT)
            try:
                status = process.wait(WITHIN_S / 2)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                process.kill()
    return status, said.read_text()


@pytest.mark.parametrize("name", ["curvd", "numpy", "curvd.cli.commands"])
def test_an_interrupt_while_the_command_line_is_imported_says_nothing(tmp_path, name):
    assert interrupted(tmp_path, name, "--help") == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("curvd_server.cli", ["serve"]),
        ("torch", ["serve", "--listen", "127.0.0.1:0"]),
        ("curvd_server.demo", ["demo"]),
    ],
)
def test_so_does_one_while_a_command_is(tmp_path, name, words):
    pytest.importorskip("torch")
    if words[0] == "serve":
        words = [*words, "--data-dir", str(tmp_path / "data")]
    elif words[0] == "demo":
        words = [*words, "--picture", str(tmp_path / "x.png")]
    assert interrupted(tmp_path, name, *words) == (-signal.SIGINT, "")


def test_who_ignores_interrupts_is_not_ended(tmp_path):
    """As ``nohup`` and shells do for what runs in the background."""

    code = HALTED.format(name="numpy", seconds=0.5)
    command = [sys.executable, "-c", code, "--version"]
    # By a shell: `preexec_fn` runs in a fork of this process, where grpcio's handlers of
    # a server that lives here end one child in some hundreds.
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0 and b"curvd" in out and err == b""


def test_the_script_is_in_the_wheel():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'curvd = "curvd_command:main"' in project
    assert '"client/curvd_command.py"' in project
