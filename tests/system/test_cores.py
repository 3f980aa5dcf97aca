"""Cores that a process may use, by its affinity and its quota, and whether others want them."""

import itertools
import os

import pytest

from curvd_server.system import is_quiet, usable_cores, waited_s

HERE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("150000 100000", min(2, HERE)),
        ("6400000 100000", min(64, HERE)),
        ("max 100000", HERE),
        ("", HERE),
        ("100000 0", HERE),
    ],
)
def test_a_quota_limits_the_cores(tmp_path, text, cores):
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    assert usable_cores(quota) == cores


def test_without_a_control_group_the_affinity_counts(tmp_path):
    assert usable_cores(tmp_path / "none") == HERE


def test_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert usable_cores(tmp_path / "none") == 1


def test_waiting_for_a_core_is_read_off_what_the_system_tells(tmp_path):
    told = tmp_path / "schedstat"
    told.write_text("1200000000 2500000000 17\n")
    assert waited_s(told) == 2.5
    for text in ("", "12", "a b c"):
        told.write_text(text)
        assert waited_s(told) == 0.0
    assert waited_s(tmp_path / "nothing") == 0.0


def ticking(step_s):
    """A clock that goes on whenever it is read."""
    times = itertools.count()
    return lambda: next(times) * step_s


@pytest.mark.parametrize(("waited_in_all_s", "quiet"), [(0.0, True), (0.01, False)])
def test_a_machine_is_quiet_where_who_computes_does_not_wait(waited_in_all_s, quiet):
    waited = iter([1.0, 1.0 + waited_in_all_s])
    assert is_quiet(ticking(1e-3), lambda: next(waited)) is quiet
