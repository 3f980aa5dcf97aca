"""Trained nets whose curvature is dense, for bench/solves.py.

Curvature and right-hand sides come from torch.func alone: Jacobians of the outputs, and
the softmax metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

LICENSE = Path(__file__).parents[1] / "LICENSE"


@dataclass
class Trained:
    """A net at some parameters, and what it has not seen."""

    name: str
    net: nn.Module
    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    @property
    def theta(self) -> Tensor:
        """The parameters: [P]."""
        return nn.utils.parameters_to_vector(self.net.parameters()).detach()

    def train(self, steps: int, rate: float = 1e-3, batch: int = 128) -> None:
        """Take steps of Adam from where it is."""
        generator = torch.Generator().manual_seed(steps)
        adam = torch.optim.Adam(self.net.parameters(), lr=rate)
        for _ in range(steps):
            rows = torch.randint(len(self.inputs), (batch,), generator=generator)
            adam.zero_grad()
            loss_of(self.net(self.inputs[rows]), self.targets[rows]).backward()
            adam.step()

    def ggn(self) -> Tensor:
        """The Gauss-Newton matrix of the mean loss: [P, P]."""
        theta = self.theta
        total = torch.zeros(len(theta), len(theta), dtype=theta.dtype)
        rows = jacrev(self._outputs)
        for x in self.inputs.split(20):
            J = vmap(rows, (None, 0))(theta, x)
            J = J.reshape(-1, *J.shape[-2:])  # [B * S, C, P]
            p = torch.stack([self._outputs(theta, one) for one in x])
            p = p.reshape(-1, p.shape[-1]).softmax(-1)
            # The root of the metric: sqrt(p) (e_c - p), so that G = F'F.
            mean = torch.einsum("nc,ncp->np", p, J)
            F = p.sqrt()[..., None] * (J - mean[:, None])
            F = F.reshape(-1, len(theta))
            total.addmm_(F.T, F)
        return total / self.targets.numel()

    def gradients(self, count: int) -> Tensor:
        """Gradients of the losses of test points: [count, P]."""

        def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return loss_of(self._outputs(theta, x)[None], y[None])

        given = self.test_inputs[:count], self.test_targets[:count]
        return vmap(grad(loss), (None, 0, 0))(self.theta, *given)

    def _outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        values, start = {}, 0
        for name, parameter in self.net.named_parameters():
            values[name] = theta[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return functional_call(self.net, values, (x[None],))[0]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy; classes are the last axis of the outputs."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Gpt(nn.Module):
    """Attention and a small net in each block; the head is tied to the embedding."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.words = nn.Parameter(0.3 * torch.randn(vocabulary, width))
        self.places = nn.Parameter(0.3 * torch.randn(length, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.words[x] + self.places[: x.shape[1]]
        q, k, v = self.qkv(self.norms[0](h)).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h = h + self.out(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)
        h = h + self.down(torch.tanh(self.up(self.norms[1](h))))
        return self.norms[2](h) @ self.words.T


def mlp() -> Trained:
    """64-32-32-10, tanh, on 1500 digits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )
    found = digits("mlp", net, 1500, (64,))
    found.train(1500)
    return found


def cnn() -> Trained:
    """Three convolutions and a linear layer, on 500 digits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    found = digits("cnn", net, 500, (1, 8, 8))
    found.train(800)
    return found


def gpt() -> Trained:
    """A block of width 12, on the licence's text; curvature of 32 pieces of it."""
    torch.manual_seed(0)
    words = "".join(c if c.isalpha() else " " for c in LICENSE.read_text().lower())
    text = " ".join(words.split())
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(c) for c in text])
    pieces = tokens[: len(text) // 17 * 17].view(-1, 17)
    pieces = pieces[torch.randperm(len(pieces))]
    seen, unseen = pieces[:-100], pieces[-100:]
    net = Gpt(len(letters), 12, 16).double()
    found = Trained(
        "gpt", net, seen[:, :-1], seen[:, 1:], unseen[:, :-1], unseen[:, 1:]
    )
    found.train(500, rate=3e-3, batch=32)
    found.inputs, found.targets = found.inputs[:32], found.targets[:32]
    return found


def digits(name: str, net: nn.Module, count: int, shape: tuple[int, ...]) -> Trained:
    """Handwritten digits, some of them kept for tests."""
    x, y = load_digits(return_X_y=True)
    inputs = torch.tensor(x / 16.0).reshape(-1, *shape)
    targets = torch.tensor(y)
    order = torch.randperm(len(y))
    seen, unseen = order[:count], order[-200:]
    return Trained(
        name, net.double(), inputs[seen], targets[seen], inputs[unseen], targets[unseen]
    )


NETS: tuple[Callable[[], Trained], ...] = (mlp, cnn, gpt)
