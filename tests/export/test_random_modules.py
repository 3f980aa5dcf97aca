"""A hundred of the random modules of `make fuzz-modules`: equal to torch, or refused."""

import itertools

import pytest

pytest.importorskip("torch")
import fuzz_modules
from support.grammar import cases, derive


@pytest.mark.usefixtures("untimed")
def test_a_random_module_is_what_torch_computes_or_refused(live_target, capsys):
    counts = fuzz_modules.run(live_target, range(100))
    failed = {name for name in counts if name.isupper()}
    assert not failed, capsys.readouterr().err
    assert counts["equal"] >= 40, counts
    assert counts["GradientMismatch"] >= 15, counts


def test_runs_of_other_seeds_try_other_modules():
    seen = []
    for seed in (0, 1, 21, 22):
        made = [derive(number) for number in cases(seed, 60)]
        assert len({tuple(case.said) for case in made}) > 50
        seen.append(made)
    numbers = [cases(seed, 1 << 31) for seed in (0, 1, 21, 22)]
    assert all(a[-1] < b[0] for a, b in itertools.pairwise(numbers))
    # Not the numbers alone are others: so are what is drawn, and its parameters.
    firsts = {
        tuple(p.sum().item() for p in made[0].module.parameters()) for made in seen
    }
    assert len(firsts) == len(seen)
    whole = {tuple(tuple(case.said) for case in made) for made in seen}
    assert len(whole) == len(seen)
