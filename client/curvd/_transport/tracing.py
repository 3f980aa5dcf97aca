"""Spans of calls, as OpenTelemetry has them; imported only where a client asks for them.

A call is one span, its repetitions included, in the trace of whoever makes it. The server
hears of it by a header (W3C Trace Context), whoever speaks HTTP/2. Attributes follow
OpenTelemetry's semantic conventions for RPC (version 1.41).
"""

from __future__ import annotations

from typing import Any

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from curvd._calls import Call
from curvd.config import VERSION
from curvd.errors import CurvdError

_propagator = TraceContextTextMapPropagator()


class CallSpans:
    """Makes a span of each call to one server.

    Args:
        target: Where the server is.
    """

    def __init__(self, target: str) -> None:
        self._tracer = trace.get_tracer("curvd", VERSION)
        host, _, port = target.rpartition(":")
        self._server: dict[str, str | int] = {"server.address": target}
        if host and port.isdecimal():
            self._server = {
                "server.address": host.strip("[]"),
                "server.port": int(port),
            }

    def begin(self, call: Call[Any]) -> CallSpan:
        """Begin the span of a call; that of whoever makes it is its parent.

        Args:
            call: The call, which tells the server of it from now on.
        """
        name = call.rpc.path[1:]
        span = self._tracer.start_span(
            name,
            kind=trace.SpanKind.CLIENT,
            attributes={
                "rpc.system.name": "grpc",
                "rpc.method": name,
                **self._server,
            },
        )
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, trace.set_span_in_context(span))
        call.metadata = tuple(carrier.items())
        return CallSpan(span)


class CallSpan:
    """The span of one call.

    Args:
        span: OpenTelemetry's.
    """

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def repeated(self, error: CurvdError) -> None:
        """Take note that the call is made again.

        Args:
            error: How it failed before.
        """
        self._span.add_event("repeated", {"error.type": error.code})

    def end(self, error: BaseException | None) -> None:
        """End the span.

        Args:
            error: How the call failed; None: it did not.
        """
        code = "OK"
        if error is not None:
            code = error.code if isinstance(error, CurvdError) else "CANCELLED"
            self._span.set_attribute("error.type", code)
            self._span.set_status(trace.StatusCode.ERROR, str(error)[:200])
        self._span.set_attribute("rpc.response.status_code", code)
        self._span.end()
