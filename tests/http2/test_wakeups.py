"""When a socket wakes who reads it: seldom within a frame, and always at its end."""

import select
import socket
import ssl

import numpy as np
import pytest

from curvd.contract.rpcs import RPCS
from curvd.http2 import frames
from curvd.http2.connection import H2Connection
from curvd.http2.frames import Kind
from curvd.http2.messages import framed
from curvd.http2.receiver import _WORTH_WAKING_BYTES
from curvd.http2.sockets import counts_bytes

CODEC = RPCS["MatVec"].request
CHUNK_BYTES = 2 << 20
PATH = ((":method", "POST"), (":scheme", "http"), (":path", "/a/B"))

pytestmark = pytest.mark.skipif(
    not hasattr(socket, "SO_RCVLOWAT"), reason="this system wakes for every byte"
)


class Wire:
    """A server's connection over TCP, and the bare socket of its client."""

    def __init__(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.bare = socket.create_connection(listener.getsockname())
        self.end, _ = listener.accept()
        listener.close()
        self.bare.settimeout(30)
        self.end.setblocking(False)
        self.place = np.zeros(CHUNK_BYTES, np.uint8)
        self.connection = H2Connection(self.end, client=False, accept=self._accept)

    def _accept(self, stream):
        stream.read(CODEC, CHUNK_BYTES + 100, lambda nbytes: self.place[:nbytes].data)

    def send(self, data):
        """Send bytes, and wait until the kernel of the other end has them."""
        self.bare.sendall(data)

    def wakes(self, within_s=0.0):
        """Whether whoever polls the connection is woken."""
        poll = select.poll()
        poll.register(self.end, select.POLLIN)
        return bool(poll.poll(1e3 * within_s))

    def pull(self):
        """Wait to be woken, and read."""
        assert self.wakes(10)
        self.connection.pull()


@pytest.fixture
def wire():
    wire = Wire()
    yield wire
    wire.bare.close()
    wire.end.close()


def chunk(values):
    """A message that is one chunk, in one frame, and the frame's head apart."""
    data = b"".join(framed(CODEC, values.data))
    return frames.head(len(data), Kind.DATA, 0, 1), data


def greeting():
    return (
        frames.PREFACE
        + frames.settings({})
        + frames.frame(Kind.HEADERS, frames.END_HEADERS, 1, frames.literals(PATH))
    )


def test_a_frame_wakes_its_reader_when_much_of_it_is_there_and_at_its_end(wire):
    values = np.random.default_rng(0).integers(0, 256, CHUNK_BYTES, dtype=np.uint8)
    head, data = chunk(values)
    wire.send(greeting() + head + data[:100])
    wire.pull()
    assert wire.connection.drained
    at = 100
    wire.send(data[at : at + 1000])
    assert not wire.wakes(0.05)  # not worth it
    at += 1000
    wire.send(data[at : at + _WORTH_WAKING_BYTES])
    at += _WORTH_WAKING_BYTES
    wire.pull()
    assert wire.connection.bytes_received > _WORTH_WAKING_BYTES
    wire.send(data[at:-1])
    assert not wire.wakes(0.05)
    wire.send(data[-1:])
    while not wire.connection.stream.inbox:
        wire.pull()
    assert np.array_equal(wire.place, values)
    wire.send(
        frames.frame(Kind.PING, 0, 0, b"a  b  cc")
    )  # shorter than what was waited for
    wire.pull()
    assert wire.connection.drained


def test_a_short_frame_wakes_its_reader_for_each_byte(wire):
    head, data = chunk(np.zeros(400_000, np.uint8))
    wire.send(greeting() + head + data[:100])
    wire.pull()
    wire.send(data[100:200])
    wire.pull()
    wire.send(data[200:])
    while not wire.connection.stream.inbox:
        wire.pull()


def test_the_end_of_a_connection_wakes_its_reader_within_a_frame(wire):
    head, data = chunk(np.zeros(CHUNK_BYTES, np.uint8))
    wire.send(greeting() + head + data[:100])
    wire.pull()
    assert not wire.wakes(0.05)
    wire.bare.close()
    assert wire.wakes(10)


def test_only_plain_tcp_counts_bytes(wire):
    assert counts_bytes(wire.end)
    near, far = socket.socketpair()
    with near, far:
        assert not counts_bytes(near)  # the bytes of a Unix socket
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls = context.wrap_socket(
        wire.bare, server_hostname="x", do_handshake_on_connect=False
    )
    with tls:
        assert not counts_bytes(tls)
