"""Lines for people on a terminal, for programs in a pipe."""

import io
import json
import logging

import pytest

pytest.importorskip("structlog")
from curvd_server.system import logs


class Stderr(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def stderr(monkeypatch):
    """Replace stderr, and leave the logger as it was."""
    log = logging.getLogger("curvd_server")
    kept = log.handlers, log.propagate, log.level

    def replace(terminal):
        stream = Stderr(terminal)
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    yield replace
    log.handlers, log.propagate = kept[0], kept[1]
    log.setLevel(kept[2])
    logs._render = logs._JSON


@pytest.mark.parametrize(
    ("terminal", "style", "is_json"),
    [
        (False, "auto", True),
        (True, "auto", False),
        (True, "json", True),
        (False, "text", False),
    ],
)
def test_lines_are_for_whoever_reads_them(stderr, terminal, style, is_json):
    log = logs.logger()  # made before it is known who reads
    stream = stderr(terminal)
    logs.set_up("info", style)
    log.info("session_created", session="s1", parameters=195)
    (line,) = stream.getvalue().splitlines()
    if is_json:
        told = json.loads(line)
        assert (told["event"], told["session"], told["parameters"]) == (
            "session_created",
            "s1",
            195,
        )
        assert told["timestamp"].endswith("Z")
        return
    assert "session_created" in line and "195" in line and "info" in line
    assert ("\x1b[" in line) is terminal
    assert "T" not in line.partition("session_created")[0].replace("\x1b", "")


def test_a_strangers_text_begins_no_line_and_moves_no_cursor(stderr):
    stream = stderr(False)
    logs.set_up("info", "text")
    logs.logger().info("refused", name="a\nfake line \x1b[2J")
    (line,) = stream.getvalue().splitlines()
    assert "\x1b" not in line
    assert "\\nfake line" in line


def test_a_traceback_for_people_is_written_once(stderr):
    stream = stderr(False)
    logs.set_up("info", "text")
    try:
        raise ValueError("what went wrong")
    except ValueError:
        logs.logger().exception("defect", rpc="MatVec")
    text = stream.getvalue()
    assert text.count("ValueError: what went wrong") == 1
    assert text.index("defect") < text.index("Traceback")
