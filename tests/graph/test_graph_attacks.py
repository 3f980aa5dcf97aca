"""Hostile graphs: each attack gets one typed refusal, and nothing else happens."""

import math

import pytest

torch = pytest.importorskip("torch")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support.graphs import (  # noqa: E402
    HONEST,
    Ref,
    W,
    X,
    dtype,
    graph,
    memory_format,
    node,
)
from support.mutations import mutated  # noqa: E402

from curvd.contract import graph_ops  # noqa: E402
from curvd.contract.specs import ModelSpec  # noqa: E402
from curvd.errors import (  # noqa: E402
    CurvdError,
    InvalidGraph,
    InvalidSpec,
    LimitExceeded,
)
from curvd.v1 import graph_pb2 as pb  # noqa: E402
from curvd_server.device.torch_device import TorchDevice  # noqa: E402
from curvd_server.graph.decoder import canonical, decode  # noqa: E402
from curvd_server.graph.execution import dryrun  # noqa: E402
from curvd_server.graph.execution.interpret import Interpreter  # noqa: E402
from curvd_server.graph.execution.module import GraphModule  # noqa: E402
from curvd_server.storage.registry import model_spec  # noqa: E402

MM = node("aten.mm.default", X, W)


@pytest.fixture(scope="module")
def device():
    return TorchDevice({}, "cpu")


def register(device, message):
    """What happens at a registration, before a tensor is taken."""
    return device.architecture(ModelSpec(builder="", graph=canonical(message)))


def test_an_honest_graph_is_taken(device):
    found = register(device, graph(MM, node("aten.relu.default", Ref(2))))
    assert list(found.tensors) == ["w"]


@pytest.mark.parametrize(
    "operator",
    [
        "aten.from_file.default",
        "aten.__import__.default",
        "aten.relu.__import__('os').system",
        "aten.relu.__class__",
        "aten.relu.default\n",
        "aten..default",
        "prim.Print.default",
        "builtins.eval",
        "os.system",
        "sym.__class__",
        "sym.pow",
        "aten.as_strided.default",
        "aten.set_.source_Tensor",
        "aten.resize_.default",
        "aten.empty_like.default",
        "aten.empty.memory_format",
        "aten.new_empty.default",
        "aten.rand_like.default",
        "aten.bernoulli.default",
        "aten.dropout.default",
        "aten.relu_.default",
        "aten.copy_.default",
        "aten.item.default",
        "aten.to_sparse.default",
        "aten._weight_norm.default",
        "quantized.add.default",
        "a" * 10_000,
        "",
    ],
)
def test_an_operator_off_the_list_is_refused(device, operator):
    with pytest.raises(InvalidGraph, match=r"not on the list.*may use"):
        register(device, graph(node(operator, X)))


@pytest.mark.parametrize(
    ("operator", "why"),
    [
        ("aten.relu.out", "not pure"),
        ("aten.add.out", "not pure"),
        ("aten.eq.str", "not pure"),
        ("aten.add.str", "not pure"),
        ("aten.to.prim_Device", "not pure"),
        ("aten.index.list_Tensor", "not pure"),
        ("aten.cumsum.dimname", "not pure"),
        ("aten.relu.nosuchoverload", "does not exist"),
    ],
)
def test_an_overload_that_is_not_plain_is_refused(device, operator, why):
    with pytest.raises(InvalidGraph, match=rf"net\.py:7 in forward.*{why}"):
        register(device, graph(node(operator, X, X)))


def test_no_operator_on_the_list_writes_or_draws(device):
    from curvd_server.graph.execution.operators import _overload

    for name in graph_ops.TENSOR_OPERATORS:
        packet = getattr(torch.ops.aten, name)
        assert any(_overload(f"aten.{name}.{o}") for o in packet.overloads()), name
        for overload in packet.overloads():
            found = _overload(f"aten.{name}.{overload}")
            if found is not None:
                assert not found._schema.is_mutable
                assert torch.Tag.nondeterministic_seeded not in found.tags or name in (
                    # These draw only with a dropout that `resolve` refuses.
                    "lstm gru rnn_tanh rnn_relu scaled_dot_product_attention".split()
                ), name


@pytest.mark.parametrize(
    "text", ["__import__('os').system('id')", "floor_", "ij ", "trunc\0", "x" * 10_000]
)
def test_a_text_that_is_no_word_is_refused(device, text):
    divided = node("aten.div.Tensor_mode", X, X, rounding_mode=text)
    with pytest.raises(InvalidGraph, match="no word that operators take"):
        register(device, graph(divided))


