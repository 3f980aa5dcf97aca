"""A hundred of the random modules of `make fuzz-modules`: equal to torch, or refused."""

import pytest

pytest.importorskip("torch")
import fuzz_modules


@pytest.mark.usefixtures("untimed")
def test_a_random_module_is_what_torch_computes_or_refused(live_target, capsys):
    counts = fuzz_modules.run(live_target, range(100))
    failed = {name for name in counts if name.isupper()}
    assert not failed, capsys.readouterr().err
    assert counts["equal"] >= 40, counts
    assert counts["GradientMismatch"] >= 15, counts
