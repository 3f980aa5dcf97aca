"""Asks the server at argv[1] for products whose values are known without it.

A linear model under squared error has the Hessian 2/(N·M) XᵀX per output. With `native` as
argv[2], and a builder and a dataset from the mounted folders, it multiplies until the server
says that it makes native code, waits until that is made, multiplies until native code computes
the product, and compares with double backward in torch. If argv[1] is a folder, it writes that
dataset there.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import curvd

PATIENCE_S = 1800
MOST_PRODUCTS = 10_000
"""Until native code is asked for, and again until it is taken over."""
PAUSE_S = 0.5
"""Between two questions whether it is made: nothing else is asked of the server meanwhile."""
CONFIG = {"width": 2048, "layers": 4}
ROWS = 64
ASKED = 20
"""Products after which the server is asked what it does."""


def points() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((ROWS, CONFIG["width"])), rng.standard_normal((ROWS, 2))
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def check_closed_form(client: curvd.Client) -> None:
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((50, 7)), rng.standard_normal((50, 3))
    weight = rng.standard_normal((3, 7))
    session = client.create_session(
        model=client.register_model(
            "mlp", {"widths": [7, 3], "bias": False}, {"1.weight": weight}
        ),
        dataset=client.register_dataset(
            {"x": inputs, "y": targets}, inputs=["x"], target="y", batch_size=16
        ),
        loss="mse",
        dtype="F64",
    )
    v = rng.standard_normal(21)
    product = session.hessian() @ v
    exact = v.reshape(3, 7) @ inputs.T @ inputs * 2 / (50 * 3)
    error = np.abs(product - exact.ravel()).max()
    session.delete()
    assert error < 1e-12, error
    print(f"MatVec: largest error {error:.1e}")


def product_of_torch(net, v: np.ndarray) -> np.ndarray:
    """``H v`` by double backward in float64."""
    import torch

    x, y = (torch.from_numpy(a).double() for a in points().values())
    parameters = list(net.parameters())
    loss = torch.nn.functional.mse_loss(net(x), y)
    rows = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([r.reshape(-1) for r in rows])
    pulled = torch.autograd.grad(gradient @ torch.from_numpy(v).double(), parameters)
    return torch.cat([r.reshape(-1) for r in pulled]).numpy()


def check_native_code(client: curvd.Client) -> None:
    import torch
    from images_builders import deep

    torch.manual_seed(0)
    net = deep.build(CONFIG)
    dataset = client.register_dataset(
        name="points", inputs=["x"], target="y", batch_size=ROWS
    )
    model = client.register_model("deep", CONFIG, net.state_dict())
    session = client.create_session(model, dataset, loss="mse")
    H = session.hessian()
    v = np.random.default_rng(1).standard_normal(H.shape[0]).astype(np.float32)
    exact = product_of_torch(net.double(), v)

    def error() -> float:
        return float(np.linalg.norm(H @ v - exact) / np.linalg.norm(exact))

    def multiply_until(holds: Callable[[], bool], what: str) -> None:
        for _ in range(MOST_PRODUCTS // ASKED):
            if holds():
                return
            for _ in range(ASKED):
                H @ v
        raise AssertionError(f"after {MOST_PRODUCTS} products, {what}")

    def is_being_made() -> bool:
        stages = {a.progress.stage for a in client.server_info().activities}
        return curvd.Stage.COMPILING in stages

    before = error()
    assert not H.last.plan.compiled
    multiply_until(is_being_made, "the server made no native code")
    print(f"native code is made for a plan of the mode {H.last.plan.mode}")
    for _ in range(round(PATIENCE_S / PAUSE_S)):
        if not is_being_made():
            break
        threading.Event().wait(PAUSE_S)
    multiply_until(lambda: H.last.plan.compiled, "native code was not taken over")
    after = error()
    assert H.last.plan.compiled
    session.delete()
    assert max(before, after) < 1e-4, (before, after)
    print(f"it took over; errors beside torch {before:.1e} before, {after:.1e} after")


def main(target: str, *what: str) -> None:
    # The composed server starts in its own time.
    patient = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=PATIENCE_S))
    with curvd.connect(target, config=patient) as client:
        check_closed_form(client)
        if "native" in what:
            check_native_code(client)


if __name__ == "__main__":
    if Path(sys.argv[1]).is_dir():
        path = Path(sys.argv[1], "points.safetensors")
        save_file(points(), path)
        path.chmod(0o644)  # the server has another user
    else:
        main(*sys.argv[1:])