def test_an_equation_is_for_einsum_only(device):
    einsum = node("aten.einsum.default", "ij,jk->ik", [X, W])
    assert register(device, graph(einsum)).tensors
    with pytest.raises(InvalidGraph, match="no word"):
        register(device, graph(node("aten.div.Tensor_mode", X, X, rounding_mode="ij,")))
    with pytest.raises(InvalidGraph, match="no word"):
        register(device, graph(node("aten.einsum.default", "ij;import os", [X, W])))


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (graph(node("aten.relu.default", Ref(2))), "only 2 are defined"),
        (
            graph(node("aten.relu.default", Ref(2**32 - 1))),
            "refers to value 4294967295",
        ),
        (graph(MM, output=3), "the graph's output refers to value 3"),
        (graph(MM, outputs=[]), "at least one input and one output"),
        (graph(MM, inputs=[]), "at least one|only 1"),
        (graph(MM, version=2), "version 2; this server reads version 1"),
        (graph(MM, dtype="I64"), "dtype must be one of"),
        (graph(MM, dtype="os"), "dtype must be one of"),
        (graph(node("aten.relu.default", X, nosuch=1)), "takes no argument 'nosuch'"),
        (graph(node("aten.relu.default", X, X)), "takes 1 positional"),
        (graph(node("aten.relu.default")), "needs argument 'self'"),
        (graph(node("aten.relu.default", X, self=X)), "or takes it once"),
        (graph(node("aten.zeros.default", [2], device="cpu")), "no word"),
        (graph(node("aten.zeros.default", [2], pin_memory=True)), "takes no argument"),
        (graph(node("aten.zeros.default", [2], layout=1)), "takes no argument"),
        (graph(node("aten.zeros.default", [2], dtype=dtype("C32"))), "unknown element"),
        (graph(node("aten.zeros.default", [2], dtype=6)), "'dtype' must be"),
        (graph(node("aten.clone.default", X, memory_format=1)), "'memory_format'"),
        (
            graph(
                node("aten.clone.default", X, memory_format=memory_format("blocked"))
            ),
            "unknown memory format 'blocked'",
        ),
        (graph(node("aten.relu.default", "none")), "must be Tensor"),
        (graph(node("aten.relu.default", dtype("F32"))), "must be Tensor"),
        (graph(node("aten.mul.Scalar", X, math.nan)), "a number is NaN"),
        (
            graph(node("aten.embedding.default", W, X, -1, True)),
            "no second derivative with scale_grad_by_freq",
        ),
        (
            graph(
                node("aten.scaled_dot_product_attention.default", W, W, W, None, 0.5)
            ),
            "draws random numbers",
        ),
        (graph(node("sym.add", 1, 2, name=3)), "no named arguments"),
        (graph(node("sym.size", X, 0), output=2), "returns int, not a tensor"),
        (graph(node("sym.item", X, 0)), "takes a sequence"),
        (graph(node("sym.size", X, W)), "takes a tensor and an axis"),
        (graph(node("sym.size", X, 7)), "refuses its arguments: IndexError"),
        (graph(node("sym.floordiv", 1, 0)), "ZeroDivisionError"),
        (graph(node("aten.mm.default", X, X)), "refuses its arguments"),
        (
            graph(node("aten.repeat.default", X, [2**62, 2**62])),
            "refuses its arguments",
        ),
        (graph(node("aten.index.Tensor", X, [X])), "refuses its arguments"),
    ],
)
def test_a_graph_that_is_not_sound_is_refused(device, message, match):
    with pytest.raises(InvalidGraph, match=match):
        register(device, message)


