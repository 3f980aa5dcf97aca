"""Asks the server at argv[1] for a product whose value is known in closed form.

A linear model under squared error has the Hessian 2/(N·M) XᵀX per output.
"""

import sys

import numpy as np

import curvd


def main(target: str) -> None:
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((50, 7)), rng.standard_normal((50, 3))
    weight = rng.standard_normal((3, 7))
    with curvd.connect(target) as client:
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
    print(f"MatVec through {target}: largest error {error:.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
