"""An operator in shards: the columns go to all workers, their partial products are added."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from curvd.contract import OperatorSpec, PlanReport
from curvd.errors import InvalidVector
from curvd_server.device.protocols import Array
from curvd_server.engine.finite import is_finite, not_finite
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Frame
from curvd_server.fleet.seats import OperatorEntry, Request
from curvd_server.fleet.shards import segments
from curvd_server.fleet.spread import Spread
from curvd_server.linalg import Runner
from curvd_server.system import Poll

if TYPE_CHECKING:
    from curvd_server.fleet.problem import FleetProblem

SPREAD_SIZE = 1 << 20
"""Elements from which vectors are spread over the workers. A basis of smaller ones fits
into the front, where a sum is no round of messages (3 ms): a log-determinant of 53 parameters
with 1,000 products took 0.9 s there and 18 s on two workers."""


class FleetOperator:
    """An operator that is built on all workers that have shards.

    Args:
        problem: The version of the objective.
        spec: The operator; scale and damping are applied here, once.
        entry: How it is made.
        report: How it is computed.
        mixes: Whether columns of several requests go through together.
    """

    is_remote = True
    """Its products are made by the workers."""

    def __init__(
        self,
        problem: FleetProblem,
        spec: OperatorSpec,
        entry: OperatorEntry,
        report: PlanReport,
        *,
        mixes: bool,
    ) -> None:
        self._problem, self.spec, self.entry = problem, spec, entry
        self.report, self.mixes = report, mixes
        self.spent_s = 0.0
        """Seconds that it has computed, at earlier versions included."""
        self._layout = problem.layout.of_operator(spec)
        forget = messages.Close(operators=(entry.build.operator,))
        self._end = weakref.finalize(self, problem.fleet.forget, forget)
        self._end.atexit = False

    def eigenvalues(self, *, cancelled: Poll) -> None:
        """Know none; see `Operator` of the protocols."""

    def inverse(self, columns: Tensor, shift: float, *, cancelled: Poll) -> None:
        """Know none; see `Operator` of the protocols."""

    @property
    def shares(self) -> bool:
        """Whether columns go together, or share what is linearised for them."""
        together = self.report.columns_at_once > 1 and self.mixes
        return together or self.report.kept_batches < self.report.batches

    @property
    def is_in_doubt(self) -> bool:
        """Whether its plan is to be chosen anew: never, its bits are those of its shards."""
        return False

    @property
    def size(self) -> int:
        """P, the length of the vectors that it multiplies."""
        return self._layout.size

    @property
    def dtype(self) -> torch.dtype:
        """Type of its products."""
        found: torch.dtype = getattr(torch, self._problem.dtype.name)
        return found

    @property
    def device(self) -> torch.device:
        """Where its products are made: partial ones are added on the host."""
        return torch.device("cpu")

    @property
    def runner(self) -> Runner | None:
        """Runs algorithms where it pays: in the front, or on the workers."""
        return None if self.size < SPREAD_SIZE else self.spread

    @property
    def spread(self) -> Spread:
        """Runs algorithms on the workers, each with its segments of all vectors."""
        fleet = self._problem.fleet
        shards = self._problem.entry.load.parts
        return Spread(fleet, segments(self.size, len(shards), len(fleet.seats)))

    def apply(
        self, columns: Array, *, counts: Sequence[int] = (), cancelled: Poll
    ) -> Array:
        """Multiply columns, and leave them as they are: [K, P] -> [K, P].

        Args:
            columns: [K, P].
            counts: Columns of each request that is in them.
            cancelled: Polled between mini-batches.

        Returns:
            The sum of the shards' partial products, added in their order.

        Raises:
            InvalidVector: If the shape is not [K, P].
            NotFinite: If a number is NaN or infinite. Workers say of which data points
                unless they hold slices of the parameters, or only the sum is infinite.
        """
        self._check(columns)
        V = np.asarray(columns, self._problem.dtype)
        start_s = time.monotonic()
        rows = self.rows(V, tuple(map(int, counts)), cancelled)
        if self.spec.scale != 1.0:
            rows *= self.spec.scale
        if self.spec.damping:
            rows += self.spec.damping * V
        if not is_finite(product := torch.from_numpy(rows)):
            raise not_finite(product, self._layout)
        self.spent_s += time.monotonic() - start_s
        return rows

    def rows(self, V: Array, counts: tuple[int, ...], cancelled: Poll) -> Array:
        """Multiply columns by the operator without scale and damping; see `apply`."""
        product = messages.Product(operator=self.entry.build.operator, counts=counts)
        frames = self._problem.fleet.all(
            dict.fromkeys(self.entry.ranks, Request(product, (V,))), cancelled=cancelled
        )
        return added(frames)

    def multiply(self, columns: Tensor, *, cancelled: Poll) -> Tensor:
        """Multiply columns of the host: [K, P] -> [K, P]."""
        return torch.from_numpy(self.apply(columns.numpy(), cancelled=cancelled))

    def relax(self) -> None:
        """Give back the memory of cached linearisations; it stays valid."""
        relax = Request(messages.Relax(operator=self.entry.build.operator))
        self._problem.fleet.all(
            dict.fromkeys(self.entry.ranks, relax), cancelled=lambda: False
        )

    def close(self) -> None:
        """Return its memory; returns when all workers have."""
        if self._end.detach():
            self._problem.fleet.drop(
                self.entry.ranks,
                messages.Close(operators=(self.entry.build.operator,)),
            )

    def _check(self, columns: Array) -> None:
        if (
            columns.ndim != 2
            or columns.shape[1] != self.size
            or columns.dtype.kind != "f"
        ):
            msg = (
                f"columns must be floating point [K, P={self.size}], "
                f"got {columns.dtype} {list(columns.shape)}"
            )
            raise InvalidVector(msg, shape=columns.shape, P=self.size)


def added(frames: Mapping[int, Frame]) -> Array:
    """Add partial results in the order of shards, whoever computed them.

    Args:
        frames: Answers by rank, each with an array per shard.

    Returns:
        The sum, in memory of its own.
    """
    first, *others = (row for rank in sorted(frames) for row in frames[rank].arrays)
    for row in others:
        first += row
    return first