def tensors(*entries):
    made = [
        pb.GraphTensor(
            names=names, role=role, dtype=kind, shape=shape, data=b"".join(data)
        )
        for names, role, kind, shape, *data in entries
    ]
    return graph(node("aten.relu.default", X), tensors=made, output=len(made) + 1)


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (tensors(([], 1, "F32", [2])), "has no name"),
        (tensors(([""], 1, "F32", [2])), "1 to 512 printable"),
        (tensors((["a\n"], 1, "F32", [2])), "printable"),
        (tensors((["x" * 600], 1, "F32", [2])), "1 to 512"),
        (tensors((["a..b"], 1, "F32", [2])), "part of the dotted name is empty"),
        (tensors((["a"], 0, "F32", [2])), "unknown role 0"),
        (tensors((["a"], 9, "F32", [2])), "unknown role 9"),
        (tensors((["a"], 1, "I64", [2])), "only floating point"),
        (tensors((["a"], 1, "os", [2])), "unknown element type"),
        (tensors((["a"], 1, "F32", [-1])), "negative or larger"),
        (tensors((["a"], 1, "F32", [2**40, 2**40])), "negative or larger"),
        (tensors((["a", "a"], 1, "F32", [2])), "comes twice"),
        (tensors((["a"], 1, "F32", [2]), (["a.b"], 1, "F32", [2])), "lies inside"),
        (tensors((["__class__"], 1, "F32", [2])), "cannot be used"),
        (tensors((["forward"], 1, "F32", [2])), "cannot be used"),
        (tensors((["_parameters.w"], 1, "F32", [2])), "cannot be used"),
        (tensors((["__class__.__init__"], 3, "F32", [2])), "cannot be used"),
        (tensors((["_interpreter"], 3, "F32", [2])), "cannot be used"),
    ],
)
def test_a_manifest_that_is_not_sound_is_refused(device, message, match):
    with pytest.raises(InvalidGraph, match=match):
        register(device, message)


