"""An objective of the engine, behind plain arrays: it makes operators, and has versions.

It belongs to whoever has the turn of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curvd.contract import OperatorSpec, ParameterLayout, Tier
from curvd.tensors import Pool
from curvd_server.device.factored import FactoredOperator, SharedFactors
from curvd_server.device.torch_operator import TorchOperator
from curvd_server.device.translated import translated
from curvd_server.engine import (
    Compiler,
    Memory,
    Problem,
    building,
    check_gradient,
    finite_gradient,
)
from curvd_server.engine.data_points import Points
from curvd_server.system import Poll

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Tools:
    """What operators are built with."""

    plans: Memory
    """Plans of earlier operators."""
    compiler: Compiler | None
    """Makes native code of what is used long enough."""
    results: Pool
    """Memory of results on the host."""


class TorchProblem:
    """An objective at one version of its parameters.

    Args:
        problem: The engine's.
        tools: What its operators are built with.
    """

    def __init__(self, problem: Problem, tools: Tools) -> None:
        self._problem, self._tools = problem, tools
        self._factors = SharedFactors()

    @property
    def layout(self) -> ParameterLayout:
        """What a vector of length P means."""
        return self._problem.layout

    @property
    def batches(self) -> int:
        """Mini-batches per pass over the data."""
        return self._problem.batches

    def with_parameters(self, values: Arrays) -> TorchProblem:
        """Make a new version; this one stays valid.

        Args:
            values: Parameters and buffers by name; what this objective does not use
                (running statistics in batch mode, for example) is passed over.

        Returns:
            The new version.
        """
        used = {*self._problem.layout.names, *self._problem.model.constants}
        with translated():
            tensors = as_tensors({n: v for n, v in values.items() if n in used})
            moved = self._problem.with_parameters(tensors)
            return TorchProblem(moved, self._tools)

    def sharing(self, other: TorchProblem) -> TorchProblem:
        """Take the parameters of the same model on other data, in the same memory."""
        return TorchProblem(self._problem.sharing(other._problem), self._tools)

    def gradient(self, *, cancelled: Poll) -> tuple[float, NDArray[Any]]:
        """Compute the loss and its gradient [P]."""
        with translated():
            loss, gradient = finite_gradient(self._problem, cancelled=cancelled)
            return loss, gradient.cpu().numpy()

    def check(self, *, cancelled: Poll) -> None:
        """Compute a gradient of all data, and find out whether it is that of the loss."""
        with translated():
            check_gradient(self._problem, cancelled)

    def points(
        self,
        compute: Callable[[Callable[[Poll], Any]], Any],
        *,
        limit: int | None,
        expired: Callable[[], bool],
    ) -> Points:
        """Name its data points as what a query is about.

        Args:
            compute: Runs a job on the device, in its turn.
            limit: Most data points; None: all.
            expired: Whether the time is up.

        Returns:
            The data points.
        """

        def told(job: Callable[[Poll], Any]) -> Any:
            def inside(cancelled: Poll) -> Any:
                with translated():
                    return job(cancelled)

            return compute(inside)

        return Points(self._problem, compute=told, limit=limit, expired=expired)

    def build(
        self,
        spec: OperatorSpec,
        *,
        budget_bytes: int,
        cancelled: Poll,
        tier: Tier = Tier.FINAL,
    ) -> TorchOperator | FactoredOperator:
        """Verify and warm an operator; see `Problem.build` of the protocols.

        Native code takes over where a first tier did, and nowhere else.
        """
        if spec.kind.is_factored:
            return self.factored(spec, budget_bytes, cancelled)
        with translated():
            built = building.build(
                self._problem,
                spec,
                budget_bytes=budget_bytes,
                memory=self._tools.plans,
                compiler=self._tools.compiler if tier is Tier.FIRST else None,
                results=self._tools.results,
                tier=tier,
                cancelled=cancelled,
            )
            return TorchOperator(built)

    def improve(
        self, operator: TorchOperator, *, budget_bytes: int, cancelled: Poll
    ) -> TorchOperator:
        """Make the last tier of an operator; see `Problem.improve` of the protocols."""
        with translated():
            return operator.improved(self._tools.plans, budget_bytes, cancelled)

    def choose_again(
        self, operator: TorchOperator, *, budget_bytes: int, cancelled: Poll
    ) -> TorchOperator | None:
        """Choose its plan anew; see `Problem.choose_again` of the protocols."""
        with translated():
            return operator.chosen_again(self._tools.plans, budget_bytes, cancelled)

    def move(
        self, operator: TorchOperator | FactoredOperator
    ) -> TorchOperator | FactoredOperator:
        """Make the same operator for this version; nothing is computed yet."""
        if isinstance(operator, FactoredOperator):
            return self.refactored(operator)
        return operator.at(self._problem)

    def factored(
        self, spec: OperatorSpec, budget_bytes: int, cancelled: Poll
    ) -> FactoredOperator:
        """Make an operator of Kronecker factors, those that are there if there are some.

        Args:
            spec: Which.
            budget_bytes: Memory for factors.
            cancelled: Polled between mini-batches.
        """
        with translated():
            return self._factors.build(
                self._problem, spec, budget_bytes=budget_bytes, cancelled=cancelled
            )

    def refactored(self, operator: FactoredOperator) -> FactoredOperator:
        """Make the same at this version; factors are made when they are asked for."""
        return self._factors.move(operator, self._problem)


def as_tensors(arrays: Arrays) -> dict[str, Any]:
    """Prepare arrays for torch.

    Args:
        arrays: By name. NumPy has no bfloat16; its bits come as uint16, which is no type
            of the wire.

    Returns:
        The same; tensors where there is no array of the type.
    """
    return {
        name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        if a.dtype == np.uint16
        else a
        for name, a in arrays.items()
    }
