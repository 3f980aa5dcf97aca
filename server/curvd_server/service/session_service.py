"""SessionService: registering models and datasets, and the life of a session."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import structlog
from google.protobuf.duration_pb2 import Duration

from curvd.contract import (
    DatasetSpec,
    ModelInfo,
    ModelSpec,
    Part,
    ServerInfo,
    SessionInfo,
    check_patterns,
    convert,
    convert_activities,
    convert_enums,
    convert_server,
    convert_sessions,
)
from curvd.errors import CurvdError, DatasetNotFound, InvalidSpec
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.config import LimitsConfig
from curvd_server.service import listings, uploads
from curvd_server.service.parameter_updates import ParameterUpdates
from curvd_server.service.streams import Send, opened
from curvd_server.sessions import NewSession, SessionStore
from curvd_server.storage import (
    Architecture,
    BlobStore,
    Checkpoints,
    Mounts,
    Registry,
    check_digest,
    model_spec,
)
from curvd_server.system import check_share

T = TypeVar("T")

_REPORT_S = 0.05
"""Between two reports of how far an opening is."""


class SessionService:
    """One method per RPC.

    Args:
        registry: The registry of models and datasets.
        sessions: The sessions of the server.
        blobs: Where uploads go.
        mounts: Datasets that lie on the server.
        limits: The limits of the server.
        describe: Describes the server.
        checkpoints: Checkpoints that lie on the server.
        try_model: Finds out what a model's state is; see `Device.try_model`.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        sessions: SessionStore,
        blobs: BlobStore,
        mounts: Mounts,
        limits: LimitsConfig,
        describe: Callable[[], ServerInfo],
        checkpoints: Checkpoints,
        try_model: Callable[[ModelSpec], Awaitable[Architecture | None]],
    ) -> None:
        self._try_model = try_model
        self._registry, self._sessions, self._mounts = registry, sessions, mounts
        self._blobs, self._limits, self._describe = blobs, limits, describe
        self._updates = ParameterUpdates(sessions, blobs, registry, limits, checkpoints)

    async def register_model(
        self, requests: AsyncIterator[Part]
    ) -> session_pb.RegisterModelResponse:
        """Register an architecture with its state."""
        header, chunks = await opened(requests)
        graph = header.graph if header.HasField("graph") else None
        spec = await asyncio.to_thread(
            model_spec, header.builder, header.config_json, graph
        )
        share_with = check_share(header.share_with)
        found = await self._registered(
            header.state,
            chunks,
            self._registering(spec, header.state.digest, share_with),
        )
        if found is None:
            missing = uploads.needed(header.state, self._blobs)
            return session_pb.RegisterModelResponse(upload_needed=missing)
        model = convert_sessions.model_to_proto(self._sessions.deletions.users()(found))
        return session_pb.RegisterModelResponse(model=model)

    def _registering(
        self, spec: ModelSpec, digest: str, share_with: tuple[str, ...]
    ) -> Callable[[], Awaitable[ModelInfo | None]]:
        """Say how a model is registered; what its state is, is found out once."""
        tried: Architecture | None = None

        async def register() -> ModelInfo | None:
            nonlocal tried
            registry = self._registry
            known = await asyncio.to_thread(registry.knows, spec, digest)
            if tried is None and not known:
                tried = await self._try_model(spec)
            return await asyncio.to_thread(
                registry.model, spec, digest, tried, share_with
            )

        return register

    async def register_dataset(
        self, requests: AsyncIterator[Part]
    ) -> session_pb.RegisterDatasetResponse:
        """Register named tensors as fixed mini-batches."""
        header, chunks = await opened(requests)
        spec = convert_sessions.dataset_spec_from_proto(header)
        if header.name or not header.tensors.total_bytes:
            return await self._present_dataset(header, spec)
        found = await self._registered(
            header.tensors,
            chunks,
            functools.partial(
                asyncio.to_thread,
                self._registry.dataset,
                spec,
                header.tensors.digest,
                share_with=check_share(header.share_with),
            ),
        )
        if found is None:
            missing = uploads.needed(header.tensors, self._blobs)
            return session_pb.RegisterDatasetResponse(upload_needed=missing)
        dataset = convert_sessions.dataset_to_proto(
            self._sessions.deletions.users()(found)
        )
        return session_pb.RegisterDatasetResponse(dataset=dataset)

    async def _present_dataset(
        self, header: session_pb.RegisterDatasetHeader, spec: DatasetSpec
    ) -> session_pb.RegisterDatasetResponse:
        """Register a dataset whose tensors are on the server, by name or digest."""
        if header.name and header.HasField("tensors"):
            msg = (
                f"give tensors, or the name {header.name[:80]!r} of a dataset, not both"
            )
            raise InvalidSpec(msg, name=header.name[:80])
        digest = header.tensors.digest
        # The second time it is hashed anew: the file is not what it was.
        for _ in range(2 if header.name else 1):
            if header.name:
                digest = await asyncio.to_thread(self._mounts.digest, header.name)
            with self._blobs.held(check_digest(digest)):
                found = await asyncio.to_thread(
                    self._registry.dataset,
                    spec,
                    digest,
                    name=header.name,
                    partial=True,
                    share_with=check_share(header.share_with),
                )
            if found is not None:
                break
        if found is None:
            msg = f"no tensors with SHA-256 {digest} are on this server; upload them"
            raise DatasetNotFound(msg, digest=digest)
        dataset = convert_sessions.dataset_to_proto(
            self._sessions.deletions.users()(found)
        )
        return session_pb.RegisterDatasetResponse(dataset=dataset)

    async def create_session(
        self, request: session_pb.CreateSessionRequest
    ) -> session_pb.CreateSessionResponse:
        """Bring a model, a dataset and a loss together."""
        new = _new_session(request)
        info = await self._sessions.create(new, validate_only=request.validate_only)
        structlog.contextvars.bind_contextvars(session=info.id)
        return session_pb.CreateSessionResponse(session=_shown(info))

    async def open_session(
        self, request: session_pb.OpenSessionRequest, send: Send
    ) -> None:
        """Do the same, and say on the way how far it is."""
        new = _new_session(request.session)
        opening = self._sessions.opening(new)
        making = asyncio.ensure_future(
            self._sessions.create(
                new, validate_only=request.session.validate_only, opening=opening
            )
        )
        try:
            while not making.done():
                await asyncio.wait([making], timeout=_REPORT_S)
                for progress in opening.news():
                    message = convert_activities.progress_to_proto(progress)
                    await send(session_pb.OpenSessionResponse(progress=message))
        finally:
            # Who has left, or does not read, ends it as he ends CreateSession.
            making.cancel()
            await asyncio.wait([making])
            if not making.cancelled():
                making.exception()  # so that asyncio does not miss that anyone looked
        info = making.result()
        structlog.contextvars.bind_contextvars(session=info.id)
        await send(session_pb.OpenSessionResponse(session=_shown(info)))

    async def get_session(
        self, request: session_pb.GetSessionRequest
    ) -> session_pb.GetSessionResponse:
        """Describe one session."""
        info = self._sessions.get(request.session_id)
        return session_pb.GetSessionResponse(session=_shown(info))

    async def list_sessions(
        self, request: session_pb.ListSessionsRequest
    ) -> session_pb.ListSessionsResponse:
        """List the sessions, oldest first."""
        page = listings.Page[session_pb.Session](request.page_size)
        infos, after = self._sessions.page(after=request.page_token, limit=page.limit)
        for info in infos:
            if not page.add(info.id, _shown(info)):
                break
            await asyncio.sleep(0)  # a thousand layouts take a second
        return session_pb.ListSessionsResponse(
            sessions=page.messages, next_page_token=page.token or after
        )

    async def renew_session(
        self, request: session_pb.RenewSessionRequest
    ) -> session_pb.RenewSessionResponse:
        """Put off the end of a session's lease."""
        info = await self._sessions.renew(request.session_id, _lease_s(request))
        return session_pb.RenewSessionResponse(session=_shown(info))

    async def delete_session(
        self, request: session_pb.DeleteSessionRequest
    ) -> session_pb.DeleteSessionResponse:
        """End a session, cancel its work and return its memory."""
        structlog.contextvars.bind_contextvars(session=request.session_id)
        await self._sessions.delete(request.session_id)
        return session_pb.DeleteSessionResponse()

    async def list_models(
        self, request: session_pb.ListModelsRequest
    ) -> session_pb.ListModelsResponse:
        """List the models that the caller may know of, oldest first."""
        page = listings.Page[session_pb.Model](request.page_size)
        found = self._registry.models(listings.ordinal(request.page_token))
        used = self._sessions.deletions.users()
        shown = (
            (n, convert_sessions.model_to_proto(used(model))) for n, model in found
        )
        await asyncio.to_thread(page.fill, shown)
        return session_pb.ListModelsResponse(
            models=page.messages, next_page_token=page.token
        )

    async def list_datasets(
        self, request: session_pb.ListDatasetsRequest
    ) -> session_pb.ListDatasetsResponse:
        """List the datasets that the caller may know of, oldest first."""
        page = listings.Page[session_pb.Dataset](request.page_size)
        found = self._registry.datasets(listings.ordinal(request.page_token))
        used = self._sessions.deletions.users()
        shown = (
            (n, convert_sessions.dataset_to_proto(used(data))) for n, data in found
        )
        await asyncio.to_thread(page.fill, shown)
        return session_pb.ListDatasetsResponse(
            datasets=page.messages, next_page_token=page.token
        )

    async def delete_model(
        self, request: session_pb.DeleteModelRequest
    ) -> session_pb.DeleteModelResponse:
        """Delete a model that no session needs."""
        await self._sessions.deletions.model(request.model_id)
        return session_pb.DeleteModelResponse()

    async def delete_dataset(
        self, request: session_pb.DeleteDatasetRequest
    ) -> session_pb.DeleteDatasetResponse:
        """Delete a dataset that no session needs."""
        await self._sessions.deletions.dataset(request.dataset_id)
        return session_pb.DeleteDatasetResponse()

    async def update_parameters(
        self, requests: AsyncIterator[Part]
    ) -> session_pb.UpdateParametersResponse:
        """Replace some or all parameter values."""
        return await self._updates.update(requests)

    async def get_server_info(
        self, request: session_pb.GetServerInfoRequest
    ) -> session_pb.GetServerInfoResponse:
        """Tell versions, limits, devices, builders, capabilities."""
        info = await asyncio.to_thread(self._describe)
        return convert_server.server_info_to_proto(info)

    async def _registered(
        self,
        upload: session_pb.Upload,
        chunks: AsyncIterator[memoryview],
        register: Callable[[], Awaitable[T | None]],
    ) -> T | None:
        """Find a resource, or make it once its bytes are there."""
        digest = check_digest(upload.digest)
        try:
            with self._blobs.held(digest):
                # Before the bytes: it may be there, or never be welcome.
                found = await register()
                if found is None and await uploads.receive(
                    upload, chunks, self._blobs, self._limits
                ):
                    found = await register()
                return found
        except CurvdError:
            await asyncio.to_thread(self._registry.release, digest)
            raise


