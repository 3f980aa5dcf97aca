"""Differences in float64 of a model whose parameters do not fit in float64.

Each parameter is widened, and moved, where a layer uses it, and freed behind it; each
gradient leaves as its projections when it arrives. So what is in float64 at once is a
layer, and the activations of a few data points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from curvd.contract import OperatorSpec
from curvd_server.engine.made_anew import Leaves, MadeAnew
from curvd_server.engine.objective import Batch, Problem
from curvd_server.engine.operators import definition
from curvd_server.engine.verification.patterns import Pattern
from curvd_server.system import yield_point

T = TypeVar("T")

_SMALL_BYTES = 1 << 20
"""Constants up to here are widened once."""
_CPU = torch.device("cpu")


class LayerwiseDifferences:
    """Central differences along a direction, of everything a summary of each gradient.

    It is a `Differences`, except that where that has a parameter's tensor this has what
    `summary` makes of it.

    Args:
        origin: The session's problem.
        batch: The mini-batch.
        point: Makes a parameter at which differences are centred, given its index, in the
            session's type.
        direction: Along which parameters move.
        summary: Makes of an index and a row what is wanted of it, linearly.
    """

    def __init__(
        self,
        origin: Problem,
        batch: Batch,
        point: Callable[[int], Tensor],
        direction: Pattern,
        summary: Callable[[int, Tensor], Tensor],
    ) -> None:
        self._point, self._direction, self._step = point, direction, 0.0
        self._leaves = Leaves(
            self._made, origin.parameters, torch.float64, _CPU, summary
        )
        self.problem = origin.exactly(
            batch, self._leaves.tensors, _widened(origin.model.constants)
        )

    def quotient(self, spec: OperatorSpec, step: float) -> list[Tensor]:
        """Multiply the direction by an operator, without any second derivative.

        Args:
            spec: The operator.
            step: Width of the central difference.

        Returns:
            A summary per parameter.
        """
        return definition(spec.kind).difference_quotient(self, spec, step)

    def of_gradient(self, step: float) -> list[Tensor]:
        """Difference the gradient; see `Differences`."""
        ahead, behind = (self.gradient(sign * step)[1] for sign in (1.0, -1.0))
        pairs = zip(ahead, behind, strict=True)
        return [(plus - minus) / (2 * step) for plus, minus in pairs]

    def of_outputs(self, step: float) -> Tensor:
        """Difference the outputs; see `Differences`."""
        batch = self.problem.data[0]
        ahead, behind = (
            self._at(
                sign * step,
                lambda: self.problem.outputs(self.problem.parameters, batch),
            )
            for sign in (1.0, -1.0)
        )
        return (ahead - behind) / (2 * step)

    def pulled_back(
        self, cotangent_at: Callable[[Tensor, Batch], Tensor]
    ) -> list[Tensor]:
        """Multiply by the transposed Jacobian; see `Differences`."""
        batch, self._step = self.problem.data[0], 0.0
        yield_point()
        with self._leaves.recording():
            outputs = self.problem.outputs(self.problem.parameters, batch)
        cotangent = cotangent_at(outputs.detach(), batch)
        return self._filled(self._leaves.pulled(outputs, cotangent))

    def gradient(self, step: float) -> tuple[float, list[Tensor]]:
        """Differentiate the objective.

        Args:
            step: How far along the direction.

        Returns:
            The loss, and a summary per parameter.
        """
        batch, self._step = self.problem.data[0], step
        yield_point()
        loss, rows = self._leaves.gradients(
            lambda: self.problem.objective(self.problem.parameters, batch)
        )
        return float(loss), self._filled(rows)

    def loss(self, step: float) -> float:
        """Compute the objective, so far along the direction."""
        batch = self.problem.data[0]
        return float(
            self._at(
                step, lambda: self.problem.objective(self.problem.parameters, batch)
            )
        )

    def _at(self, step: float, compute: Callable[[], T]) -> T:
        self._step = step
        yield_point()
        with torch.no_grad():
            return compute()

    def _made(self, index: int) -> Tensor:
        """Widen a parameter where it is now."""
        wide = self._point(index).to(_CPU, torch.float64)
        return self._direction.add(index, wide, self._step) if self._step else wide

    def _filled(self, rows: list[Tensor | None]) -> list[Tensor]:
        """Write zeros for None."""
        shape = next((row.shape for row in rows if row is not None), torch.Size())
        zeros = torch.zeros(shape, dtype=torch.float64)
        return [zeros if row is None else row for row in rows]


def _widened(constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Widen frozen parameters and buffers, large ones at each use."""
    return {name: _wide(value) for name, value in constants.items()}


def _wide(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value.cpu()
    if value.nbytes <= _SMALL_BYTES:
        return value.to(_CPU, torch.float64)
    return MadeAnew(
        lambda: value.to(_CPU, torch.float64).contiguous(),
        value.shape,
        torch.float64,
        _CPU,
    )
