"""Operators of the field by family: products of what is exported are those of the module.

The truth never sees a graph: central differences of the eager module's gradient.
"""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from support.differences import (  # noqa: E402
    BATCH,
    check,
    difference,
    pass_on,
    relative,
)
from support.families import FAMILIES, REFUSED, N  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import curvd  # noqa: E402
from curvd_server.graph.decoder import canonical, decode  # noqa: E402
from curvd_server.graph.execution.dryrun import dry_run  # noqa: E402
from curvd_server.graph.execution.interpret import Interpreter  # noqa: E402
from curvd_server.graph.execution.module import GraphModule  # noqa: E402

CASES = {case.name: case for cases in FAMILIES.values() for case in cases}
SESSIONS = (
    "solve eigh slogdet cholesky_inverse fourier_layer rotary_buffer rfft_abs "
    "mask_assignment scatter_reduce_mean len_of_batch lstm_cell spectral_norm "
    "bag_padding_mean grid_sample conv_same complex_constant fold mvn field_heat "
    "field_func_hessian"
).split()
"""Those that go through a whole session: one or two of each family; all of them with
``make cases``."""
if os.environ.get("CURVD_CASES") == "all":
    SESSIONS = [name for name in CASES if name not in REFUSED]


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
    size = sum(p.numel() for p in module.parameters())
    v = np.random.default_rng(0).standard_normal(size)
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        exported = curvd.export(module, inputs)
        want = difference(module, inputs, targets, v, pass_on, 1e-5)
        got = product(exported, inputs, targets, v)
    assert relative(got, want) <= 1e-6


@pytest.mark.filterwarnings("ignore")
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


@pytest.mark.parametrize(
    "name", ["rotary_buffer", "fourier_layer", "solve", "eigh", "field_heat"]
)
def test_one_export_serves_every_dtype(client, name):
    module, (inputs, targets) = CASES[name].module().float(), CASES[name].arrays()
    exported = curvd.export(module, inputs.float())
    model = client.register_model(exported)
    data = {"x": inputs, "y": targets}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=BATCH)
    gradients = {}
    for dtype in ("F64", "F32", "BF16"):
        session = client.create_session(
            model, dataset, loss="cross_entropy", dtype=dtype
        )
        _, gradients[dtype] = session.gradient()
        session.delete()
    assert relative(gradients["F32"], gradients["F64"]) <= 1e-5
    assert relative(gradients["BF16"], gradients["F64"]) <= 5e-2


def test_a_gaussian_loss_whose_variance_is_learned(client):
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()).double()
    head = torch.nn.Linear(3, 2).double()
    module = torch.nn.Sequential(net, head)
    inputs, targets = (
        CASES["mT"].arrays()[0],
        torch.linspace(-1, 1, N).double()[:, None],
    )

    def loss(z, y):
        return F.gaussian_nll_loss(z[:, :1], y, z[:, 1:].exp(), full=True)

    session = client.session_for(module, loss, (inputs, targets), batch_size=BATCH)
    parameters = list(module.parameters())
    total = loss(module(inputs), targets)
    gradient = torch.autograd.grad(total, parameters, create_graph=True)
    v = torch.ones(session.layout.size, dtype=torch.float64)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = torch.autograd.grad(flat @ v, parameters)
    want = torch.cat([r.flatten() for r in rows]).numpy()
    assert relative(session.hessian() @ v.numpy(), want) <= 1e-10
    session.delete()


def test_a_derivative_that_is_not_kept_is_a_constant():
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x):
            x = x.clone().requires_grad_()
            y = self.layer(x).tanh()
            (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
            return y * dx[:, :3]

    exported = curvd.export(Constant().double(), torch.randn(5, 4).double())
    assert "aten.detach.default" in [n.operator for n in exported.graph.nodes]


def test_exporting_puts_back_what_it_changes():
    from torch.distributions import Distribution

    validated = Distribution._validate_args
    curvd.export(CASES["normal"].module(), CASES["normal"].arrays()[0])
    assert Distribution._validate_args == validated


def test_a_complex_parameter_is_refused_with_a_remedy():
    class Modulus(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.to(torch.complex64)).abs()

    with pytest.raises(curvd.InvalidGraph, match=r"'weight'.*view_as_real"):
        curvd.export(Modulus(4, 3, dtype=torch.complex64), torch.randn(5, 4))


def test_a_gradient_that_torch_itself_gets_wrong_is_refused():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            # torch 2.13 says that the derivative of x * 2^-1 is 0.
            return torch.ldexp(super().forward(x), torch.tensor([1, 0, -1]))

    with pytest.raises(curvd.GradientMismatch, match="weight"):
        curvd.export(Scaled(4, 3), torch.randn(5, 4))
