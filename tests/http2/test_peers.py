"""Peers that share no line with ours: python-hyper's h2, and nghttp2's programs."""

import re
import shutil
import subprocess

import h2_peers
import numpy as np
import pytest
import raw
from support.served import server

from curvd.contract.rpcs import RPCS
from curvd.http2.messages import framed

pytestmark = pytest.mark.usefixtures("answers")
INFO = "/curvd.v1.SessionService/GetServerInfo"
EMPTY = bytes(5)


@pytest.fixture
def target(tmp_path):
    """Where a server is, and a session on it."""
    with server(tmp_path / "data") as channel:
        session = raw.fake_session(channel)
        yield channel.target, session


def product(session):
    """The bytes of a request, a vector in three pieces."""
    data = raw.file_of({"v": np.arange(5.0)})
    header, file = raw.product("MatVec", session.id, data)
    parts = [header, file[:20], file[20:90], file[90:]]
    return b"".join(v for part in parts for v in framed(RPCS["MatVec"].request, part))


def messages(data):
    """The messages in the data of an answer."""
    while data:
        end = 5 + int.from_bytes(data[1:5], "big")
        yield RPCS["MatVec"].response.load(data[5:end])
        data = data[end:]


@pytest.mark.parametrize(("window", "padding"), [(65535, None), (40, None), (1000, 20)])
def test_h2_gets_a_product_whatever_its_windows(answers, target, window, padding):
    if padding and answers != "direct":
        pytest.skip("grpcio does not understand padded data")
    where, session = target
    with h2_peers.Client(where, window=window, padding=padding) as client:
        for _ in range(10):
            stream = client.begin(RPCS["MatVec"].path, product(session))
            data, status = client.results(1)
            assert status == {stream: "0"}
            _, result, _ = raw.joined(list(messages(data[stream])))
            np.testing.assert_array_equal(result, 5 * np.arange(5.0))


def test_h2_may_reset_calls_and_go_on(target):
    where, session = target
    with h2_peers.Client(where) as client:
        for _ in range(50):
            stream = client.begin(RPCS["MatVec"].path, product(session)[:-10])
            client.connection.reset_stream(stream, 8)
            client.flush()
        stream = client.begin(INFO, EMPTY)
        _, status = client.results(1)
        assert status.get(stream) == "0"


def test_of_many_calls_at_once_each_is_answered_or_refused(target):
    where, _ = target
    with h2_peers.Client(where) as client:
        streams = [client.begin(INFO, EMPTY) for _ in range(20)]
        _, status = client.results(20)
        assert set(status) == set(streams) and status[streams[0]] == "0"
        assert set(status.values()) <= {"0", "reset 7"}  # REFUSED_STREAM: not begun


def run(program, *arguments):
    """Run one of nghttp2's programs; what it says."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: nghttp2-client)")
    done = subprocess.run(
        [program, *arguments], capture_output=True, timeout=60, check=True
    )
    return done.stdout.decode("utf-8", "replace")


@pytest.fixture
def body(tmp_path):
    path = tmp_path / "body"
    path.write_bytes(EMPTY)
    return path


HEADERS = ("-Hcontent-type: application/grpc", "-Hte: trailers")


@pytest.mark.parametrize("window", ["16", "5"])
def test_nghttp_gets_an_answer(target, body, window):
    url = f"http://{target[0]}{INFO}"
    said = run("nghttp", "-v", f"-w{window}", f"-d{body}", *HEADERS, url)
    assert "grpc-status: 0" in said
    codes = re.findall(r"error_code=(\w+)", said)
    assert set(codes) <= {"NO_ERROR"}, said


@pytest.mark.parametrize("at_once", ["1", "10"])
def test_h2load_loses_no_call(answers, target, body, at_once):
    if answers == "direct" and at_once != "1":
        pytest.skip("h2load does not wait to be told that one call at once is allowed")
    url = f"http://{target[0]}{INFO}"
    said = run("h2load", "-n200", "-c4", f"-m{at_once}", f"-d{body}", *HEADERS, url)
    assert "200 succeeded, 0 failed, 0 errored, 0 timeout" in said
    assert "status codes: 200 2xx" in said
