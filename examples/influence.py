"""Which training points does one prediction owe its loss to?

    python examples/influence.py [TARGET [PICTURE]]

The influence of training point n on a test loss is ``-g_test' (G + λ I)^-1 g_n`` (Koh &
Liang, ICML 2017): one call, in which no gradient travels.
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

    with curvd.connect(target) as client:
        model = client.register_model("mlp", CONFIG, net.state_dict())
        dataset = client.register_dataset(
            {"x": x, "y": y}, inputs=["x"], target="y", batch_size=60
        )
        with client.create_session(
            model, dataset, loss="cross_entropy", operators=["ggn"]
        ) as session:
            # The same point with its true label.
            test = x[7:8], (y[7:8] + 2) % 3
            found = session.influence(test, damping=1e-2)
    assert found.scores is not None
    influence = -found.scores[0]  # large: harmful
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
