"""Every algorithm off the CPU: it stays on the device of its vectors, and says the same.

What is right on the CPU the other files compare with dense algebra.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.places import OTHERS
from torch import Tensor

from curvd.contract.enums import Distribution, Estimator, Solver, Which
from curvd_server.linalg import (
    Products,
    Target,
    diagonal,
    eigsh,
    frobenius_norm,
    logdet,
    solve,
    spectral_density,
    trace,
)
from curvd_server.linalg.base import drain
from curvd_server.linalg.random_probes import probes

SIZE = 40
SAMPLES = Target(samples=24)
on_others = pytest.mark.parametrize("place", OTHERS, indirect=True)


def made(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def matrix(*, floor: float) -> Tensor:
    """Symmetric, a few eigenvalues equal; positive definite with a floor."""
    values = 0.7 ** torch.arange(SIZE, dtype=torch.float64)
    values[1:4] = 0.5
    values[::7] *= 1.0 if floor else -1.0
    basis = torch.linalg.qr(made(SIZE, SIZE))[0]
    return (basis * (values + floor)) @ basis.T


def starting_again(products: Products):
    found = drain(eigsh(products, 3))
    return eigsh(products, 3, start=found.vectors, which=Which.LARGEST_MAGNITUDE)


def preconditioned(products: Products):
    B = made(2, SIZE, seed=1).to(products.device)
    diagonal = (products(torch.eye(SIZE, dtype=B.dtype).to(B))).diagonal()
    start = torch.zeros_like(B)
    return solve(products, B, damping=0.1, preconditioner=diagonal, start=start)


def solved(solver: Solver):
    def query(products: Products):
        B = made(3, SIZE, seed=1).to(products.device)
        return solve(products, B, solver=solver, damping=0.1, tolerance=1e-10)

    return query


def indefinite(products: Products):
    B = made(2, SIZE, seed=1).to(products.device)
    return solve(products, B, solver=Solver.CG)


def traced(estimator: Estimator):
    return lambda products: trace(products, estimator=estimator, target=SAMPLES)


def read_off(estimator: Estimator):
    return lambda products: diagonal(products, estimator=estimator, target=SAMPLES)


QUERIES = {
    **{f"eigsh {w}": lambda p, w=w: eigsh(p, 4, which=w) for w in Which},
    "eigsh of a small basis": lambda p: eigsh(p, 4, basis=9, tolerance=1e-9),
    "eigsh, warm": starting_again,
    **{f"solve {s}": solved(s) for s in Solver},
    "solve, preconditioned": preconditioned,
    "solve, indefinite": indefinite,
    **{f"trace {e}": traced(e) for e in Estimator},
    "diagonal hutchinson": read_off(Estimator.HUTCHINSON),
    "diagonal xdiag": read_off(Estimator.EXCHANGEABLE),
    "density": lambda p: spectral_density(p, samples=2, steps=9, block=2),
    "logdet": lambda p: logdet(p, damping=1.0, steps=9, target=SAMPLES, block=2),
    "norm": lambda p: frobenius_norm(p, target=SAMPLES),
}


@on_others
@pytest.mark.parametrize("name", QUERIES)
def test_a_query_says_what_it_says_on_the_cpu(place: str, name: str):
    floor = 0.0 if "indefinite" in name or "eigsh" in name else 0.1
    found = []
    for device in ("cpu", place):
        A = matrix(floor=floor).to(device)
        products = Products(
            lambda V, A=A: V @ A, size=SIZE, dtype=A.dtype, device=A.device
        )
        found.append(drain(QUERIES[name](products)))
    for field in dataclasses.fields(found[0]):
        here, there = (getattr(result, field.name) for result in found)
        if isinstance(here, Tensor):
            assert_alike(there.cpu().numpy(), here.numpy())
        elif isinstance(here, float | np.ndarray):
            assert_alike(there, here)


def assert_alike(there, here):
    """Equal up to rounding; eigenvectors also up to their sign."""
    signs = np.sign(there) * np.sign(here) if np.ndim(here) == 2 else 1.0
    np.testing.assert_allclose(there * signs, here * 1.0, rtol=1e-6, atol=1e-6)


@on_others
@pytest.mark.parametrize("distribution", Distribution)
def test_probes_are_made_there_and_are_those_of_the_cpu(place, distribution):
    make = lambda device: probes(  # noqa: E731
        distribution, 7, [0, 3, 2**40], 999, dtype=torch.float64, device=device
    )
    there = make(place)
    assert there.device.type == place
    torch.testing.assert_close(there.cpu(), make("cpu"), rtol=1e-12, atol=1e-14)
