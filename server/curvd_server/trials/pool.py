"""Models of strangers are tried in processes of their own, bounded in time and memory.

A graph that is hostile takes seconds of Python and gigabytes even without a single
value, and so do a thousand layers; in this process that would hold up every answer. A
child has one processor's time and memory of its own, and is ended when its caller leaves.
What comes back is JSON.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from typing import Any

from curvd.contract import SerializedGraph, TensorInfo
from curvd.errors import BY_REASON, Internal, LimitExceeded, Overloaded
from curvd_server.storage import Architecture
from curvd_server.system import Quotas, uninterrupted
from curvd_server.system.quotas import TRIAL_SECONDS
from curvd_server.trials import nursery
from curvd_server.trials.nursery import LENGTH

AT_ONCE = 2
"""Children at once."""
WAITING = 8
"""Trials of one peer that wait for a child; further ones are turned away."""
SECONDS = 22
"""Of a processor, for one child; a little more than a graph may take (`dryrun`)."""
WALL_S = 120.0
"""For one child, however busy the machine is."""
BYTES = 1 << 30
"""Memory of one child, beyond what it starts with."""
_ANSWER_BYTES = 64 << 20
KNOWN_TENSORS = 20_000
"""Of all models together whose trials are remembered; a trial counts as one at least."""
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH")

PEER: ContextVar[str] = ContextVar("peer", default="")
"""Host of the call under way; calls that came over grpcio have none in common."""


class Trials:
    """Tries models for one server.

    Args:
        quotas: How long those of one caller may be tried in an hour.
    """

    def __init__(self, quotas: Quotas | None = None) -> None:
        self._free, self._quotas = AT_ONCE, quotas or Quotas()
        # What came of what was sent to a child, the latest used last. No refusal: the same
        # model may fit into the time or memory of another day.
        self._known: OrderedDict[bytes, Architecture | None] = OrderedDict()
        # Whose turn it is comes first.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def of(
        self,
        model: SerializedGraph,
        loss: SerializedGraph,
        *,
        rows: int,
        limit_bytes: int,
    ) -> Architecture | None:
        """Check graphs, and run them without memory; see `graph.trial.try_graphs`.

        Cancelling ends the child.

        Args:
            model: A model; may be empty.
            loss: A loss; may be empty.
            rows: Data points of a mini-batch.
            limit_bytes: Memory that values which are needed at the same time may have.

        Returns:
            The tensors of the model's state, if there is a model.

        Raises:
            InvalidGraph: If a graph is not sound.
            LimitExceeded: If it needs too much memory or time, to run or to try.
            Overloaded: If the same peer has too many trials waiting.
        """
        if not model and not loss:
            return None
        task = {"rows": rows, "limit_bytes": limit_bytes}
        return await self._run(task, model, loss)

    async def of_builder(
        self, builder: str, config: Mapping[str, Any]
    ) -> Architecture | None:
        """Find out what a builder of ours makes; see `graph.trial.try_builder`.

        Args:
            builder: One of `builders.BUILDERS`.
            config: The config that a client gave.

        Returns:
            The tensors of the model's state.

        Raises:
            InvalidSpec: If the builder refuses the configuration.
            LimitExceeded: If it takes too much memory or time.
            Overloaded: If the same peer has too many trials waiting.
        """
        return await self._run({"builder": builder, "config": dict(config)})

    async def _run(
        self, task: Mapping[str, Any], model: bytes = b"", loss: bytes = b""
    ) -> Architecture | None:
        whole = {"builder": "", "seconds": SECONDS, "bytes": BYTES, **task}
        parts = (json.dumps(whole).encode(), model, loss)
        request = b"".join(LENGTH.pack(len(p)) + p for p in parts)
        key = hashlib.sha256(request).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        self._quotas.check_spent(TRIAL_SECONDS)
        async with self._slot(PEER.get()):
            found = await self._tried(request)
        self._remember(key, found)
        return found

    async def _tried(self, request: bytes) -> Architecture | None:
        """Have a child work on a request, at its caller's expense."""
        start_s, spent_s = time.monotonic(), None
        try:
            answer = await _answer(request)
            spent_s = _seconds_in(answer)
            return _read(answer)
        finally:
            if spent_s is None:  # it was ended: by its own time, or with its caller
                spent_s = min(time.monotonic() - start_s, SECONDS)
            self._quotas.spend(TRIAL_SECONDS, spent_s)

    def _remember(self, key: bytes, found: Architecture | None) -> None:
        """Remember what came of a trial, and forget those that were not used for long."""
        self._known[key] = found
        while sum(map(_size, self._known.values())) > KNOWN_TENSORS:
            self._known.popitem(last=False)

    @contextlib.asynccontextmanager
    async def _slot(self, peer: str) -> AsyncIterator[None]:
        """Wait for a free child; peers take turns."""
        if self._free:
            self._free -= 1
        else:
            queue = self._waiting.setdefault(peer, deque())
            if len(queue) >= WAITING:
                msg = (
                    f"{len(queue)} models of yours wait to be tried, which is the limit; "
                    "retry when some are done"
                )
                raise Overloaded(msg, retry_after_s=1.0, limit=WAITING)
            turn = asyncio.get_running_loop().create_future()
            queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._let_in()
                raise
        try:
            yield
        finally:
            self._let_in()

    def _let_in(self) -> None:
        """Hand a free child to whoever is next."""
        while self._waiting:
            peer, queue = next(iter(self._waiting.items()))
            turn = queue.popleft()
            del self._waiting[peer]
            if queue:
                self._waiting[peer] = queue  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


