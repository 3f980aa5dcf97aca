"""Modules that are more than a list of layers, after the sorts of curvlinops' cases."""

import torch
import torch.nn.functional as F
from torch import nn


class DictInputs(nn.Module):
    """Takes keyword arguments."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4, bias=False)
        self.out = nn.Linear(4, 3)

    def forward(self, x, extra):
        return self.out(torch.tanh(self.left(x) + self.right(extra)))


class Shared(nn.Module):
    """The same weights at two depths."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.sigmoid(self.inner(torch.sigmoid(self.inner(x)))))


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's transpose."""

    def __init__(self):
        super().__init__()
        self.encoder, self.bias = nn.Linear(4, 3), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T, self.bias)


class InPlace(nn.Module):
    """Writes to what it computed."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 5), nn.Linear(5, 3)
        self.act = nn.SELU(inplace=True)

    def forward(self, x):
        y = self.first(x)
        y += 1.0
        y = self.act(y.mul_(0.5))
        return self.out(y)


class Unet(nn.Module):
    """Down, up, and across."""

    def __init__(self):
        super().__init__()
        self.begin = nn.Conv2d(1, 2, 3, padding=1)
        self.down = nn.Conv2d(2, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.end = nn.Conv2d(4, 2, 1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):
        high = torch.tanh(self.begin(x))
        low = torch.tanh(self.down(self.pool(high)))
        return self.end(torch.cat([self.up(low), high], dim=1))


class Vmapped(nn.Module):
    """Calls `torch.func.vmap` in forward."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return torch.func.vmap(lambda row: self.out(torch.tanh(self.inner(row))))(x)


class Residual(nn.Module):
    """Skips a layer, and normalises."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.out = (
            nn.LayerNorm(4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        return self.out(x + F.gelu(self.inner(self.norm(x))))


class Attending(nn.Module):
    """One head of attention over five positions."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 9), nn.Linear(3, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))


class Partial(nn.Module):
    """Some parameters want no gradient, and one is not used."""

    def __init__(self):
        super().__init__()
        self.fixed, self.out = nn.Linear(4, 5), nn.Linear(5, 3)
        self.fixed.weight.requires_grad_(False)

    def forward(self, x):
        return self.out(torch.tanh(self.fixed(x)))


MODULES = {
    # name: (module, shape of one data point or of each keyword, loss, reduction)
    "dict inputs": (DictInputs, {"x": (3,), "extra": (2,)}, "CrossEntropyLoss", "mean"),
    "dict inputs, mse": (DictInputs, {"x": (3,), "extra": (2,)}, "MSELoss", "sum"),
    "shared": (Shared, (4,), "CrossEntropyLoss", "mean"),
    "shared, bce": (Shared, (4,), "BCEWithLogitsLoss", "mean"),
    "tied": (Tied, (4,), "MSELoss", "mean"),
    "tied, sum": (Tied, (4,), "MSELoss", "sum"),
    "in-place": (InPlace, (4,), "CrossEntropyLoss", "sum"),
    "in-place, mse": (InPlace, (4,), "MSELoss", "mean"),
    "unet": (Unet, (1, 4, 4), "CrossEntropyLoss", "mean"),
    "unet, mse": (Unet, (1, 4, 4), "MSELoss", "mean"),
    "vmap": (Vmapped, (4,), "CrossEntropyLoss", "mean"),
    "vmap, mse": (Vmapped, (4,), "MSELoss", "sum"),
    "residual": (Residual, (4,), "CrossEntropyLoss", "mean"),
    "residual, bce": (Residual, (4,), "BCEWithLogitsLoss", "sum"),
    "attention": (Attending, (5, 3), "CrossEntropyLoss", "mean"),
    "attention, mse": (Attending, (5, 3), "MSELoss", "mean"),
    "partly fixed": (Partial, (4,), "CrossEntropyLoss", "mean"),
}
