"""A few data points in float64, at parameters that move in place along directions.

What a linearisation is compared with comes from here, made of gradients and outputs
alone. Nothing is held that can be had again: directions are made anew wherever they are
needed, and difference quotients are accumulated where backward passes leave gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvd.contract import OperatorSpec
from curvd_server.engine.objective import (
    Batch,
    Problem,
    chunks,
    dot,
    norm,
    rows_of,
)
from curvd_server.engine.operators import definition
from curvd_server.system import yield_point

ROWS = 4
"""Data points."""
PERTURBATION = 0.03
"""How far the parameters lie from the session's, relative to their scale."""
KEPT_ELEMENTS = 1 << 18
"""Of all parameters together, up to which directions are kept once they are made: to make
random numbers of so few takes longer than what is computed with them."""


@dataclass(frozen=True, slots=True)
class Direction:
    """A random direction that is made when it is needed, and the same each time."""

    seed: int
    scales: tuple[float, ...]
    """Of its entries, by parameter."""
    fixed: tuple[tuple[int, int], ...]
    """Rows that stay zero, by index of the parameter and of the row."""
    _kept: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Its entries by index of the parameter, where they are few."""

    @property
    def entries(self) -> list[Tensor]:
        """One tensor per parameter, in float64; nothing unless they are kept."""
        return [self._kept[index] for index in sorted(self._kept)]

    def keep(self, like: Sequence[Tensor]) -> None:
        """Make all entries and keep them, if they are few.

        Args:
            like: One tensor per parameter.
        """
        if sum(p.numel() for p in like) > KEPT_ELEMENTS:
            return
        normals = _normals(self.seed, tuple(p.shape for p in like))
        entries = torch._foreach_mul(normals, self.scales)
        for index, row in self.fixed:
            entries[index][row] = 0.0
        self._kept.update(enumerate(entries))

    def along(self, index: int, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Walk along a parameter, or something of its shape.

        Args:
            index: The index of the parameter.
            tensor: On the CPU.

        Yields:
            Views of chunks of the tensor, and the direction's entries there.
        """
        kept = self._kept.get(index)
        if kept is not None:
            for chunk, entries in chunks(tensor, kept):
                yield chunk, entries
            return
        generator, start = _generator(self.seed, index), 0
        for (chunk,) in chunks(tensor):
            entries = torch.randn(chunk.shape, generator=generator).double()
            entries *= self.scales[index]
            for row in (r - start for i, r in self.fixed if i == index):
                if 0 <= row < len(chunk):
                    entries[row] = 0.0
            start += len(chunk)
            yield chunk, entries

    def tensors(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Make all of it, one tensor per parameter."""
        made = [torch.empty_like(p) for p in like]
        for index, tensor in enumerate(made):
            for chunk, entries in self.along(index, tensor):
                chunk.copy_(entries)
        return made

    def dot(self, rows: Sequence[Tensor]) -> float:
        """Multiply it with one tensor per parameter, and sum."""
        if self._kept:
            return sum(map(dot, rows, self.entries))
        return sum(
            dot(chunk, entries)
            for index, row in enumerate(rows)
            for chunk, entries in self.along(index, row)
        )


def _generator(seed: int, index: int) -> torch.Generator:
    """Make the source of a direction's entries in one parameter."""
    # note: torch's generator reads 32 bits of a seed, the lowest.
    return torch.Generator().manual_seed((seed + 1_000_003 * index) % 2**32)


@functools.lru_cache(maxsize=6)
def _normals(seed: int, shapes: tuple[torch.Size, ...]) -> tuple[Tensor, ...]:
    """Make a direction's entries for parameters of scale one, which are `KEPT_ELEMENTS` at most.

    The second session of an architecture has the same, and so has one objective when its
    gradient and its operators are verified; who has them must not write to them.
    """
    return tuple(
        torch.randn(shape, generator=_generator(seed, index)).double()
        for index, shape in enumerate(shapes)
    )


class FiniteDifferences:
    """Differences of gradients on an excerpt of a problem, at float64 parameters of its own.

    Args:
        origin: The session's problem.
        perturbation: Where the parameters go first, at once.
        direction: Along which they move, and quotients are taken.
        shrink: By what the session's parameters are multiplied before.
    """

    def __init__(
        self,
        origin: Problem,
        perturbation: Direction,
        direction: Direction,
        shrink: float = 1.0,
    ) -> None:
        self.problem = origin.excerpt(ROWS)
        self._origin, self._shrink = origin, shrink
        self._perturbation, self._direction = perturbation, direction
        self._centre: list[Tensor] = []
        self._move(0.0)
        if direction.entries:
            self._centre = [p.clone() for p in self.problem.parameters]

    def quotient(self, spec: OperatorSpec, step: float) -> list[Tensor]:
        """Multiply the direction by an operator, without any second derivative.

        Args:
            spec: The operator.
            step: Width of the central difference.

        Returns:
            One tensor per parameter. The parameters are left somewhere along the way.
        """
        return definition(spec.kind).difference_quotient(self, spec, step)

    def of_gradient(self, step: float) -> list[Tensor]:
        """Difference the gradient; see `Differences`."""
        leaves = self._leaves()
        for sign in (1.0, -1.0):
            self._move(sign * step)
            self._add_gradient(leaves, self.problem.data[0], sign)
        return [row.div_(2 * step) for row in _gradients(leaves)]

    def of_outputs(self, step: float) -> Tensor:
        """Difference the outputs; see `Differences`."""
        batch = self.problem.data[0]
        ahead, behind = (self._outputs(batch, sign * step) for sign in (1.0, -1.0))
        return (ahead - behind) / (2 * step)

    def pulled_back(
        self, cotangent_at: Callable[[Tensor, Batch], Tensor]
    ) -> list[Tensor]:
        """Multiply by the transposed Jacobian; see `Differences`."""
        batch, leaves = self.problem.data[0], self._leaves()
        self._move(0.0)
        yield_point()
        with torch.enable_grad():
            outputs = self.problem.outputs(leaves, batch)
            cotangent = cotangent_at(outputs.detach(), batch)
            rows = torch.autograd.grad(outputs, leaves, cotangent, allow_unused=True)
        return filled(rows, leaves)

    def unit_gradient(self) -> list[Tensor]:
        """Give the gradient if each output's derivative of the loss were one data point's."""

        def ones(outputs: Tensor, batch: Batch) -> Tensor:
            return torch.ones_like(outputs) / self.problem.normaliser

        return self.pulled_back(ones)

    def beyond_the_sum(self) -> tuple[list[float], list[float]]:
        """Subtract the data points' own gradients from the gradient.

        Returns:
            Norms of what remains, and of the gradient, by parameter.
        """
        whole, leaves = self.problem.data[0], self._leaves()
        self._add_gradient(leaves, whole, 1.0)
        norms = [norm(row) for row in _gradients(leaves)]
        for point in range(len(whole.targets)):
            cut = slice(point, point + 1)
            self._add_gradient(leaves, rows_of(whole, cut), -1.0)
        return [norm(row) for row in _gradients(leaves)], norms

    def slopes(self, step: float) -> tuple[float, float, float]:
        """Give what the loss's slope along the direction is made of, in two ways.

        Args:
            step: Width of the central difference.

        Returns:
            The loss ahead and behind, and the gradient's share of the direction.
        """
        batch = self.problem.data[0]
        ends = []
        for sign in (1.0, -1.0):
            self._move(sign * step)
            yield_point()
            with torch.no_grad():
                loss = self.problem.objective(self.problem.parameters, batch)
            ends.append(float(loss))
        leaves = self._leaves()
        self._move(0.0)
        self._add_gradient(leaves, batch, 1.0)
        share = self._direction.dot(_gradients(leaves))
        ahead, behind, share = self.problem.model.company.total([*ends, share])
        return ahead, behind, share

    def _move(self, step: float) -> None:
        if self._centre:
            yield_point()
            torch._foreach_copy_(self.problem.parameters, self._centre)
            if step:
                kept = self._direction.entries
                torch._foreach_add_(self.problem.parameters, kept, alpha=step)
            return
        pairs = zip(self.problem.parameters, self._origin.parameters, strict=True)
        for index, (parameter, origin) in enumerate(pairs):
            yield_point()
            # From the origin each time: adding and subtracting would round.
            parameter.copy_(origin)
            if self._shrink != 1.0:
                parameter.mul_(self._shrink)
            for direction, length in (
                (self._perturbation, PERTURBATION),
                (self._direction, step),
            ):
                if length:
                    for chunk, entries in direction.along(index, parameter):
                        chunk.add_(entries, alpha=length)

    def _outputs(self, batch: Batch, step: float) -> Tensor:
        self._move(step)
        yield_point()
        with torch.no_grad():
            return self.problem.outputs(self.problem.parameters, batch)

    def _leaves(self) -> list[Tensor]:
        """View the parameters, which may move, as what gradients are added up for."""
        return [p.detach().requires_grad_() for p in self.problem.parameters]

    def _add_gradient(
        self, leaves: Sequence[Tensor], batch: Batch, factor: float
    ) -> None:
        """Add the gradient, times a factor, to those of the leaves.

        Each parameter's is added as the backward pass gets there, and not kept.
        """
        yield_point()
        with torch.enable_grad():
            loss = factor * self.problem.objective(leaves, batch)
        if loss.requires_grad:
            torch.autograd.backward(loss, inputs=leaves)


def _gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Look at what was added up."""
    return filled([leaf.grad for leaf in leaves], leaves)


def filled(rows: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Write zeros for None."""
    pairs = zip(rows, like, strict=True)
    return [torch.zeros_like(p) if r is None else r for r, p in pairs]


def scale_of(parameter: Tensor) -> float:
    """Give the typical size of a parameter's entries; not too small if all are zero."""
    if not parameter.numel():
        return 0.0
    return max(norm(parameter) / math.sqrt(parameter.numel()), 1e-2)
