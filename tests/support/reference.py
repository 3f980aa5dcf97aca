"""The truth for tests of the engine, in float64 and without second derivatives.

Dense definitions are written out on purpose, slow and plain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.places import here
from support.zoo import Animal
from torch import Tensor

from curvd.contract.enums import Dtype
from curvd.contract.specs import DatasetSpec
from curvd_server.engine.objective.objective import Problem


def problem_of(animal: Animal, batch_size: int = 4, dtype=Dtype.FLOAT64) -> Problem:
    """The animal's problem, by default with a ragged last mini-batch."""
    data = DatasetSpec(inputs=("x",), target="y", batch_size=batch_size)
    return Problem.load(
        animal.module(),
        {},
        animal.arrays(),
        data,
        animal.loss,
        animal.mode,
        dtype,
        here(),
    )


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all entries."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflat(problem: Problem, vector: Tensor) -> dict[str, Tensor]:
    """Parameters by name, from a vector."""
    return {
        p.name: vector[p.offset : p.offset + p.size].reshape(p.shape)
        for p in problem.layout.parameters
    }


def columns(problem: Problem, count: int) -> Tensor:
    """Some columns ``[K, P]``, on the CPU."""
    g = torch.Generator().manual_seed(3)
    size = (count, problem.layout.size)
    return torch.randn(size, generator=g, dtype=torch.float64).to(problem.result_dtype)


def central_difference(problem: Problem, v: Tensor) -> Tensor:
    """``(g(θ + εv) - g(θ - εv)) / 2ε``, Richardson extrapolated once.

    A padding row is a constant by definition, so it is not moved.
    """
    theta = flat(problem.parameters)
    v = v.to(theta.device, copy=True)
    for name, row in problem.model.fixed:
        unflat(problem, v)[name][row] = 0.0

    def quotient(step: float) -> Tensor:
        ahead, behind = (
            problem.with_parameters(unflat(problem, theta + s * v)).gradient()[1]
            for s in (step, -step)
        )
        return (ahead - behind) / (2 * step)

    return (4 * quotient(1e-5) - quotient(2e-5)) / 3


def jacobian(problem: Problem, index: int) -> tuple[Tensor, Tensor]:
    """Outputs ``z`` of a mini-batch and ``dz/dθ: [*z, P]``, row by row."""
    leaves = [p.detach().requires_grad_() for p in problem.parameters]
    with torch.enable_grad():
        z = problem.outputs(leaves, problem.data[index])
        rows = [
            flat([
                torch.zeros_like(p) if g is None else g
                for g, p in zip(
                    torch.autograd.grad(
                        entry, leaves, retain_graph=True, allow_unused=True
                    ),
                    leaves,
                    strict=True,
                )
            ])
            for entry in z.reshape(-1)
        ]
    return z.detach(), torch.stack(rows).reshape(*z.shape, -1)


def _square(problem: Problem) -> Tensor:
    """Zeros ``[P, P]``."""
    shape = (problem.layout.size, problem.layout.size)
    return torch.zeros(shape, dtype=torch.float64, device=problem.device)


def dense_ggn(problem: Problem) -> Tensor:
    """``sum_b J_b^T (d²loss/dz²) J_b`` with the middle by automatic differentiation."""
    total = _square(problem)
    for index, batch in enumerate(problem.data):
        z, J = jacobian(problem, index)

        def of_outputs(z: Tensor, batch=batch) -> Tensor:
            return problem.batch_loss(z, batch)

        middle = torch.autograd.functional.hessian(of_outputs, z)
        J = J.reshape(z.numel(), -1)
        total += J.T @ middle.reshape(z.numel(), z.numel()) @ J
    return total


def dense_empirical_fisher(problem: Problem) -> Tensor:
    """``sum_n g_n g_n^T / normaliser`` over the data points' own losses."""
    total = _square(problem)
    for index, batch in enumerate(problem.data):
        z, J = jacobian(problem, index)
        leaf = z.requires_grad_()
        loss = problem.loss.sum(leaf, batch.targets)
        (d,) = torch.autograd.grad(loss, leaf)
        for row, jac in zip(d, J, strict=True):
            g = row.reshape(-1) @ jac.reshape(row.numel(), -1)
            total += torch.outer(g, g) / problem.normaliser
    return total


def block_diagonal(problem: Problem, sizes: Sequence[int], matrix: Tensor) -> Tensor:
    """Zero all but the diagonal blocks of some parameters each."""
    mask, start = torch.zeros_like(matrix), 0
    for size in sizes:
        inside = problem.layout.parameters[start : start + size]
        a, b = inside[0].offset, inside[-1].offset + inside[-1].size
        mask[a:b, a:b] = 1.0
        start += size
    return matrix * mask


def error(got: Tensor, want: Tensor) -> float:
    """Relative error; absolute where the truth is zero."""
    got, want = got.cpu(), want.cpu()
    return float((got - want).norm() / (want.norm() + 1e-12))
