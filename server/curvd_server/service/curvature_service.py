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
from curvd_server.service import (
    product_stream,
    product_unary,
    sinks,
    sources,
    stored,
    validation,
    vector_algebra,
)
from curvd_server.service.dependencies import ProductDependencies
from curvd_server.service.outcomes import header_of, summary_of
from curvd_server.service.result_cache import Content, Key, ResultCache
from curvd_server.service.result_encoding import Format
from curvd_server.service.retries import Attempt, KeepingSink, RecognisingSource
from curvd_server.service.sinks import Sink
from curvd_server.service.sources import Source
from curvd_server.service.streams import CALLER, Chunks, OneMessage, Send, opened
from curvd_server.sessions import Lease, SessionStore
from curvd_server.system import HostMemory, calling

ProductHeader = curvature_pb.ProductHeader

_MATRIX = {"MatVec": False, "MatMat": True, "Multiply": None}
"""Whether an operand has a column axis; None: it may."""


class CurvatureService:
    """One method per RPC.

    Args:
        sessions: The server's sessions.
        batcher: The queue of their device.
        limits: The server's limits.
        memory: The host's memory, for results that are kept.
    """

    def __init__(
        self,
        *,
        sessions: SessionStore,
        batcher: Batcher,
        limits: LimitsConfig,
        memory: HostMemory,
    ) -> None:
        self._sessions = sessions
        self._results = ResultCache(
            budget_bytes=limits.kept_bytes, keep_s=limits.kept_s, memory=memory
        )
        self._dependencies = ProductDependencies(
            batcher, limits, Pool(limits.idle_bytes), self._results
        )

    def expire(self) -> None:
        """Let go of results that were kept long enough."""
        self._results.expire()

    async def mat_vec(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Multiply one vector."""
        header, chunks = await opened(requests)
        await self._product("MatVec", header, chunks, send)

    async def mat_mat(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Multiply K vectors, block by block, as they arrive."""
        header, chunks = await opened(requests)
        if header.HasField("resume"):
            msg = "MatMat does not resume: ask for the columns that are missing"
            raise InvalidSpec(msg, field="resume")
        await self._product("MatMat", header, chunks, send)

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
            small = product_unary.operand(header, file, lease, self._dependencies)
            if small is not None:
                return await product_unary.multiply(
                    header, small, lease, spec, self._dependencies, format_
                )
            answer, chunks = OneMessage(RPCS["Multiply"]), Chunks.of(file)
            source, sink = await self._ends(
                "Multiply", header, chunks, answer.send, lease
            )
            await product_stream.multiply(source, lease, spec, sink, self._dependencies)
        return answer.framed()

    async def gradient(self, request: curvature_pb.GradientRequest, send: Send) -> None:
        """Compute the objective and its gradient."""
        _bind(request)
        async with self._sessions.lease(
            request.session_id, expected_version=_expected(request)
        ) as lease:
            format_ = _format(request, "Gradient", lease)
            sink: Sink = sinks.StreamSink(send, format_)
            if request.store_as:
                # It is a function of the parameters: a retry may compute it again.
                sink = sinks.StoreSink(
                    lease.vectors, request.store_as, "", "", send, format_
                )
            dtype, layout = validation.vector_dtype(lease.info.dtype), lease.info.layout
            batcher = self._dependencies.batcher
            with batcher.reserve(1, layout.size * dtype.itemsize):
                ticket = batcher.run_in_turns(
                    lambda cancelled: lease.problem.gradient(cancelled=cancelled),
                    lane=lease.info.id,
                )
                done = await asyncio.wrap_future(ticket)
                loss, gradient = done.value
                header = header_of(lease, loss=loss)
                await sinks.deliver(sink, header, gradient, summary_of([done]))

    async def put_vector(
        self, requests: AsyncIterator[Part]
    ) -> curvature_pb.PutVectorResponse:
        """Store a vector."""
        header, chunks = await opened(requests)
        _bind(header)
        async with self._sessions.lease(header.session_id) as lease:
            vector = await stored.receive(
                header, chunks, lease, self._dependencies.limits
            )
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
            dtype = vector.array.dtype
            sink = sinks.StreamSink(send, Format.of(request, RPCS["GetVector"], dtype))
            header = header_of(lease)
            header.version = vector.version
            header.parameters_digest = ""
            await sinks.deliver(sink, header, vector.array, summary_of([]))

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

    async def combine_vectors(
        self, request: curvature_pb.CombineVectorsRequest
    ) -> curvature_pb.CombineVectorsResponse:
        """Store a linear combination of stored vectors."""
        _bind(request)
        async with self._sessions.lease(request.session_id) as lease:
            vector = await vector_algebra.combine(request, lease.vectors)
        return curvature_pb.CombineVectorsResponse(
            vector=stored.described(request.store_as, vector)
        )

    async def inner_products(
        self, request: curvature_pb.InnerProductsRequest
    ) -> curvature_pb.InnerProductsResponse:
        """Multiply stored vectors with each other."""
        async with self._sessions.lease(request.session_id) as lease:
            return await vector_algebra.inner_products(request, lease.vectors)

    async def orthonormalise_vectors(
        self, request: curvature_pb.OrthonormaliseVectorsRequest
    ) -> curvature_pb.OrthonormaliseVectorsResponse:
        """Store an orthonormal basis of what stored vectors span."""
        _bind(request)
        async with self._sessions.lease(request.session_id) as lease:
            vector, values = await vector_algebra.orthonormalise(request, lease.vectors)
        return curvature_pb.OrthonormaliseVectorsResponse(
            vector=stored.described(request.store_as, vector), singular_values=values
        )

    async def _product(
        self, name: str, header: ProductHeader, chunks: Chunks, send: Send
    ) -> None:
        """Multiply what may travel in any way: lease, source, operator, sink."""
        self._begin(header)
        inline = sources.name_of(header) == "inline"
        if inline and header.HasField("resume") and await chunks.is_empty():
            await self._resume(name, header, send)
            return
        spec = convert.operator_from_proto(header.operator)
        async with self._leased(header, spec) as lease:
            source, sink = await self._ends(name, header, chunks, send, lease)
            await product_stream.multiply(source, lease, spec, sink, self._dependencies)

    async def _ends(
        self,
        name: str,
        header: ProductHeader,
        chunks: Chunks,
        send: Send,
        lease: Lease,
    ) -> tuple[Source, Sink]:
        """Choose where the operand comes from, and where the result goes."""
        format_, content = _format(header, name, lease), Content.of(header)
        await sources.check_chunks(header, chunks)
        # Without a pause between this question and the look at the operand: a product
        # may take the place of its own operand.
        made = None
        if sources.name_of(header) != "inline":
            made = lease.vectors.made_by(
                header.store_as, header.request_id, content.header
            )
        if made is not None:
            return sources.Nothing(), sinks.StoredBefore(made, send, format_)
        attempt = Attempt(self._results, _key(header), content, lease.info.version)
        retries = bool(header.request_id) and not header.store_as
        source = sources.source_of(
            header,
            chunks,
            lease,
            self._dependencies,
            matrix=_MATRIX[name],
            arrived=attempt.arrived if retries else sources.ignored,
        )
        if header.store_as:
            return source, sinks.StoreSink(
                lease.vectors,
                header.store_as,
                header.request_id,
                content.header,
                send,
                format_,
            )
        sink = sinks.StreamSink(send, format_)
        if not retries:
            return source, sink
        return RecognisingSource(source, attempt), KeepingSink(sink, attempt)

    async def _resume(self, name: str, header: ProductHeader, send: Send) -> None:
        """Send what is kept of a result; its operand did not come again."""
        self._sessions.get(header.session_id)
        kept = self._results.get(_key(header), Content.of(header))
        if kept is None:
            msg = (
                f"the result of request {header.request_id!r} is not kept any more: "
                "send the operand again"
            )
            raise ResultNotKept(msg, request_id=header.request_id)
        format_ = Format.of(header, RPCS[name], kept.rows.dtype)
        sink = sinks.StreamSink(send, format_)
        await sinks.deliver(sink, kept.header, kept.rows, kept.summary)

    def _leased(
        self, header: ProductHeader, spec: OperatorSpec
    ) -> contextlib.AbstractAsyncContextManager[Lease]:
        """Find what a product is asked from."""
        return self._sessions.lease(
            header.session_id, operator=spec, expected_version=_expected(header)
        )

    def _begin(self, header: ProductHeader) -> None:
        _bind(header)
        self._results.received(CALLER.get(), _key(header))


def _key(header: ProductHeader) -> Key:
    return (header.session_id, header.request_id, calling().name)


def _format(request: Any, name: str, lease: Lease) -> Format:
    own = validation.vector_dtype(lease.info.dtype)
    return Format.of(request, RPCS[name], own)


def _expected(request: Any) -> int | None:
    return request.expected_version if request.HasField("expected_version") else None


def _bind(request: Any) -> None:
    structlog.contextvars.bind_contextvars(
        session=request.session_id, request_id=request.request_id
    )
