"""The asyncio client: the names and signatures of `curvd.remote`, with ``await``.

    async with curvd.aio.connect("127.0.0.1:50551") as client:
        session = await client.session("…")
        H = session.hessian()
        product = await (H @ v)

A client belongs to the event loop of its first call. Cancelling a task cancels its work
on the server. Imports what `curvd.remote` has for both clients; calls and transport as
that does.
"""

from __future__ import annotations

from curvd.aio.client import AsyncClient, connect
from curvd.aio.operator import AsyncOperator
from curvd.aio.session import AsyncSession

__all__ = ["AsyncClient", "AsyncOperator", "AsyncSession", "connect"]
