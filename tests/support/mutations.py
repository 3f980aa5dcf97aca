"""Graphs that were changed at random places; from a seed, so that each can be had again."""

import functools
import random

import torch

from curvd.contract import graph_ops
from curvd.v1 import graph_pb2 as pb
from curvd_server.graph.execution import operators

NUMBERS = (0, 1, -1, 2, 3, 7, 64, 65_536, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
WORDS = (
    *sorted(graph_ops.WORDS),
    "",
    "ij,jk->ik",
    "...,...->",
    "__import__",
    "\0",
    "é",
)
DTYPES = (*graph_ops.ELEMENT_TYPES, "", "C64", "os")
NAMES = (
    "w",
    "x",
    "a.b",
    "a",
    "",
    ".",
    "..",
    "__class__",
    "forward",
    "../../x",
    "a" * 600,
)
OPERATORS = sorted(graph_ops.TENSOR_OPERATORS)
SIZES = sorted(graph_ops.SIZE_OPERATORS)
FOREIGN = (
    "aten.from_file.default",
    "aten.relu_.default",
    "prim.Print.default",
    "os.system",
)


@functools.cache
def allowed():
    """Every overload that a graph may use."""
    names = [
        f"aten.{name}.{overload}"
        for name in sorted(graph_ops.TENSOR_OPERATORS)
        for overload in getattr(torch.ops.aten, name).overloads()
    ]
    return [name for name in names if operators._overload(name) is not None]


def _overloads(rng):
    if rng.random() < 0.95:
        return rng.choice(allowed())
    name = rng.choice(OPERATORS)
    return f"aten.{name}.{rng.choice(getattr(torch.ops.aten, name).overloads())}"


def operator(rng):
    """Mostly one that is allowed."""
    kind = rng.random()
    if kind < 0.75:
        return _overloads(rng)
    return f"sym.{rng.choice(SIZES)}" if kind < 0.95 else rng.choice(FOREIGN)


def literal(rng, values):
    kind = rng.randrange(10)
    if kind < 4:
        return pb.GraphLiteral(value=rng.randrange(max(values, 1)))
    if kind == 4:
        return pb.GraphLiteral(boolean=rng.random() < 0.5)
    if kind < 7:
        return pb.GraphLiteral(integer=rng.choice(NUMBERS))
    if kind == 7:
        return pb.GraphLiteral(number=rng.choice(FLOATS))
    if kind == 8:
        return pb.GraphLiteral(text=rng.choice(WORDS))
    return rng.choice([
        pb.GraphLiteral(dtype=rng.choice(DTYPES)),
        pb.GraphLiteral(memory_format=rng.choice(graph_ops.MEMORY_FORMATS)),
        pb.GraphLiteral(),
    ])


def argument(rng, values, name=""):
    if rng.random() < 0.3:
        items = [literal(rng, values) for _ in range(rng.randrange(5))]
        if rng.random() < 0.5:
            items = [pb.GraphLiteral(integer=rng.choice(NUMBERS)) for _ in items]
        return pb.GraphArgument(name=name, literals=pb.GraphLiterals(items=items))
    return pb.GraphArgument(name=name, literal=literal(rng, values))


def fitting(rng, values):
    """A node whose arguments have the kinds that its schema names."""
    name = _overloads(rng)
    schema = getattr(
        getattr(torch.ops.aten, name.split(".")[1]), name.split(".")[2]
    )._schema
    made = pb.GraphNode(operator=name)
    named = rng.random() < 0.2
    for a in schema.arguments:
        if a.name in ("device", "layout", "pin_memory") or (
            a.has_default_value() and rng.random() < 0.6
        ):
            if not a.kwarg_only and a.has_default_value():
                break
            continue
        made.arguments.append(
            _fitting_argument(
                rng, values, str(a.type), a.name if a.kwarg_only or named else ""
            )
        )
    return made


def _fitting_argument(rng, values, kind, name):
    def small():
        return rng.choice((0, 1, 2, 3, 4, -1, -2) if rng.random() < 0.95 else NUMBERS)

    def one(kind):
        if "Tensor" in kind:
            return pb.GraphLiteral(value=rng.randrange(max(values, 1)))
        if "bool" in kind:
            return pb.GraphLiteral(boolean=rng.random() < 0.5)
        if "float" in kind:
            return pb.GraphLiteral(number=rng.choice((*FLOATS, 0.5, 2.0)))
        if "str" in kind:
            return pb.GraphLiteral(text=rng.choice(WORDS))
        if name == "dtype":
            return pb.GraphLiteral(dtype=rng.choice(graph_ops.ELEMENT_TYPES))
        if name == "memory_format":
            return pb.GraphLiteral(memory_format=rng.choice(graph_ops.MEMORY_FORMATS))
        return pb.GraphLiteral(integer=small())

    if "List" in kind:
        items = [one(kind) for _ in range(rng.randrange(1, 4))]
        return pb.GraphArgument(name=name, literals=pb.GraphLiterals(items=items))
    return pb.GraphArgument(name=name, literal=one(kind))


def mutated(honest, seed, count):
    """Change a graph at some places.

    Args:
        honest: Copied.
        seed: Makes the changes.
        count: How many.

    Returns:
        Another graph, perhaps still a sound one.
    """
    rng, message = random.Random(seed), pb.Graph()
    message.CopyFrom(honest)
    first = len(message.inputs) + len(message.tensors)
    for _ in range(count):
        at = rng.randrange(len(message.nodes)) if message.nodes else 0
        change = rng.randrange(12)
        if change == 0 and message.nodes:
            message.nodes[at].operator = operator(rng)
        elif change == 1 and message.nodes and message.nodes[at].arguments:
            k = rng.randrange(len(message.nodes[at].arguments))
            name = message.nodes[at].arguments[k].name
            message.nodes[at].arguments[k].CopyFrom(argument(rng, first + at, name))
        elif change == 2 and message.nodes:
            name = rng.choice(("", "dim", "self", "alpha", "nosuch"))
            message.nodes[at].arguments.append(argument(rng, first + at, name))
        elif change == 3 and message.nodes:
            del message.nodes[at]
        elif change in (4, 5, 6, 7):
            message.nodes.append(fitting(rng, first + len(message.nodes)))
        elif change == 8:
            message.outputs[:] = [rng.randrange(first + len(message.nodes) + 2)]
        elif change == 9:
            tensor = message.tensors.add(
                names=[rng.choice(NAMES)],
                role=rng.randrange(5),
                dtype=rng.choice(DTYPES),
                shape=[rng.choice(NUMBERS[:8]) for _ in range(rng.randrange(4))],
            )
            tensor.data = rng.randbytes(rng.randrange(9))
        elif change == 10 and message.tensors:
            message.tensors[0].shape[:] = [rng.choice(NUMBERS) for _ in range(2)]
        else:
            message.inputs[0].shape[:] = [
                rng.choice(NUMBERS[:8]) for _ in range(rng.randrange(4))
            ]
            message.inputs[0].dtype = rng.choice(DTYPES)
    if change in (4, 5, 6, 7):
        message.outputs[:] = [first + len(message.nodes) - 1]
    return message
