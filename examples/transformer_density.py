"""Draw the spectral density of a transformer's Hessian and of its Gauss-Newton part.

    python examples/transformer_density.py [TARGET [PICTURE]]

Needs curvd[server] for the architecture, and curvd[plot].
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import curvd
from curvd_server.models import BUILDERS

CONFIG = {"vocabulary": 32, "context": 16, "layers": 2, "width": 16, "heads": 2}


def main(
    target: str = "127.0.0.1:50551", picture: str = "transformer-density.png"
) -> list[curvd.Density]:
    torch.manual_seed(0)
    state = BUILDERS["gpt"](CONFIG).state_dict()
    tokens = torch.randint(32, (8, 17))
    with curvd.connect(target) as client:
        model = client.register_model("gpt", CONFIG, state)
        dataset = client.register_dataset(
            {"x": tokens[:, :-1], "y": tokens[:, 1:]},
            inputs=["x"],
            target="y",
            batch_size=4,
        )
        with client.create_session(
            model, dataset, loss="cross_entropy", operators=["hessian", "ggn"]
        ) as session:
            found = [
                operator.spectral_density(probes=8, steps=30)
                for operator in (session.hessian(), session.ggn())
            ]
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    for density in found:
        density.plot(axes)
    axes.legend(axes.lines, ["Hessian", "Gauss-Newton"], frameon=False)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(picture, dpi=150)
    print(f"{sum(d.products for d in found)} products; picture: {picture}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
