"""An operator of the engine, behind plain arrays and tensors of the device.

It belongs to whoever has the turn of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import PlanReport
from curvd_server.device.translated import translated
from curvd_server.engine import Memory, Problem, building, choose_again, is_in_doubt
from curvd_server.engine.operator import Operator
from curvd_server.system import Poll


class TorchOperator:
    """An operator that is built.

    Args:
        operator: The engine's operator.
        report: How it is computed; by default as it says now.
    """

    is_remote = False
    """Its products are made by the thread that asks."""

    def __init__(self, operator: Operator, report: PlanReport | None = None) -> None:
        self._operator = operator
        # Asked here, on the device's thread, because it may measure.
        self._report = report or operator.report

    @property
    def report(self) -> PlanReport:
        """How it is computed; whether in native code, as of now."""
        compiled, busy = self._operator.is_compiled, self._operator.choice.busy
        if (self._report.compiled, self._report.busy) != (compiled, busy):
            self._report = replace(self._report, compiled=compiled, busy=busy)
        return self._report

    @property
    def is_in_doubt(self) -> bool:
        """Whether its plan was chosen on a busy machine."""
        return is_in_doubt(self._operator)

    @property
    def spent_s(self) -> float:
        """Seconds that it has computed, at earlier versions included."""
        return self._operator.spent_s

    @property
    def runner(self) -> None:
        """Nobody runs algorithms elsewhere: vectors are whole here."""

    @property
    def shares(self) -> bool:
        """Whether columns go together, or share what is linearised for them."""
        report = self._report
        together = report.columns_at_once > 1 and self._operator.mixes
        return together or report.kept_batches < report.batches

    @property
    def size(self) -> int:
        """P, the length of the vectors that it multiplies."""
        return self._operator.problem.layout.size

    @property
    def dtype(self) -> torch.dtype:
        """Type of its products."""
        return self._operator.problem.result_dtype

    @property
    def device(self) -> torch.device:
        """Where its products are made."""
        return self._operator.problem.device

    def improved(
        self, plans: Memory, budget_bytes: int, cancelled: Poll
    ) -> TorchOperator:
        """Make its last tier.

        Args:
            plans: Plans of earlier operators.
            budget_bytes: Memory for cached linearisations.
            cancelled: Polled between mini-batches.
        """
        final = building.improve(
            self._operator,
            budget_bytes=budget_bytes,
            memory=plans,
            cancelled=cancelled,
        )
        return TorchOperator(final)

    def chosen_again(
        self, plans: Memory, budget_bytes: int, cancelled: Poll
    ) -> TorchOperator | None:
        """Choose its plan anew.

        Args:
            plans: Plans of earlier operators.
            budget_bytes: Memory for cached linearisations.
            cancelled: Polled between mini-batches.

        Returns:
            The operator with a better plan; None if there is none.
        """
        made = choose_again(
            self._operator,
            budget_bytes=budget_bytes,
            memory=plans,
            cancelled=cancelled,
        )
        return None if made is None else TorchOperator(made)

    def at(self, problem: Problem) -> TorchOperator:
        """Make the same operator at another version of its problem.

        Args:
            problem: The engine's.

        Returns:
            The operator; nothing is computed or measured yet.
        """
        return TorchOperator(self._operator.at(problem), self.report)

    def apply(
        self, columns: NDArray[Any], *, counts: Sequence[int] = (), cancelled: Poll
    ) -> NDArray[Any]:
        """Multiply columns: [K, P] -> [K, P]; see `Device`'s `Operator`."""
        with translated():
            rows = self._operator.apply(columns, counts=counts, cancelled=cancelled)
            return rows.cpu().numpy()

    def multiply(self, columns: Tensor, *, cancelled: Poll) -> Tensor:
        """Multiply columns that are on the device: [K, P] -> [K, P]."""
        with translated():
            return self._operator.apply(columns, cancelled=cancelled)

    def eigenvalues(self, *, cancelled: Poll) -> None:
        """Know none; see `Device`'s `Operator`."""

    def inverse(self, columns: Tensor, shift: float, *, cancelled: Poll) -> None:
        """Know none; see `Operator` of the protocols."""

    def close(self) -> None:
        """Return its memory."""
        self._operator.close()
