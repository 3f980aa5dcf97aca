"""Laplace posterior: predictive variance of a regression net, without any matrix.

    python examples/laplace.py [TARGET [PICTURE]]

With the Gaussian posterior ``N(θ, (N G / (2 σ²) + λ I)^-1)``, the variance of a
linearised prediction is ``j' (…)^-1 j``, j its gradient: one call for all test points, in
which no gradient travels, and one for the prior with the largest marginal likelihood.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

import curvd

CONFIG = {"widths": [1, 16, 1], "activation": "tanh"}
NOISE, PRIOR = 0.1, 1.0


def main(target: str = "127.0.0.1:50551", picture: str | None = None) -> np.ndarray:
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 100)[:, None]
    y = torch.sin(3 * x) + NOISE * torch.randn_like(x)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(500):
        optimiser.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimiser.step()
    points = torch.linspace(-4, 4, 33)[:, None]  # from far outside the data to inside
    with curvd.connect(target) as client:
        model = client.register_model("mlp", CONFIG, net.state_dict())
        dataset = client.register_dataset(
            {"x": x, "y": y}, inputs=["x"], target="y", batch_size=50
        )
        with client.create_session(
            model, dataset, loss="mse", operators=["ggn"]
        ) as session:
            found = session.predictive(points, prior=PRIOR, noise=NOISE)
            evidence = session.marginal_likelihood(np.logspace(-2, 2, 9), noise=NOISE)
    print(f"prior precision with the largest marginal likelihood: {evidence.best:g}")
    variance = found.variance[:, 0]
    for index in (16, 18, 20, 24, 32):
        deviation = variance[index] ** 0.5
        print(f"x = {points[index, 0]:5.2f}: standard deviation {deviation:.3f}")
    if picture is not None:
        with torch.no_grad():
            mean = net(points)[:, 0].numpy()
        draw(x, y, points[:, 0].numpy(), mean, variance**0.5, picture)
    return variance


def draw(x, y, points, mean, deviation, picture: str) -> None:
    from matplotlib.figure import Figure  # needs curvd[plot]

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    low, high = mean - 2 * deviation, mean + 2 * deviation
    axes.fill_between(points, low, high, alpha=0.2, linewidth=0)
    axes.plot(points, mean, label="prediction, two standard deviations")
    axes.plot(x, y, ".", color="black", markersize=3, label="data")
    axes.set(xlabel="x", ylabel="y")
    axes.legend(frameon=False, loc="lower left")
    axes.figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
