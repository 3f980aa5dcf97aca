"""A builder of a user's own, which the composed server finds in a mounted folder.

It is a net that native code wins clearly: chains of elementary operations on activations of
half a megabyte, which a compiler fuses and which a program reads and writes one by one.
Columns gain nothing together where memory is what takes the time, so the plan takes them
one by one, as native code does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Bend(nn.Module):
    """Scale and shift each feature, and bend it smoothly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width) / 2)
        self.shift = nn.Parameter(torch.randn(width) / 10)

    def forward(self, x: Tensor) -> Tensor:
        """Bend: [B, width] -> [B, width]."""
        x = x * self.scale + self.shift
        return torch.tanh(x) * torch.sigmoid(x) + x


def build(config: dict[str, Any]) -> nn.Module:
    """Make some layers of a width, and a linear one behind them."""
    width, layers = int(config["width"]), int(config["layers"])
    return nn.Sequential(*(Bend(width) for _ in range(layers)), nn.Linear(width, 2))
