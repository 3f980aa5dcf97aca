"""Strangers who flood a server, or hoard what it has: bytes for `storm_net` and tests.

`python tests/hostile.py NAME HOST:PORT STRANGERS SECONDS [SESSION TOKEN]` attacks a server
on this machine, and ends by itself.
"""

import contextlib
import itertools
import selectors
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from curvd.http2 import frames
from curvd.http2.frames import RECOGNISED, Code, Kind, Setting

GREETING = frames.PREFACE + frames.settings({Setting.DIRECT: 1})
PREFIX = "/curvd.v1.CurvatureService/"
_REPEATED_BYTES = 1 << 16
_AGAIN_S = 0.5
"""Pause before a hoarder connects again."""


def headers(stream, path=PREFIX + "MatMat", *more, flags=0):
    """The beginning of a call."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    )
    block = frames.literals(fields)
    return frames.header_frames(stream, block, flags, frames.DEFAULT_LONGEST)


def repeated(frame):
    """The same frame for ever, many in one piece."""
    return itertools.repeat(frame * max(1, _REPEATED_BYTES // len(frame)))


def calls(make):
    """Calls with numbers that rise, some in one piece."""
    numbers = itertools.count(1, 2)
    while True:
        yield b"".join(make(number) for number in itertools.islice(numbers, 64))


def reset(stream):
    return frames.frame(Kind.RST_STREAM, 0, stream, frames.number(Code.CANCEL))


def _after(beginning, pieces):
    return itertools.chain([GREETING + beginning], pieces)


def _large_headers(stream):
    more = [(f"x-{i}", "v" * 500) for i in range(100)]
    return headers(stream, PREFIX + "MatMat", *more, flags=frames.END_STREAM)


def _unfinished_block():
    begun = frames.frame(Kind.HEADERS, 0, 1, bytes(100))
    return begun + frames.frame(Kind.CONTINUATION, 0, 1, bytes(16000)) * 3


def _provoked(stream):
    """What has to be answered by a reset."""
    return headers(stream) + frames.frame(
        Kind.WINDOW_UPDATE, 0, stream, frames.number(0)
    )


_FOREIGN = frames.PREFACE + frames.settings({})
_REMEMBERED = frames.frame(Kind.HEADERS, 5, 1, b"\x40\x01x\x7f\xa1\x1e" + bytes(4000))
"""A field of 4,000 bytes; from now on one byte stands for it."""


def _bomb(stream, flags=5):
    """Headers that are a thousand times as long as they look."""
    block = frames.literals(((":method", "POST"), (":path", PREFIX + "MatMat")))
    return frames.frame(Kind.HEADERS, flags, stream, block + b"\xbe" * 15_000)


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "unknown frames": lambda: _after(b"", repeated(frames.frame(0xBB, 0, 0))),
    "PRIORITY": lambda: _after(
        b"", repeated(frames.frame(Kind.PRIORITY, 0, 1, bytes(5)))
    ),
    "empty CONTINUATION": lambda: _after(
        frames.frame(Kind.HEADERS, 0, 1, b""),
        repeated(frames.frame(Kind.CONTINUATION, 0, 1)),
    ),
    "empty DATA": lambda: _after(headers(1), repeated(frames.frame(Kind.DATA, 0, 1))),
    "one-byte DATA": lambda: _after(
        headers(1), repeated(frames.frame(Kind.DATA, 0, 1, b"\0"))
    ),
    "PING": lambda: _after(b"", repeated(frames.frame(Kind.PING, 0, 0, bytes(8)))),
    "PING acks": lambda: _after(
        b"", repeated(frames.frame(Kind.PING, frames.ACK, 0, bytes(8)))
    ),
    "SETTINGS": lambda: _after(b"", repeated(frames.settings({}))),
    "SETTINGS acks": lambda: _after(
        b"", repeated(frames.frame(Kind.SETTINGS, frames.ACK, 0))
    ),
    "WINDOW_UPDATE, idle": lambda: _after(
        b"", repeated(frames.frame(Kind.WINDOW_UPDATE, 0, 9, frames.number(1)))
    ),
    "WINDOW_UPDATE": lambda: _after(
        b"", repeated(frames.frame(Kind.WINDOW_UPDATE, 0, 0, frames.number(1)))
    ),
    "rapid reset": lambda: _after(b"", calls(lambda n: headers(n) + reset(n))),
    "provoked resets": lambda: _after(b"", calls(_provoked)),
    "goodbyes": lambda: _after(
        b"", repeated(frames.frame(Kind.GOAWAY, 0, 0, bytes(8)))
    ),
    "large headers": lambda: _after(b"", calls(_large_headers)),
    "calls without token": lambda: _after(
        b"", calls(lambda n: headers(n, flags=frames.END_STREAM))
    ),
    "random bytes": lambda: _after(b"", itertools.repeat(bytes(range(256)) * 256)),
    "foreign useless frames": lambda: itertools.chain(
        [_FOREIGN], repeated(frames.frame(0xBB, 0, 0))
    ),
    "foreign header bombs": lambda: itertools.chain(
        [_FOREIGN + _REMEMBERED], calls(lambda number: _bomb(number + 2))
    ),
    "greetings, byte by byte": lambda: (bytes([byte]) for byte in GREETING),
    "churn": lambda: iter([b""]),
    "churn with greetings": lambda: iter([GREETING]),
}
"""What a stranger sends, piece by piece; then the connection is closed and made anew."""

HOARDS: dict[str, bytes] = {
    "silent": b"",
    "half greetings": GREETING[:30],
    "idle": GREETING,
    "foreign idle": _FOREIGN,
    "foreign half headers": _FOREIGN + _REMEMBERED + _bomb(3, flags=0),
    "half calls": GREETING + headers(1),
    "large header blocks": GREETING + _unfinished_block(),
}
"""What a stranger sends before saying nothing more, on very many connections."""

CONTROLS = ("nobody", "a busy core")
"""What attacks no server: what does the machine do by itself?"""
TLS_FLOODS = ("handshakes", "foreign handshakes", "half handshakes")
HOARDED = 1000
"""Connections of all hoarders together."""


@dataclass(eq=False)
class Stranger:
    """One connection that is made again when it ends."""

    address: tuple[str, int]
    pieces: Callable[[], Iterator[bytes]]
    hoards: bool
    due_s: float = 0.0
    sock: socket.socket | None = None

    def connect(self):
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.connect_ex(self.address)
        self.rest, self.left = b"", self.pieces()

    def step(self):
        """Read what came, send what goes; tell whether the connection lives."""
        with contextlib.suppress(BlockingIOError):
            if not self.sock.recv(1 << 16):
                return False
        if not self.rest:
            piece = next(self.left, None)
            if piece is None:
                return self.hoards
            self.rest = piece
        with contextlib.suppress(BlockingIOError):
            self.rest = self.rest[self.sock.send(self.rest) :]
        return True


def attack(address, pieces, count, until, hoards=False):
    """Keep so many connections open, and send on all of them.

    Args:
        address: Host and port.
        pieces: Makes what one connection sends.
        count: Connections at once.
        until: Tells whether to go on.
        hoards: Whether a connection stays when all is sent.
    """
    strangers = [Stranger(address, pieces, hoards) for _ in range(count)]
    with selectors.DefaultSelector() as selector:
        while until():
            now = time.monotonic()
            for stranger in strangers:
                if stranger.sock is None and stranger.due_s <= now:
                    stranger.connect()
                    selector.register(stranger.sock, _events(stranger), stranger)
            for key, _ in selector.select(0.05):
                stranger = key.data
                try:
                    lives = stranger.step()
                except OSError:
                    lives = False
                if not lives:
                    selector.unregister(stranger.sock)
                    stranger.sock.close()
                    stranger.sock = None
                    stranger.due_s = now + (_AGAIN_S if hoards else 0.0)
                elif hoards and not stranger.rest:
                    selector.modify(stranger.sock, selectors.EVENT_READ, stranger)
        for stranger in strangers:
            if stranger.sock is not None:
                stranger.sock.close()


def _events(stranger):
    return selectors.EVENT_READ | selectors.EVENT_WRITE


def shake_hands(address, until, *, protocols, whole):
    """Make one encrypted connection after the other.

    Args:
        address: Host and port.
        until: Tells whether to go on.
        protocols: What is offered (ALPN).
        whole: Whether handshakes are finished.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(protocols)
    while until():
        with contextlib.suppress(OSError):
            with socket.create_connection(address, 2) as sock:
                if whole:
                    context.wrap_socket(sock, server_hostname="localhost").close()
                    continue
                sent = ssl.MemoryBIO()
                half = context.wrap_bio(ssl.MemoryBIO(), sent)
                with contextlib.suppress(ssl.SSLWantReadError):
                    half.do_handshake()
                sock.sendall(sent.read())
                sock.recv(1)


def main(name, target, strangers, seconds):
    """Attack for so many seconds."""
    host, _, port = target.rpartition(":")
    address, end_s = (host, int(port)), time.monotonic() + float(seconds)
    until = lambda: time.monotonic() < end_s  # noqa: E731
    if name == "nobody":
        time.sleep(float(seconds))
    elif name == "a busy core":
        while until():
            pass
    elif name in FLOODS:
        attack(address, FLOODS[name], int(strangers), until)
    elif name in HOARDS:
        bytes_ = HOARDS[name]
        attack(address, lambda: iter([bytes_]), HOARDED, until, hoards=True)
    else:
        import threading

        ours = [RECOGNISED, "h2"]
        settings = {
            "handshakes": {"protocols": ours, "whole": True},
            "foreign handshakes": {"protocols": ["h2"], "whole": True},
            "half handshakes": {"protocols": ours, "whole": False},
        }[name]
        threads = [
            threading.Thread(target=shake_hands, args=(address, until), kwargs=settings)
            for _ in range(int(strangers))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
