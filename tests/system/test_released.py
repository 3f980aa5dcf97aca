"""An error that is kept holds nothing that was worked with, and a defect says where."""

import gc
import traceback
import weakref

import pytest

from curvd.errors import Cancelled
from curvd_server.system import released


class Data:
    """Large, in real life."""


def caught(kind):
    """An error that came through a frame with data; and whether those are there."""
    data = Data()

    def worked(data):
        try:
            raise KeyError("the cause")
        except KeyError as cause:
            raise kind("why") from cause

    try:
        worked(data)
    except kind as error:
        return released(error), weakref.ref(data)


@pytest.mark.parametrize("kind", [Cancelled, RuntimeError])
def test_what_the_frames_held_is_free(kind):
    gc.disable()
    try:
        error, data = caught(kind)
        assert data() is None
    finally:
        gc.enable()
    assert str(error) == "why"
    assert isinstance(error.__cause__, KeyError)


def test_a_defect_says_where_it_was():
    error, _ = caught(RuntimeError)
    said = "".join(traceback.format_exception(error))
    assert "in worked" in said
    assert "raise KeyError" in said
