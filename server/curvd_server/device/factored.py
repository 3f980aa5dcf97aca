"""Operators whose factors are known, behind plain arrays."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import OperatorSpec, PlanReport
from curvd_server.device.translated import translated
from curvd_server.engine.kronecker import Factors, KroneckerOperator, build, factors_of
from curvd_server.engine.objective import Problem
from curvd_server.system import Poll


class FactoredOperator:
    """An operator of Kronecker factors; an `Operator` of the device's protocols.

    Args:
        operator: The engine's operator.
    """

    is_in_doubt = False
    """Nothing was timed."""
    shares = False
    """Columns together would round otherwise than alone."""
    is_remote = False
    """Its products are made by the thread that asks."""

    def __init__(self, operator: KroneckerOperator) -> None:
        self.operator = operator

    @property
    def report(self) -> PlanReport:
        """How it is computed."""
        return self.operator.report

    @property
    def spent_s(self) -> float:
        """Seconds that it has computed, at earlier versions included."""
        return self.operator.spent_s

    @property
    def size(self) -> int:
        """P, the length of the vectors that it multiplies."""
        return self.operator.problem.layout.size

    @property
    def dtype(self) -> torch.dtype:
        """Type of its products."""
        return self.operator.problem.result_dtype

    @property
    def device(self) -> torch.device:
        """Where its products are made."""
        return self.operator.problem.device

    def apply(
        self, columns: NDArray[Any], *, counts: Sequence[int] = (), cancelled: Poll
    ) -> NDArray[Any]:
        """Multiply columns: [K, P] -> [K, P]; see `Device`'s `Operator`."""
        with translated():
            ends = np.cumsum(counts or (len(columns),))
            parts = np.split(columns, ends[:-1])
            rows = [self.operator.apply(p, cancelled=cancelled).cpu() for p in parts]
            return (rows[0] if len(rows) == 1 else torch.cat(rows)).numpy()

    def multiply(self, columns: Tensor, *, cancelled: Poll) -> Tensor:
        """Multiply columns that are on the device: [K, P] -> [K, P]."""
        with translated():
            return self.operator.apply(columns, cancelled=cancelled)

    @property
    def runner(self) -> None:
        """Nobody runs algorithms elsewhere: vectors are whole here."""

    def eigenvalues(self, *, cancelled: Poll) -> Tensor:
        """Give all eigenvalues: [P] in float64, in no order."""
        with translated():
            return self.operator.eigenvalues(cancelled)

    def inverse(
        self, columns: Tensor, shift: float, *, cancelled: Poll
    ) -> Tensor | None:
        """Multiply columns that are on the device by the inverse: [K, P] -> [K, P].

        Args:
            columns: [K, P].
            shift: Added to the diagonal of the operator that is inverted.
            cancelled: Polled between mini-batches, if factors have to be made.

        Returns:
            The products; None if there is no such inverse.
        """
        with translated():
            return self.operator.inverse(columns, shift, cancelled)

    def close(self) -> None:
        """Return its memory, if no other operator shares it."""
        self.operator.close()


class SharedFactors:
    """The factors of one version, which all functions of an operator share."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[OperatorSpec, Factors]
        self._known = weakref.WeakValueDictionary()

    def build(
        self,
        problem: Problem,
        spec: OperatorSpec,
        *,
        budget_bytes: int,
        cancelled: Poll,
    ) -> FactoredOperator:
        """Make an operator, of factors that are there if there are some.

        Args:
            problem: The objective at its version.
            spec: The operator.
            budget_bytes: Memory for factors that are not there.
            cancelled: Polled between mini-batches.

        Returns:
            The operator, warm.
        """
        key = factors_of(spec)
        operator = build(
            problem,
            spec,
            budget_bytes=budget_bytes,
            factors=self._known.get(key),
            cancelled=cancelled,
        )
        self._known[key] = operator.factors
        return FactoredOperator(operator)

    def move(self, operator: FactoredOperator, problem: Problem) -> FactoredOperator:
        """Make the same operator at this version; its factors are made when asked for.

        Args:
            operator: Of another version.
            problem: The objective at this one.
        """
        before = operator.operator
        key = factors_of(before.spec)
        factors = self._known.get(key)
        if factors is None:
            here = problem.restricted(key)
            factors = Factors(here, key, before.factors.reading)
            self._known[key] = factors
        return FactoredOperator(before.at(factors))
