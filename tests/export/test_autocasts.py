"""Modules that a trainer of mixed precision has prepared: their function in the session's type."""

import functools
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from support.differences import seeded  # noqa: E402
from support.torchvision_aside import aside_if_broken  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402

N = 12
LOSS = nn.CrossEntropyLoss()


def points():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=generator)
    return x, torch.randint(3, (N,), generator=generator)


class Net(nn.Module):
    """Two layers and a number that the code reads."""

    def __init__(self):
        super().__init__()
        self.a, self.o, self.number = nn.Linear(4, 5), nn.Linear(5, 3), 1.0

    def forward(self, x):
        return self.o(torch.tanh(self.number * self.a(x)))


def patched(module):
    """Give a module a forward of its own, as some libraries do."""
    plain = type(module).forward
    module.forward = types.MethodType(lambda self, x: 2 * plain(self, x), module)
    return module


def by_accelerate(module, dtype):
    """Do what `Accelerator.prepare` does with a model where its autocast is torch's own."""
    with aside_if_broken():
        operations = pytest.importorskip("accelerate.utils.operations")
    module._original_forward = module.forward
    inner = torch.autocast("cpu", dtype=dtype)(module.forward.__func__)
    converting = operations.convert_outputs_to_fp32(inner)
    module.forward = types.MethodType(converting, module)
    module._is_accelerate_prepared = True


def by_torch(module, dtype):
    module.forward = torch.autocast("cpu", dtype=dtype)(module.forward)


def by_a_layer(module, dtype):
    by_accelerate(module.o, dtype)


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def objective(module, x, y):
    """Compute loss and gradient by torch, in float64, without autocast."""
    wide = Net().double()
    wide.load_state_dict(module.state_dict())
    wide.number = module.number
    if "_original_forward" in vars(
        module
    ) and module._original_forward.__func__ is not (Net.forward):
        patched(wide)
    loss = LOSS(wide(x.double()), y)
    rows = torch.autograd.grad(loss, list(wide.parameters()))
    return float(loss.detach()), nn.utils.parameters_to_vector(rows)


def check(session, module, x, y):
    value, gradient = session.gradient()
    expected, row = objective(module, x, y)
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, row, rtol=1e-4, atol=1e-6)


WAYS = [
    (by_accelerate, Net),
    (by_accelerate, lambda: patched(Net())),
    (by_torch, Net),
    (by_a_layer, Net),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("prepare", "make"), WAYS)
def test_a_module_that_was_prepared_since_is_followed(client, prepare, make, dtype):
    x, y = points()
    module = seeded(make).float()
    with client.session_for(module, LOSS, (x, y), batch_size=6) as session:
        prepare(module, dtype)
        there = dict(vars(module))
        optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
        LOSS(module(x), y).backward()
        optimiser.step()
        module.calls = 1  # so that it is exported again
        for _ in range(2):
            session.update_parameters(module)
            check(session, module, x, y)
        assert all(vars(module)[n] is v for n, v in there.items())
        module.number = 3.0
        with pytest.raises(curvd.InvalidSpec, match=r"number was 1\.0 and is 3\.0"):
            session.update_parameters(module)


@pytest.mark.parametrize("prepare", [by_accelerate, by_a_layer])
def test_a_module_that_is_prepared_already_has_a_session(client, prepare):
    x, y = points()
    module = seeded(Net).float()
    prepare(module, torch.bfloat16)
    there = {name: dict(vars(layer)) for name, layer in module.named_modules()}
    with client.session_for(module, LOSS, (x, y), batch_size=6) as session:
        check(session, module, x, y)
        with torch.no_grad():
            module.a.weight.mul_(1.5)
        session.update_parameters(module)
        check(session, module, x, y)
    for name, held in there.items():
        now = vars(module.get_submodule(name))
        assert now.keys() == held.keys()
        assert all(now[n] is value for n, value in held.items())


def test_what_else_wraps_forward_is_a_change(client):
    x, y = points()
    module = seeded(Net).float()
    with client.session_for(module, LOSS, (x, y), batch_size=6) as session:
        inner = torch.autocast("cpu", dtype=torch.bfloat16)(module.forward)

        @functools.wraps(inner)
        def doubled(x):
            return 2 * inner(x)

        module.forward = doubled
        with pytest.raises(curvd.InvalidSpec, match="forward was not there"):
            session.update_parameters(module)
        module.forward = torch.autocast("cpu", dtype=torch.bfloat16)(doubled)
        with pytest.raises(curvd.InvalidSpec, match="forward was not there"):
            session.update_parameters(module)
