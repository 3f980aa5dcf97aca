"""A traced call tells what each worker took for it."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("opentelemetry")
from support.fleets import ThreadLauncher
from support.small_net import open_session
from support.spans import Spans, below

import curvd
from curvd_server import app
from curvd_server.config import ServerConfig
from curvd_server.transport import tracing

RANKS = [0, 1]
COLUMNS = 40
"""More than run together: two blocks."""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The spans of an opening and of two products, of a server that has ended."""
    spans = Spans()
    monkeypatch.setattr(tracing, "provider_of", lambda *args: spans.provider)
    monkeypatch.setattr(app, "LocalLauncher", ThreadLauncher)
    config = ServerConfig(
        listen="127.0.0.1:0",
        drain_s=0.0,
        data_dir=tmp_path,
        devices="cpu:0,cpu:1",
        traces="http://127.0.0.1:4317",
    )
    with app.serve_in_thread(config) as target, curvd.connect(target) as client:
        session = open_session(client)
        operator, size = session.hessian(), session.layout.size
        operator.matvec(np.ones(size))
        operator.matmat(np.ones((size, COLUMNS)))
    return spans


def of_workers(made, call):
    """The spans of workers in a call, by command and rank."""
    found = {}
    for span in below(made, call)["compute"]:
        command = span.attributes.get("curvd.command")
        if command is not None:
            ranks = found.setdefault(command, {})
            ranks.setdefault(span.attributes["curvd.rank"], []).append(span)
    return found


@pytest.mark.parametrize("blocks", [1, 2])
def test_each_block_of_a_product_has_a_span_of_each_rank(made, blocks):
    calls = [
        span
        for span in made.get_finished_spans()
        if span.name.startswith("curvd.v1.CurvatureService/")
    ]
    assert len(calls) == 2
    call = calls[blocks - 1]
    runs = [
        span
        for span in below(made, call)["compute"]
        if "curvd.rank" not in span.attributes
    ]
    assert len(runs) == blocks
    ranks = of_workers(made, call)["Product"]
    assert sorted(ranks) == RANKS
    for rank, spans in ranks.items():
        assert len(spans) == blocks
        for run, span in zip(runs, spans, strict=True):
            assert span.context.trace_id == call.context.trace_id
            assert span.attributes["curvd.device"] == f"cpu:{rank}"
            assert run.start_time <= span.start_time < span.end_time <= run.end_time
            took_s = (span.end_time - span.start_time) / 1e9
            assert 0 < span.attributes["curvd.device_s"] <= took_s + 1e-6
            assert span.attributes["curvd.waited_s"] >= 0


def test_an_opening_tells_what_workers_made(made):
    (call,) = made.named("curvd.v1.SessionService/CreateSession")
    found = of_workers(made, call)
    for command in ("Load", "Build"):
        assert sorted(found[command]) == RANKS
    assert len(found["Decide"]) == 1  # one chooses the plan for all
