"""What a linear program computes, and that it computes nothing else."""

from collections import Counter

import pytest

torch = pytest.importorskip("torch")
from curvd.contract.enums import Dtype  # noqa: E402
from curvd.contract.specs import DatasetSpec, LossSpec, OperatorSpec  # noqa: E402
from curvd_server.engine.objective.objective import Problem  # noqa: E402
from curvd_server.engine.objective.parameter_slices import tangents_of  # noqa: E402
from curvd_server.engine.operators import linearize  # noqa: E402
from curvd_server.engine.operators.linearize import program  # noqa: E402
from curvd_server.models import builders  # noqa: E402

aten = torch.ops.aten
MODELS = {
    "resnet18": ({"width": 4}, lambda: torch.randn(3, 3, 8, 8), (3,), 10),
    "gpt": (
        {"vocabulary": 7, "context": 4, "layers": 2, "width": 8, "heads": 2},
        lambda: torch.randint(0, 7, (3, 4)),
        (3, 4),
        7,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def problem(request):
    config, inputs, targets, classes = MODELS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = builders.BUILDERS[request.param](config).eval()
        arrays = {"x": inputs(), "y": torch.randint(0, classes, targets)}
    return Problem.load(
        module,
        module.state_dict(),
        arrays,
        DatasetSpec(inputs=("x",), target="y", batch_size=3),
        LossSpec(name="cross_entropy"),
        dtype=Dtype.FLOAT64,
    )


def operations(linear, block: range) -> Counter:
    graph = linear.code.kernel(block, block).module.graph
    return Counter(n.target for n in graph.nodes if n.op == "call_function")


def test_nothing_is_copied_and_no_zeros_are_added(problem):
    linear = program(problem, OperatorSpec(), problem.data[0])
    found = operations(linear, range(len(problem.parameters)))
    for idle in (aten._to_copy.default, aten.zeros_like.default, torch.zeros):
        assert not found[idle]


def test_sums_of_products_take_one_operation(problem):
    linear = program(problem, OperatorSpec(), problem.data[0])
    found = operations(linear, range(len(problem.parameters)))
    assert found[aten.addcmul.default]
    # Each linear layer multiplies twice for its output, inputs' and weights' gradient.
    assert found[aten.addmm.default] == found[aten.mm.default]


def test_a_block_does_not_multiply_by_zeros(problem):
    """In a block each product has one side only: the other's tangent is zero."""
    linear = program(problem, OperatorSpec(), problem.data[0])
    weight = len(problem.parameters) - 2  # of the last layer
    found = operations(linear, range(weight, weight + 1))
    assert not found[torch.zeros]
    assert not found[aten.addmm.default]


@pytest.mark.parametrize("batched", [False, True])
def test_every_block_agrees_with_double_backward(problem, batched):
    data, size = problem.data[0], problem.layout.size
    columns = torch.randn(2, size, dtype=torch.float64)
    tangents = tangents_of(columns if batched else columns[0], problem.layout)
    ours = program(problem, OperatorSpec(), data)
    other = linearize.MODES["double_backward"](problem, OperatorSpec(), data)
    n = len(problem.parameters)
    for block in (range(n), range(2), range(n // 3, n // 2), range(n - 2, n)):
        inside = tangents[block.start : block.stop]
        rows = ours.product(inside, block, batched=batched)
        want = other.product(inside, block, batched=batched)
        for row, right in zip(rows, want, strict=True):
            torch.testing.assert_close(row, right, rtol=1e-9, atol=1e-12)
