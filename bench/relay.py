"""A slow link between two ends of this machine, whose kernel has no netem."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time


class Relay:
    """A TCP relay that delays what it passes, limits its rate and counts its bytes."""

    def __init__(self, target: str, *, delay_s: float, bytes_per_s: float) -> None:
        host, _, port = target.rpartition(":")
        self._address = (host, int(port))
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._address)
                for source, sink in ((near, far), (far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    # Deep enough for the bytes in flight, so that TCP still pushes back.
                    line: queue.Queue[tuple[float, bytes]] = queue.Queue(64)
                    threading.Thread(
                        target=self._read, args=(source, line), daemon=True
                    ).start()
                    threading.Thread(
                        target=self._write, args=(sink, line), daemon=True
                    ).start()

    def _read(
        self, source: socket.socket, line: queue.Queue[tuple[float, bytes]]
    ) -> None:
        free_s = 0.0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                free_s = max(free_s, time.monotonic()) + len(data) / self._bytes_per_s
                self.bytes += len(data)
                line.put((free_s + self._delay_s, data))
        line.put((0.0, b""))

    def _write(
        self, sink: socket.socket, line: queue.Queue[tuple[float, bytes]]
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                due_s, data = line.get()
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                time.sleep(max(0.0, due_s - time.monotonic()))
                sink.sendall(data)
