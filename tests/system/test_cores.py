"""Cores that a process may use, by its affinity and by its control group's quota."""

import os

import pytest

from curvd_server.system import usable_cores

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
