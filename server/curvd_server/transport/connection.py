"""One connection of a client of ours, on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterable

from curvd.http2 import (
    Code,
    H2Connection,
    Headers,
    ProtocolError,
    Stream,
)
from curvd_server.system import logger
from curvd_server.transport.allowance import Allowance
from curvd_server.transport.callers import authentication_of
from curvd_server.transport.limits import ConnectionLimits
from curvd_server.transport.upload_scheduler import UploadScheduler

_MOST_PARTS = 64
"""Parts that wait for their call; a client that sends more is not read."""
_LARGE_BYTES = 1 << 20
"""Bytes from which on a request has to wait for its turn."""
_CALL_S = 4e-4
"""What a call costs the event loop that comes to nothing."""
_MOST_FAILURES = 8
"""Calls without success, beyond those with, that a trusted client may make."""


class ServerConnection:
    """Moves bytes whenever the socket is ready, and wakes the calls that wait.

    Args:
        sock: Connected, non-blocking; TLS already spoken.
        peer: Who calls, as gRPC writes it.
        begin: Called with this and a stream whose headers came; gives the call's task.
        uploads: Say whose large request is read first.
        allowance: When it is read, as long as nobody vouches for the client.
        header_bytes: Bytes of the headers of one call.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        begin: Callable[[ServerConnection, Stream], asyncio.Task[None]],
        uploads: UploadScheduler,
        allowance: Allowance,
        header_bytes: int,
    ) -> None:
        self.peer, self._begin, self._uploads = peer, begin, uploads
        certificate = sock.getpeercert() if isinstance(sock, ssl.SSLSocket) else None
        self.authentication = authentication_of(certificate or {})
        """The names in the client's certificate, as grpcio writes them."""
        self._allowance = allowance
        self._loop = asyncio.get_running_loop()
        self._h2 = H2Connection(
            sock, client=False, accept=self._accept, header_bytes=header_bytes
        )
        self._task: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._reads = self._writes = self._is_going_away = self._is_coming_back = False
        self._before = 0  # bytes received before the request
        self._queued = False  # once for each request
        self.vouched = self._rests = False
        """Whether a call of the client was ever let through."""
        self._failures = 0
        self._idle_since = self._loop.time()
        self.failure: ProtocolError | None = None
        """What the client did wrong, if that ended the connection."""
        self.owner = ""
        """Name of whose it is, once a call has told."""
        self.left: Callable[[ServerConnection], None] = lambda connection: None
        """Called when it is closed."""
        self.gone = asyncio.Event()
        """Set when the connection is closed."""
        self._watch()
        self._flush()

    @property
    def bytes_received(self) -> int:
        """Bytes that came."""
        return self._h2.bytes_received

    @property
    def longest_chunk(self) -> int:
        """Bytes of a chunk that the client takes in one message; 0: it did not say."""
        return self._h2.longest_chunk

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._task is not None and not self._task.done()

    @property
    def calls(self) -> int:
        """How many calls are under way."""
        return int(self.busy) + len(self._ending)

    def vouch(self) -> None:
        """Trust the client: its call was let through."""
        self.vouched = True

    def distrust(self) -> None:
        """Treat the client as a stranger again, until another call of it is let through.

        What it sends is read in the time that strangers have, it makes room for others,
        and is closed if nothing comes of it.
        """
        self.vouched = False

    def concluded(self, *, success: bool) -> None:
        """Take note that a call is over."""
        self._idle_since = self._loop.time()
        self._failures = max(0, self._failures + (-1 if success else 1))

    def overdue(self, now: float, limits: ConnectionLimits) -> str | None:
        """Tell whether the client should have called by now.

        Args:
            now: Time of the event loop.
            limits: How long it may take.

        Returns:
            A word for what it missed.
        """
        quiet_s = now - self._idle_since
        if self.busy or self.gone.is_set():
            return None
        if not self.vouched:
            return "greeting" if quiet_s > limits.greeting_s else None
        return "idle" if quiet_s > limits.idle_connection_s else None

    def resume(self) -> None:
        """Read again, if nothing else is in the way."""
        self._watch()

    @property
    def is_ending_calls(self) -> bool:
        """Whether calls that were cancelled still run."""
        return bool(self._ending)

    async def ended_calls(self) -> None:
        """Wait for them: a connection has one call at a time, however many it resets."""
        while self._ending:
            await asyncio.wait(set(self._ending))

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait for what only the other side can bring about.

        Args:
            ready: Whether it is so. It is asked when something came or went, so that
                nobody is woken for a part of a part; true when the connection is gone.
        """
        while not ready():
            future = self._loop.create_future()
            self._waiting.append((ready, future))
            await future

    async def send(
        self,
        stream: Stream,
        headers: Headers,
        views: Iterable[memoryview] = (),
        trailers: Headers = (),
    ) -> None:
        """Send, and wait until the bytes are not needed any more.

        Args:
            stream: Where.
            headers: To send first, if any.
            views: The bytes.
            trailers: The status, if nothing follows.

        Raises:
            asyncio.CancelledError: If the client is gone.
        """
        if not self.send_soon(stream, headers, views, trailers):
            await self.sent(stream)

    def send_soon(
        self,
        stream: Stream,
        headers: Headers,
        views: Iterable[memoryview] = (),
        trailers: Headers = (),
    ) -> bool:
        """Send without waiting; what the client does not take now goes out as it reads.

        Args:
            stream: Where.
            headers: To send first, if any.
            views: The bytes.
            trailers: The status, if nothing follows.

        Returns:
            Whether all of it is out; else `sent` waits for the rest.
        """
        if headers:
            self._h2.send_headers(stream, headers)
        self._h2.send_data(stream, views)
        if trailers:
            self._h2.send_headers(stream, trailers, end=True)
        self._flush()
        return not self.is_lost(stream) and self._is_sent(stream)

    async def sent(self, stream: Stream) -> None:
        """Wait until the bytes that were given to a stream are not needed any more.

        Args:
            stream: The stream.

        Raises:
            asyncio.CancelledError: If the client is gone.
        """
        await self.until(lambda: self._is_sent(stream))
        if self.is_lost(stream):
            raise asyncio.CancelledError

    def finish(self, stream: Stream, trailers: Headers) -> None:
        """End a call; it goes out as the client reads.

        Args:
            stream: Where.
            trailers: The status.
        """
        if self.gone.is_set() or stream.reset_code is not None:
            return
        self._h2.send_headers(stream, trailers, end=True)
        if not stream.ended:
            self._h2.reset(stream, Code.NO_ERROR)
        stream.reader = None
        stream.inbox.clear()
        self._uploads.leave(self)
        self._flush()

    def is_lost(self, stream: Stream) -> bool:
        """Whether nobody waits for an answer any more."""
        return stream.reset_code is not None or self.gone.is_set()

    def acknowledge(self, stream: Stream, nbytes: int) -> None:
        """Let the client send more."""
        self._h2.acknowledge(stream, nbytes)
        self._watch()
        self._flush()

    def goaway(self) -> None:
        """Tell the client to make its next call elsewhere; close if it makes none."""
        if self.gone.is_set():
            return
        with contextlib.suppress(ProtocolError):
            self._h2.goaway()
        self._is_going_away = True
        self._flush()

    def close(self) -> None:
        """Close the connection; a call under way is cancelled."""
        if self.gone.is_set():
            return
        self.gone.set()
        self.left(self)
        self._uploads.leave(self)
        self._watch()
        self._h2.sock.close()
        if self._task is not None:
            self._task.cancel()
        self._wake()

    def _accept(self, stream: Stream) -> None:
        if not self._trusted:
            self._allowance.spend(_CALL_S)
        self._before, self._queued = self._h2.bytes_received, False
        self._task = task = self._begin(self, stream)
        stream.on_reset = lambda: self._cancel(task)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel a call at once: the next one may come with the same bytes."""
        task.cancel()
        if not task.done():
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _is_sent(self, stream: Stream) -> bool:
        return self.is_lost(stream) or not (stream.outbox or self._writes)

    @property
    def _trusted(self) -> bool:
        return self.vouched and self._failures <= _MOST_FAILURES

    def _readable(self) -> None:
        if self._trusted:
            self._read()
        elif not self._allowance.spent:
            with self._allowance.charged():
                self._read()
        elif not self._rests:
            self._rests = True
            self._watch()
            self._allowance.wait(self._rested)

    def _rested(self) -> None:
        self._rests = False
        if not self.gone.is_set():
            with self._allowance.charged():
                self._read()

    def _read(self) -> None:
        try:
            self._h2.pull()
        except (ProtocolError, OSError) as error:
            self._break(error)
            return
        except Exception as error:
            logger().exception("defect", peer=self.peer)
            self._break(error)
            return
        self._queue(self._h2.stream)
        self._watch()
        self._flush()
        self._wake()

    def _queue(self, stream: Stream | None) -> None:
        """Wait for a turn if there is much to read, and go when nothing is."""
        if stream is None or stream.ended or stream.reader is None:
            self._uploads.leave(self)
        elif not self._queued and self.bytes_received - self._before > _LARGE_BYTES:
            self._queued = True
            self._uploads.join(self)

    def _come_back(self) -> None:
        """Read on after the other connections, although the socket shows nothing."""
        if self._h2.more and self._reads and not self._is_coming_back:
            self._is_coming_back = True
            self._loop.call_soon(self._again)

    def _again(self) -> None:
        self._is_coming_back = False
        if self._reads:
            self._readable()

    def _writable(self) -> None:
        self._flush()
        self._wake()

    def _flush(self) -> None:
        if self.gone.is_set():
            return
        try:
            blocked = not self._h2.push()
        except OSError as error:
            self._break(error)
            return
        if blocked is not self._writes:
            self._writes = blocked
            if blocked:
                self._loop.add_writer(self._h2.sock, self._writable)
            else:
                self._loop.remove_writer(self._h2.sock)
        stream = self._h2.stream
        if self._is_going_away and not blocked and (stream is None or stream.over):
            self.close()

    def _watch(self) -> None:
        """Read as long as there is somebody to read for."""
        stream = self._h2.stream
        full = stream is not None and len(stream.inbox) > _MOST_PARTS
        paused = full or self._rests or self._uploads.waits(self)
        reads = not (paused or self.gone.is_set())
        if reads is not self._reads:
            self._reads = reads
            if reads:
                self._loop.add_reader(self._h2.sock, self._readable)
            else:
                self._loop.remove_reader(self._h2.sock)
        self._come_back()
        if self.gone.is_set() and self._writes:
            self._writes = False
            self._loop.remove_writer(self._h2.sock)

    def _break(self, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            left = self._is_going_away or error.code is Code.NO_ERROR
            self.failure = None if left else error
            with contextlib.suppress(ProtocolError, OSError):
                self._h2.goaway(error.code)
                self._h2.push()
        self.close()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for ready, future in waiting:
            if future.done():  # whoever waited was cancelled
                continue
            if ready():
                future.set_result(None)
            else:
                self._waiting.append((ready, future))
