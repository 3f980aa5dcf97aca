"""Waiting for a socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any


async def readable(sock: socket.socket) -> None:
    """Wait until there is something to read, or the end of it."""
    loop = asyncio.get_running_loop()
    await _ready(sock, loop.add_reader, loop.remove_reader)


async def writable(sock: socket.socket) -> None:
    """Wait until there is room to write."""
    loop = asyncio.get_running_loop()
    await _ready(sock, loop.add_writer, loop.remove_writer)


async def _ready(
    sock: socket.socket, add: Callable[..., Any], remove: Callable[..., Any]
) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    add(sock, wake)
    try:
        await future
    finally:
        remove(sock)
