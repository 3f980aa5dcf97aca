"""Minimise a loss by damped Gauss-Newton steps, each one remote linear solve.

    python examples/newton_cg.py [TARGET [PICTURE]]

The Gauss-Newton matrix is positive semi-definite where the Hessian need not be, so each
damped step ``-(G + λ I)^-1 g`` descends (Martens, ICML 2010). Step and gradient travel;
the products of the solve stay on the server.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

import curvd

CONFIG = {"widths": [6, 8, 1], "activation": "tanh"}


def main(
    target: str = "127.0.0.1:50551", picture: str | None = None, steps: int = 10
) -> list[float]:
    torch.manual_seed(0)
    x = torch.randn(128, 6)
    y = torch.sin(x[:, :1] + x[:, 1:2])
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    losses = []
    with curvd.connect(target) as client:
        model = client.register_model("mlp", CONFIG, net.state_dict())
        dataset = client.register_dataset(
            {"x": x, "y": y}, inputs=["x"], target="y", batch_size=64
        )
        with client.create_session(
            model, dataset, loss="mse", operators=["ggn"]
        ) as session:
            values = {n: p.detach().numpy() for n, p in net.named_parameters()}
            damping = 3e-2
            for step in range(steps):
                loss, gradient = session.gradient(layout="dict")
                losses.append(loss)
                found = session.ggn().solve(gradient, damping=damping, tolerance=1e-3)
                print(
                    f"step {step}: loss {loss:.5f}, {found.products} products, "
                    f"relative residual {found.relative_residuals[0]:.0e}"
                )
                values = {n: np.subtract(v, found.x[n]) for n, v in values.items()}
                session.update_parameters(values)
    if picture is not None:
        draw(losses, picture)
    return losses


def draw(losses: list[float], picture: str) -> None:
    from matplotlib.figure import Figure  # needs curvd[plot]

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes.semilogy(losses, "o-")
    axes.set(xlabel="Gauss-Newton step", ylabel="loss")
    axes.figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