def _size(found: Architecture | None) -> int:
    return 1 if found is None else 1 + len(found.tensors)


def start() -> None:
    """Start the process that children are forked from, unless it runs.

    It imports torch on its own, so nobody waits for it but the first trial.
    """
    with _lock:
        _connection()


async def _answer(request: bytes) -> bytes:
    """Have a child work on a request; end it if the caller leaves."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            _pass_on(theirs)
        ours.setblocking(False)
        child = -1
        try:
            async with asyncio.timeout(WALL_S):
                (pid,) = LENGTH.unpack(await _exactly(loop, ours, LENGTH.size))
                with contextlib.suppress(ProcessLookupError):
                    child = os.pidfd_open(pid)
                await loop.sock_sendall(ours, request)
                (size,) = LENGTH.unpack(await _exactly(loop, ours, LENGTH.size))
                if size > _ANSWER_BYTES:
                    raise EOFError
                return await _exactly(loop, ours, size)
        except (EOFError, OSError, TimeoutError) as error:
            msg = (
                f"trying the model took more than {SECONDS} s of a processor, "
                f"{WALL_S:.0f} s in all, or {BYTES} bytes; use fewer operators or layers"
            )
            raise LimitExceeded(msg, seconds=SECONDS, bytes=BYTES) from error
        finally:
            if child >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(child, signal.SIGKILL)
                os.close(child)


async def _exactly(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, size: int
) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await loop.sock_recv(connection, min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _seconds_in(data: bytes) -> float | None:
    """Read how long a child has computed; None if it does not say."""
    try:
        return min(max(0.0, float(json.loads(data)["seconds"])), SECONDS)
    except (ValueError, TypeError, LookupError):
        return None


def _read(data: bytes) -> Architecture | None:
    """Read a child's answer, which may be anything."""
    try:
        answer: Mapping[str, Any] = json.loads(data)
        if "reason" in answer:
            refusal = BY_REASON[answer["reason"]](str(answer["message"]))
            values = answer["values"].items()
            refusal.metadata = {str(name): str(value) for name, value in values}
            raise refusal
        found = answer["found"]
        if found is None:
            return None
        tensors = {
            str(name): TensorInfo(str(name), str(dtype), tuple(map(int, shape)))
            for name, dtype, shape in found["tensors"]
        }
        ties = {str(name): str(home) for name, home in found["ties"].items()}
        buffers = frozenset(map(str, found["buffers"]))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        msg = "the process that tried the graph gave no answer that can be read"
        raise Internal(msg) from error
    return Architecture(tensors, ties, buffers)


_lock = threading.Lock()
_nursery: tuple[subprocess.Popen[bytes], socket.socket] | None = None
"""One for all servers of this process; it ends with it."""


def _pass_on(connection: socket.socket) -> None:
    """Have a child work for the other end of a connection."""
    with _lock:
        for _ in range(2):
            try:
                socket.send_fds(_connection(), [b"!"], [connection.fileno()])
            except OSError:  # it was ended: there will be a new one
                _forget()
            else:
                return
    msg = "the process that tries graphs cannot be started"
    raise Internal(msg)


def _connection() -> socket.socket:
    global _nursery
    if _nursery is not None and _nursery[0].poll() is not None:
        _forget()
    if _nursery is None:
        ours, theirs = socket.socketpair()
        kept = {n: v for n, v in os.environ.items() if n in _KEPT_VARIABLES}
        # Ctrl-C is for the server, from before the imports on.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            f"from {nursery.__name__} import main; main({theirs.fileno()})"
        )
        command = [sys.executable, "-c", code]
        with uninterrupted():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        theirs.close()
        _nursery = process, ours
        atexit.unregister(_forget)
        atexit.register(_forget)
    return _nursery[1]


def _forget() -> None:
    global _nursery
    if _nursery is not None:
        process, connection = _nursery
        connection.close()
        process.kill()
        process.wait()
    _nursery = None
