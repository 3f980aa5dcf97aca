"""`curvd bench` counts what the server counts, and leaves nothing behind."""

import contextlib
import json

import numpy as np
import pytest
from click.testing import CliRunner
from support.small_net import open_session

import curvd
from curvd.cli import bench
from curvd.cli.commands import main
from curvd.errors import Overloaded, Unavailable
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A server of this file's own, so that what it counts is what was done here."""
    folder = tmp_path_factory.mktemp("data")
    config = ServerConfig(listen="127.0.0.1:0", data_dir=folder)
    with serve_in_thread(config) as target:
        yield target


def run(*args):
    return CliRunner().invoke(main, ["bench", *map(str, args), "--seconds", "60"])


def done(target):
    with curvd.connect(target) as client:
        status = client.server_info().status
        assert status is not None
        return status.products, status.columns


def test_each_combination_is_measured_and_the_server_counted_as_much(target):
    before = done(target)
    options = ("-p", "200,400", "-k", "1,3", "-c", "1,2", "--products", 4, "--json")
    result = run(target, *options)
    assert result.exit_code == 0, result.output
    points = json.loads(result.output)["points"]
    # P of a net of 64 inputs and 10 outputs: 75 for each hidden unit, and 10.
    assert [(p["parameters"], p["columns"], p["callers"]) for p in points] == [
        (P, K, c) for P in (75 * 3 + 10, 75 * 5 + 10) for K in (1, 3) for c in (1, 2)
    ]
    for p in points:
        assert (p["products"], p["failed"]) == (4 * p["callers"], {})
        waits = [p["latency_s"][name] for name in ("p50", "p90", "p99", "p100")]
        assert waits == sorted(waits)
        assert 0 < p["compute_s"] <= waits[-1]
        assert p["products_per_s"] == pytest.approx(p["products"] / p["seconds"])
        assert p["bytes_per_s"] == pytest.approx(
            p["columns_per_s"] * 4 * p["parameters"]
        )
    after = done(target)
    # And the first of each caller, which is not counted.
    assert after[0] - before[0] == sum(p["products"] + p["callers"] for p in points)
    assert after[1] - before[1] == sum(
        (p["products"] + p["callers"]) * p["columns"] for p in points
    )
    with curvd.connect(target) as client:
        assert client.sessions() == []


def test_a_session_of_ones_own_stays_and_its_table_is_for_people(target):
    with curvd.connect(target) as client, open_session(client) as session:
        options = ("--session", session.id, "--operator", "ggn", "-k", "2", "-c", "1")
        result = run(target, *options, "--products", 3)
        assert result.exit_code == 0, result.output
        heading, row = result.output.splitlines()
        assert heading.split()[:5] == ["P", "K", "CALLERS", "PRODUCTS", "FAILED"]
        size = session.info.layout.size
        assert row.split()[:5] == [f"{size}", "2", "1", "3", "0"]
        assert [s.id for s in client.sessions()] == [session.id]


def test_what_the_server_refuses_is_told_by_its_reason(target):
    result = run(target, "-p", "200", "-k", "1", "-c", "1", "--session", "none")
    assert result.exit_code == 1
    assert "no session 'none'" in result.output


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("-c", "1,0", "'1,0' is not a list such as 1,4,16"),
        ("-p", "5", "--parameters must be at least 85, got 5"),
    ],
)
def test_what_cannot_be_measured_is_refused(target, option, value, said):
    result = run(target, option, value)
    assert result.exit_code == 2
    assert said in result.output


class Busy:
    """An operator whose every other product is refused."""

    shape, dtype, last = (3, 3), np.dtype("f4"), None

    def __init__(self, error=None):
        self.asked, self.error = 0, error

    def matvec(self, v):
        self.asked += 1
        if self.error is not None:
            raise self.error
        if self.asked % 2 == 0:
            raise Overloaded("later", retry_after_s=1.0)
        return v


def test_products_that_were_refused_are_counted_apart():
    point = bench.measure(
        lambda: contextlib.nullcontext(Busy()),
        columns=1,
        callers=2,
        seconds=60.0,
        most=10,
    )
    assert (point.products, point.failed) == (10, {"OVERLOADED": 10})
    assert point.compute_s is None


def test_the_caller_who_cannot_begin_says_why_and_nobody_waits_for_him():
    operators = iter([Busy(), Busy(Unavailable("gone")), Busy()])
    with pytest.raises(Unavailable, match="gone"):
        bench.measure(
            lambda: contextlib.nullcontext(next(operators)),
            columns=1,
            callers=3,
            seconds=60.0,
            most=10,
        )
