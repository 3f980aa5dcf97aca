"""Data points that are joined, though not on the examples: refused, and nothing else is.

That a mini-batch and its parts agree on the data proves nothing about other parameters: a
clamp at the mini-batch's maximum does nothing until activations grow. The truth is eager
torch: what is refused here does depend on the mini-batch once parameters have grown.
"""

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from support.differences import draw, labels, seeded  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd.exported import prepare  # noqa: E402

N, T = 9, 4
X, Y, Z = 0.1 * draw(N, 4), labels(3, N), 0.3 * draw(N, 3, seed=2)
TOKENS = labels(10, N, T)
MSE, CE = F.mse_loss, nn.CrossEntropyLoss()


class Net(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between=torch.tanh):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 5), nn.Linear(5, 3), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


class Tokens(nn.Module):
    """Inputs that are integers, which no factor makes large."""

    def __init__(self, between):
        super().__init__()
        self.table, self.places = nn.Embedding(10, 6), nn.Embedding(T, 6)
        self.b, self.between = nn.Linear(6, 3), between

    def forward(self, x):
        h = self.table(x) + self.places(torch.arange(T, device=x.device))
        return self.b(self.between(h)).mean(1)


def by_deviations(h):
    return h * ((h - h.mean()).abs() < 6 * h.std())


JOINED = {
    "scaled by the maximum": lambda h: h / h.abs().max().clamp(min=1.0),
    "clamped at the mean": lambda h: torch.minimum(h, h.detach().mean() + 3.0),
    "clamped at the median": lambda h: torch.minimum(h, h.median() + 20.0),
    "moved by the mean": lambda h: h + F.relu(h.mean(0) - 20.0),
    "switched by the deviation": lambda h: torch.where(h.std() > 1e-4, h, 2 * h),
    "without outliers": by_deviations,
    "bounded before": lambda h: h.tanh() / h.tanh().abs().max().clamp(min=2.0),
}


@pytest.mark.parametrize("between", JOINED.values(), ids=JOINED)
@pytest.mark.parametrize(("kind", "x"), [(Net, X), (Tokens, TOKENS)])
def test_a_module_that_joins_data_points_elsewhere_is_refused(kind, x, between):
    module = seeded(lambda: kind(between))
    torch.testing.assert_close(module(x)[:3], module(x[:3]))  # it does not show
    with pytest.raises(
        curvd.InvalidSpec, match=r"data points are joined: a row .*Beside .*amax\(1"
    ):
        curvd.export(module, x)
    curvd.export(module, x, check=False)


def test_mini_batches_that_are_meant_are_exported():
    module = seeded(lambda: Net(JOINED["scaled by the maximum"]))
    assert curvd.export(module, X, mode="batch_statistics").parameters


def alone(h):
    """Attend within a data point, all data points in one product behind a mask."""
    flat = h.reshape(-1, h.shape[-1])
    of = torch.arange(len(flat), device=h.device) // T
    scores = (flat @ flat.T).masked_fill(of[:, None] != of[None, :], -torch.inf)
    return (scores.softmax(-1) @ flat).reshape(h.shape)


APART = {
    "layer norm": (Net, lambda h: F.layer_norm(h, h.shape[-1:])),
    "own maximum": (Net, lambda h: h / h.abs().amax(1, keepdim=True).clamp(min=1.0)),
    "overflow": (Net, lambda h: h - h.exp().sum(1, keepdim=True).log()),
    "NaN to numbers": (Net, torch.nan_to_num),
    "times zero": (Net, lambda h: h + 0 * h.sum()),
    "a layer in eval mode": (Net, nn.BatchNorm1d(5).double().eval()),
    "one hot": (Net, lambda h: F.one_hot(h.argmax(1), 5).to(h) * h),
    "attention": (Tokens, lambda h: F.scaled_dot_product_attention(h, h, h)),
    "causal": (
        Tokens,
        lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True),
    ),
    "masked apart": (Tokens, alone),
}


@pytest.mark.parametrize(("kind", "between"), APART.values(), ids=APART)
def test_data_points_that_are_apart_are_exported(kind, between):
    x = X if kind is Net else TOKENS
    assert curvd.export(seeded(lambda: kind(between)), x).parameters


@pytest.mark.parametrize("power", [-250, -30, 0, 30, 250])
def test_numbers_that_outputs_are_multiplied_by_keep_their_digits(power):
    """0.3 is another in float32, and 2^250 is none."""
    size = 0.3 * 2.0**power
    x, y = draw(6, 4), draw(6, 3) * size
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Times(size)))
    model = prepare(
        module, nn.MSELoss(), (x, y), None, None, batch_size=2, check=True
    ).model
    assert model.inputs


