"""Full collections of garbage keep away from work whose objects stay."""

import gc
import weakref

import pytest

from curvd_server.system import (
    collect_if_due,
    garbage,
    look_at_all,
    none_while_building,
)


class Node:
    """Something that refers to itself, as the nodes of a graph do."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def full():
    """Counts full collections, at the interpreter's own thresholds."""
    counted, thresholds = [], gc.get_threshold()
    gc.set_threshold(700, 10, 10)

    def note(phase, info):
        if phase == "start" and info["generation"] == 2:
            counted.append(phase)

    gc.callbacks.append(note)
    yield counted
    gc.callbacks.remove(note)
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def many():
    """So many that several full collections would be due."""
    return [Node() for _ in range(700 * 10 * 2 * garbage._MANY)]


def test_no_full_collection_comes_while_much_is_built_and_what_is_left_is_collected(
    full,
):
    thresholds = gc.get_threshold()
    gc.collect()
    full.clear()
    before = gc.get_freeze_count()
    with none_while_building() as aside:
        built = many()
        seen = weakref.ref(built[0])
        with none_while_building() as other:
            pass
        assert gc.get_threshold()[2] > thresholds[2]
    assert not full and aside.some and other.some
    assert gc.get_freeze_count() > before + len(built)
    assert gc.get_threshold() == thresholds
    del built
    gc.collect()
    assert seen() is not None  # it is set aside
    look_at_all()
    assert seen() is None


def test_little_is_not_set_aside(full):
    gc.collect()
    before = gc.get_freeze_count()
    with none_while_building() as aside:
        built = [Node() for _ in range(100)]
    assert not aside.some and gc.get_freeze_count() == before
    seen = weakref.ref(built[0])
    del built
    gc.collect()
    assert seen() is None


def test_a_collection_that_is_due_comes_where_nobody_waits(full):
    young, middle, old = gc.get_threshold()
    gc.collect()
    full.clear()
    collect_if_due()
    assert not full
    with none_while_building():
        built = [Node() for _ in range(young * middle * 2 * old)]
        collect_if_due()
        assert not full
    collect_if_due()
    assert len(full) == 1 and built
    collect_if_due()
    assert len(full) == 1


def test_work_that_fails_leaves_the_collector_as_it_was(full):
    thresholds = gc.get_threshold()
    with pytest.raises(ZeroDivisionError), none_while_building():
        raise ZeroDivisionError
    assert gc.get_threshold() == thresholds
