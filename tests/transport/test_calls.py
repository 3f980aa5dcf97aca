"""Calls on our own connections: what they are refused for, and when they end."""

import asyncio
import contextlib
import socket

import grpc

from curvd.http2 import frames
from curvd.http2.frames import Code, Kind, Setting
from curvd_server.transport.allowance import Allowance
from curvd_server.transport.calls import Calls
from curvd_server.transport.connection import ServerConnection
from curvd_server.transport.drops import Drops
from curvd_server.transport.stalls import StallGuard
from curvd_server.transport.upload_scheduler import UploadScheduler

GREETING = frames.PREFACE + frames.settings({Setting.DIRECT: 1})
HEADERS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/a.B/C",
    "content-type": "application/grpc",
    "te": "trailers",
}


def call(number, **changes):
    """A call with an empty message."""
    headers = HEADERS | {k.replace("_", "-"): v for k, v in changes.items()}
    block = frames.literals(tuple(headers.items()))
    message = frames.frame(Kind.DATA, frames.END_STREAM, number, bytes(5))
    return frames.header_frames(number, block, 0, frames.DEFAULT_LONGEST) + message


def reset(number):
    return frames.frame(Kind.RST_STREAM, 0, number, frames.number(Code.CANCEL))


class Stubborn(grpc.GenericRpcHandler):
    """A method whose calls go on for a while after they were cancelled."""

    def __init__(self):
        self.begun, self.running, self.most = asyncio.Queue(), 0, 0
        self.may_end = asyncio.Event()

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self.run)

    async def run(self, request, context):
        self.begun.put_nowait(None)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await self.may_end.wait()
        finally:
            self.running -= 1
        return b""


@contextlib.asynccontextmanager
async def linked(handler):
    """A client's socket, and the connection that answers it."""
    calls = Calls([], 1 << 20, StallGuard(60.0, Drops()))
    calls.add_generic_rpc_handlers([handler])
    bare, end = socket.socketpair()
    bare.setblocking(False)
    end.setblocking(False)
    connection = ServerConnection(
        end, "a test", calls.begin, UploadScheduler(), Allowance(), 1 << 14
    )
    try:
        yield bare, connection
    finally:
        connection.close()
        bare.close()


async def heard(bare, what):
    """Read until it is there."""
    loop, data = asyncio.get_running_loop(), b""
    async with asyncio.timeout(30):
        while what not in data:
            data += await loop.sock_recv(bare, 1 << 16)
    return data


async def test_the_next_call_waits_for_the_end_of_one_that_was_reset():
    handler = Stubborn()
    async with linked(handler) as (bare, _):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(bare, GREETING + call(1))
        await asyncio.wait_for(handler.begun.get(), 30)
        for number in range(1, 41, 2):
            ping = frames.frame(Kind.PING, 0, 0, number.to_bytes(8, "big"))
            await loop.sock_sendall(bare, reset(number) + call(number + 2) + ping)
            await heard(bare, frames.frame(Kind.PING, frames.ACK, 0, ping[-8:]))
        assert handler.begun.empty() and handler.running == 1
        handler.may_end.set()
        await asyncio.wait_for(handler.begun.get(), 30)
    assert handler.begun.empty() and handler.most == 1


class Complaining(grpc.GenericRpcHandler):
    """A method whose error message begins and ends with blanks."""

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self.run)

    async def run(self, request, context):
        await context.abort(grpc.StatusCode.ABORTED, "  a b ")


async def test_blanks_around_a_message_are_encoded():
    async with linked(Complaining()) as (bare, _):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(bare, GREETING + call(1))
        await heard(bare, b"%20%20a b%20")
