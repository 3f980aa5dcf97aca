"""UpdateParameters: values that are uploaded, parts of several ranks, or a checkpoint.

Whatever the way, the server has one safetensors file of the new values before the session
moves to them, under its SHA-256 like any upload.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Iterable

import structlog

from curvd.contract import Part
from curvd.errors import (
    CurvdError,
    FailedPrecondition,
    InvalidSpec,
    InvalidTensors,
    StateMismatch,
)
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.config import LimitsConfig
from curvd_server.service import uploads
from curvd_server.service.streams import Chunks, opened
from curvd_server.sessions import SessionStore, Update
from curvd_server.storage import (
    BlobStore,
    Checkpoints,
    Piece,
    Registry,
    StoredVersion,
    assembled,
    check_digest,
    chosen,
    pieces_of,
)


class ParameterUpdates:
    """Brings sessions to new values.

    Args:
        sessions: The sessions of the server.
        blobs: Where values go.
        registry: Says what blobs are needed for.
        limits: The limits of the server.
        checkpoints: What clients may name.
    """

    def __init__(
        self,
        sessions: SessionStore,
        blobs: BlobStore,
        registry: Registry,
        limits: LimitsConfig,
        checkpoints: Checkpoints,
    ) -> None:
        self._sessions, self._blobs = sessions, blobs
        self._checkpoints = checkpoints
        self._registry, self._limits = registry, limits

    async def update(
        self, requests: AsyncIterator[Part]
    ) -> session_pb.UpdateParametersResponse:
        """Answer one call; see the contract."""
        header, chunks = await opened(requests)
        structlog.contextvars.bind_contextvars(session=header.session_id)
        _check_source(header)
        if header.as_part:
            return await self._keep(header, chunks)
        update = _update(header)
        # Before the bytes: they may have been replaced since.
        made = await self._sessions.made_by(header.session_id, update)
        if made is None and header.parts:
            made = await self._together(header, update)
        elif made is None and header.HasField("checkpoint"):
            made = await self._read(header, update)
        elif made is None:
            made = await self._received(header, chunks, update)
            if made is None:
                return self._needed(header)
        version = session_pb.ParameterVersion(
            version=made.version, parameters_digest=made.parameters_digest
        )
        return session_pb.UpdateParametersResponse(version=version)

    async def _received(
        self, header: session_pb.UpdateParametersHeader, chunks: Chunks, update: Update
    ) -> StoredVersion | None:
        """Receive values and commit them; None if not all of them have come."""
        try:
            with self._blobs.held(update.digest):
                if await uploads.receive(
                    header.values, chunks, self._blobs, self._limits
                ):
                    return await self._sessions.update(header.session_id, update)
                return None
        except (InvalidSpec, InvalidTensors, StateMismatch):  # of no use, then or later
            await asyncio.to_thread(self._registry.release, update.digest)
            raise

    async def _keep(
        self, header: session_pb.UpdateParametersHeader, chunks: Chunks
    ) -> session_pb.UpdateParametersResponse:
        """Receive a part; a session that is not there has none."""
        self._sessions.get(header.session_id)
        digest = check_digest(header.values.digest)
        with self._blobs.held(digest):
            if not await uploads.receive(
                header.values, chunks, self._blobs, self._limits
            ):
                return self._needed(header)
        part = session_pb.UpdatePart(digest=digest)
        return session_pb.UpdateParametersResponse(part=part)

    async def _together(
        self, header: session_pb.UpdateParametersHeader, update: Update
    ) -> StoredVersion:
        """Commit parts, which are of no use afterwards."""
        digests = dict.fromkeys(map(check_digest, header.parts))
        with contextlib.ExitStack() as held:
            for digest in digests:
                held.enter_context(self._blobs.held(digest))
                self._check_there(digest)
            pieces = await asyncio.to_thread(self._pieces, digests)
            made = await self._move(header.session_id, update, pieces)
        for digest in digests:
            await asyncio.to_thread(self._registry.release, digest)
        return made

    async def _read(
        self, header: session_pb.UpdateParametersHeader, update: Update
    ) -> StoredVersion:
        """Read a checkpoint and commit it."""
        named = header.checkpoint
        model = await self._sessions.architecture(header.session_id)
        there = await asyncio.to_thread(self._checkpoints.pieces, named.name)
        pieces = chosen(there, model, named.prefix)
        return await self._move(header.session_id, update, pieces)

    def _pieces(self, digests: Iterable[str]) -> list[Piece]:
        return [p for d in digests for p in pieces_of(self._blobs.open(d))]

    async def _move(
        self, session_id: str, update: Update, pieces: Iterable[Piece]
    ) -> StoredVersion:
        """Make one blob of pieces, and move a session to it."""
        limit_bytes = self._limits.upload_bytes
        whole = await asyncio.to_thread(assembled, pieces, limit_bytes=limit_bytes)
        digest = await asyncio.to_thread(whole.digest)
        try:
            with self._blobs.held(digest):
                await asyncio.to_thread(
                    self._blobs.write, digest, whole.segments(), whole.total_bytes
                )
                update = dataclasses.replace(update, digest=digest)
                return await self._sessions.update(session_id, update)
        except CurvdError:
            await asyncio.to_thread(self._registry.release, digest)
            raise

    def _check_there(self, digest: str) -> None:
        if not self._blobs.has(digest):
            msg = (
                f"part {digest} of the update is not on this server: it was never sent, "
                "or was removed because no update named it in time; send the parts again"
            )
            raise FailedPrecondition(msg, digest=digest)

    def _needed(
        self, header: session_pb.UpdateParametersHeader
    ) -> session_pb.UpdateParametersResponse:
        missing = uploads.needed(header.values, self._blobs)
        return session_pb.UpdateParametersResponse(upload_needed=missing)


def _check_source(header: session_pb.UpdateParametersHeader) -> None:
    """Refuse more than one way to say what the values are, and none."""
    given = [name for name in ("values", "checkpoint") if header.HasField(name)]
    given += ["parts"] if header.parts else []
    if len(given) != 1 or (header.as_part and given != ["values"]):
        msg = (
            f"an update has values, parts or a checkpoint, a part has values; got "
            f"{', '.join(given) or 'none'}{' of a part' if header.as_part else ''}"
        )
        raise InvalidSpec(msg, given=given)


def _update(header: session_pb.UpdateParametersHeader) -> Update:
    expected = header.expected_version if header.HasField("expected_version") else None
    digest, source = header.values.digest, ""
    if header.parts:
        digest = ""
        source = "parts " + hashlib.sha256("".join(header.parts).encode()).hexdigest()
    elif header.HasField("checkpoint"):
        digest = ""
        source = f"checkpoint {header.checkpoint.name} {header.checkpoint.prefix}"
    else:
        check_digest(digest)
    return Update(
        digest=digest,
        source=source,
        expected_version=expected,
        request_id=header.request_id,
    )