class Times(nn.Module):
    """Multiplies by a number."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x * self.number


def test_numbers_that_become_indices_are_left_in_range():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.b = nn.Embedding(3, 4), nn.Linear(7, 3)

        def forward(self, x):
            return self.b(torch.cat([self.table(x[:, 0].long()), x[:, 1:]], 1))

    x = torch.cat([labels(3, N)[:, None].double(), draw(N, 3)], 1)
    assert curvd.export(seeded(Table), x).parameters


def flooded(z, y, least=0.05):
    return (MSE(z, y) - least).abs() + least


LOSSES = {
    "clamped": lambda z, y: MSE(z, y).clamp(max=5.0),
    "weighted": lambda z, y: MSE(z, y) * (1 + F.relu(MSE(z, y) - 5.0)),
    "hinge of a mean": lambda z, y: MSE(z, y) + F.relu(z.mean(0).abs() - 1.5).sum(),
    "another branch": lambda z, y: torch.where(MSE(z, y) > 3, 3.0, MSE(z, y)),
    "flooded": flooded,
    "flooded late": lambda z, y: flooded(z, y, 1e-3),
    "a sum": lambda z, y: (z - y).square().sum().clamp(max=500.0),
    "counted": lambda z, y: ((z - y).square().sum().clamp(max=500.0), len(y)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_joins_data_points_elsewhere_is_refused(loss):
    with pytest.raises(
        curvd.InvalidSpec, match=r"data points are joined: what the loss.*reduction="
    ):
        prepare(seeded(Net), loss, (X, Z), None, None, batch_size=4, check=True)


def masked(z, y):
    counted = (y >= 0).to(z)
    own = F.cross_entropy(z, y.clamp(min=0), reduction="none")
    return (own * counted).sum(), counted.sum()


FINE = {
    "huber": (F.huber_loss, Z),
    "own clamps": (
        lambda z, y: MSE(z, y, reduction="none").mean(1).clamp(max=0.2).mean(),
        Z,
    ),
    "overflow": (lambda z, y: F.poisson_nll_loss(z, y), Z.abs()),
    "guarded": (lambda z, y: torch.nan_to_num(F.poisson_nll_loss(z, y)), Z.abs()),
    "probabilities": (lambda z, y: F.binary_cross_entropy(z.sigmoid(), y), Z.sigmoid()),
    "divergence": (
        lambda z, y: F.kl_div(z.log_softmax(1), y, reduction="batchmean"),
        Z.softmax(1),
    ),
    "labels": (lambda z, y: F.cross_entropy(z, y, ignore_index=-100), Y),
    "numbers as labels": (lambda z, y: F.cross_entropy(z, y.long()), Y.double()),
    "one hot": (lambda z, y: MSE(z, F.one_hot(y, 3).to(z)), Y),
    "counted": (masked, torch.where(torch.arange(N) % 3 == 1, -100, Y)),
    "margins": (lambda z, y: F.multi_margin_loss(z, y, reduction="mean"), Y),
}


@pytest.mark.parametrize(("loss", "targets"), FINE.values(), ids=FINE)
def test_losses_of_single_data_points_are_exported(loss, targets):
    found = prepare(
        seeded(Net), loss, (X, targets), None, None, batch_size=4, check=True
    )
    assert found.loss.name is curvd.LossName.CUSTOM or loss is F.huber_loss


def _first(h):
    return torch.cat([h[:1] * 2, h[1:]])


def _even(h):
    weights = torch.ones(h.shape[0], 1)
    weights[::2] = 3.0
    return h * weights


POSITIONS = {
    "counted": lambda h: h * torch.arange(1, h.shape[0] + 1)[:, None],
    "the first": _first,
    "every other": _even,
    "from a table": lambda h: h + torch.linspace(0.5, 2, 1000)[: h.shape[0], None],
    "backwards": lambda h: h.flip(0),
}


@pytest.mark.parametrize("between", POSITIONS.values(), ids=POSITIONS)
def test_rows_that_depend_on_their_place_in_a_mini_batch_are_refused(between):
    net = seeded(lambda: Net(lambda h: between(h.tanh())))
    with pytest.raises(
        curvd.InvalidSpec, match=r"which row of the mini-batch|other data"
    ):
        curvd.export(net, X)


def test_positions_within_a_data_point_are_exported():
    net = seeded(lambda: Net(lambda h: h * torch.arange(1.0, h.shape[1] + 1)))
    assert curvd.export(net, X).graph.nodes
