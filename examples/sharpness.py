"""Watch the sharpness (largest Hessian eigenvalue) while a net trains.

    python examples/sharpness.py [TARGET [PICTURE]]

Between two visits the parameters move little, so each query starts from the
eigenvector of the last one. Gradient descent sharpens the minimum until the largest
eigenvalue reaches ``2 / learning rate``, where steps overshoot and flatten it again
(Cohen et al., ICLR 2021).
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import curvd

CONFIG = {"widths": [10, 16, 3], "activation": "tanh"}
RATE, STEPS = 1.5, 10
"""The learning rate, and the steps between two visits."""


def main(
    target: str = "127.0.0.1:50551", picture: str | None = None, visits: int = 30
) -> list[float]:
    torch.manual_seed(0)
    x, y = torch.randn(256, 10), torch.randint(3, (256,))
    # The layers of the server's builder "mlp", in its order.
    net = nn.Sequential(nn.Flatten(), nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE)
    sharpness = []
    with curvd.connect(target) as client:
        model = client.register_model("mlp", CONFIG, net.state_dict())
        dataset = client.register_dataset(
            {"x": x, "y": y}, inputs=["x"], target="y", batch_size=64
        )
        with client.create_session(model, dataset, loss="cross_entropy") as session:
            for _ in range(visits):
                found = session.hessian().eigsh(
                    1, tolerance=1e-3, warm_start=True, vectors=False
                )
                sharpness.append(float(found.values[0]))
                print(
                    f"version {found.version}: sharpness {sharpness[-1]:.4f} "
                    f"± {found.residuals[0]:.0e}, {found.products} products"
                )
                for _ in range(STEPS):
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(net(x), y).backward()
                    optimiser.step()
                session.update_parameters(net.state_dict())
    if picture is not None:
        draw(sharpness, picture)
    return sharpness


def draw(sharpness: list[float], picture: str) -> None:
    from matplotlib.figure import Figure  # needs curvd[plot]

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes.plot(range(0, STEPS * len(sharpness), STEPS), sharpness, "o-")
    axes.axhline(2 / RATE, color="0.5", linestyle="--")
    axes.text(0, 2 / RATE, "2 / learning rate", va="bottom")
    axes.set(xlabel="step of training", ylabel="largest eigenvalue of the Hessian")
    axes.figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
