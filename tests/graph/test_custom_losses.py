"""Losses as graphs: what is none is refused, and what is one counts as it says."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from support.graphs import (  # noqa: E402
    Ref,
    graph,
    node,
)

from curvd.contract.specs import SerializedGraph  # noqa: E402
from curvd.errors import (  # noqa: E402
    InvalidGraph,
    InvalidSpec,
    LimitExceeded,
)
from curvd.v1 import graph_pb2 as pb  # noqa: E402
from curvd_server.graph.decoder import canonical  # noqa: E402
from curvd_server.graph.execution.loss import CustomLoss  # noqa: E402


def loss(*nodes, outputs=None, constants=(), inputs=("z", "y")):
    """A loss of outputs [B, 3] and targets [B, 3]; its first node is value 2."""
    return graph(
        *nodes,
        inputs=[pb.GraphInput(name=n, dtype="F32", shape=[3]) for n in inputs],
        tensors=constants,
        outputs=[len(inputs) + len(constants) + len(nodes) - 1]
        if outputs is None
        else outputs,
    )


SUM = node("aten.sum.default", Ref(0))
COUNT = node("aten.sum.default", Ref(1))


def constant(**changes):
    return pb.GraphTensor(
        **{"names": ["c"], "role": 3, "dtype": "F32", "shape": [3], "data": bytes(12)}
        | changes
    )


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (None, r"needs a graph: use curvd\.export_loss"),
        (loss(SUM, inputs=("z",)), "1 inputs and 1 outputs"),
        (loss(SUM, inputs=("z", "y", "x")), "3 inputs and 1 outputs"),
        (loss(SUM, COUNT, outputs=[2, 3, 3]), "2 inputs and 3 outputs"),
        (loss(SUM, SUM, outputs=[2, 3]), "must not depend on the model's outputs"),
        (loss(node("aten.relu.default", Ref(0))), r"scalars; this is .* \[2, 3\]"),
        (loss(node("aten.argmax.default", Ref(0))), r"scalars; this is torch\.int64"),
        (
            loss(SUM, node("aten.argmax.default", Ref(1)), outputs=[2, 3]),
            r"scalars; this is torch\.int64",
        ),
        (loss(node("sym.size", Ref(0), 0)), "returns int, not a tensor"),
        (
            loss(SUM, constants=[constant(data=bytes(11))], outputs=[3]),
            "has role buffer and 11",
        ),
        (
            loss(SUM, constants=[constant(shape=[2**40])], outputs=[3]),
            "4398046511104 bytes|need",
        ),
        (loss(SUM, constants=[constant(role=1)], outputs=[3]), "it has role parameter"),
    ],
)
def test_a_graph_that_is_no_loss_is_refused(message, match):
    data = SerializedGraph(b"" if message is None else canonical(message))
    with pytest.raises((InvalidGraph, LimitExceeded), match=match):
        CustomLoss.of(data, torch.float32, torch.device("cpu"))


def test_a_loss_counts_what_its_graph_says():
    half = constant(data=np.full(3, 0.5, np.float32).tobytes())
    message = loss(
        SUM,
        node("aten.mul.Tensor", Ref(1), Ref(2)),
        node("aten.sum.default", Ref(4)),
        constants=[half],
        outputs=[3, 5],
    )
    data = SerializedGraph(canonical(message))
    found = CustomLoss.of(data, torch.float32, torch.device("cpu"))
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert found.counts(targets).tolist() == [1.0, 0.0]
    assert float(found.sum(torch.ones(2, 3), targets)) == 6.0
    found.check(torch.ones(2, 3), targets)
    with pytest.raises(InvalidSpec, match="negative weight"):
        found.check(torch.ones(2, 3), -targets)
    with pytest.raises(InvalidSpec, match=r"\[3\] per data point"):
        found.check(torch.ones(2, 4), targets)


def test_integer_targets_of_a_loss_stay_integers():
    message = loss(node("aten.cross_entropy_loss.default", Ref(0), Ref(1), None, 2))
    message.inputs[1].CopyFrom(pb.GraphInput(name="y", dtype="I64"))
    data = SerializedGraph(canonical(message))
    found = CustomLoss.of(data, torch.float32, torch.device("cpu"))
    narrow = torch.tensor([1, 2], dtype=torch.int32)
    assert found.prepared(torch.float32, narrow).dtype is torch.int64
    with pytest.raises(InvalidSpec, match=r"int64 targets, got torch\.float32"):
        found.prepared(torch.float32, torch.ones(2))
