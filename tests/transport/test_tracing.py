"""Calls are spans: the caller's trace goes on in the server, and is made of its parts."""

import contextlib
import sys
import threading
from concurrent import futures

import grpc
import numpy as np
import pytest
import raw
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from support.fake_device import FakeDevice
from support.served import Channels, server
from support.spans import Spans, below

import curvd
from curvd.contract.rpcs import RPCS
from curvd.errors import InvalidSpec, SessionNotFound
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.transport import Gate, tracing

ANYWHERE = "http://127.0.0.1:4317"
V = raw.file_of({"v": np.ones(5)})
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def made(monkeypatch):
    """What servers make that start in this test."""
    spans = Spans()
    monkeypatch.setattr(tracing, "provider_of", lambda *args: spans.provider)
    return spans


@pytest.fixture
def asked(monkeypatch):
    """What clients make that this test has."""
    spans = Spans()
    monkeypatch.setattr(trace, "get_tracer", spans.provider.get_tracer)
    return spans


def with_headers(channel, headers):
    """A channel whose calls say something of their trace."""

    class Headers:
        def __getattr__(self, shape):
            def stub(*args):
                method = getattr(channel, shape)(*args)
                return lambda request, *, timeout, metadata: method(
                    request, timeout=timeout, metadata=headers
                )

            return stub

    return Headers()


def traced(tmp_path, **options):
    return server(tmp_path, traces=ANYWHERE, **options)


@pytest.mark.parametrize("spoken", ["direct", "grpcio"])
@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_clients_span_is_the_parent_of_the_servers(
    tmp_path, made, asked, transport, spoken
):
    with traced(tmp_path, transport=spoken) as channel:
        session = raw.fake_session(channel)
        config = curvd.ClientConfig(tracing=True, transport=transport)
        with curvd.connect(channel.target, config=config) as client:
            operator = client.session(session.id).hessian()
            with asked.provider.get_tracer("test").start_as_current_span("mine"):
                operator @ np.ones(5)
    (mine,) = asked.named("mine")
    (ours,) = asked.named("curvd.v1.CurvatureService/Multiply")
    assert ours.kind is trace.SpanKind.CLIENT
    assert ours.parent.span_id == mine.context.span_id
    (theirs,) = made.named("curvd.v1.CurvatureService/Multiply")
    assert theirs.kind is trace.SpanKind.SERVER
    assert theirs.context.trace_id == ours.context.trace_id == mine.context.trace_id
    assert theirs.parent.span_id == ours.context.span_id and theirs.parent.is_remote
    for span in (ours, theirs):
        assert span.attributes["rpc.system.name"] == "grpc"
        assert span.attributes["rpc.method"] == "curvd.v1.CurvatureService/Multiply"
        assert span.attributes["rpc.response.status_code"] == "OK"
    assert theirs.attributes["curvd.session"] == session.id
    parts = below(made, theirs)
    assert parts.keys() >= {"compute", "send"}
    (compute,) = parts["compute"]
    assert compute.attributes["curvd.columns"] == 1
    assert theirs.start_time <= compute.start_time <= compute.end_time
    assert compute.end_time <= theirs.end_time


async def test_the_asyncio_client_does_the_same(tmp_path, made, asked):
    with traced(tmp_path) as channel:
        session = raw.fake_session(channel)
        config = curvd.ClientConfig(tracing=True)
        async with curvd.aio.connect(channel.target, config=config) as client:
            operator = (await client.session(session.id)).hessian()
            await (operator @ np.ones(5))
            with pytest.raises(SessionNotFound):
                await client.session("none")
    (ours,) = asked.named("curvd.v1.CurvatureService/Multiply")
    (theirs,) = made.named("curvd.v1.CurvatureService/Multiply")
    assert theirs.parent.span_id == ours.context.span_id
    _, failed = asked.named("curvd.v1.SessionService/GetSession")
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert failed.attributes["error.type"] == "NOT_FOUND"
    # Of the server it is no error: the caller has asked for what is not there.
    _, failed = made.named("curvd.v1.SessionService/GetSession")
    assert failed.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert failed.status.status_code is trace.StatusCode.UNSET


def test_a_stream_is_received_queued_computed_and_sent(tmp_path, made):
    with traced(tmp_path) as channel:
        session = raw.fake_session(channel)
        data = raw.file_of({"v": np.ones((3, 5))})
        raw.call(channel, "MatMat", raw.product("MatMat", session.id, data))
    (call,) = made.named("curvd.v1.CurvatureService/MatMat")
    parts = below(made, call)
    assert parts.keys() == {"receive", "queue", "compute", "send"}
    (queue,), (compute,) = parts["queue"], parts["compute"]
    assert queue.end_time == compute.start_time
    assert compute.attributes["curvd.columns"] == 3
    assert compute.attributes["curvd.run_columns"] == 3
    assert parts["receive"][0].attributes["curvd.bytes"] == len(data)
    assert parts["send"][0].attributes["curvd.bytes"] > 3 * 5 * 8


def test_an_opening_tells_what_it_builds(tmp_path, made):
    with traced(tmp_path) as channel:
        raw.fake_session(channel)
    (call,) = made.named("curvd.v1.SessionService/CreateSession")
    stages = [s.attributes["curvd.stage"] for s in below(made, call)["build"]]
    assert "checking" in stages and "verifying" in stages
    assert made.named("curvd.v1.SessionService/RegisterModel")


