"""What an operator says about itself, and what it is linearised to.

An operator is one file beside this one: a `Definition`, found by its kind (`registry`).
Everything in which operators differ is asked of it, and nobody asks for the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from curvd.contract import LossName, OperatorSpec
from curvd_server.engine.objective import Batch, Problem
from curvd_server.engine.program import HessianProgram, JacobianProgram, Rows


class Linearisation(Protocol):
    """One mini-batch's share of an operator at fixed parameters."""

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        """Multiply the diagonal block of some consecutive parameters.

        Args:
            tangents: One tensor per parameter of the block; ``[K, ...]`` if batched.
            block: Indices of the parameters.
            batched: Whether tangents and rows have a leading column axis.

        Returns:
            One tensor per parameter of the block.
        """
        ...


class Differences(Protocol):
    """Central differences at a few data points, in float64, along one direction ``v``.

    They are made of outputs and gradients alone: no second derivative is asked for.
    """

    problem: Problem
    """The few data points, at parameters that move."""

    def of_gradient(self, step: float) -> list[Tensor]:
        """Difference the gradient: ``H v``, one tensor per parameter.

        Args:
            step: Width of the central difference.
        """
        ...

    def of_outputs(self, step: float) -> Tensor:
        """Difference the outputs: ``J v``.

        Args:
            step: Width of the central difference.
        """
        ...

    def pulled_back(
        self, cotangent_at: Callable[[Tensor, Batch], Tensor]
    ) -> list[Tensor]:
        """Multiply by the transposed Jacobian, an ordinary backward pass.

        Args:
            cotangent_at: Makes what is multiplied, given outputs and their mini-batch.

        Returns:
            One tensor per parameter.
        """
        ...


class Definition(Protocol):
    """One curvature operator: its linearisations, and what they are compared with."""

    @property
    def adds_weight_decay(self) -> bool:
        """Whether the penalty on parameters is part of what is differentiated."""
        ...

    def check_loss(self, loss: LossName, spec: OperatorSpec) -> None:
        """Refuse losses of which this operator would be zero or meaningless.

        Args:
            loss: The loss.
            spec: The operator.

        Raises:
            InvalidSpec: With what to use instead.
        """
        ...

    def program(
        self, problem: Problem, spec: OperatorSpec, batch: Batch
    ) -> HessianProgram | JacobianProgram:
        """Trace once per shape, and run what depends on no tangent."""
        ...

    def double_backward(
        self, problem: Problem, spec: OperatorSpec, batch: Batch
    ) -> Linearisation:
        """Keep the graph whose backward pass is the product."""
        ...

    def forward_over_reverse(
        self, problem: Problem, spec: OperatorSpec, batch: Batch
    ) -> Linearisation:
        """Keep nothing; differentiate in forward mode at every product."""
        ...

    def difference_quotient(
        self, differences: Differences, spec: OperatorSpec, step: float
    ) -> list[Tensor]:
        """Multiply the direction of differences: the truth that products must reproduce.

        Args:
            differences: The differences of outputs and gradients.
            spec: The operator.
            step: Width of the central difference.

        Returns:
            One tensor per parameter.
        """
        ...
