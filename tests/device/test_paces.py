"""What products take says which are short, and which are long enough to give way."""

import pytest

from curvd_server.device.paces import _SHORT_S, LONG_S, SHARED_LONG_S, Paces


class Anything:
    """Stands for an operator: paces only tell them apart."""


@pytest.fixture
def paces():
    return Paces()


@pytest.fixture
def operator():
    return Anything()


def test_an_operator_that_nobody_has_asked_is_long_and_not_short(paces, operator):
    assert not paces.is_short(operator, 1)
    assert paces.is_long(operator, 1, is_shared=False)
    assert paces.is_long(operator, 1, is_shared=True)
    paces.count(Anything(), 1, 0.0, complete=True)  # another one says nothing of it
    assert not paces.is_short(operator, 1)


@pytest.mark.parametrize("columns", [1, 2, 8])
def test_bounds_are_of_all_columns_together(paces, operator, columns):
    paces.count(operator, columns, _SHORT_S, complete=True)
    assert paces.is_short(operator, columns)
    assert not paces.is_short(operator, 2 * columns)
    most = round(columns * LONG_S / _SHORT_S)
    assert not paces.is_long(operator, most - 1, is_shared=False)
    assert paces.is_long(operator, most + 1, is_shared=False)


def test_one_slow_product_counts_for_a_while(paces, operator):
    paces.count(operator, 1, 100 * LONG_S, complete=True)
    was_long, was_short = [], []
    for _ in range(100):
        paces.count(operator, 1, _SHORT_S / 2, complete=True)
        was_long.append(paces.is_long(operator, 1, is_shared=False))
        was_short.append(paces.is_short(operator, 1))
    assert 10 < was_long.count(True) < 50
    # Not now and then: at first it was long, and in the end it is short.
    assert was_long == sorted(was_long, reverse=True)
    assert was_short == [not long for long in was_long]


def test_beside_callers_with_names_the_quickest_run_of_such_a_width_decides(
    paces, operator
):
    """A busy machine makes no product a long one."""
    paces.count(operator, 3, SHARED_LONG_S / 2, complete=True)
    paces.count(operator, 2, 100 * LONG_S, complete=True)
    assert paces.is_long(operator, 3, is_shared=False)
    assert not paces.is_long(operator, 3, is_shared=True)
    assert not paces.is_long(operator, 2, is_shared=True)
    # Of twice as many, nothing is known but the slowest.
    assert paces.is_long(operator, 4, is_shared=True)
    # A run that was given up is no measure of what a whole one takes.
    paces.count(operator, 4, 0.0, complete=False)
    assert paces.is_long(operator, 4, is_shared=True)


def test_a_product_between_slow_ones_is_short_and_one_that_stays_slow_is_not(
    paces, operator
):
    """A busy machine interrupts now and then; data that are no longer kept always cost."""
    for seconds in [_SHORT_S / 2, LONG_S / 2, LONG_S / 2] * 20:
        paces.count(operator, 1, seconds, complete=True)
        assert paces.is_short(operator, 1)
    was_short = []
    for _ in range(50):
        paces.count(operator, 1, LONG_S / 2, complete=True)
        was_short.append(paces.is_short(operator, 1))
    assert 2 < was_short.count(True) < 20
    assert was_short == sorted(was_short, reverse=True)


def test_waits_are_guessed_from_what_columns_took_lately(paces):
    first_s = paces.wait_s(1)
    assert first_s > 0
    assert paces.wait_s(8) == pytest.approx(8 * first_s)
    for operator in (Anything(), Anything()) * 50:
        paces.count(operator, 4, 4 * 2e-3, complete=True)
    assert paces.wait_s(10) == pytest.approx(10 * 2e-3)
    paces.count(Anything(), 1, 1.0, complete=True)
    assert 2e-3 < paces.wait_s(1) < 0.5  # one that is slow does not decide alone
