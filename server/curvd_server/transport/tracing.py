"""Spans of calls, as OpenTelemetry has them; imported only where a server sends traces.

A call is a span of its own, in the trace that its caller names (W3C Trace Context), and
what takes its time is below it: `queue` and `compute` at the device, `build` of operators,
`receive` and `send` on the wire. They are made when they have ended, from moments that are
measured anyway. Attributes follow OpenTelemetry's semantic conventions for RPC (version
1.41); what is ours begins with ``curvd.``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import unquote

import grpc.aio
import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from curvd.contract import Rpc
from curvd_server.system import TRACED

_PARENT, _STATE = "traceparent", "tracestate"
"""Names of the headers of W3C Trace Context."""
_SAMPLED = 0x01
"""The flag of a parent that is traced itself."""
_MOST = 128
"""Spans below one call: a query has thousands of products."""
_FAULTS = frozenset({
    "DATA_LOSS",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "UNAVAILABLE",
    "UNIMPLEMENTED",
    "UNKNOWN",
})
"""Codes that are an error of the server's; the others are its caller's business."""
_FLUSH_S = 5.0
"""Longest that a server that stops waits until its last spans are sent."""

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes spans of the calls of one server.

    Args:
        provider: Where they go.
        share: Share of the calls that are traced, of those whose callers do not say.
        chance: A number in [0, 1) for each of these.
    """

    def __init__(
        self,
        provider: TracerProvider,
        share: float = 1.0,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._tracer = provider.get_tracer("curvd_server")
        self._share, self._chance = share, chance

    def begin(
        self,
        rpc: Rpc,
        context: grpc.aio.ServicerContext[Any, Any],
        began_s: float,
    ) -> CallTrace | None:
        """Begin the span of a call, which what runs in its context adds to.

        Args:
            rpc: Which method.
            context: gRPC's.
            began_s: When its handler began, on the clock of `time.monotonic`.

        Returns:
            The span; None if this call is not traced.
        """
        headers = _trace_headers(context)
        parent: Context | None = None
        if headers:
            parent = _propagator.extract(headers)
            asked = trace.get_current_span(parent).get_span_context()
            if not asked.is_valid:  # malformed: as if there were none (W3C, 3.2.2.3)
                parent = None
            elif not asked.trace_flags & _SAMPLED:
                return None
        if parent is None and self._chance() >= self._share:
            return None
        traced = CallTrace(self._tracer, rpc, context, parent, began_s)
        TRACED.set(traced)
        structlog.contextvars.bind_contextvars(trace=traced.trace_id)
        return traced


class CallTrace:
    """The span of one call and those below it. Threads may share it.

    Args:
        tracer: Makes spans.
        rpc: Which method.
        context: gRPC's.
        parent: The caller's span; None: the trace begins here.
        began_s: When the handler began, on the clock of `time.monotonic`.
    """

    def __init__(
        self,
        tracer: trace.Tracer,
        rpc: Rpc,
        context: grpc.aio.ServicerContext[Any, Any],
        parent: Context | None,
        began_s: float,
    ) -> None:
        # Spans have times of day; ours are measured on a clock that nobody sets.
        self._zero_ns = time.time_ns() - time.monotonic_ns()
        self._tracer, self._lock = tracer, threading.Lock()
        self._made, self._left_out, self._over = 0, 0, False
        self._code, self._answered_s = "OK", began_s
        # Our own connections know when the headers came; grpcio has read all of a request
        # that is one message before anybody is told.
        came_s: float = getattr(context, "came_s", began_s)
        self._span = tracer.start_span(
            rpc.path[1:],
            # An empty one, or the span of whatever runs here would be the parent.
            Context() if parent is None else parent,
            trace.SpanKind.SERVER,
            {
                "rpc.system.name": "grpc",
                "rpc.method": rpc.path[1:],
                **_address(context.peer()),
            },
            start_time=self._ns(came_s),
        )
        self._below = trace.set_span_in_context(self._span, Context())
        if not rpc.client_streams and came_s < began_s:
            self.add("receive", came_s, began_s)
        finish: Any = self._finish  # grpc's stubs want a class of their own
        context.add_done_callback(finish)

    @property
    def trace_id(self) -> str:
        """The trace that it belongs to, 32 hexadecimal digits."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def add(
        self, name: str, began_s: float, ended_s: float, **attributes: str | int | float
    ) -> None:
        """Make a span of something that has ended; see `Traces.add`."""
        with self._lock:
            if self._over:  # others wait for what goes on
                return
            if self._made >= _MOST:
                self._left_out += 1
                return
            self._made += 1
        span = self._tracer.start_span(
            name,
            self._below,
            attributes={f"curvd.{key}": value for key, value in attributes.items()},
            start_time=self._ns(began_s),
        )
        span.end(self._ns(max(began_s, ended_s)))

    def answered(self, code: str) -> None:
        """Take note of how a call ends, whose answer has still to be sent.

        Args:
            code: Of its status.
        """
        self._code, self._answered_s = code, time.monotonic()
        known = structlog.contextvars.get_contextvars()
        for name in ("session", "request_id", "caller"):
            if known.get(name):
                self._span.set_attribute(f"curvd.{name}", known[name])

    def _finish(self, context: Any) -> None:
        """End the span: the status has been sent, or nobody waits for it."""
        now_s = time.monotonic()
        self.add("send", self._answered_s, now_s)
        with self._lock:
            if self._over:
                return
            self._over = True
        span, code = self._span, self._code
        span.set_attribute("rpc.response.status_code", code)
        if self._left_out:
            span.set_attribute("curvd.spans_left_out", self._left_out)
        if code in _FAULTS:
            span.set_attribute("error.type", code)
            span.set_status(trace.StatusCode.ERROR)
        span.end(self._ns(now_s))

    def _ns(self, moment_s: float) -> int:
        return self._zero_ns + round(moment_s * 1e9)


@contextlib.asynccontextmanager
async def exporting(
    endpoint: str, share: float, version: str
) -> AsyncIterator[Tracing]:
    """Send spans to a collector while the server runs, in the background.

    Args:
        endpoint: Where it takes OTLP over gRPC: ``http://host:port``, or ``https://``.
        share: As for `Tracing`.
        version: Of the server.

    Yields:
        What makes them.
    """
    provider = provider_of(endpoint, version)
    try:
        yield Tracing(provider, share)
    finally:
        # Not for ever, and not in a thread that the process waits for: the collector may
        # be away.
        ending = threading.Thread(target=provider.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, _FLUSH_S)


def provider_of(endpoint: str, version: str) -> TracerProvider:
    """Say where spans go.

    Args:
        endpoint: As for `exporting`. Headers, certificates and the sizes of batches are
            read from OpenTelemetry's environment variables (``OTEL_EXPORTER_OTLP_…``,
            ``OTEL_BSP_…``), and so is what the resource says beside (``OTEL_RESOURCE_…``).
        version: Of the server.

    Returns:
        What makes tracers. Which calls are traced is not its business.
    """
    provider = TracerProvider(
        sampler=ALWAYS_ON,
        resource=Resource.create({
            SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME") or "curvd",
            SERVICE_VERSION: version,
        }),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(
        endpoint=endpoint, insecure=endpoint.startswith("http://")
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _trace_headers(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """Find what a caller says of its trace; nothing if it says nothing."""
    header: Callable[[str], str] | None = getattr(context, "header", None)
    if header is None:
        known = dict(context.invocation_metadata() or ())
        found = {name: str(known.get(name, "")) for name in (_PARENT, _STATE)}
        return found if found[_PARENT] else {}
    parent = header(_PARENT)
    return {_PARENT: parent, _STATE: header(_STATE)} if parent else {}


def _address(peer: str) -> dict[str, str | int]:
    """Say where a call comes from, as the conventions for networks name it."""
    kind, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return {"network.transport": "unix"} if kind == "unix" else {}
    return {
        "network.transport": "tcp",
        "network.peer.address": host.strip("[]"),
        "network.peer.port": int(port),
    }
