"""An error that is kept holds nothing that was worked with, and a defect says where."""

import asyncio
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


def test_links_that_from_none_hides_are_released_too():
    data = Data()

    def worked(data):
        try:
            raise KeyError("hidden")
        except KeyError:
            raise Cancelled("why") from None

    gc.disable()
    try:
        try:
            worked(data)
        except Cancelled as error:
            kept, seen = released(error), weakref.ref(data)
        del data
        assert seen() is None and isinstance(kept.__context__, KeyError)
    finally:
        gc.enable()


def test_another_who_waited_for_the_same_goes_on():
    ended = []

    async def waits(failed, go_on):
        try:
            await failed
        finally:
            await go_on.wait()
            ended.append("in peace")

    async def both():
        failed, go_on = asyncio.get_running_loop().create_future(), asyncio.Event()
        first = asyncio.ensure_future(waits(failed, go_on))
        failed.set_exception(RuntimeError("why"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        released(failed.exception())
        assert not ended
        go_on.set()
        with pytest.raises(RuntimeError, match="why"):
            await asyncio.wait_for(first, 60)

    asyncio.run(both())
    assert ended == ["in peace"]


def test_an_error_that_is_released_on_its_way_is_told_once():
    error, _ = caught(RuntimeError)

    def further():
        raise error

    try:
        further()
    except RuntimeError as again:
        released(again)
    said = "".join(traceback.format_exception(error))
    assert said.count("raise KeyError") == 1 and "in further" in said
