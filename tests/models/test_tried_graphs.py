"""Graphs are decoded and tried once for each size, and refused as if they never had been."""

import pytest

torch = pytest.importorskip("torch")
from support.graphs import Ref, W, X, graph, node  # noqa: E402

from curvd.contract.specs import SerializedGraph  # noqa: E402
from curvd.errors import InvalidGraph, LimitExceeded  # noqa: E402
from curvd_server.graph.decoder import canonical, decode  # noqa: E402
from curvd_server.graph.execution import Interpreter, dry_run  # noqa: E402
from curvd_server.models import tried_graphs  # noqa: E402
from curvd_server.models.tried_graphs import TriedGraphs  # noqa: E402

PLENTY = 1 << 20


def net(*last):
    nodes = (node("aten.mm.default", X, W), node("aten.relu.default", Ref(2)), *last)
    return SerializedGraph(canonical(graph(*nodes)))


@pytest.fixture
def runs(monkeypatch):
    """Sizes of the mini-batches that graphs were run with."""
    sizes = []

    def counted(interpreter, *, batch, limit_bytes):
        sizes.append(batch)
        return dry_run(interpreter, batch=batch, limit_bytes=limit_bytes)

    monkeypatch.setattr(tried_graphs, "dry_run", counted)
    return sizes


def test_a_graph_of_the_same_bytes_is_run_once_for_each_size(runs):
    graphs = TriedGraphs(2)
    first, outputs = graphs.tried(net(), 5, PLENTY)
    again, others = graphs.tried(SerializedGraph(bytes(net())), 5, PLENTY)
    assert again is first and runs == [5]
    assert [t.shape for t in others] == [t.shape for t in outputs] == [(5, 4)]
    assert graphs.tried(net(), 7, PLENTY)[1][0].shape == (7, 4)
    assert runs == [5, 7]


def test_another_graph_is_another(runs):
    graphs = TriedGraphs(2)
    first, _ = graphs.tried(net(), 5, PLENTY)
    other, outputs = graphs.tried(net(node("aten.t.default", Ref(3))), 5, PLENTY)
    assert other is not first and outputs[0].shape == (4, 5)


def test_what_a_run_needs_is_compared_with_the_memory_of_each_time():
    graphs, rows = TriedGraphs(2), 100
    interpreter = Interpreter(decode(net()))
    peak = dry_run(interpreter, batch=rows, limit_bytes=PLENTY).peak_bytes
    # The weight, and input, product and its relu, two of which live at once.
    assert peak == 4 * (4 * 4 + 2 * rows * 4)
    graphs.tried(net(), rows, PLENTY)
    graphs.tried(net(), rows, peak)
    with pytest.raises(LimitExceeded, match=f"the device has {peak - 1}") as known:
        graphs.tried(net(), rows, peak - 1)
    with pytest.raises(LimitExceeded) as fresh:
        TriedGraphs(2).tried(net(), rows, peak - 1)
    assert str(known.value) == str(fresh.value)
    graphs.tried(net(), rows, peak)  # there is as much again


def test_what_is_refused_is_not_kept(runs):
    graphs = TriedGraphs(2)
    wrong = net(node("aten.mm.default", Ref(3), X))
    for _ in range(2):
        with pytest.raises(InvalidGraph, match="refuses its arguments"):
            graphs.tried(wrong, 5, PLENTY)
    assert not len(graphs) and runs == [5, 5]


def test_the_longest_unused_graph_and_size_are_forgotten(runs):
    graphs = TriedGraphs(2)
    one, two, three = (net(*[node("aten.relu.default", Ref(3))] * k) for k in range(3))
    for each in (one, two, one, three):
        graphs.tried(each, 5, PLENTY)
    assert len(graphs) == 2 and runs == [5, 5, 5]
    graphs.tried(one, 5, PLENTY)
    assert runs == [5, 5, 5]
    graphs.tried(two, 5, PLENTY)
    assert runs == [5, 5, 5, 5]
    for size in range(5, 5 + tried_graphs.SIZES + 1):
        graphs.tried(one, size, PLENTY)
    before = len(runs)
    graphs.tried(one, 5, PLENTY)
    assert len(runs) == before + 1
