"""Recurrent layers in float32: oneDNN's kernel for them cannot be differentiated forwards."""

import pytest

torch = pytest.importorskip("torch")
from support.reference import (  # noqa: E402
    central_difference,
    columns,
    dense_ggn,
    error,
    flat,
    problem_of,
)
from support.zoo import ANIMALS  # noqa: E402

import curvd  # noqa: E402
from curvd.contract import DatasetSpec, Dtype, LossSpec, OperatorSpec  # noqa: E402
from curvd_server.engine.objective import Problem, tangents_of  # noqa: E402
from curvd_server.engine.operators.linearize import MODES, program  # noqa: E402
from curvd_server.graph import canonical, decode  # noqa: E402
from curvd_server.graph.execution import GraphModule, Interpreter  # noqa: E402

LSTM = next(a for a in ANIMALS if a.name == "lstm")


def as_module(dtype):
    return problem_of(LSTM, dtype=dtype)


def as_graph(dtype):
    module, arrays = LSTM.module().eval(), LSTM.arrays()
    exported = curvd.export(module, torch.as_tensor(arrays["x"]))
    graph = GraphModule(Interpreter(decode(canonical(exported.graph))))
    data = problem_of(LSTM).model.data
    return Problem.load(
        graph, dict(exported.state), arrays, data, LSTM.loss, LSTM.mode, dtype
    )


def product(problem, mode, v):
    spec = OperatorSpec()
    rows = [torch.zeros_like(p) for p in problem.parameters]
    for batch in problem.data:
        linear = MODES[mode](problem, spec, batch)
        found = linear.product(
            tangents_of(v, problem.layout), range(len(rows)), batched=False
        )
        rows = [r + f for r, f in zip(rows, found, strict=True)]
    return flat(rows).double()


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("made", [as_module, as_graph])
def test_every_mode_multiplies_an_lstm_in_float32(made, mode):
    v = columns(problem_of(LSTM), 1)[0]
    want = product(as_module(Dtype.FLOAT64), "double_backward", v)
    got = product(made(Dtype.FLOAT32), mode, v.float())
    assert error(got, want) < 1e-5


def test_what_runs_beside_it_keeps_onednn():
    before = torch.backends.mkldnn.enabled
    product(
        as_module(Dtype.FLOAT32), "program", columns(problem_of(LSTM), 1)[0].float()
    )
    assert torch.backends.mkldnn.enabled == before


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def recurrent(steps):
    """A tanh layer that runs for so many steps, on four data points."""
    torch.manual_seed(0)
    module = Last().double()
    arrays = {"x": torch.randn(4, steps, 3).double(), "y": torch.randn(4, 2).double()}
    data = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    return Problem.load(
        module, {}, arrays, data, LossSpec(name="mse"), dtype=Dtype.FLOAT64
    )


class Last(torch.nn.Module):
    """The last state of a layer that multiplies one weight at every step."""

    def __init__(self):
        super().__init__()
        self.enter, self.again = torch.nn.Linear(3, 5), torch.nn.Linear(5, 5)
        self.leave = torch.nn.Linear(5, 2)

    def forward(self, x):
        state = torch.tanh(self.enter(x[:, 0]))
        for row in x.unbind(1)[1:]:
            state = torch.tanh(self.enter(row) + self.again(state))
        return self.leave(state)


def multiplied(linear, problem, v, block, batched=False):
    layout, lead = problem.layout, v.shape[:-1]
    tangents = tangents_of(v, layout)[block.start : block.stop]
    found = linear.product(tangents, block, batched=batched)
    rows = [r.reshape(*lead, -1) for r in found]
    return torch.cat(rows, -1)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_joined_products_are_those_of_the_definition(kind):
    problem = recurrent(6)
    linear = program(problem, OperatorSpec(kind=kind), problem.data[0])
    V = columns(problem, 3)
    if kind == "hessian":
        want = torch.stack([central_difference(problem, v) for v in V])
    else:
        want = V @ dense_ggn(problem)
    every = range(len(problem.parameters))
    for got in (
        torch.stack([multiplied(linear, problem, v, every) for v in V]),
        multiplied(linear, problem, V, every, batched=True),
    ):
        assert error(got, want) < 1e-8


@pytest.mark.parametrize("block", [range(2), range(2, 4), range(3, 4), range(4, 6)])
def test_a_block_of_joined_products_is_the_blocks_own(block):
    """What is joined goes, where the tangents of the other blocks are zero."""
    problem = recurrent(6)
    inside = problem.layout.parameters[block.start : block.stop]
    ends = inside[0].offset, inside[-1].offset + inside[-1].size
    v = torch.zeros(problem.layout.size, dtype=torch.float64)
    v[slice(*ends)] = columns(problem, 1)[0][slice(*ends)]
    linear = program(problem, OperatorSpec(), problem.data[0])
    got = multiplied(linear, problem, v, block)
    assert error(got, central_difference(problem, v)[slice(*ends)]) < 1e-8


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_step_more_multiplies_only_the_tangents_of_states(kind):
    counts = []
    for steps in (6, 12):
        problem = recurrent(steps)
        linear = program(problem, OperatorSpec(kind=kind), problem.data[0])
        graphs = [t.kernel.module.graph for t in linear.tasks(range(6))]
        counts.append(sum(n.target in PRODUCTS for g in graphs for n in g.nodes))
    # One forwards and one back; the weights' own are joined over all steps.
    assert counts[1] - counts[0] == 6 * 2