def _shown(info: SessionInfo) -> session_pb.Session:
    """Describe a session; the graph of its loss stays here, as a page may have many."""
    message = convert_sessions.session_to_proto(info)
    message.loss.ClearField("graph")
    return message


def _new_session(request: session_pb.CreateSessionRequest) -> NewSession:
    """Read what a session is to be."""
    budget = request.budget_bytes if request.HasField("budget_bytes") else None
    own: dict[str, Any] = {"shares_with": request.shares_with}
    if not request.shares_with:
        own = {
            "model_id": request.model_id,
            "loss": convert.loss_from_proto(request.loss),
            "dtype": convert_enums.dtype_from_proto(request.dtype),
            "mode": convert_enums.mode_from_proto(request.mode),
            "params": check_patterns(request.params),
        }
    return NewSession(
        **own,
        dataset_id=request.dataset_id,
        operators=tuple(map(convert.operator_from_proto, request.operators)),
        build_later=request.build_later,
        plan=convert_enums.tier_from_proto(request.plan) if request.plan else None,
        budget_bytes=budget,
        lease_s=_lease_s(request),
        name=request.name,
        request_id=request.request_id,
        fingerprint=_fingerprint(request),
        share_with=check_share(request.share_with),
    )


def _lease_s(request: Any) -> float | None:
    if not request.HasField("lease"):
        return None
    lease: Duration = request.lease
    return lease.ToNanoseconds() / 1e9


def _fingerprint(request: session_pb.CreateSessionRequest) -> str:
    content = session_pb.CreateSessionRequest()
    content.CopyFrom(request)
    content.ClearField("request_id")
    return hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()
