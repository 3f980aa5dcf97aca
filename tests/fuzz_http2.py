"""Fuzzes what reads strangers' bytes: receiver, connection, and the recogniser of the port.

`make fuzz-http2` lets atheris look for inputs that reach new code, for ten minutes, and
keeps them. `test_http2_corpus.py` replays what was kept, without atheris. An input is a
byte for the target, a byte for how the rest is cut into reads, and the rest.

Whatever comes, nothing but `ProtocolError` may be raised, memory is bounded, every read ends,
and neither the verdict nor the bytes of the answer depend on where reads are cut.
"""

from __future__ import annotations

import base64
import contextlib
import random
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

import http2_cases as h2


def watched():
    """Let atheris see what is covered, if it runs."""
    if sys.argv[1:2] != ["--worker"]:
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(
        include=["curvd.http2", "curvd_server.transport.detect", "hpack"]
    )


with watched():
    from curvd.contract.rpcs import RPCS
    from curvd.http2.connection import H2Connection
    from curvd.http2.glitches import Glitches
    from curvd.http2.stream import ProtocolError
    from curvd_server.transport.detect import bytes_needed, is_ours

CORPUS = Path(__file__).parent / "corpora" / "http2.txt"
MOST_BYTES = 2048
CODEC = RPCS["MatVec"].request
GREETING = h2.PREFACE + h2.frame(h2.SETTINGS)
MOST_HELD = 64 << 20
REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/a.B/C")]
ANSWER = [(":status", "200"), ("grpc-status", "0")]


class Script:
    """A socket that receives pieces, and takes all that is sent."""

    def __init__(self, pieces):
        self._pieces, self.sent = deque(pieces), bytearray()

    def recv_into(self, place):
        if not self._pieces:
            raise BlockingIOError
        piece = self._pieces.popleft()
        count = min(len(piece), len(place))
        place[:count] = piece[:count]
        if count < len(piece):
            self._pieces.appendleft(piece[count:])
        return count

    def sendmsg(self, views):
        for view in views:
            self.sent += view
        return sum(len(view) for view in views)


def cuts(data, seed):
    """Cut bytes into reads: all at once, each alone, or at random."""
    if seed == 0 or not data:
        return [data] * bool(data)
    rng, pieces, at = random.Random(seed), [], 0
    while at < len(data):
        size = 1 if seed == 1 else rng.randrange(1, 200)
        pieces.append(data[at : at + size])
        at += size
    return pieces


def connection(data, seed, *, client):
    """Let a connection read; tell how it went, and what it sent."""
    sock = Script(cuts(data, seed))

    def accept(stream):
        stream.read(CODEC, 1 << 20, lambda nbytes: None)
        if stream.number % 8 != 1:  # others stay open
            connection.send_headers(stream, ANSWER, end=True)
            if not stream.ended:
                connection.reset(stream, 0)
            connection.push()

    glitches = Glitches(clock=lambda: 0.0)
    connection = H2Connection(sock, client=client, accept=accept, glitches=glitches)
    if client:
        stream = connection.open(REQUEST)
        stream.read(CODEC, 1 << 20, lambda nbytes: None)
        connection.send_data(stream, (), end=True)
    verdict = "alive"
    try:
        for _ in range(len(data) + 10):
            connection.push()
            heard = connection.bytes_received
            connection.pull()
            if connection.bytes_received == heard and not connection.more:
                break
        else:
            raise AssertionError("reading does not end")
    except ProtocolError as error:
        verdict = error.code.name
    connection.push()
    check_bounds(connection)
    stream = connection.stream
    state = stream and (
        stream.number,
        stream.reset_code,
        stream.ended_by_peer,
        str(stream.failure),
        [nbytes for _, nbytes in stream.inbox],
    )
    return verdict, state, bytes(sock.sent)


def check_bounds(connection):
    """What a peer made a connection hold is bounded."""
    held = (
        sum(nbytes for _, nbytes in connection.stream.inbox) if connection.stream else 0
    )
    assert held <= MOST_HELD
    assert connection._receiver._scratch.nbytes <= 1 << 20
    assert len(connection._blocks._known) <= 16
    assert len(connection._closed._excused) <= 128
    assert len(connection._sender._out) <= 1100


def one_connection(data, seed, *, client):
    whole = connection(data, 0, client=client)
    if seed:
        assert connection(data, seed, client=client) == whole
    return whole


def recogniser(data, *, tls):
    """More bytes never change what is known, and say when to look again."""
    known = None
    for count in range(1, min(len(data), 300) + 1):
        found = is_ours(data[:count], tls=tls)
        assert known is None or found is known
        if found is None:
            assert bytes_needed(data[:count], tls=tls) > count
        known = found


def one_input(data):
    """Run one input."""
    if len(data) < 3:
        return
    target, seed, rest = data[0] % 5, data[1], bytes(data[2:])
    if target == 0:
        one_connection(GREETING + rest, seed, client=False)
    elif target == 1:
        one_connection(rest, seed, client=False)
    elif target == 2:
        one_connection(h2.frame(h2.SETTINGS) + rest, seed, client=True)
    else:
        recogniser(rest, tls=target == 4)


def seeds():
    """Inputs to begin with: the cases of the tables."""
    for case in h2.CASES:
        yield bytes([0, 2]) + case.data
    for data, _ in h2.BEGINNINGS.values():
        yield bytes([1, 1]) + data
    for case in h2.SERVER_CASES:
        yield bytes([2, 2]) + case.data
    yield bytes([3, 0]) + h2.PREFACE + h2.setting(0xC52D, 1)
    hello = (
        b"\x16\x03\x01\x00\x30\x01\x00\x00\x2c\x03\x03" + bytes(30) + b"\x05curvd\x02h2"
    )
    yield bytes([4, 0]) + hello


def kept():
    """The inputs that fuzzing found so far, one in each line."""
    return [base64.b64decode(line) for line in CORPUS.read_text().split()]


def fuzz(seconds):
    """Look for inputs that reach new code; keep the fewest that reach it all."""
    with tempfile.TemporaryDirectory() as folder:
        before, found, merged = (Path(folder) / name for name in ("a", "b", "c"))
        for path in (before, found, merged):
            path.mkdir()
        old = kept() if CORPUS.exists() else []
        for index, data in enumerate((*seeds(), *old)):
            (before / str(index)).write_bytes(data)
        worker = [sys.executable, __file__, "--worker"]
        limits = ["-rss_limit_mb=1024", "-timeout=20", f"-max_len={MOST_BYTES}"]
        budget = f"-max_total_time={seconds}"
        ended = subprocess.run([*worker, found, before, budget, *limits]).returncode
        if ended == 0:
            merge = [*worker, merged, before, found, "-merge=1", *limits]
            ended = subprocess.run(merge).returncode
        if ended == 0:
            inputs = sorted((p.read_bytes() for p in merged.iterdir()), key=len)
            lines = (base64.b64encode(data).decode() + "\n" for data in inputs)
            CORPUS.write_text("".join(lines))
            print(f"{len(inputs)} inputs are kept in {CORPUS}")
        return ended


def work():
    """Run libFuzzer in this process; it does not come back."""
    import atheris

    # libFuzzer starts itself anew to merge, by what stands first here, in a shell.
    itself = f"{sys.executable} {__file__} --worker"
    atheris.Setup([itself, *sys.argv[2:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work()
    sys.exit(fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 600))
