"""The main job on real data: what ``curvd demo`` and ``make demo`` run.

A small convolutional net learns scikit-learn's handwritten digits; a server in a
process of its own holds net and data; a client asks it for curvature, and every
answer is checked against central differences of the gradient in float64.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import nn

import curvd
from curvd_server.models import builders

CONFIG = {"channels": 1, "classes": 10, "widths": [8, 16]}
EIGENVALUES = 8
TOLERANCE = 1e-4
"""float32 products against the float64 reference, relative to its norm."""

Vector = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained net and the data it was trained on."""

    module: nn.Module
    images: torch.Tensor
    """[N, 1, 8, 8] float32, in [0, 1]."""
    labels: torch.Tensor
    """[N] int64."""
    accuracy: float
    """On images that were held out."""


def main(picture: Path = Path("demo-spectrum.png"), *, as_json: bool = False) -> int:
    """Run the demo.

    Args:
        picture: Where the picture of the spectrum goes.
        as_json: Whether to print what was found as JSON, and the rest to stderr.

    Returns:
        Exit status: 0 if every check passed.
    """
    console = Console(highlight=False, stderr=as_json)
    console.print(
        "[bold]1. Train[/] a small convolutional net on real digits (scikit-learn)"
    )
    net = train(epochs=25)
    console.print(f"   held-out accuracy {net.accuracy:.1%}")

    console.print("[bold]2. Serve[/]: a curvd server in a process of its own")
    with server_process() as target, curvd.connect(target) as client:
        info = client.server_info()
        console.print(
            f"   {target}: curvd {info.version}, torch {info.torch_version}, "
            f"{info.devices[0].description}"
        )

        console.print("[bold]3. Register[/] net and data, and open a session")
        session = open_session(client, net)
        spec, plan = session.info.operators[0]
        console.print(
            f"   {session.info.layout.size} parameters, {session.info.data_points} images in "
            f"{session.info.batches} batches; {spec.kind} by {plan.mode}, verified: differences "
            f"{plan.difference_gap:.0e}, symmetry {plan.symmetry_gap:.0e}"
        )

        console.print("[bold]4. Multiply[/], and check against float64 differences")
        rows = check_products(session, net)
        console.print(_table("product", "relative error", rows, TOLERANCE))

        console.print(
            f"[bold]5. Eigenvalues[/]: SciPy's eigsh on the remote Hessian, k = {EIGENVALUES}"
        )
        values, residuals = eigenvalues(session)
        eigen_rows = list(zip((f"{v:.6g}" for v in values), residuals, strict=True))
        console.print(_table("eigenvalue", "residual / largest", eigen_rows, TOLERANCE))

        draw(values, picture)
        console.print(f"[bold]6. Picture[/] of the spectrum: {picture}")
        session.delete()

    worst = max(error for _, error in rows + eigen_rows)
    passed = worst <= TOLERANCE
    console.print(
        f"{'[green]All checks passed' if passed else '[red]A check failed'}[/]: "
        f"worst {worst:.1e}, limit {TOLERANCE:.0e}"
    )
    if as_json:
        facts = {
            "passed": passed,
            "limit": TOLERANCE,
            "accuracy": net.accuracy,
            "products": dict(rows),
            "eigenvalues": dict(eigen_rows),
            "picture": str(picture),
        }
        sys.stdout.write(json.dumps(facts, indent=2, default=float) + "\n")
    return 0 if passed else 1


