"""A process that forks one child for each model of a stranger: see `main`.

It is started afresh, so that it has no socket and no secret of the server; it imports
torch once, and sees nothing of a stranger itself. For each trial it is sent one end of
a socket, and forks. The child names itself, is sent the model, gives up most of its
rights to time and memory, answers with JSON, and ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import struct
import time
from typing import Any

from curvd.contract import SerializedGraph
from curvd.errors import CurvdError, LimitExceeded
from curvd_server.storage import Architecture

LENGTH = struct.Struct("<Q")
"""Comes before each part of what is sent; the first thing a child sends is its process
id, in the same form."""
_NICENESS = 10
_FILE_BYTES = 1 << 16
"""Libraries look for a temporary folder when they are imported."""


def main(number: int) -> None:
    """Fork a child for each socket that comes, until the server is gone.

    Args:
        number: File descriptor of the connection to the server.
    """
    import torch

    from curvd_server.engine import use_differentiable_attention
    from curvd_server.models import try_builder, try_graphs

    torch.set_num_threads(1)
    use_differentiable_attention()
    # What torch imports when it first needs it, children find there.
    torch.empty(2, device="meta").relu().softmax(0).sum()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    gc.freeze()
    control = socket.socket(fileno=number)
    while True:
        _, passed, _, _ = socket.recv_fds(control, 1, 1)
        if not passed:
            return
        with socket.socket(fileno=passed[0]) as connection:
            if os.fork():
                continue
            control.close()
            with contextlib.suppress(BaseException):
                _serve(connection, try_builder, try_graphs)
            os._exit(0)


def _serve(connection: socket.socket, try_builder: Any, try_graphs: Any) -> None:
    connection.sendall(LENGTH.pack(os.getpid()))
    task = json.loads(_received(connection))
    model, loss = (SerializedGraph(_received(connection)) for _ in range(2))
    _limit(task["seconds"], task["bytes"])
    try:
        if task["builder"]:
            found = try_builder(task["builder"], task["config"])
        else:
            found = try_graphs(
                model, loss, rows=task["rows"], limit_bytes=task["limit_bytes"]
            )
        answer: dict[str, Any] = {"found": None if found is None else _written(found)}
    except CurvdError as error:
        answer = _refusal(error)
    except MemoryError:
        msg = (
            f"trying the model takes more than {task['bytes']} bytes; use fewer operators "
            "or layers"
        )
        answer = _refusal(LimitExceeded(msg, limit=task["bytes"]))
    except RecursionError as error:
        answer = _refusal(LimitExceeded(f"the graph is nested too deeply: {error}"))
    answer["seconds"] = time.process_time()
    data = json.dumps(answer).encode()
    connection.sendall(LENGTH.pack(len(data)) + data)


def _limit(seconds: int, nbytes: int) -> None:
    """Give up the rights to more time and memory, and to large files."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, used + nbytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _received(connection: socket.socket) -> bytes:
    (size,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _written(found: Architecture) -> dict[str, Any]:
    return {
        "tensors": [[t.name, t.dtype, t.shape] for t in found.tensors.values()],
        "ties": dict(found.ties),
        "buffers": sorted(found.buffers),
    }


def _refusal(error: CurvdError) -> dict[str, Any]:
    values = dict(error.metadata)
    return {"reason": error.reason, "message": str(error), "values": values}
