"""CurvatureService: products and gradients, and the vectors that sessions store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import structlog

from curvd.contract import RPCS, Framed, OperatorSpec, Part, convert
from curvd.errors import InvalidSpec, ResultNotKept
from curvd.tensors import Pool
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.config import LimitsConfig
from curvd_server.device import Batcher
from curvd_server.service import product_unary, stored, validation
from curvd_server.service.handlers import CALLER, Chunks, Send, opened
from curvd_server.service.outcomes import (
    Kept,
    content_of,
    header_of,
    send_kept,
    summary_of,
)
from curvd_server.service.product_stream import Product, Tools
from curvd_server.service.result_cache import KeptResults
from curvd_server.service.result_encoding import Format, Sender
from curvd_server.sessions import Lease, SessionStore
from curvd_server.system import HostMemory


class CurvatureService:
    """One method per RPC.

    Args:
        sessions: Of the server.
        batcher: The queue of their device.
        limits: Of the server.
        memory: Of the host, for results that are kept.
    """

    def __init__(
        self,
        *,
        sessions: SessionStore,
        batcher: Batcher,
        limits: LimitsConfig,
        memory: HostMemory,
    ) -> None:
        self._sessions, self._batcher, self._limits = sessions, batcher, limits
        self._kept: KeptResults[Kept] = KeptResults(
            budget_bytes=limits.kept_bytes, keep_s=limits.kept_s, memory=memory
        )
        self._tools = Tools(batcher, limits, Pool(limits.idle_bytes), self._kept)

    def expire(self) -> None:
        """Let go of results that were kept long enough."""
        self._kept.expire()

    async def mat_vec(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Multiply one vector."""
        header, chunks = await opened(requests)
        await self._product(header, chunks, send, "MatVec", matrix=False)

    async def mat_mat(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Multiply K vectors, block by block, as they arrive."""
        header, chunks = await opened(requests)
        if header.HasField("resume"):
            msg = "MatMat does not resume: ask for the columns that are missing"
            raise InvalidSpec(msg, field="resume")
        await self._product(header, chunks, send, "MatMat", matrix=True)

    async def multiply(self, request: Framed) -> Framed:
        """Multiply few bytes, in one message each way."""
        header = request.message.header
        self._begin(header)
        if header.HasField("resume"):
            msg = "Multiply has nothing to resume: its result is one message"
            raise InvalidSpec(msg, field="resume")
        (file,) = request.tensors
        spec = convert.operator_from_proto(header.operator)
        async with self._leased(header, spec) as lease:
            format_ = _format(header, "Multiply", lease)
            columns = product_unary.operand(header, file, lease, self._tools)
            if columns is not None:
                return await product_unary.multiply(
                    header, columns, lease, spec, self._tools, format_
                )
            return await self._collected(header, file, lease, spec, format_)

    async def gradient(self, request: curvature_pb.GradientRequest, send: Send) -> None:
        """Compute the objective and its gradient."""
        _bind(request)
        async with self._sessions.lease(
            request.session_id, expected_version=_expected(request)
        ) as lease:
            dtype = validation.vector_dtype(lease.info.dtype)
            message = RPCS["Gradient"].response.message
            sender = Sender(send, Format.of(request, message, dtype))
            with self._batcher.reserve(1, lease.info.layout.size * dtype.itemsize):
                ticket = self._batcher.run_in_turns(
                    lambda cancelled: lease.problem.gradient(cancelled=cancelled),
                    lane=lease.info.id,
                )
                done = await asyncio.wrap_future(ticket)
                loss, gradient = done.value
                header = header_of(lease, loss=loss)
                await sender.whole(header, gradient, summary_of([done]))

    async def put_vector(
        self, requests: AsyncIterator[Part]
    ) -> curvature_pb.PutVectorResponse:
        """Store a vector."""
        header, chunks = await opened(requests)
        _bind(header)
        async with self._sessions.lease(header.session_id) as lease:
            vector = await stored.receive(header, chunks, lease, self._tools)
        return curvature_pb.PutVectorResponse(
            vector=stored.described(header.name, vector)
        )

    async def get_vector(
        self, request: curvature_pb.GetVectorRequest, send: Send
    ) -> None:
        """Send a stored vector."""
        _bind(request)
        async with self._sessions.lease(request.session_id) as lease:
            vector = lease.vectors.get(request.name)
            message = RPCS["GetVector"].response.message
            sender = Sender(send, Format.of(request, message, vector.array.dtype))
            header = header_of(lease)
            header.version = vector.version
            header.parameters_digest = ""
            await sender.whole(header, vector.array, summary_of([]))

    async def list_vectors(
        self, request: curvature_pb.ListVectorsRequest
    ) -> curvature_pb.ListVectorsResponse:
        """Name what is stored."""
        async with self._sessions.lease(request.session_id) as lease:
            found = [stored.described(n, v) for n, v in lease.vectors.items()]
        return curvature_pb.ListVectorsResponse(vectors=found)

    async def delete_vector(
        self, request: curvature_pb.DeleteVectorRequest
    ) -> curvature_pb.DeleteVectorResponse:
        """Forget a stored vector."""
        async with self._sessions.lease(request.session_id) as lease:
            lease.vectors.delete(request.name)
        return curvature_pb.DeleteVectorResponse()

    async def _product(
        self,
        header: curvature_pb.ProductHeader,
        chunks: Chunks,
        send: Send,
        name: str,
        *,
        matrix: bool,
    ) -> None:
        self._begin(header)
        source = header.operand.WhichOneof("source") or "inline"
        if header.HasField("resume") and source == "inline":
            first = await anext(chunks, None)
            if first is None:
                await self._take_up(header, send, name)
                return
            chunks.put_back(first)
        spec = convert.operator_from_proto(header.operator)
        async with (
            self._leased(header, spec) as lease,
            contextlib.AsyncExitStack() as stack,
        ):
            format_ = _format(header, name, lease)
            product = Product(header, lease, spec, self._tools, format_, matrix, stack)
            await product.run(chunks, send)

    def _begin(self, header: curvature_pb.ProductHeader) -> None:
        _bind(header)
        self._kept.received(CALLER.get(), (header.session_id, header.request_id))

    async def _collected(
        self,
        header: curvature_pb.ProductHeader,
        file: memoryview,
        lease: Lease,
        spec: OperatorSpec,
        format_: Format,
    ) -> Framed:
        """Make a stream of one message, and one message of the answer."""
        response = RPCS["Multiply"].response.message()
        sent: list[memoryview] = []

        async def collect(part: Part) -> None:
            if isinstance(part, memoryview):
                sent.append(part)
            else:
                response.MergeFrom(part)

        chunks = Chunks(_nothing(), file if file.nbytes else None)
        async with contextlib.AsyncExitStack() as stack:
            product = Product(header, lease, spec, self._tools, format_, None, stack)
            await product.run(chunks, collect)
        return Framed(response, tuple(sent))

    def _leased(
        self, header: curvature_pb.ProductHeader, spec: OperatorSpec
    ) -> contextlib.AbstractAsyncContextManager[Lease]:
        """Find what a product is asked from."""
        return self._sessions.lease(
            header.session_id, operator=spec, expected_version=_expected(header)
        )

    async def _take_up(
        self, header: curvature_pb.ProductHeader, send: Send, name: str
    ) -> None:
        """Send what is kept of a result; its operand did not come again."""
        self._sessions.get(header.session_id)
        key = (header.session_id, header.request_id)
        kept = self._kept.get(key, content_of(header))
        if kept is None:
            msg = (
                f"the result of request {header.request_id!r} is not kept any more: "
                "send the operand again"
            )
            raise ResultNotKept(msg, request_id=header.request_id)
        message = RPCS[name].response.message
        format_ = Format.of(header, message, kept.rows.dtype)
        await send_kept(kept, Sender(send, format_), format_)


async def _nothing() -> AsyncIterator[Part]:
    return
    yield  # makes it a generator


def _format(header: curvature_pb.ProductHeader, name: str, lease: Lease) -> Format:
    own = validation.vector_dtype(lease.info.dtype)
    return Format.of(header, RPCS[name].response.message, own)


def _expected(request: Any) -> int | None:
    return request.expected_version if request.HasField("expected_version") else None


def _bind(request: Any) -> None:
    structlog.contextvars.bind_contextvars(
        session=request.session_id, request_id=request.request_id
    )
