"""Servers that misbehave: the caller gets a typed error that says what was wrong."""

import contextlib
import socket
import threading

import http2_cases as h2
import pytest

from curvd._transport.direct import DirectChannel
from curvd.config import ClientConfig
from curvd.contract.rpcs import RPCS
from curvd.contract.statuses import RpcError


class Server:
    """Answers one call with given bytes, and remembers what the client says to them."""

    def __init__(self, data):
        self._data, self.heard = data, b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        sock, _ = self._listener.accept()
        with sock, contextlib.suppress(ConnectionError):
            sock.settimeout(20)
            while not self._asked():
                self.heard += sock.recv(1 << 16)
            sock.sendall(self._data)
            sock.shutdown(socket.SHUT_WR)
            while more := sock.recv(1 << 16):
                self.heard += more

    def _asked(self):
        return any(kind == h2.DATA and flags & 1 for kind, flags, _, _ in self.frames())

    def frames(self):
        """What the client sent."""
        data = self.heard[len(h2.PREFACE) :]
        while len(data) >= 9:
            end = 9 + int.from_bytes(data[:3], "big")
            yield data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end]
            data = data[end:]

    def reaction(self):
        """What the client said against the answer."""
        self._listener.close()
        self._thread.join(20)
        for kind, _, _, payload in self.frames():
            if kind == h2.GOAWAY:
                return f"goaway {h2.CODES[int.from_bytes(payload[4:8], 'big')]}"
            if kind == h2.RST_STREAM:
                return f"reset {h2.CODES[int.from_bytes(payload, 'big')]}"
        return h2.NOTHING


def ask(target):
    """Make a call; the code with which it ended, and why."""
    channel, rpc = DirectChannel(target, ClientConfig()), RPCS["GetServerInfo"]
    try:
        parts = iter([rpc.request.message()])
        list(channel.call(rpc, parts, lambda nbytes: None, 20.0))
    except RpcError as error:
        return error.code.name, str(error)
    finally:
        channel.close()
    return "OK", ""


@pytest.mark.parametrize("case", h2.SERVER_CASES, ids=lambda case: case.name)
def test_a_server_that_misbehaves_is_told_and_the_caller_knows_why(case):
    server = Server(h2.frame(h2.SETTINGS) + case.data)
    code, why = ask(server.target)
    assert (code, server.reaction()) == (case.code, case.reaction)
    assert case.match in why


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (h2.GOOD, "the first frame is no SETTINGS: this is not HTTP/2"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the peer speaks HTTP/1, not HTTP/2"),
    ],
)
def test_a_server_that_begins_without_settings_does_not_speak_http2(data, match):
    server = Server(data)
    assert ask(server.target) == ("UNAVAILABLE", match)
    assert server.reaction() == h2.PROTOCOL
