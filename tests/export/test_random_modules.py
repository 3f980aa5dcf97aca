"""A hundred of the random modules of `make fuzz-modules`: equal to torch, or refused."""

import functools

import pytest

pytest.importorskip("torch")
import fuzz_modules

from curvd_server.engine import building
from curvd_server.engine.tuning.autotune import Plan


def test_a_random_module_is_what_torch_computes_or_refused(
    live_target, monkeypatch, capsys
):
    # Racing plans takes most of the time, and other tests verify each of them.
    plain = functools.partial(building.build, plan=Plan("double_backward"))
    monkeypatch.setattr(building, "build", plain)
    counts = fuzz_modules.run(live_target, range(100))
    failed = {name for name in counts if name.isupper()}
    assert not failed, capsys.readouterr().err
    assert counts["equal"] >= 40, counts
    assert counts["GradientMismatch"] >= 15, counts
