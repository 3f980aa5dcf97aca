"""Numbers that torch makes of integers have the default type of the caller's process."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from support.differences import draw, labels  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402

N, P = 7, 5
OPERATORS = {
    "quotient": lambda k: 1e4 * (k / 7),
    "product": lambda k: k * 0.3e4,
    "sum": lambda k: (k + 0.1) * 1e4,
    "power": lambda k: (k + 1) ** 7.3,
    "exponential": lambda k: torch.exp(k),
    "root": lambda k: 1e4 * torch.sqrt(k),
    "of flags": lambda k: (k > 2) * 12345.678,
    "choice of a number": lambda k: torch.where(k > 2, 12345.678, k),
    "factory": lambda k: torch.linspace(0, 1e4 / 7, P),
    "of a scalar": lambda k: 1e4 * (k.sum() / 7),
    "remainder": lambda k: torch.remainder(1000 * k, 7.1) * 1e4,
    "arc": lambda k: 1e4 * torch.atan2(k, k + 1),
    "floor": lambda k: torch.floor_divide(k, 0.7) / 0.3 * 1e4,
    "degrees": lambda k: 100 * torch.rad2deg(k),
}


class Net(nn.Module):
    """A layer that is turned by angles, which come from integers."""

    def __init__(self, angles):
        super().__init__()
        self.a, self.b, self.angles = nn.Linear(4, P), nn.Linear(P, 3), angles

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) * torch.cos(self.angles(torch.arange(P))))


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def default(request):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(usual)


@pytest.mark.parametrize("angles", OPERATORS.values(), ids=OPERATORS)
def test_the_default_type_of_the_process_decides(client, default, angles):
    torch.manual_seed(0)
    module, loss = Net(angles).double(), nn.CrossEntropyLoss()
    x, y = draw(N, 4).double(), labels(3, N)
    v = torch.randn(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    parameters = list(module.parameters())
    total = loss(module(x), y)
    gradient = nn.utils.parameters_to_vector(
        torch.autograd.grad(total, parameters, create_graph=True)
    )
    product = nn.utils.parameters_to_vector(
        torch.autograd.grad(gradient @ v, parameters)
    )
    with client.session_for(module, loss, (x, y), batch_size=3, dtype="F64") as session:
        np.testing.assert_allclose(
            session.gradient()[1], gradient.detach(), rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            session.hessian() @ v, product, rtol=1e-8, atol=1e-10
        )


def test_a_session_in_float32_of_such_a_module_is_in_float32(client):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module, loss = Net(lambda k: k / 7), nn.CrossEntropyLoss()
        x, y = torch.randn(N, 4), labels(3, N)
        want = torch.autograd.grad(loss(module(x), y), list(module.parameters()))
        with client.session_for(
            module, loss, (x, y), batch_size=3, dtype="F32"
        ) as session:
            got = session.gradient()[1]
    finally:
        torch.set_default_dtype(usual)
    np.testing.assert_allclose(got, nn.utils.parameters_to_vector(want), atol=1e-6)


def test_what_no_tensor_decides_is_refused(client):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = Net(lambda k: torch.where(k > 2, 0.3, 0.1))
        with pytest.raises(curvd.InvalidGraph, match=r"where.*default type.*float64"):
            data = torch.randn(N, 4), labels(3, N)
            client.session_for(module, nn.CrossEntropyLoss(), data, batch_size=3)
    finally:
        torch.set_default_dtype(usual)
