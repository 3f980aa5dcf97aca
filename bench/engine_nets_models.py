"""Small nets for `bench/engine_nets.py`, written as users write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last state: [B, T, I] -> [B, 10]."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, hidden: int) -> None:
        super().__init__()
        self.layer = kind(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.layer(x)
        return self.head(states[:, -1])


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with GroupNorm and SiLU: [B, 3, H, W]."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            layers += [
                nn.Conv2d(before, before, 3, padding=1, groups=before),
                nn.Conv2d(before, width, 1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.AvgPool2d(2),
            ]
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Mixer(nn.Module):
    """Patches that are mixed along both axes: [B, 3, 32, 32] -> [B, 10]."""

    def __init__(self, width: int = 128, depth: int = 4, patch: int = 4) -> None:
        super().__init__()
        tokens = (32 // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.across = nn.ModuleList(_mlp(tokens, 2 * tokens) for _ in range(depth))
        self.within = nn.ModuleList(_mlp(width, 2 * width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        norms = iter(self.norms)
        for across, within in zip(self.across, self.within, strict=True):
            x = x + across(next(norms)(x).transpose(1, 2)).transpose(1, 2)
            x = x + within(next(norms)(x))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """A transformer encoder that normalises first: [B, T, 96] -> [B, 10]."""

    def __init__(self, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class UNet(nn.Module):
    """Down, up, and the skip between: [B, 3, 32, 32] -> classes of pixels [B, 32, 32, 4]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter, self.down = _block(3, width), _block(width, 2 * width)
        self.bottom = _block(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, 2 * width, 2, 2)
        self.join = _block(4 * width, width)
        self.top = nn.ConvTranspose2d(width, width, 2, 2)
        self.leave = _block(2 * width, width)
        self.head = nn.Conv2d(width, 4, 1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x)
        second = self.down(self.pool(first))
        x = self.up(self.bottom(self.pool(second)))
        x = self.top(self.join(torch.cat([x, second], 1)))
        return self.head(self.leave(torch.cat([x, first], 1))).permute(0, 2, 3, 1)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.GELU()
    )


@dataclass(frozen=True)
class Net:
    """A net, and the shapes of its data; classes are drawn."""

    make: Callable[[], nn.Module]
    row: tuple[int, ...]
    """Shape of a data point."""
    batch_size: int
    targets: tuple[int, ...] = ()
    """Shape of a data point's targets."""
    classes: int = 10


NETS = {
    "lstm": Net(lambda: Recurrent(nn.LSTM, 64, 256), (20, 64), 16),
    "gru": Net(lambda: Recurrent(nn.GRU, 64, 256), (20, 64), 16),
    "separable": Net(Separable, (3, 32, 32), 16),
    "mixer": Net(Mixer, (3, 32, 32), 16),
    "encoder": Net(Encoder, (32, 96), 16),
    "unet": Net(UNet, (3, 32, 32), 4, targets=(32, 32), classes=4),
}
