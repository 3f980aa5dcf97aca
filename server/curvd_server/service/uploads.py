"""Receiving a blob: ask first, go on from the committed offset, verify, keep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.config import LimitsConfig
from curvd_server.service.validation import check_upload
from curvd_server.storage import BlobStore, check_digest


async def receive(
    upload: session_pb.Upload,
    chunks: AsyncIterator[memoryview],
    blobs: BlobStore,
    limits: LimitsConfig,
) -> bool:
    """Take what a client sends of a blob.

    Args:
        upload: What is announced.
        chunks: The bytes from there on; none, if the client only asks.
        blobs: Where they go.
        limits: The limits of the server.

    Returns:
        Whether the blob is complete. What has arrived is kept in any case.
    """
    check_upload(upload.total_bytes, upload.offset, limits)
    if blobs.has(check_digest(upload.digest)):
        return True
    chunk = await anext(chunks, None)
    if chunk is None:
        return False
    with blobs.upload(
        upload.digest, offset=upload.offset, total_bytes=upload.total_bytes
    ) as writer:
        while chunk is not None:
            await asyncio.to_thread(writer.write, chunk)
            chunk = await anext(chunks, None)
        return await asyncio.to_thread(writer.finish)


def needed(upload: session_pb.Upload, blobs: BlobStore) -> session_pb.UploadNeeded:
    """Say from where an upload goes on.

    Args:
        upload: What was announced.
        blobs: Where it goes.

    Returns:
        The answer.

    Raises:
        LimitExceeded: If the caller has no quota for it: before he sends anything.
    """
    blobs.check_quota(upload.digest, upload.total_bytes)
    return session_pb.UploadNeeded(committed_bytes=blobs.committed_bytes(upload.digest))
