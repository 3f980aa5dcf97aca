"""Who is expected back: whoever usually comes back at once, for as long as that takes."""

import pytest

from curvd_server.device.presence import Presence


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def presence(now):
    return Presence(lambda: now[0])


def visits(presence, now, name, absences):
    """Have requests come and end, with so many seconds between them."""
    for away_s in absences:
        presence.came(name)
        now[0] += 1e-3
        presence.ended(name)
        now[0] += away_s
    presence.came(name)
    presence.ended(name)


def test_who_comes_back_at_once_is_expected_for_twice_as_long(presence, now):
    visits(presence, now, "ann", [1e-3] * 5)
    assert presence.expected() == {"ann": pytest.approx(2e-3)}
    now[0] += 1.9e-3
    assert presence.expected() == {"ann": pytest.approx(0.1e-3)}
    now[0] += 0.2e-3
    assert presence.expected() == {}


def test_nobody_is_expected_who_was_here_once(presence, now):
    presence.came("ann")
    presence.ended("ann")
    assert presence.expected() == {}


def test_nobody_is_expected_who_takes_his_time(presence, now):
    visits(presence, now, "ann", [1e-3] * 5)
    visits(presence, now, "ann", [10.0] * 5)
    assert presence.expected() == {}


def test_who_is_there_is_not_expected(presence, now):
    visits(presence, now, "ann", [1e-3] * 5)
    presence.came("ann")
    presence.came("ann")
    presence.ended("ann")
    assert presence.expected() == {}
    presence.ended("ann")
    assert list(presence.expected()) == ["ann"]


def test_several_share_it_for_a_second_after_they_asked(presence, now):
    presence.came("ann")
    assert not presence.is_shared()
    presence.came("ben")
    assert presence.is_shared()
    presence.came("")  # nobody in particular
    now[0] += 1.1
    assert not presence.is_shared()


def test_who_left_long_ago_is_forgotten(presence, now):
    visits(presence, now, "ann", [1e-3])
    now[0] += 2.0
    presence.came("ben")
    assert list(presence._callers) == ["ben"]
