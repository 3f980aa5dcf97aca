"""Echo peers for bench/wire.py: raw TCP, Arrow Flight and a bare grpcio unary call.

    python bench/peers.py raw|flight|unary

prints the port it listens on. The allocator is tuned by the environment that the
bench sets, so that Flight is measured with the default and with the tuned one.
"""

from __future__ import annotations

import socket
import sys
import threading

import numpy as np


def recv_into(connection: socket.socket, view: memoryview) -> None:
    """Fill a buffer."""
    while view.nbytes:
        got = connection.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]


def serve_raw() -> None:
    """Store and answer, one connection, buffers kept."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffers: dict[int, memoryview] = {}
    size = memoryview(bytearray(8))
    while True:
        try:
            recv_into(connection, size)
        except (EOFError, ConnectionError):
            return
        n = int.from_bytes(size, "little")
        if n not in buffers:
            buffers[n] = memoryview(np.zeros(n, np.uint8))
        recv_into(connection, buffers[n])
        connection.sendall(buffers[n])


class RawClient:
    """The other end of `serve_raw`."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def echo(self, source: np.ndarray, target: np.ndarray) -> None:
        """Send [P], receive [P] in place."""
        view = memoryview(source).cast("B")
        self._socket.sendall(view.nbytes.to_bytes(8, "little"))
        self._socket.sendall(view)
        recv_into(self._socket, memoryview(target).cast("B"))


def serve_flight() -> None:
    """Store and answer over DoExchange, 1 MiB record batches."""
    from pyarrow import flight

    class Echo(flight.FlightServerBase):
        def do_exchange(self, context, descriptor, reader, writer):
            size = int(descriptor.command)
            stored, filled = _stored(size), 0
            for chunk in reader:
                part = chunk.data.column(0).to_numpy()
                stored[filled : filled + len(part)] = part
                filled += len(part)
            _write(writer, stored)

    server = Echo("grpc://127.0.0.1:0")
    print(server.port, flush=True)
    server.serve()


class FlightClient:
    """The other end of `serve_flight`."""

    def __init__(self, port: int) -> None:
        from pyarrow import flight

        self._flight = flight
        self._client = flight.connect(f"grpc://127.0.0.1:{port}")

    def echo(self, source: np.ndarray, target: np.ndarray) -> None:
        """Send [P], receive [P] in place."""
        descriptor = self._flight.FlightDescriptor.for_command(
            str(source.size).encode()
        )
        writer, reader = self._client.do_exchange(descriptor)
        with writer:
            sender = threading.Thread(
                target=lambda: (_write(writer, source), writer.done_writing())
            )
            sender.start()
            filled = 0
            for chunk in reader:
                part = chunk.data.column(0).to_numpy()
                target[filled : filled + len(part)] = part
                filled += len(part)
            sender.join()


_PATH = "/echo.Echo/Echo"


def serve_unary() -> None:
    """Answer a gRPC call of bytes with the same bytes; nothing else."""
    import asyncio

    import grpc.aio

    async def echo(request, context):
        return request

    async def serve():
        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(echo)
        server.add_generic_rpc_handlers((
            grpc.method_handlers_generic_handler("echo.Echo", {"Echo": handler}),
        ))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(port, flush=True)
        await server.wait_for_termination()

    asyncio.run(serve())


class UnaryClient:
    """The other end of `serve_unary`."""

    def __init__(self, port: int) -> None:
        import grpc

        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._echo = self._channel.unary_unary(_PATH)

    def echo(self, source: np.ndarray, target: np.ndarray) -> None:
        """Send [P], receive [P]."""
        target[:] = np.frombuffer(self._echo(source.tobytes()), source.dtype)


_buffers: dict[int, np.ndarray] = {}


def _stored(size: int) -> np.ndarray:
    if size not in _buffers:
        _buffers[size] = np.zeros(size, np.float32)
    return _buffers[size]


def _write(writer, array: np.ndarray, rows: int = 1 << 18) -> None:
    import pyarrow as pa

    writer.begin(pa.schema([("v", pa.float32())]))
    for start in range(0, array.size, rows):
        part = pa.array(array[start : start + rows])
        writer.write_batch(pa.record_batch([part], names=["v"]))


if __name__ == "__main__":
    from curvd.tensors import tune_allocator

    if sys.argv[1] == "unary":
        tune_allocator()
    {"raw": serve_raw, "flight": serve_flight, "unary": serve_unary}[sys.argv[1]]()
