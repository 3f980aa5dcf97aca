"""`curvd top` shows what a real server does, to people, pipes and programs."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import raw
from click.testing import CliRunner
from support import fake_service
from support.fake_device import FakeDevice
from support.served import server, stub

import curvd
from curvd.cli import top
from curvd.cli.commands import main
from curvd.errors import SessionNotFound

JSON_LINES = ("--json", "--every-s", "0.01")
V = raw.file_of({"v": np.ones(5)})


def run(*args):
    result = CliRunner().invoke(main, ["top", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.output


def looked(channel):
    """What one look tells a program."""
    return json.loads(run(channel.target, "--once", "--json", "--every-s", "0.01"))


def test_numbers_are_those_of_what_was_done(tmp_path):
    with server(tmp_path) as channel:
        session = raw.fake_session(channel)
        for columns in (1, 3):
            data = raw.file_of({"v": np.ones((columns, 5))})
            raw.call(channel, "MatMat", raw.product("MatMat", session.id, data))
        with pytest.raises(SessionNotFound):
            raw.call(channel, "MatVec", raw.product("MatVec", "none", V))
        found = looked(channel)
    status = found["status"]
    assert (status["products"], status["columns"], status["failed_calls"]) == (2, 4, 1)
    assert (status["ready_sessions"], status["cold_sessions"]) == (1, 0)
    assert status["operators"] == {"first": 0, "final": 1, "native": 0}
    (shown,) = found["sessions"]
    assert (shown["id"], shown["parameters"]) == (session.id, 5)
    assert [(o["kind"], o["tier"]) for o in shown["operators"]] == [
        ("hessian", "final")
    ]
    # Between the two looks there was nothing but the calls of the looks themselves.
    assert found["rates_per_s"]["products"] == 0
    assert found["rates_per_s"]["calls"] > 0


def test_what_is_under_way_is_shown_with_its_progress(tmp_path):
    device = FakeDevice()
    with server(tmp_path, device) as channel:
        session = raw.fake_session(channel, name="mine")
        (operator,) = device.operators
        operator.gate.clear()
        answers = stub(channel, "MatVec")(
            iter(raw.product("MatVec", session.id, V)), timeout=300
        )
        assert operator.started.wait(300)
        output = run(channel.target, "--once", "--every-s", "0.01")
        operator.gate.set()
        list(answers)
        device.held_up_by.clear()
        device.building.clear()
        opening = threading.Thread(target=raw.fake_session, args=(channel,))
        opening.start()
        assert device.building.wait(300)
        at_work = ""
        while "1 of 2" not in at_work:  # a moment after it began
            at_work = run(channel.target, "--once", "--every-s", "0.01")
        device.held_up_by.set()
        opening.join()
    assert "1 columns and " in output
    assert "operators: 0 first, 1 final, 0 native" in output
    assert "hessian final" in output
    assert "'mine'" in output
    assert "AT WORK\nopening of '': verifying fake, 1 of 2, " in at_work


def test_in_a_pipe_looks_follow_each_other_until_nobody_reads(tmp_path):
    with server(tmp_path) as channel:
        session = raw.fake_session(channel)
        code = "from curvd.cli.commands import main; main()"
        watching = subprocess.Popen(
            [sys.executable, "-c", code, "top", channel.target, *JSON_LINES],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            first = json.loads(watching.stdout.readline())
            raw.call(channel, "MatVec", raw.product("MatVec", session.id, V))
            before = first["status"]["products"]
            after = next(
                look
                for line in watching.stdout
                if (look := json.loads(line))["status"]["products"] > before
            )
        finally:
            watching.kill()
            watching.communicate()
    assert first["rates_per_s"] == {}
    assert after["rates_per_s"]["products"] > 0


def test_a_server_that_does_not_say_is_named():
    with fake_service.serving(fake_service.FakeService()) as target:
        result = CliRunner().invoke(main, ["top", target, "--once"])
    assert result.exit_code == 1
    assert "does not say how it fares: update the server" in result.output


def test_a_server_that_began_anew_has_no_rates():
    status = curvd.ServerStatus(
        **dict.fromkeys(curvd.ServerStatus.__slots__, 0)
        | {"uptime_s": 5.0, "operators": {}, "memory_bytes": {}}
    )
    assert top._rates(status, status) == {}
