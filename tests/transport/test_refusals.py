"""A caller at his quota is refused at once at first, and then in a steady pace."""

import asyncio

import pytest

from curvd_server.transport.refusals import Refusals


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def refusals(now):
    return Refusals(per_second=10.0, at_once=5, longest_s=2.0, clock=lambda: now[0])


def test_the_first_are_told_at_once_and_then_so_many_a_second(refusals):
    pauses = [refusals.pause_s("ben") for _ in range(8)]
    assert pauses == pytest.approx([0, 0, 0, 0, 0, 0.1, 0.2, 0.3])


def test_callers_do_not_wait_for_each_other(refusals):
    for _ in range(50):
        refusals.pause_s("ben")
    assert refusals.pause_s("ann") == 0


def test_whoever_pauses_has_them_back(refusals, now):
    for _ in range(8):
        refusals.pause_s("ben")
    now[0] += 0.8
    assert [refusals.pause_s("ben") for _ in range(6)] == pytest.approx([0] * 5 + [0.1])


def test_a_pause_has_a_longest_length_and_leaves_no_debt_beyond_it(refusals, now):
    pauses = [refusals.pause_s("ben") for _ in range(1000)]
    assert max(pauses) == 2.0
    now[0] += 2.5
    assert refusals.pause_s("ben") == 0


def test_who_is_gone_is_forgotten(refusals, now):
    refusals.pause_s("ben")
    now[0] += 10.0
    refusals.pause_s("ann")
    assert list(refusals._until_s) == ["ann"]


def test_nobody_in_particular_is_never_put_off(refusals, monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def many(name, remaining_s):
        for _ in range(6):
            await refusals.pace(name, remaining_s)

    asyncio.run(many("", None))
    assert slept == []
    asyncio.run(many("ben", None))
    assert slept == pytest.approx([0.1])


def test_a_refusal_comes_before_the_deadline(refusals, monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    for _ in range(20):
        refusals.pause_s("ben")
    asyncio.run(refusals.pace("ben", 0.4))
    assert slept == [0.2]
