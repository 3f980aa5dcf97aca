"""Lines of calls: all that failed, some of the others, and how many there were."""

import asyncio
import json
import logging

import pytest
import raw
from support.served import server

from curvd.contract.rpcs import RPCS
from curvd.errors import SessionNotFound
from curvd_server.transport import AccessLog


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines(caplog):
    """What was logged, as objects."""
    caplog.set_level(logging.INFO, logger="curvd_server")
    return lambda: [
        line
        for record in caplog.records
        if (line := json.loads(record.getMessage()))["event"] == "call"
    ]


async def settled(loop_turns=2):
    """Let what was put off to the loop's next turn happen."""
    for _ in range(loop_turns):
        await asyncio.sleep(0)


async def test_a_method_has_so_many_lines_in_a_second_and_one_for_the_rest(lines):
    clock = Clock()
    log = AccessLog(3, clock)
    for _ in range(10):
        log.add("MatVec", "OK", 0.1, lambda: "peer")
        log.add("Gradient", "OK", 0.1, lambda: "peer")
    await settled()
    assert [line["rpc"] for line in lines()] == ["MatVec", "Gradient"] * 3
    clock.now = 1.0
    log.add("MatVec", "OK", 0.1, lambda: "peer")
    await settled()
    rest = {line["rpc"]: line["more"] for line in lines() if "more" in line}
    assert rest == {"MatVec": 7, "Gradient": 7}
    assert lines()[-1] | {"rpc": "MatVec", "peer": "peer"} == lines()[-1]


async def test_what_failed_always_has_a_line(lines):
    log = AccessLog(0, Clock())
    for code in ("INTERNAL", "CANCELLED", "OK", "NOT_FOUND") * 20:
        log.add("MatVec", code, 0.1, lambda: "peer")
    await settled()
    codes = [line["code"] for line in lines()]
    assert (len(codes), "OK" in codes) == (60, False)
    log.summarise()
    assert lines()[-1]["more"] == 20


async def test_a_call_costs_no_line_where_nobody_reads_them(caplog):
    caplog.set_level(logging.WARNING, logger="curvd_server")

    def peer():
        raise AssertionError("nobody needs to know")

    log = AccessLog(3, Clock())
    for code in ("OK", "INTERNAL"):
        log.add("MatVec", code, 0.1, peer)
    await settled()
    assert caplog.records == []


def test_the_lines_of_a_server_account_for_all_its_calls(tmp_path, lines):
    with server(tmp_path, log_calls=0) as channel:
        for _ in range(7):
            request = RPCS["GetServerInfo"].request.message()
            raw.call(channel, "GetServerInfo", request)
        for _ in range(3):
            with pytest.raises(SessionNotFound):
                request = RPCS["GetSession"].request.message(session_id="none")
                raw.call(channel, "GetSession", request)
    well = [line for line in lines() if line["rpc"] == "GetServerInfo"]
    assert sum(line.get("more", 1) for line in well) == 7
    assert all("more" in line for line in well)
    assert [line["code"] for line in lines()].count("NOT_FOUND") == 3
