"""Our client against a server on python-hyper's h2."""

import h2_peers
import numpy as np
import pytest

from curvd._transport.direct import DirectChannel
from curvd.config import ClientConfig
from curvd.contract.rpcs import RPCS

MATVEC = RPCS["MatVec"]


@pytest.fixture(params=[(65535, None), (300, None), (5000, 7)], ids=str)
def echo(request):
    window, padding = request.param
    server = h2_peers.Echo(window=window, padding=padding)
    yield server
    server.close()


def nowhere(nbytes):
    return None


@pytest.mark.parametrize("sizes", [[], [0], [10, 5000, 1], [150_000, 30_000]], ids=str)
def test_what_is_sent_comes_back(echo, sizes):
    rng = np.random.default_rng(0)
    sent = [memoryview(rng.bytes(size)) for size in sizes]
    channel = DirectChannel(echo.target, ClientConfig())
    for _ in range(3):
        parts = iter([memoryview(b"first"), *sent])
        came = list(channel.call(MATVEC, parts, nowhere, 30.0))
        assert came == [b"first", *sent]
    channel.close()
    echo.close()
    assert echo.calls == 3
