"""Laplace posterior: predictive variance of a regression net, without any matrix.

    python examples/laplace.py [TARGET]

With the Gaussian posterior ``N(θ, (N G / (2 σ²) + λ I)^-1)``, the variance of a
linearised prediction is ``j' (…)^-1 j``, j its gradient: one solve for all test points.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

import curvd

CONFIG = {"widths": [1, 16, 1], "activation": "tanh"}
NOISE, PRIOR = 0.1, 1.0


def main(target: str = "127.0.0.1:50551") -> np.ndarray:
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 100)[:, None]
    y = torch.sin(3 * x) + NOISE * torch.randn_like(x)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(500):
        optimiser.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimiser.step()
    inside_and_far = torch.tensor([[-0.5], [0.0], [0.5], [2.0], [4.0]])
    rows = []
    for point in inside_and_far:
        grads = torch.autograd.grad(net(point[None]).sum(), list(net.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    jacobian = torch.stack(rows, dim=1).numpy()  # [P, K]
    with curvd.connect(target) as client:
        model = client.register_model("mlp", CONFIG, net.state_dict())
        dataset = client.register_dataset(
            {"x": x, "y": y}, inputs=["x"], target="y", batch_size=50
        )
        with client.create_session(
            model, dataset, loss="mse", operators=["ggn"]
        ) as session:
            # The loss is the mean of squares: its GGN is 2/N times J'J.
            precision = session.ggn(scale=len(x) / (2 * NOISE**2), damping=PRIOR)
            found = precision.solve(jacobian, tolerance=1e-4)
    variance = np.einsum("pk,pk->k", jacobian, found.x)
    for point, v in zip(inside_and_far[:, 0], variance, strict=True):
        print(f"x = {point:5.2f}: standard deviation {v**0.5:.3f}")
    return variance


if __name__ == "__main__":
    main(*sys.argv[1:2])