def test_names_are_never_paths(device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = register(device, tensors((["/x/\\x"], 3, "F32", [2])))
    assert list(found.tensors) == ["/x/\\x"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (graph(node("aten.zeros.default", [10**13])), "need 40000000000[0-9]* bytes"),
        (graph(node("aten.repeat.default", X, [2**20, 2**20])), "all that is needed"),
        (
            graph(*[
                node("aten.cat.default", [Ref(k), Ref(k)], 1)
                for k in (0, *range(2, 60))
            ]),
            "all that is needed|overflow",
        ),
        (
            graph(
                node("aten.zeros.default", [1]),
                node("aten.expand.default", Ref(2), [2**40]),
                node("aten.unbind.int", Ref(3)),
            ),
            "would return 1099511627776 tensors",
        ),
        (
            graph(
                node("aten.zeros.default", [1]),
                node("aten.expand.default", Ref(2), [2**40]),
                node("aten.split.Tensor", Ref(3), 1),
            ),
            "would return 1099511627776 tensors",
        ),
        (graph(node("aten.tensor_split.sections", X, 2**40)), "would return"),
        (graph(node("aten.tensor_split.sections", sections=2**40, self=X)), "would"),
        (
            graph(
                node("aten.zeros.default", [1]),
                node("aten.expand.default", Ref(2), [2**40]),
                node("sym.min", 1, 2),
                node("aten.split.Tensor", self=Ref(3), dim=-1, split_size=Ref(4)),
            ),
            "would return 1099511627776 tensors",
        ),
        (
            graph(
                node("aten.zeros.default", [1, 1, 4]),
                node("aten.expand.default", Ref(2), [2**40, -1, -1]),
                node(
                    "aten.rnn_tanh.input",
                    *(Ref(3), Ref(2), [W, W], False, 1, 0.0, False, False, False),
                ),
            ),
            "would walk 1099511627776 steps",
        ),
        (tensors((["a"], 1, "F32", [2**49])), "tensors of the graph need"),
        (graph(MM, nodes=[MM] * (graph_ops.MAX_NODES + 1)), "50001 nodes"),
        (graph(node("aten.cat.default", [X] * 5000)), "5000 items of a list"),
        (graph(node("aten.relu.default", *[X] * 100)), "arguments of"),
        (
            graph(MM, inputs=[pb.GraphInput(name="x" * 500, dtype="F32")] * 5000),
            "bytes",
        ),
        (graph(MM, sources=["x" * 2**21]), "2 MiB|bytes; the limit is 2097152"),
        (tensors((["a"], 3, "F32", [2], b"x" * 70_000)), "bytes of an inline tensor"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_made(device, message, match):
    with pytest.raises((LimitExceeded, InvalidGraph), match=match):
        register(device, message)


def test_sizes_do_not_grow_without_bound(device):
    squares = [node("sym.mul", 10**9, 10**9)]
    squares += [node("sym.mul", Ref(k), Ref(k)) for k in range(2, 40)]
    with pytest.raises(InvalidGraph, match="OverflowError"):
        register(device, graph(*squares))


def test_trying_a_graph_ends_in_time(device, monkeypatch):
    monkeypatch.setattr(dryrun, "LIMIT_S", 0.0)
    with pytest.raises(LimitExceeded, match=r"took longer than 0\.0 s"):
        register(device, graph(MM))


def test_no_message_of_a_graph_contains_itself():
    """Two hundred lists inside each other cannot even be written."""

    def depth(message, above=()):
        assert message.full_name not in above
        inner = [f.message_type for f in message.fields if f.message_type is not None]
        return 1 + max(
            (depth(m, (*above, message.full_name)) for m in inner), default=0
        )

    assert depth(pb.Graph.DESCRIPTOR) == 5


def test_bytes_that_are_no_graph_are_refused():
    with pytest.raises(InvalidGraph, match="no message"):
        decode(b"\x80\x04\x95pickle")


def test_unknown_fields_do_not_change_what_a_graph_is():
    honest = canonical(graph(MM))
    padded = pb.Graph.FromString(honest + b"\xfa\x3f\x04evil")
    assert canonical(padded) == honest


def test_infinities_are_numbers_like_others(device):
    filled = node("aten.masked_fill.Scalar", X, Ref(2), -math.inf)
    mask = node("aten.gt.Scalar", X, 0.0)
    assert register(device, graph(mask, filled)).tensors


def test_no_operator_changes_what_was_handed_in():
    message = graph(
        node("aten.fill.Scalar", W, 0.0),
        node("aten.clamp_min.default", X, 0.0),
        node("aten.arange.default", 4, dtype=dtype("I64")),
        node("aten.index_add.default", W, 0, Ref(4), W),
        node("aten.mm.default", Ref(3), Ref(5)),
    )
    run = GraphModule(Interpreter(decode(canonical(message))))
    w, x = torch.randn(4, 4), torch.randn(3, 4)
    before = w.clone(), x.clone()
    torch.func.functional_call(run, {"w": w}, (x,))
    assert torch.equal(w, before[0])
    assert torch.equal(x, before[1])


def test_running_statistics_are_never_written_to(device):
    buffers = [
        pb.GraphTensor(names=[n], role=3, dtype="F32", shape=[4]) for n in ("m", "v")
    ]
    message = graph(tensors=buffers)
    message.nodes.append(
        node(
            "aten.batch_norm.default",
            *(X, None, None, Ref(1), Ref(2), True, 0.5, 1e-5, False),
        )
    )
    message.nodes.append(
        node(
            "aten.batch_norm.default",
            input=X,
            weight=None,
            bias=None,
            running_mean=Ref(1),
            running_var=Ref(2),
            training=True,
            momentum=0.5,
            eps=1e-5,
            cudnn_enabled=False,
        )
    )
    message.nodes.append(node("aten.add.Tensor", Ref(3), Ref(4)))
    message.outputs[:] = [5]
    run = GraphModule(Interpreter(decode(canonical(message))))
    run.use_batch_statistics()
    mean, variance = torch.zeros(4), torch.ones(4)
    torch.func.functional_call(run, {"m": mean, "v": variance}, (torch.randn(8, 4),))
    assert not mean.any() and torch.equal(variance, torch.ones(4))


def test_instance_norm_leaves_what_it_is_given_alone():
    buffers = [
        pb.GraphTensor(names=[n], role=3, dtype="F32", shape=[4]) for n in ("m", "v")
    ]
    message = graph(
        tensors=buffers, inputs=[pb.GraphInput(name="x", dtype="F32", shape=[4, 5])]
    )
    arguments = (X, None, None, Ref(1), Ref(2), True, 0.5, 1e-5, False)
    message.nodes.append(node("aten.instance_norm.default", *arguments))
    message.outputs[:] = [3]
    run = GraphModule(Interpreter(decode(canonical(message))))
    mean, variance = torch.zeros(4), torch.ones(4)
    torch.func.functional_call(run, {"m": mean, "v": variance}, (torch.randn(8, 4, 5),))
    assert not mean.any() and torch.equal(variance, torch.ones(4))


def test_chance_cannot_come_in_by_a_reference(device):
    half = node("sym.truediv", 1, 2)
    attention = node("aten.scaled_dot_product_attention.default", W, W, W, None, Ref(2))
    with pytest.raises(InvalidGraph, match="needs 'dropout_p' as a literal"):
        register(device, graph(half, attention))


def test_a_model_has_a_builder_or_a_graph():
    with pytest.raises(InvalidSpec, match="a builder or a graph, not both"):
        model_spec("mlp", "", graph(MM))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**63), st.integers(1, 6))
def test_mutated_graphs_are_taken_or_refused(device, seed, count):
    message = mutated(HONEST[seed % len(HONEST)], seed, count)
    try:
        register(device, message)
    except CurvdError:
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_a_typed_way(data):
    honest = canonical(HONEST[0])
    for attack in (data, honest + data, honest[: len(data)] + data):
        try:
            Interpreter(decode(attack))
        except CurvdError:
            pass
