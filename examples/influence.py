"""Which training points does one prediction owe its loss to?

    python examples/influence.py [TARGET [PICTURE]]

The influence of training point n on a test loss is ``-g_test' (G + λ I)^-1 g_n`` (Koh &
Liang, ICML 2017): one remote solve, then one inner product per training point.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

import curvd

CONFIG = {"widths": [4, 12, 3], "activation": "tanh"}


def main(target: str = "127.0.0.1:50551", picture: str | None = None) -> np.ndarray:
    torch.manual_seed(0)
    centres = 2 * torch.randn(3, 4)
    y = torch.randint(3, (120,))
    x = centres[y] + torch.randn(120, 4)
    y[7] = (y[7] + 1) % 3  # a wrong label
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()

    def gradient(point: torch.Tensor, label: torch.Tensor) -> np.ndarray:
        loss = nn.functional.cross_entropy(net(point[None]), label[None])
        grads = torch.autograd.grad(loss, list(net.parameters()))
        return torch.cat([g.reshape(-1) for g in grads]).numpy()

    with curvd.connect(target) as client:
        model = client.register_model("mlp", CONFIG, net.state_dict())
        dataset = client.register_dataset(
            {"x": x, "y": y}, inputs=["x"], target="y", batch_size=60
        )
        with client.create_session(
            model, dataset, loss="cross_entropy", operators=["ggn"]
        ) as session:
            # The same point with its true label.
            test = gradient(x[7], (y[7] + 2) % 3)
            found = session.ggn().solve(test, damping=1e-2)
    influence = np.array([-found.x @ gradient(a, b) for a, b in zip(x, y, strict=True)])
    worst = int(np.argmax(influence))
    print(f"training point {worst} harms this prediction most: {influence[worst]:.3f}")
    if picture is not None:
        draw(influence, worst, picture)
    return influence


def draw(influence: np.ndarray, worst: int, picture: str) -> None:
    from matplotlib.figure import Figure  # needs curvd[plot]

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes.bar(range(len(influence)), influence, width=1.0)
    axes.annotate(
        "the wrong label",
        (worst, influence[worst]),
        xytext=(8, -8),
        textcoords="offset points",
    )
    axes.set(xlabel="training point", ylabel="harm to the prediction")
    axes.figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
