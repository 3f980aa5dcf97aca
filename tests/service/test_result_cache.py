import numpy as np
import pytest

from curvd.errors import RequestIdReused
from curvd_server.service.result_cache import (
    Content,
    Fingerprint,
    ResultCache,
    fingerprint,
)

ASKED = Content("header", "operand")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def kept(**options):
    clock = Clock()
    options = {"budget_bytes": 100, "keep_s": 10.0, "clock": clock} | options
    return ResultCache(**options), clock


def test_a_result_is_found_until_its_time_is_over():
    results, clock = kept()
    results.put(("s", "r"), ASKED, "value", 60)
    clock.now = 9.9
    assert results.get(("s", "r"), ASKED) == "value"
    assert results.get(("other", "r"), ASKED) is None
    clock.now = 10.0
    assert results.get(("s", "r"), ASKED) is None
    assert results.nbytes == 0


def test_the_next_call_on_a_connection_shows_that_the_last_result_arrived():
    results, _ = kept()
    results.put(("s", "a"), ASKED, "a", 10, "ipv4:1")
    results.put(("s", "b"), ASKED, "b", 10, "ipv4:2")
    results.put(("s", "c"), ASKED, "c", 10)
    results.received("ipv4:1", ("s", "a"))
    assert results.get(("s", "a"), ASKED) == "a"  # it is asked for again
    results.put(("s", "a"), ASKED, "a", 10, "ipv4:1")
    results.received("ipv4:1", ("s", "d"))
    results.received("", ("s", "d"))
    assert results.get(("s", "a"), ASKED) is None
    assert results.get(("s", "b"), ASKED) == "b"
    assert results.get(("s", "c"), ASKED) == "c"


def test_the_oldest_make_room_in_bytes_and_in_number():
    results, _ = kept(entries=2)
    for name in "abc":
        results.put(("s", name), ASKED, name, 10)
    assert results.get(("s", "a"), ASKED) is None
    results.put(("s", "d"), ASKED, "d", 95)
    assert results.get(("s", "c"), ASKED) is None
    assert results.get(("s", "d"), ASKED) == "d"
    assert results.nbytes == 95


def test_what_is_too_large_or_has_no_id_is_not_kept():
    results, _ = kept()
    results.put(("s", "r"), ASKED, "value", 101)
    results.put(("s", ""), ASKED, "value", 1)
    assert results.nbytes == 0


def test_other_content_under_the_same_id_is_refused():
    results, _ = kept()
    results.put(("s", "r"), ASKED, "value", 1)
    assert results.get(("s", "r"), Content("header")) == "value"  # operand not known
    for other in (Content("other"), Content("header", "other")):
        with pytest.raises(RequestIdReused):
            results.get(("s", "r"), other)


@pytest.mark.parametrize("size", [1, 5, 16384, 16385, 40_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_operands_are_told_apart_wherever_they_differ(size, dtype):
    columns = np.random.default_rng(0).standard_normal((2, size)).astype(dtype)
    original = fingerprint(columns)
    assert fingerprint(columns.copy()) == original
    for index in (0, size // 2, size - 1):
        changed = columns.copy()
        changed[1, index] += 1
        assert fingerprint(changed) != original


def test_the_same_values_in_other_places_are_another_operand():
    """Unit vectors, for example: a loop over them with one id must not go unnoticed."""
    units = np.eye(3, 1 << 15, k=8, dtype=np.float32)
    assert len({fingerprint(row[None]) for row in units}) == 3


@pytest.mark.parametrize("cuts", [(), (7,), (65_536, 65_537), (1, 200_003, 262_144)])
def test_pieces_have_the_fingerprint_of_the_whole(cuts):
    raw = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8)
    arriving, seen = np.zeros_like(raw), Fingerprint()
    for stop in (*cuts, raw.nbytes):
        arriving[:stop] = raw[:stop]  # what comes later is not looked at
        seen.update(arriving, stop)
    assert seen.nbytes == raw.nbytes
    assert seen.digits(arriving) == fingerprint(raw.view(np.float32)[None])
