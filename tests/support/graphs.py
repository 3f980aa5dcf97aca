"""Graphs made by hand, for tests that attack the server with them."""

import torch

from curvd.contract import graph_ops
from curvd.v1 import graph_pb2 as pb


class Ref(int):
    """The number of a value."""


def literal(value):
    if value is None:
        return pb.GraphLiteral()
    if isinstance(value, pb.GraphLiteral):
        return value
    kinds = {
        Ref: "value",
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "text",
    }
    return pb.GraphLiteral(**{kinds[type(value)]: value})


def argument(value, name=""):
    if isinstance(value, list):
        several = pb.GraphLiterals(items=[literal(v) for v in value])
        return pb.GraphArgument(name=name, literals=several)
    if value is None:
        return pb.GraphArgument(name=name)
    return pb.GraphArgument(name=name, literal=literal(value))


def node(operator, *arguments, **options):
    return pb.GraphNode(
        operator=operator,
        arguments=[
            *(argument(a) for a in arguments),
            *(argument(a, name) for name, a in options.items()),
        ],
        source=1,
    )


def dtype(name):
    return pb.GraphLiteral(dtype=name)


def memory_format(name):
    return pb.GraphLiteral(memory_format=name)


X, W = Ref(0), Ref(1)
"""The input [B, 4] and the parameter [4, 4] of `graph`."""


def graph(*nodes, output=None, **changes):
    """A graph with one input, one parameter and some nodes, the first of them value 2."""
    return pb.Graph(
        **{
            "version": graph_ops.VERSION,
            "inputs": [pb.GraphInput(name="x", dtype="F32", shape=[4])],
            "tensors": [
                pb.GraphTensor(
                    names=["w"],
                    role=pb.GRAPH_TENSOR_ROLE_PARAMETER,
                    dtype="F32",
                    shape=[4, 4],
                )
            ],
            "nodes": nodes,
            "outputs": [len(nodes) + 1 if output is None else output],
            "sources": ["net.py:7 in forward"],
            "dtype": "F32",
        }
        | changes
    )


HONEST = [
    graph(
        node("aten.mm.default", X, W),
        node("aten.relu.default", Ref(2)),
        node("aten.sum.default", Ref(3)),
    ),
    graph(
        node("sym.size", X, 0),
        node("aten.zeros.default", [Ref(2), 4], dtype=dtype("F32")),
        node("aten.add.Tensor", X, Ref(3), alpha=2),
        node("aten.split.Tensor", Ref(4), 2, 1),
        node("sym.item", Ref(5), 1),
        node("aten.softmax.int", Ref(6), -1),
    ),
]
"""Where mutations start from."""


def filled(shape, kind):
    """A tensor for a run: small numbers."""
    from curvd_server.graph.execution.operators import DTYPES

    return (
        torch
        .arange(torch.Size(shape).numel())
        .reshape(shape)
        .remainder(3)
        .to(DTYPES[kind])
    )
