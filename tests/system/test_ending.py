"""A process that was told to end ends, and says what it leaves behind."""

import threading

from curvd.contract.enums import Work
from curvd_server.system import Activities, Ongoing, end_within


def test_what_goes_on_is_named_and_the_process_ends(caplog):
    activities, ended, statuses = Activities(), threading.Event(), []

    def end(status):
        statuses.append(status)
        ended.set()

    ongoing = Ongoing(
        Work.QUERY, "Sketch", session=lambda: ("s-1", "mine"), activities=activities
    )
    with ongoing:
        end_within(0.01, activities.under_way, end=end)
        assert ended.wait(30)
    assert statuses == [1]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "query Sketch of session s-1" in line and "abandoned" in line
    assert activities.under_way() == ()
