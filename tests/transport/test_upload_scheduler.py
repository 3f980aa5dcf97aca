"""Large requests are read one after the other, and nobody slow is in the way."""

from curvd_server.transport.upload_scheduler import UploadScheduler


class UploadSource:
    """Somebody who sends; counts how often it was told to read again."""

    def __init__(self):
        self.bytes_received = self.resumed = 0

    def resume(self):
        self.resumed += 1


class Looks:
    """Timers that are over when the test says so."""

    def __init__(self):
        self.due = None

    def __call__(self, seconds, look):
        assert self.due is None, "one look at a time"
        self.due = look
        return self

    def cancel(self):
        self.due = None

    def pass_by(self):
        look, self.due = self.due, None
        look()


def queue(*uploads):
    looks = Looks()
    order = UploadScheduler(looks)
    for upload in uploads:
        order.join(upload)
    return order, looks


def test_the_first_is_read_and_the_others_wait():
    first, second, third = UploadSource(), UploadSource(), UploadSource()
    order, _ = queue(first, second, third)
    assert [order.waits(u) for u in (first, second, third)] == [False, True, True]
    order.leave(first)
    assert [order.waits(u) for u in (first, second, third)] == [False, False, True]
    assert second.resumed == 1


def test_who_is_not_in_the_queue_never_waits():
    order, _ = queue(UploadSource(), UploadSource())
    stranger = UploadSource()
    assert not order.waits(stranger)
    order.leave(stranger)
    assert stranger.resumed == 0


def test_one_that_gives_up_while_it_waits_is_not_read_again():
    first, second, third = UploadSource(), UploadSource(), UploadSource()
    order, _ = queue(first, second, third)
    order.leave(second)
    order.leave(first)
    assert second.resumed == 0 and not order.waits(third)


def test_who_sends_slowly_holds_nobody_up():
    slow, second, third = UploadSource(), UploadSource(), UploadSource()
    order, looks = queue(slow, second, third)
    looks.pass_by()
    assert not order.waits(second)
    assert not order.waits(slow)  # it is read whenever something comes
    looks.pass_by()
    assert not order.waits(third)


def test_who_sends_for_long_gives_way_to_the_next():
    long, second = UploadSource(), UploadSource()
    order, looks = queue(long, second)
    while not order.waits(long):
        long.bytes_received += 1 << 20
        looks.pass_by()
    assert not order.waits(second) and second.resumed == 1
    order.leave(second)
    assert not order.waits(long)


def test_a_long_request_alone_is_not_looked_at():
    alone, late = UploadSource(), UploadSource()
    order, looks = queue(alone)
    assert looks.due is None
    order.join(late)
    assert not order.waits(alone) and order.waits(late)


def test_one_that_is_left_alone_is_not_looked_at_any_more():
    first, second, late = UploadSource(), UploadSource(), UploadSource()
    order, looks = queue(first, second)
    order.leave(second)
    assert looks.due is None
    order.join(late)
    assert not order.waits(first) and order.waits(late)