@pytest.mark.parametrize(
    ("headers", "share", "traces"),
    [
        ([("traceparent", f"00-{TRACE}-{SPAN}-01")], 0.0, [TRACE]),
        ([("traceparent", f"00-{TRACE}-{SPAN}-00")], 1.0, []),
        ([], 0.0, []),
        ([], 1.0, [None]),
        ([("traceparent", "00-nonsense")], 0.0, []),
        ([("traceparent", f"00-{'0' * 32}-{SPAN}-01")], 1.0, [None]),
    ],
)
def test_who_decides_what_is_traced(tmp_path, made, headers, share, traces):
    with traced(tmp_path, trace_share=share) as channel:
        asking = with_headers(channel, headers)
        with pytest.raises(SessionNotFound):
            raw.call(asking, "MatVec", raw.product("MatVec", "none", V))
    found = made.named("curvd.v1.CurvatureService/MatVec")
    ids = [trace.format_trace_id(span.context.trace_id) for span in found]
    assert len(ids) == len(traces)
    for trace_id, wanted in zip(ids, traces, strict=True):
        assert wanted in (None, trace_id) and int(trace_id, 16)
    if not traces:
        assert not made.get_finished_spans()


def test_a_call_of_thousands_of_blocks_has_not_as_many_spans(
    tmp_path, made, monkeypatch
):
    monkeypatch.setattr(tracing, "_MOST", 6)
    with traced(tmp_path) as channel:
        session = raw.fake_session(channel)
        data = raw.file_of({"v": np.ones((300, 5))})
        raw.call(channel, "MatMat", raw.product("MatMat", session.id, data))
    (call,) = made.named("curvd.v1.CurvatureService/MatMat")
    assert sum(map(len, below(made, call).values())) == 6
    assert call.attributes["curvd.spans_left_out"] > 10


class Context:
    """As much of a call as a gate looks at."""

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def header(self, name):
        return {"traceparent": f"00-{TRACE}-{SPAN}-00"}.get(name, "")

    def add_done_callback(self, callback):
        raise AssertionError("nobody wants to know")


async def python_calls(gate):
    """Python's calls of one call that passes a gate."""
    counted = []

    async def answer():
        return None

    def note(frame, event, arg):
        if event == "call":
            counted.append(frame.f_code.co_qualname)

    await gate.call(RPCS["MatVec"], Context(), answer)
    sys.setprofile(note)
    try:
        await gate.call(RPCS["MatVec"], Context(), answer)
    finally:
        sys.setprofile(None)
    return counted


async def test_what_is_not_traced_costs_nothing(made):
    off = await python_calls(Gate())
    out = await python_calls(Gate(tracing=tracing.Tracing(made.provider, 0.0)))
    assert not [name for name in off if "race" in name]
    assert len(out) - len(off) < 60  # whatever the call computes
    assert not made.get_finished_spans()


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans by OTLP, as collectors do."""

    def __init__(self):
        self.taken, self._lock = [], threading.Lock()

    def Export(self, request, context):
        with self._lock:
            self.taken.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self):
        """Service and span of all that came."""
        return [
            (attribute.value.string_value, span)
            for request in self.taken
            for resource in request.resource_spans
            for attribute in resource.resource.attributes
            if attribute.key == "service.name"
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@contextlib.contextmanager
def collecting():
    collector = Collector()
    end = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, end)
    port = end.add_insecure_port("127.0.0.1:0")
    end.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        end.stop(None).wait(60)


def test_a_collector_gets_one_trace_of_both_sides(tmp_path, monkeypatch):
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    with collecting() as (collector, place):
        config = ServerConfig(
            listen="127.0.0.1:0", drain_s=0.0, data_dir=tmp_path, traces=place
        )
        here = TracerProvider(
            resource=Resource.create({"service.name": "training"}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=place, insecure=True)
        here.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(trace, "get_tracer", here.get_tracer)
        with (
            serve_in_thread(config, device=FakeDevice()) as target,
            Channels(target) as channel,
            curvd.connect(target, config=curvd.ClientConfig(tracing=True)) as client,
        ):
            session = client.session(raw.fake_session(channel).id)
            session.hessian() @ np.ones(5)
        here.shutdown()
        products = {
            service: span
            for service, span in collector.spans()
            if span.name == "curvd.v1.CurvatureService/Multiply"
        }
        assert products.keys() == {"training", "curvd"}
        ours, theirs = products["training"], products["curvd"]
        assert theirs.trace_id == ours.trace_id
        assert theirs.parent_span_id == ours.span_id
        parts = [s for _, s in collector.spans() if s.parent_span_id == theirs.span_id]
        assert {"compute", "send"} <= {span.name for span in parts}


def test_a_collector_that_is_away_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "_FLUSH_S", 0.1)
    with collecting() as (_, place):
        pass
    with server(tmp_path, traces=place) as channel:
        session = raw.fake_session(channel)
        raw.call(channel, "MatVec", raw.product("MatVec", session.id, V))


def test_who_has_no_opentelemetry_is_told_what_to_install(tmp_path, monkeypatch):
    for name in ("curvd_server.transport.tracing", "curvd._transport.tracing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(sys.modules["curvd_server.transport"], "tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(InvalidSpec, match=r"--traces needs OpenTelemetry.*\[otel\]"):
        with server(tmp_path, traces=ANYWHERE):
            pass
    config = curvd.ClientConfig(tracing=True)
    with pytest.raises(InvalidSpec, match=r"tracing=True.*needs OpenTelemetry"):
        curvd.connect("127.0.0.1:1", config=config)


@pytest.mark.parametrize(
    "place", ["127.0.0.1:4317", "http://", "ftp://a:1", "http://a"]
)
def test_a_place_that_is_none_is_refused(tmp_path, place):
    with pytest.raises(InvalidSpec, match="traces must be where a collector"):
        ServerConfig(data_dir=tmp_path, traces=place)
