"""Recurrent layers in float32: oneDNN's kernel for them cannot be differentiated forwards."""

import pytest

torch = pytest.importorskip("torch")
from support.reference import columns, error, flat, problem_of  # noqa: E402
from support.zoo import ANIMALS  # noqa: E402

import curvd  # noqa: E402
from curvd.contract import Dtype, OperatorSpec  # noqa: E402
from curvd_server.engine.objective import Problem, tangents_of  # noqa: E402
from curvd_server.engine.operators.linearize import MODES  # noqa: E402
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