def train(epochs: int) -> Trained:
    """Train the demo's net.

    Args:
        epochs: Passes over the training images.

    Returns:
        The net in evaluation mode, with its training data.
    """
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    held_out, kept = order[:297], order[297:]
    module = builders.BUILDERS["cnn"](CONFIG)
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in track(range(epochs), description="   training", transient=True):
        for batch in torch.split(kept[torch.randperm(len(kept))], 128):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(module(images[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    module.eval()
    with torch.no_grad():
        right = module(images[held_out]).argmax(1) == labels[held_out]
    return Trained(module, images[kept], labels[kept], right.double().mean().item())


@contextlib.contextmanager
def server_process() -> Iterator[str]:
    """Run ``curvd serve`` on a free loopback port, with a data directory of its own.

    Yields:
        The target to connect to.
    """
    with tempfile.TemporaryDirectory(prefix="curvd-demo-") as data_dir:
        command = [sys.executable, "-m", "curvd.cli", "serve"]
        command += ["--listen", "127.0.0.1:0", "--data-dir", data_dir]
        command += ["--log-level", "warning"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            # It says where it listens once it does.
            yield server.stdout.readline().split()[-1]
        finally:
            server.terminate()
            server.wait(timeout=60)


def open_session(client: curvd.Client, net: Trained) -> curvd.Session:
    """Register the net and its training data, and bring them together.

    Args:
        client: Connected.
        net: The net, from `train`.

    Returns:
        A float32 session of the mean cross-entropy.
    """
    model = client.register_model("cnn", CONFIG, net.module.state_dict())
    dataset = client.register_dataset(
        {"images": net.images, "labels": net.labels},
        inputs=["images"],
        target="labels",
        batch_size=256,
    )
    return client.create_session(
        model=model, dataset=dataset, loss="cross_entropy", dtype="F32", name="digits"
    )


def check_products(session: curvd.Session, net: Trained) -> list[tuple[str, float]]:
    """Ask for single, batched and block-diagonal products and check them.

    Args:
        session: The session of the trained net.
        net: The net, from `train`.

    Returns:
        What was asked for, and its relative error.
    """
    layout = session.info.layout
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((layout.size, 4)).astype(np.float32)
    reference = difference_reference(net)
    exact = np.stack(
        [reference(column) for column in matrix.T.astype(np.float64)], axis=1
    )

    hessian = session.hessian()
    one_block_per_tensor = session.hessian(block_sizes=(1,) * len(layout.parameters))
    blocks = np.zeros(layout.size)
    for parameter in layout.parameters:
        rows = slice(parameter.offset, parameter.offset + parameter.size)
        inside = np.zeros(layout.size)
        inside[rows] = matrix[rows, 0]
        blocks[rows] = reference(inside)[rows]
    return [
        ("Hessian, one vector", _error(hessian @ matrix[:, 0], exact[:, 0])),
        ("Hessian, four columns", _error(hessian @ matrix, exact)),
        (
            f"block-diagonal, {len(layout.parameters)} blocks",
            _error(one_block_per_tensor @ matrix[:, 0], blocks),
        ),
    ]


def difference_reference(net: Trained) -> Callable[[Vector], Vector]:
    """Make the truth: central differences of the gradient, float64, plain torch.

    Args:
        net: The net, from `train`.

    Returns:
        Maps v: [P] to Hv: [P].
    """
    module = builders.BUILDERS["cnn"](CONFIG).double().eval()
    module.load_state_dict(net.module.state_dict())
    parameters = list(module.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(theta: torch.Tensor) -> torch.Tensor:
        nn.utils.vector_to_parameters(theta, parameters)
        loss = nn.functional.cross_entropy(module(net.images.double()), net.labels)
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters))

    def product(v: Vector) -> Vector:
        # So small that none of a million ReLUs crosses its kink.
        step = 1e-9 / float(np.linalg.norm(v))
        direction = step * torch.from_numpy(v)
        difference = gradient(start + direction) - gradient(start - direction)
        product: Vector = (difference / (2 * step)).numpy()
        return product

    return product


def eigenvalues(session: curvd.Session) -> tuple[Vector, list[float]]:
    """Let SciPy find the largest eigenvalues of the remote Hessian.

    Args:
        session: The session of the trained net.

    Returns:
        The eigenvalues, largest first, and ``|Hx - λx|`` relative to the largest.
    """
    operator = session.hessian().to_scipy()
    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    values, vectors = eigsh(operator, k=EIGENVALUES, which="LA", v0=start, tol=1e-4)
    values, vectors = values[::-1], vectors[:, ::-1]
    residuals = np.linalg.norm(operator @ vectors - vectors * values, axis=0)
    return values, [float(r / values[0]) for r in residuals]


def draw(values: Vector, picture: Path) -> None:
    """Draw the top of the spectrum.

    Args:
        values: [k] Eigenvalues, largest first.
        picture: PNG file, in a folder that is there.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(1, len(values) + 1), values, color="#4477aa")
    axes.set(
        xlabel="rank",
        ylabel="eigenvalue",
        yscale="log",
        title="Largest Hessian eigenvalues: small CNN on digits, mean cross-entropy",
    )
    axes.title.set_fontsize("medium")
    axes.set_xticks(range(1, len(values) + 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)


def _error(result: Vector, exact: Vector) -> float:
    return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))


def _table(
    what: str, measure: str, rows: list[tuple[str, float]], limit: float
) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 3))
    table.add_column(what)
    table.add_column(measure, justify="right")
    table.add_column("")
    for name, error in rows:
        table.add_row(
            name, f"{error:.1e}", "ok" if error <= limit else "[red]TOO LARGE[/]"
        )
    return table
