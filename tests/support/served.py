"""A real server on a fake device, and bare stubs of it."""

import contextlib

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.fake_device import FakeDevice

from curvd.contract.rpcs import RPCS
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextlib.contextmanager
def server(tmp_path, device=None, **options):
    """A real server on a fake device, and a channel to it."""
    options = {"listen": "127.0.0.1:0", "drain_s": 0.0, "data_dir": tmp_path} | options
    device = device or FakeDevice()
    with (
        serve_in_thread(ServerConfig(**options), device=device) as target,
        Channels(target) as channels,
    ):
        yield channels


class Channels(contextlib.ExitStack):
    """A channel whose methods have a connection each, as our own clients' calls have."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def __getattr__(self, shape):
        own = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.insecure_channel(self.target, own)
        return getattr(self.enter_context(channel), shape)


class As:
    """Channels that bring a token."""

    def __init__(self, channels, token):
        self._channels = channels
        self._metadata = (("authorization", f"Bearer {token}"),)

    def __getattr__(self, shape):
        def stub(*args):
            method = getattr(self._channels, shape)(*args)
            return lambda request, *, timeout, metadata: method(
                request, timeout=timeout, metadata=self._metadata
            )

        return stub


def healthy(channel, service=""):
    """What the health service says."""
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(
        health_pb2.HealthCheckRequest(service=service), timeout=300
    ).status


def stub(channel, name):
    """A bare stub."""
    rpc = RPCS[name]
    return getattr(channel, rpc.shape)(rpc.path, rpc.request.dump, rpc.response.load)
