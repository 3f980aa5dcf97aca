"""Watch the sharpness (largest Hessian eigenvalue) while a net trains.

    python examples/sharpness.py [TARGET]

Between two visits the parameters move little, so each query starts from the
eigenvector of the last one.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import curvd

CONFIG = {"widths": [10, 16, 3], "activation": "tanh"}


def main(target: str = "127.0.0.1:50551", visits: int = 5) -> list[float]:
    torch.manual_seed(0)
    x, y = torch.randn(256, 10), torch.randint(3, (256,))
    # The layers of the server's builder "mlp", in its order.
    net = nn.Sequential(nn.Flatten(), nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
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
                for _ in range(10):
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(net(x), y).backward()
                    optimiser.step()
                session.update_parameters(net.state_dict())
    return sharpness


if __name__ == "__main__":
    main(*sys.argv[1:2])
