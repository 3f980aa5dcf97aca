"""Small nets for Kronecker factors, each with data and a loss, as an eager user has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvd.contract import DatasetSpec, Dtype, LossSpec
from curvd_server.engine.objective import Problem

BATCH = 4
"""Data points of a mini-batch; the last one is smaller."""


class Sequences(nn.Module):
    """A net on tokens with features: outputs are [B, T, C], or [B, C] if pooled."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        # Positions see each other, as in attention.
        h = h + 0.5 * h.mean(1, keepdim=True)
        return self.last(h.mean(1) if self.pooled else h)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, (2, 3), dilation=(2, 1), bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


@dataclass(frozen=True)
class Net:
    """A module, what it is given, and its loss."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: str = "cross_entropy"
    terms: tuple[int, ...] = ()
    """Axes of the targets of a data point, classes aside."""
    reduction: str = "mean"
    points: int = 7

    def module(self) -> nn.Module:
        """Make it, always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().double()

    def data(self) -> tuple[Tensor, Tensor]:
        """Make inputs and targets."""
        g = torch.Generator().manual_seed(1)
        x = torch.randn(self.points, *self.shape, generator=g, dtype=torch.float64)
        if self.loss == "mse":
            return x, torch.randn(
                self.points, *self.terms, 3, generator=g, dtype=torch.float64
            )
        if self.loss == "bce_with_logits":
            return x, torch.randint(
                0, 2, (self.points, *self.terms, 3), generator=g
            ).double()
        return x, torch.randint(0, 3, (self.points, *self.terms), generator=g)

    def problem(self, batch_size: int = BATCH) -> Problem:
        """Make the engine's objective of it."""
        x, y = self.data()
        return Problem.load(
            self.module(),
            {},
            {"x": x, "y": y},
            DatasetSpec(inputs=("x",), target="y", batch_size=batch_size),
            LossSpec(name=self.loss, reduction=self.reduction),
            dtype=Dtype.FLOAT64,
        )

    def loss_module(self) -> nn.Module:
        """Give the loss as torch has it."""
        kinds = {
            "cross_entropy": nn.CrossEntropyLoss,
            "mse": nn.MSELoss,
            "bce_with_logits": nn.BCEWithLogitsLoss,
        }
        return kinds[self.loss](reduction=self.reduction)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=True))


NETS = (
    Net("mlp", _mlp, (4,)),
    Net("mlp_sum", _mlp, (4,), reduction="sum"),
    Net("mlp_mse", _mlp, (4,), "mse"),
    Net("mlp_bce", _mlp, (4,), "bce_with_logits"),
    # More than a factor has rows, so that no eigenvector is any of many.
    Net("cnn", _cnn, (2, 8, 8), points=30),
    Net("pooled", lambda: Sequences(pooled=True), (6, 4)),
)
"""With one loss term for each data point."""
PER_TOKEN = (
    Net("tokens", lambda: Sequences(pooled=False), (6, 4), terms=(6,)),
    Net("tokens_mse", lambda: Sequences(pooled=False), (6, 4), "mse", terms=(6,)),
)
"""With a loss term for each position of a sequence."""
