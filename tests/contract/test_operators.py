"""Operators of the field by family: products of what is exported are those of the module.

The truth never sees a graph: central differences of the eager module's gradient.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from contract.differences import (  # noqa: E402
    BATCH,
    check,
    difference,
    pass_on,
    relative,
)
from server.families import FAMILIES, REFUSED, N  # noqa: E402

import curvd  # noqa: E402
from curvd_server.graph.decode import canonical, decode  # noqa: E402
from curvd_server.graph.dryrun import dry_run  # noqa: E402
from curvd_server.graph.interpret import Interpreter  # noqa: E402
from curvd_server.graph.module import GraphModule  # noqa: E402

CASES = {case.name: case for cases in FAMILIES.values() for case in cases}
SESSIONS = (
    "solve eigh slogdet cholesky_inverse fourier_layer rotary_buffer rfft_abs "
    "mask_assignment scatter_reduce_mean len_of_batch lstm_cell spectral_norm "
    "bag_padding_mean grid_sample fold mvn field_heat field_func_hessian"
).split()
"""Those that go through a whole session: one or two of each family."""


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def product(exported, inputs, targets, v):
    """Hv of a graph as a server runs it, mini-batch by mini-batch."""
    interpreter = Interpreter(decode(canonical(exported.graph)))
    for batch in (1, BATCH):
        dry_run(interpreter, batch=batch, limit_bytes=1 << 24)
    run, state = GraphModule(interpreter), dict(exported.state)
    parameters = [state[n].clone().requires_grad_() for n in exported.parameters]
    state |= dict(zip(exported.parameters, parameters, strict=True))
    total = 0.0
    for start in range(0, N, BATCH):
        rows = slice(start, start + BATCH)
        outputs = torch.func.functional_call(run, state, (inputs[rows],))
        total = total + F.cross_entropy(outputs, targets[rows], reduction="sum") / N
    gradient = torch.autograd.grad(
        total, parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    flat = torch.cat([g.flatten() for g in gradient])
    rows = torch.autograd.grad(
        flat @ torch.from_numpy(v),
        parameters,
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([r.flatten() for r in rows]).numpy()


@pytest.mark.filterwarnings("ignore")  # of torch, about operators that are deprecated
@pytest.mark.parametrize("name", [n for n in CASES if n not in REFUSED])
def test_a_product_is_that_of_the_eager_module(name):
    module, (inputs, targets) = CASES[name].module(), CASES[name].arrays()
    exported = curvd.export(module, inputs)
    size = sum(p.numel() for p in module.parameters())
    v = np.random.default_rng(0).standard_normal(size)
    want = difference(module, inputs, targets, v, pass_on, 1e-5)
    assert relative(product(exported, inputs, targets, v), want) <= 1e-6


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_multiplies(client, name):
    module, (inputs, targets) = CASES[name].module(), CASES[name].arrays()
    check(client, module, inputs, targets)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_with_its_line_and_a_remedy(name, capfd):
    module, (inputs, _) = CASES[name].module(), CASES[name].arrays()
    with pytest.raises(curvd.InvalidGraph, match=REFUSED[name]) as refusal:
        curvd.export(module, inputs)
    assert "families.py:" in str(refusal.value) or name == "fractional_pool"
    assert capfd.readouterr().err == ""
