"""A training whose curvature is watched, without a change to its loop.

    python examples/watched_training.py [TARGET [PICTURE]]

A small net learns scikit-learn's digits by plain gradient descent. `curvd.watch` hears of
the optimiser's steps and copies the parameters every 20 of them; the server computes beside
the training. The sharpness rises until it reaches ``2 / learning rate``, where gradient
descent becomes unstable, and stays about there while the loss goes on falling (Cohen et
al., ICLR 2021). Needs curvd[demo].
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import curvd

RATE = 0.5
"""The learning rate."""


def main(
    target: str = "127.0.0.1:50551", picture: str | None = None, steps: int = 3000
) -> tuple[curvd.Reading, ...]:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data[:1000] / 16, dtype=torch.float32)
    y = nn.functional.one_hot(torch.tensor(digits.target[:1000]), 10).float()
    net = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    loss = nn.MSELoss()
    with curvd.connect(target) as client:
        session = client.session_for(net, loss, (x, y), batch_size=250)
        metrics = ("sharpness", "loss")
        with session, curvd.watch(session, net, every=20, metrics=metrics) as watch:
            for _ in range(steps):
                optimizer.zero_grad()
                loss(net(x), y).backward()
                optimizer.step()
    for reading in watch.readings[:: max(1, len(watch.readings) // 8)]:
        print(reading)
    if picture is not None:
        draw(watch.readings, picture)
    return watch.readings


def draw(readings: tuple[curvd.Reading, ...], picture: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [reading.step for reading in readings]
    left.errorbar(
        at,
        [reading["sharpness"] for reading in readings],
        yerr=[reading.errors["sharpness"] for reading in readings],
        fmt=".-",
        linewidth=0.8,
        markersize=4,
        label="largest eigenvalue of the Hessian",
    )
    left.axhline(2 / RATE, color="0.4", linestyle="--", label="2 / learning rate")
    left.set(xlabel="step of the training", ylabel="sharpness", ylim=(0, None))
    left.legend(frameon=False, loc="lower right")
    losses = [reading["loss"] for reading in readings]
    right.plot(at, losses, ".-", linewidth=0.8, markersize=4)
    right.set(xlabel="step of the training", ylabel="loss", ylim=(0, None))
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
