"""HTTP/2 as RFC 9113 says, by both ways in: our own half, and grpcio behind the relay."""

import itertools
import socket

import hpack
import http2_cases as h2
import pytest
from support.fake_device import FakeDevice

from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig

OURS = h2.PREFACE + h2.setting(0xC52D, 1)
THEIRS = h2.PREFACE + h2.frame(h2.SETTINGS)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a server listens that nobody harms."""
    config = ServerConfig(
        listen="127.0.0.1:0", drain_s=0.0, data_dir=tmp_path_factory.mktemp("data")
    )
    with serve_in_thread(config, device=FakeDevice()) as target:
        host, _, port = target.rpartition(":")
        yield host, int(port)


def frames_of(sock):
    """The frames that come, until the connection ends."""
    data = b""
    try:
        while came := sock.recv(1 << 16):
            data += came
            while len(data) >= 9:
                end = 9 + int.from_bytes(data[:3], "big")
                if len(data) < end:
                    break
                yield data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end]
                data = data[end:]
    except ConnectionError:
        return


def reaction(address, data):
    """What follows from bytes: the first thing that is said against them."""
    pings, decoder = itertools.count(), hpack.Decoder()
    with socket.create_connection(address, timeout=300) as sock:
        sock.sendall(data + h2.frame(h2.PING, 0, 0, next(pings).to_bytes(8, "big")))
        for kind, flags, _, payload in frames_of(sock):
            if kind == h2.GOAWAY:
                return f"goaway {h2.CODES[int.from_bytes(payload[4:8], 'big')]}"
            if kind == h2.RST_STREAM and payload != bytes(4):
                return f"reset {h2.CODES[int.from_bytes(payload, 'big')]}"
            if kind == h2.HEADERS and (refused := status_of(payload, decoder)):
                return refused
            if kind == h2.PING and flags & h2.ACK:
                count = next(pings)
                if count == 3:
                    return h2.NOTHING
                sock.sendall(h2.frame(h2.PING, 0, 0, count.to_bytes(8, "big")))
    return "closed"


def status_of(block, decoder):
    """What headers refuse a call with, if they do so without gRPC."""
    status = dict(decoder.decode(block)).get(":status", "200")
    return None if status == "200" else f"status {status}"


def names(case):
    return f"{case.section} {case.name}"


@pytest.mark.parametrize("case", h2.CASES, ids=names)
def test_our_half_reacts_as_the_rfc_says(address, case):
    assert reaction(address, OURS + case.data) == case.reaction


@pytest.mark.parametrize("case", h2.CASES, ids=names)
def test_grpcio_reacts_as_it_is_known_to(address, case):
    assert h2.verdict_of(reaction(address, THEIRS + case.data)) == case.of_grpcio


def test_every_exception_names_a_case():
    names = {case.name for case in h2.CASES}
    listed = [n for _, cases in h2.GRPCIO_DIFFERS.values() for n in cases]
    assert len(names) == len(h2.CASES)
    assert set(listed) <= names and len(set(listed)) == len(listed)
