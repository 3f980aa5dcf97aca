"""The very module is compared with its graph: what is exported is a twin of it."""

import sys

import pytest
import torch
from torch import nn

import curvd
from curvd.errors import GradientMismatch
from curvd.graph import itself, unfilled

X = torch.linspace(-1, 1, 32).reshape(8, 4)


@pytest.fixture(autouse=True)
def _fresh():
    Registered.factors.clear()  # an identity may come again


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


class Scaled(Registered):
    """Scales its gradient alone, by what it finds under its own identity."""

    def forward(self, x):
        h = self.layer(x)
        if id(self) in Registered.factors and h.requires_grad:
            h.register_hook(lambda gradient: gradient / 2)
        return torch.tanh(h)


def test_a_gradient_that_is_looked_up_by_identity_is_refused():
    module = Scaled().eval()
    with pytest.raises(GradientMismatch, match=r"the gradient of layer\.(weight|bias)"):
        curvd.export(module, X)
    assert all(p.grad is None for p in module.parameters())


def test_parameters_that_move_meanwhile_are_said_to(monkeypatch):
    module = nn.Linear(4, 2)

    def beside_a_step(wrapper, rows):
        result = unfilled.called(wrapper, rows)
        with torch.no_grad():
            module.bias += 1
        return result

    monkeypatch.setattr(itself, "called", beside_a_step)
    with pytest.raises(GradientMismatch, match=r"parameters moved while.*deepcopy"):
        curvd.export(module, X)


def test_sparse_gradients_and_frozen_layers_are_compared_too():
    module = nn.Sequential(
        nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2)
    )
    module[2].requires_grad_(False)
    curvd.export(module.double().eval(), torch.tensor([[1, 2], [3, 4], [5, 8], [0, 7]]))


def test_it_is_refused_as_it_trains():
    """Layers in training mode that do the same in both."""
    with pytest.raises(GradientMismatch, match="by the very object"):
        curvd.export(Registered(), X)


class Magnifying(nn.Module):
    """Magnifies rounding until nothing of it is left."""

    def __init__(self, core):
        super().__init__()
        self.core, self.head = core, nn.Linear(8, 3)

    def forward(self, x):
        h = self.core(x)
        h = torch.sigmoid(h[0] if isinstance(h, tuple) else h)
        for _ in range(20):
            h = 3.99 * h * (1 - h)
        return self.head(h[:, -1])


@pytest.mark.parametrize(
    "core",
    [
        lambda: nn.GRU(8, 8, 2, batch_first=True),
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
        ),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    ],
)
def test_rounding_that_is_magnified_is_no_difference(core):
    torch.manual_seed(1)
    curvd.export(Magnifying(core()).eval(), torch.randn(12, 6, 8))


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
