"""The very module is compared with its graph: what is exported is a twin of it."""

import sys

import pytest
import torch
from torch import nn

import curvd
from curvd.errors import GradientMismatch

X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Registered(nn.Module):
    """Looks a factor up under its own identity."""

    factors: dict[int, float] = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.factors[id(self)] = 3.0

    def forward(self, x):
        return self.layer(x) * Registered.factors.get(id(self), 1.0)


class Framed(nn.Module):
    """Finds its parent in a frame, by what that is."""

    def __init__(self, parent):
        super().__init__()
        self.layer, self.parent = nn.Linear(4, 2), id(parent)

    def forward(self, x):
        frame = sys._getframe(1)
        while frame is not None and id(frame.f_locals.get("self")) != self.parent:
            frame = frame.f_back
        return self.layer(x) * (1.0 if frame is None else 2.0)


class Parent(nn.Module):
    """Has such a child."""

    def __init__(self):
        super().__init__()
        self.child = Framed(self)

    def forward(self, x):
        return self.child(x)


@pytest.mark.parametrize("make", [Registered, Parent])
@pytest.mark.parametrize("mode", [None, "eval"])
def test_a_module_that_knows_itself_by_identity_is_refused(make, mode):
    module = make().eval()
    with pytest.raises(GradientMismatch, match=r"by the very object.*Make it an attr"):
        curvd.export(module, X, mode=mode)
    loss = nn.MSELoss()
    with pytest.raises(GradientMismatch, match="something else than a module of the"):
        curvd.exported.prepare(
            module, loss, (X, X[:, :2]), None, mode, batch_size=4, check=True
        )


def test_it_is_refused_as_it_trains():
    """Layers in training mode that do the same in both."""
    with pytest.raises(GradientMismatch, match="by the very object"):
        curvd.export(Registered(), X)


def test_what_it_returned_at_first_is_what_it_returns_afterwards():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    expected, state = module(X), {n: b.clone() for n, b in module.named_buffers()}
    torch.manual_seed(7)
    random = torch.get_rng_state()
    curvd.export(module, X)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(module(X), expected)
    assert all(torch.equal(b, state[n]) for n, b in module.named_buffers())


@pytest.mark.parametrize("mode", [None, "eval", "batch_statistics"])
def test_where_it_is_in_another_mode_than_its_graph_nothing_is_compared(mode):
    """Its owner may be training it; it is not called, or its statistics would move."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net.train(mode is not None)
    before = {n: b.clone() for n, b in net.named_buffers()}
    curvd.export(net, X, mode=mode)
    assert net.training == (mode is not None)
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


def test_it_can_be_switched_off():
    curvd.export(Registered().eval(), X, check=False)
