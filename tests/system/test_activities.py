"""Long work says which stage it is in, to whoever began it and to nobody else."""

import logging
import threading

import pytest

from curvd.contract import Stage, StageProgress, Work
from curvd_server.system import Activities, Ongoing, advance, enter_stage


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ongoing(clock):
    return Ongoing(Work.OPENING, session=lambda: ("", "mine"), clock=clock)


def stages(news):
    return [(p.stage, p.detail, p.done, p.total) for p in news]


def test_news_are_each_stage_once_as_it_was_at_its_end(ongoing, clock):
    ongoing.enter(Stage.CHECKING, total=3)
    clock.now_s += 2.0
    ongoing.advance()
    ongoing.advance()
    ongoing.enter(Stage.VERIFYING, "double_backward", total=7)
    clock.now_s += 1.0
    waiting, checking, verifying = ongoing.news()
    assert waiting.stage is Stage.WAITING
    assert checking == StageProgress(
        stage=Stage.CHECKING, done=2, total=3, elapsed_s=2.0
    )
    assert (verifying.done, verifying.elapsed_s) == (0, 1.0)
    assert ongoing.news() == []
    ongoing.advance()
    assert stages(ongoing.news()) == [(Stage.VERIFYING, "double_backward", 1, 7)]


def test_a_stage_that_ends_between_two_reports_is_not_lost(ongoing):
    ongoing.enter(Stage.TUNING, total=2)
    ongoing.news()
    ongoing.advance(2, detail="program/1/1")
    ongoing.enter(Stage.WARMING)
    assert stages(ongoing.news()) == [
        (Stage.TUNING, "program/1/1", 2, 2),
        (Stage.WARMING, "", 0, None),
    ]


def test_a_total_that_was_too_small_grows(ongoing):
    ongoing.enter(Stage.TUNING, total=2)
    ongoing.advance(5)
    assert (ongoing.now.progress.done, ongoing.now.progress.total) == (5, 5)


def test_what_is_left_is_said_at_the_pace_so_far():
    progress = StageProgress(stage=Stage.WARMING, done=4, total=10, elapsed_s=2.0)
    assert progress.left_s == 3.0
    assert str(progress) == "warming, 4 of 10"
    assert StageProgress(stage=Stage.WARMING, total=10).left_s is None
    assert StageProgress(stage=Stage.TUNING, done=3, elapsed_s=1.0).left_s is None


def test_a_thread_is_heard_only_by_who_listens_there(ongoing):
    enter_stage(Stage.TUNING)  # nobody listens
    advance()
    other = Ongoing(Work.QUERY)

    def elsewhere():
        with other.here():
            enter_stage(Stage.MULTIPLYING, total=4)
            advance(3)

    with ongoing.here():
        enter_stage(Stage.VERIFYING)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with other.here():
            advance()
        advance()
    advance()
    assert (ongoing.now.progress.stage, ongoing.now.progress.done) == ("verifying", 1)
    assert (other.now.progress.stage, other.now.progress.done) == ("multiplying", 4)


def test_what_goes_on_is_listed_the_oldest_first(clock):
    activities = Activities()
    opening = Ongoing(
        Work.OPENING, session=lambda: ("", "a"), activities=activities, clock=clock
    )
    query = Ongoing(
        Work.QUERY,
        "Trace",
        session=lambda: ("s-1", "b"),
        activities=activities,
        clock=clock,
    )
    assert activities.listed() == ()
    with opening:
        clock.now_s += 3.0
        with query:
            first, second = activities.listed()
            assert (first.work, first.session_name, first.elapsed_s) == (
                Work.OPENING,
                "a",
                3.0,
            )
            assert (second.subject, second.session_id) == ("Trace", "s-1")
        assert [a.work for a in activities.listed()] == [Work.OPENING]
    assert activities.listed() == ()


def test_work_that_fails_is_listed_no_longer():
    activities = Activities()
    with pytest.raises(ZeroDivisionError), Ongoing(Work.OPENING, activities=activities):
        1 / 0  # noqa: B018
    assert activities.listed() == ()


def test_each_stage_that_ends_is_one_line_of_the_log(ongoing, clock, caplog):
    caplog.set_level(logging.INFO, logger="curvd_server")
    with ongoing:
        ongoing.enter(Stage.VERIFYING, "double_backward", total=7)
        clock.now_s += 1.5
        ongoing.advance(2)
        ongoing.enter(Stage.WARMING, total=4)
        ongoing.advance(4)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2  # it did not wait long enough to be worth one
    for text in ("opening: verifying ended", '"detail": "double_backward"',
                 '"done": 2', '"seconds": 1.5', '"session": "mine"'):  # fmt: skip
        assert text in lines[0]
    assert "opening: warming ended" in lines[1]


def test_a_query_writes_no_line_for_its_stage(caplog):
    caplog.set_level(logging.INFO, logger="curvd_server")
    with Ongoing(Work.QUERY, "Trace") as query:
        query.enter(Stage.MULTIPLYING)
    assert caplog.records == []
