"""Our half and python-hyper's h2 object to the same bytes, at the same frame."""

import h2.config
import h2.connection
import h2.exceptions
import h2.settings
import http2_cases as cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curvd.contract.rpcs import RPCS
from curvd.http2.connection import H2Connection
from curvd.http2.glitches import Glitches
from curvd.http2.stream import ProtocolError

GREETING = cases.PREFACE + cases.frame(cases.SETTINGS)
CODEC = RPCS["MatVec"].request
H2_DIFFERS = {
    "PING longer than any frame": "it waits for the frame, and then refuses it",
    ":path without a slash": "it does not look at paths",
    "table resized three times": "its HPACK allows any number",
    "more headers than allowed": "it allows 64 KiB of decoded fields, however encoded",
}


class Socket:
    """What `H2Connection` needs of one."""

    def __init__(self):
        self.came, self.sent = bytearray(), bytearray()

    def recv_into(self, place):
        if not self.came:
            raise BlockingIOError
        count = min(len(self.came), len(place))
        place[:count] = self.came[:count]
        del self.came[:count]
        return count

    def sendmsg(self, views):
        for view in views:
            self.sent += view
        return sum(len(view) for view in views)


class Ours:
    """Our half."""

    def __init__(self):
        self._sock = Socket()
        self._connection = H2Connection(
            self._sock,
            client=False,
            accept=lambda stream: stream.read(CODEC, 1 << 20, lambda nbytes: None),
            glitches=Glitches(clock=lambda: 0.0),
        )

    def objects(self, data):
        """Whether it ends the connection or a stream because of what comes."""
        self._sock.sent.clear()
        self._sock.came += data
        try:
            while self._sock.came or self._connection.more:
                self._connection.pull()
        except ProtocolError:
            return True
        self._connection.push()
        return has_reset(self._sock.sent)


class Theirs:
    """H2."""

    def __init__(self):
        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self._connection = h2.connection.H2Connection(config)
        one = {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1}
        self._connection.local_settings = h2.settings.Settings(
            client=False, initial_values=one
        )
        self._connection.initiate_connection()
        self._connection.data_to_send()

    def objects(self, data):
        try:
            self._connection.receive_data(data)
        except h2.exceptions.ProtocolError:
            return True
        return has_reset(self._connection.data_to_send())


def has_reset(data):
    kinds = []
    while data:
        kinds.append(data[3])
        data = data[9 + int.from_bytes(data[:3], "big") :]
    return cases.RST_STREAM in kinds


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: f"{c.section} {c.name}")
def test_h2_objects_to_what_we_object_to(case):
    if case.section == "gRPC":
        pytest.skip("h2 knows nothing of gRPC")
    ours, theirs = (peer().objects(GREETING + case.data) for peer in (Ours, Theirs))
    assert ours == (case.reaction != cases.NOTHING)
    assert (theirs != ours) == (case.name in H2_DIFFERS)


STEPS = {
    "open 1": cases.headers(1),
    "open 3": cases.headers(3),
    "open and end 1": cases.headers(1, flags=5),
    "open and end 5": cases.headers(5, flags=5),
    "a message on 1": cases.frame(cases.DATA, 0, 1, bytes(5)),
    "the last message on 1": cases.frame(cases.DATA, 1, 1, bytes(5)),
    "a message on 3": cases.frame(cases.DATA, 0, 3, bytes(5)),
    "padded data on 1": cases.frame(cases.DATA, 8, 1, b"\2" + bytes(7)),
    "too much padding on 1": cases.frame(cases.DATA, 8, 1, b"\x08" + bytes(7)),
    "trailers on 1": cases.headers(1, cases.literal(b"x", b"y"), flags=5),
    "reset 1": cases.frame(cases.RST_STREAM, 0, 1, cases.number(8)),
    "widen the connection": cases.frame(
        cases.WINDOW_UPDATE, 0, 0, cases.number(1 << 29)
    ),
    "widen 1": cases.frame(cases.WINDOW_UPDATE, 0, 1, cases.number(1 << 29)),
    "widen 1 by nothing": cases.frame(cases.WINDOW_UPDATE, 0, 1, cases.number(0)),
    "priority of 1": cases.frame(cases.PRIORITY, 0, 1, cases.number(0) + b"\1"),
    "ping": cases.frame(cases.PING, 0, 0, bytes(8)),
    "unknown": cases.frame(77, 1, 1, b"x"),
    "no window": cases.setting(4, 0),
    "a large window": cases.setting(4, (1 << 31) - 1),
    "begin headers of 1": cases.cut(),
    "end headers of 1": cases.frame(cases.CONTINUATION, 4, 1, cases.block()[20:]),
    "continue headers of 1": cases.frame(cases.CONTINUATION, 0, 1),
    "malformed 3": cases.headers(3, cases.block(without=[b":method"])),
    "a dynamic field on 1": cases.headers(
        1, cases.block(more=b"\x40\1a\1b\xbe"), flags=5
    ),
    "an index that depends on it": cases.headers(3, cases.block(more=b"\xbe"), flags=5),
}


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=8))
def test_both_object_at_the_same_step(steps):
    ours, theirs = Ours(), Theirs()
    ours.objects(GREETING), theirs.objects(GREETING)
    for name in steps:
        verdicts = ours.objects(STEPS[name]), theirs.objects(STEPS[name])
        assert verdicts[0] == verdicts[1], (name, verdicts)
        if verdicts[0]:
            break
