"""Elementwise chains of a linear program: what they compute, and in how many passes."""

import pytest

torch = pytest.importorskip("torch")
from support.reference import (  # noqa: E402
    central_difference,
    columns,
    dense_ggn,
    error,
)
from torch import nn  # noqa: E402

from curvd.contract import DatasetSpec, Dtype, LossSpec, OperatorSpec  # noqa: E402
from curvd_server.engine.objective import Problem, tangents_of  # noqa: E402
from curvd_server.engine.operators.linearize import program  # noqa: E402

aten = torch.ops.aten
CHAINS = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.addcmul.default,
    aten.neg.default,
    aten.clone.default,
    aten.div.Scalar,
}


class Arithmetic(nn.Module):
    """Differences, shares, gates, a square and a residual; nothing that is linear alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 6)
        self.last, self.norm = nn.Linear(6, 2), nn.LayerNorm(6)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        g = nn.functional.silu(self.second(h) / 3 - h)
        h = (h - 0.5 * g) * torch.sigmoid(g) + h
        h = self.norm(h - g**2) - h.mean(1, keepdim=True) * g
        return self.last(-h / (1 + h**2))


class Pooled(nn.Module):
    """Convolutions with group norms and a pooling between."""

    def __init__(self, pool):
        super().__init__()
        self.enter, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.pool, self.again = pool, nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        x = self.pool(nn.functional.silu(self.norm(self.enter(x))))
        return nn.functional.gelu(self.again(x)).mean((2, 3))


def loaded(module, *row, rows=3):
    torch.manual_seed(0)
    module = module().double()
    arrays = {"x": torch.randn(rows, *row).double(), "y": torch.randn(rows, 2).double()}
    data = DatasetSpec(inputs=("x",), target="y", batch_size=rows)
    return Problem.load(
        module, {}, arrays, data, LossSpec(name="mse"), dtype=Dtype.FLOAT64
    )


def product(problem, kind, v, *, batched=False, block=None):
    block = block or range(len(problem.parameters))
    linear = program(problem, OperatorSpec(kind=kind), problem.data[0])
    tangents = tangents_of(v, problem.layout)[block.start : block.stop]
    rows = linear.product(tangents, block, batched=batched)
    return torch.cat([r.reshape(*v.shape[:-1], -1) for r in rows], -1)


def whole_kernel(problem):
    linear = program(problem, OperatorSpec(), problem.data[0])
    block = range(len(problem.parameters))
    return linear.code.kernel(block, block).module.graph


def passes(problem, shape):
    """Count what walks over tensors of a shape and is no matrix product."""
    return sum(
        node.target in CHAINS and tuple(node.meta["val"].shape) == shape
        for node in whole_kernel(problem).nodes
    )


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("batched", [False, True])
def test_chains_are_those_of_the_definition(kind, batched):
    problem = loaded(Arithmetic, 3)
    V = columns(problem, 3)
    if kind == "hessian":
        want = torch.stack([central_difference(problem, v) for v in V])
    else:
        want = V @ dense_ggn(problem)
    if batched:
        got = product(problem, kind, V, batched=True)
    else:
        got = torch.stack([product(problem, kind, v) for v in V])
    assert error(got, want) < 1e-8


@pytest.mark.parametrize("first", range(0, 8, 2))
def test_a_block_of_chains_is_the_blocks_own(first):
    """Where the other tangents are zero, sums and differences keep one side."""
    problem = loaded(Arithmetic, 3)
    block = range(first, first + 2)
    inside = problem.layout.parameters[block.start : block.stop]
    where = slice(inside[0].offset, inside[-1].offset + inside[-1].size)
    v = torch.zeros(problem.layout.size, dtype=torch.float64)
    v[where] = columns(problem, 1)[0][where]
    got = product(problem, "hessian", v, block=block)
    assert error(got, central_difference(problem, v)[where]) < 1e-8


@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus])
def test_an_activation_takes_a_pass_for_each_tangent(act):
    """One forwards, and two backwards: of the cotangent's tangent, and its own input's."""
    problem = loaded(lambda: nn.Sequential(nn.Linear(3, 7), act(), nn.Linear(7, 2)), 3)
    assert passes(problem, (3, 7)) == 3


def test_no_constant_is_kept_that_nothing_reads():
    problem = loaded(Arithmetic, 3)
    linear = program(problem, OperatorSpec(), problem.data[0])
    read = {n.target for n in linear.code.graph.nodes if n.op == "get_attr"}
    assert set(linear.constants) == read


POOLS = {
    "square": lambda: nn.AvgPool2d(2),
    "rectangle": lambda: nn.AvgPool2d((2, 3)),
    "row": lambda: nn.AvgPool2d((1, 4)),
    "divisor": lambda: nn.AvgPool2d(3, divisor_override=5),
    "overlapping": lambda: nn.AvgPool2d(3, 2),
    "padded": lambda: nn.AvgPool2d(2, padding=1),
    "padding without": lambda: nn.AvgPool2d(4, 4, 2, count_include_pad=False),
    "left over": lambda: nn.AvgPool2d(5),
    "ceiling": lambda: nn.AvgPool2d(5, ceil_mode=True),
    "large": lambda: nn.AvgPool2d(6),
}
TO_SUMS = {"square", "rectangle", "row", "divisor"}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_is_that_of_the_definition(name):
    problem = loaded(lambda: Pooled(POOLS[name]()), 1, 12, 12)
    V = columns(problem, 2)
    want = torch.stack([central_difference(problem, v) for v in V])
    assert error(torch.stack([product(problem, "hessian", v) for v in V]), want) < 1e-8
    assert error(product(problem, "hessian", V, batched=True), want) < 1e-8
    targets = {node.target for node in whole_kernel(problem).nodes}
    pooled = {aten.avg_pool2d.default, aten.avg_pool2d_backward.default} & targets
    assert not pooled if name in TO_SUMS else len(pooled) == 2
