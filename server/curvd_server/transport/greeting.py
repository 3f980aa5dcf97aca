"""The beginning of a connection: waiting until it says who calls, and encrypting it."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import time
from concurrent.futures import Executor

from curvd_server.transport.allowance import Allowance
from curvd_server.transport.detect import ENOUGH_BYTES, bytes_needed, is_ours
from curvd_server.transport.readiness import readable, writable

_LOOK_S = 0.01
"""First pause before looking again at a greeting that is cut; each is twice as long."""

_STEP_S = 1e-4
"""What a step of a handshake costs the event loop, beside its computation."""


async def recognised(sock: socket.socket, *, tls: bool) -> bool:
    """Wait until it can be told whether a client of ours calls; nothing is consumed.

    Args:
        sock: Connected, non-blocking.
        tls: Whether it is going to be encrypted.

    Returns:
        Whether one does.

    Raises:
        OSError: If the connection is gone.
    """
    came, pause_s = 0, _LOOK_S
    try:
        while True:
            await readable(sock)
            beginning = sock.recv(ENOUGH_BYTES, socket.MSG_PEEK)
            if not beginning:
                msg = "the connection was closed"
                raise ConnectionError(msg)
            ours = is_ours(beginning, tls=tls)
            if ours is not None:
                return ours
            if _has_ended(sock):
                msg = "the connection was closed within its greeting"
                raise ConnectionError(msg)
            if len(beginning) == came:  # Unix sockets wake us for what we saw
                await asyncio.sleep(pause_s)
                pause_s *= 2
            came = len(beginning)
            # The kernel wakes us when there is something new to be told.
            needed = bytes_needed(beginning, tls=tls)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, needed)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _has_ended(sock: socket.socket) -> bool:
    """Tell whether nothing more will come, although not all was read."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


async def encrypted(
    sock: socket.socket, context: ssl.SSLContext, allowance: Allowance, worker: Executor
) -> ssl.SSLSocket:
    """Agree on keys, which is a millisecond or two of computation for each connection.

    Args:
        sock: Non-blocking; the result takes its place.
        context: Settings.
        allowance: Says when, and is told how long it took.
        worker: Computes off the event loop.

    Returns:
        The encrypted socket.

    Raises:
        OSError: If the connection is gone, or no keys can be agreed on.
    """
    tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    try:
        while True:
            await allowance.turn()
            step = asyncio.get_running_loop().run_in_executor(worker, _shaken, tls)
            try:
                outcome, seconds = await asyncio.shield(step)
            except asyncio.CancelledError:
                # The descriptor must not be closed, and used by another connection,
                # while the step writes to it.
                await asyncio.wait([step])
                raise
            allowance.spend(seconds + _STEP_S)
            if outcome is None:
                return tls
            if isinstance(outcome, ssl.SSLWantReadError):
                await readable(tls)
            elif isinstance(outcome, ssl.SSLWantWriteError):
                await writable(tls)
            else:
                raise outcome
    except BaseException:
        tls.close()
        raise


def _shaken(tls: ssl.SSLSocket) -> tuple[OSError | None, float]:
    """Go on with a handshake; tell what is in its way, and how long it computed."""
    start_s, outcome = time.thread_time(), None
    try:
        tls.do_handshake()
    except OSError as error:
        outcome = error
    return outcome, time.thread_time() - start_s
