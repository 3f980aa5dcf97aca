"""What `make soak` calls flat is flat, and a leak is none."""

import numpy as np
import pytest
from support.flatness import HOUR_S, Watch, slope

AT_S = np.arange(0.0, 1500.0, 2.0)


def resident(leak_mb_per_hour):
    """MB of a server: what is held, work under way, and what malloc has not given back."""
    rng = np.random.default_rng(0)
    under_way = rng.exponential(20.0, len(AT_S))
    level = 400.0 + rng.normal(0.0, 1.0, len(AT_S))
    return level + under_way + leak_mb_per_hour * AT_S / HOUR_S


@pytest.mark.parametrize("leak", [0.0, 20.0, 100.0])
def test_a_slope_is_found_beside_work_under_way(leak):
    found = slope(AT_S, resident(leak), 60.0)
    assert found.low <= leak <= found.high
    assert abs(found.value - leak) < 5.0


@pytest.mark.parametrize(("leak", "missed"), [(0.0, []), (100.0, ["server, MB"])])
def test_a_leak_is_missed_and_named(leak, missed):
    watch = Watch(0, None, at_s=list(AT_S), seen={"server, MB": list(resident(leak))})
    lines, found = watch.table(300.0, 60.0, {"server, MB": 40.0})
    assert found == missed
    assert "server, MB" in lines[-1]


def test_too_short_a_look_is_no_proof():
    watch = Watch(0, None, at_s=[0.0, 2.0], seen={"threads": [7, 7]})
    _, missed = watch.table(0.0, 60.0, {"threads": 4.0})
    assert missed == ["threads"]
