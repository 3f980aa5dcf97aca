"""KFAC and EKFAC as operators: factors, and what is made of their eigenvalues.

Everything here is synchronous and belongs to whoever has the turn of its device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from curvd.contract import OperatorFunction, OperatorSpec, PlanReport, WeightSharing
from curvd.errors import InvalidSpec, InvalidVector, OutOfMemory, ScaleOutOfRange
from curvd_server.engine.kronecker.cotangents import check_fisher
from curvd_server.engine.kronecker.factors import Factors
from curvd_server.engine.kronecker.reading import Reading, read
from curvd_server.engine.objective import Array, Problem, never

AT_ONCE = 32
"""Columns that are multiplied together."""


class KroneckerOperator:
    """``scale * f(K) + damping * I`` with ``K`` a sum of Kronecker products.

    Args:
        factors: Of ``K``; shared with other functions of it.
        spec: The operator.
        gap: Evidence: ``|u.Kv - v.Ku|``, relative.
    """

    def __init__(self, factors: Factors, spec: OperatorSpec, gap: float = 0.0) -> None:
        self.factors, self.spec = factors, spec
        self._gap = gap
        self._seconds = self.spent_s = 0.0
        factors.sharers += 1
        self._is_closed = False

    @property
    def problem(self) -> Problem:
        """The objective, as a function of the operator's parameters."""
        return self.factors.problem

    @property
    def report(self) -> PlanReport:
        """How it is computed: from what blocks, and what memory they hold.

        Operators that share factors have an equal share of their memory each.
        """
        problem, factors = self.problem, self.factors
        size = problem.layout.size * problem.result_dtype.itemsize
        held = factors.nbytes // max(1, factors.sharers) if factors.is_made else 0
        return PlanReport(
            mode="factored",
            columns_at_once=AT_ONCE,
            batches=problem.batches,
            kept_batches=problem.batches,
            kept_bytes=held,
            compiled=False,
            symmetry_gap=self._gap,
            difference_gap=factors.reading.gap,
            seconds_per_product=self._seconds,
            peak_bytes=problem.device_bytes + 2 * factors.nbytes + 3 * AT_ONCE * size,
            blocks=tuple(block.said for block in factors.reading.blocks),
        )

    def at(self, factors: Factors) -> KroneckerOperator:
        """Make this operator of the factors of another version.

        Args:
            factors: Of the same kind; perhaps not made yet.

        Returns:
            The operator; nothing is computed yet.
        """
        moved = KroneckerOperator(factors, self.spec, self._gap)
        moved._seconds, moved.spent_s = self._seconds, self.spent_s
        return moved

    def close(self) -> None:
        """Let go of the factors; their memory is free when nobody shares them."""
        if not self._is_closed:
            self._is_closed = True
            self.factors.sharers -= 1
            if not self.factors.sharers:
                self.factors.drop()

    def make_ready(self, *, cancelled: Callable[[], bool] = never) -> None:
        """Make the factors, and find out what holds for products.

        Args:
            cancelled: Polled between mini-batches.
        """
        self.factors.spectra(cancelled)
        p = self.problem
        generator = torch.Generator().manual_seed(1)
        V = torch.randn(2, p.layout.size, generator=generator, dtype=torch.float64)
        V = V.to(p.device, p.result_dtype)
        start = time.perf_counter()
        KV = self.apply(V, cancelled=cancelled)
        self._seconds = (time.perf_counter() - start) / 2
        left, right = (V[0] @ KV[1], V[1] @ KV[0])
        typical = KV[0].norm() * V[1].norm() / max(1, p.layout.size) ** 0.5
        gap = (left - right).abs() / torch.stack((left.abs(), typical)).max()
        self._gap = float(gap.nan_to_num(0.0))

    def apply(self, columns: Array, *, cancelled: Callable[[], bool] = never) -> Tensor:
        """Multiply columns.

        Args:
            columns: ``V: [K, P]``, any K.
            cancelled: Polled between mini-batches, if factors have to be made.

        Returns:
            ``(scale * f(K) + damping * I) V^T``, transposed: ``[K, P]``.

        Raises:
            InvalidVector: If the shape is not ``[K, P]``.
            InvalidSpec: If an inverse is asked for that does not exist.
            Cancelled: If the caller gave up.
        """
        V = self._checked(columns)
        function = self._function(self.spec.function, self.spec.shift, cancelled)
        out = self._product(V, function, cancelled)
        if self.spec.scale != 1.0:
            out *= self.spec.scale
        if self.spec.damping:
            out.add_(V, alpha=self.spec.damping)
        return out

    def inverse(
        self, columns: Tensor, shift: float, cancelled: Callable[[], bool] = never
    ) -> Tensor | None:
        """Multiply columns by ``(K + shift * I)^-1``, whatever the operator makes of K.

        Args:
            columns: ``V: [K, P]``.
            shift: Added to the diagonal.
            cancelled: Polled between mini-batches, if factors have to be made.

        Returns:
            [K, P]; None if there is no such inverse.
        """
        V = self._checked(columns)
        try:
            function = self._function(OperatorFunction.INVERSE, shift, cancelled)
        except InvalidSpec:
            return None
        return self._product(V, function, cancelled)

    def _product(
        self,
        V: Tensor,
        function: Callable[[Tensor], Tensor],
        cancelled: Callable[[], bool],
    ) -> Tensor:
        """Multiply by a function of ``K``."""
        spectra = self.factors.spectra(cancelled)
        start = time.perf_counter()
        # What is in no block has eigenvalues of zero.
        out = V * float(function(torch.zeros(1, dtype=V.dtype))[0])
        for part, place in zip(V.split(AT_ONCE), out.split(AT_ONCE), strict=True):  # type: ignore[no-untyped-call]
            for spectrum in spectra:
                spectrum.product(part, place, function)
        self.spent_s += time.perf_counter() - start
        return out

    def eigenvalues(self, cancelled: Callable[[], bool] = never) -> Tensor:
        """Give all eigenvalues, in no order: [P] in float64.

        Args:
            cancelled: Polled between mini-batches, if factors have to be made.
        """
        function = self._function(self.spec.function, self.spec.shift, cancelled)
        found = function(self.factors.eigenvalues(cancelled).double())
        return found * self.spec.scale + self.spec.damping

    def _checked(self, columns: Array) -> Tensor:
        V = torch.from_numpy(columns) if isinstance(columns, np.ndarray) else columns
        p = self.problem
        if V.ndim != 2 or V.shape[1] != p.layout.size or not V.is_floating_point():
            msg = (
                f"columns must be floating point [K, P={p.layout.size}], "
                f"got {V.dtype} {list(V.shape)}"
            )
            raise InvalidVector(msg, shape=tuple(V.shape), P=p.layout.size)
        return V.to(p.device, p.result_dtype)

    def _function(
        self, which: OperatorFunction, shift: float, cancelled: Callable[[], bool]
    ) -> Callable[[Tensor], Tensor]:
        """Make ``f`` on eigenvalues, if it is defined on all of them."""
        if which is OperatorFunction.NONE:
            return lambda values: values
        known = self.factors.eigenvalues(cancelled)
        least, largest = float(known.min()), float(known.max())
        needed = torch.finfo(known.dtype).eps * largest
        if least + shift <= needed:
            msg = (
                f"{self.spec.kind} has an eigenvalue of {least:.3g} beside one of "
                f"{largest:.3g}: with a damping of {shift:g} it has no {which} in "
                f"{known.dtype}; take a damping above {max(needed, 1e-300):.3g}"
            )
            raise InvalidSpec(msg, least=least, largest=largest, damping=shift)
        if which is OperatorFunction.INVERSE:
            limits = torch.finfo(known.dtype)
            if not 1 / limits.max < least + shift < 1 / limits.tiny:
                msg = (
                    f"{self.spec.kind} has eigenvalues of {least:.3g} to {largest:.3g}: with "
                    f"a damping of {shift:g} their reciprocals are no numbers of "
                    f"{known.dtype}; take another damping, or scale the loss by a power of "
                    "two"
                )
                raise ScaleOutOfRange(msg, least=least, damping=shift)
            return lambda values: (values + shift).reciprocal()
        return lambda values: (values + shift).rsqrt()


def factors_of(spec: OperatorSpec) -> OperatorSpec:
    """Name the factors of an operator: what all functions of it share.

    Args:
        spec: The operator.

    Returns:
        The same without function, scale and damping.
    """
    return dataclasses.replace(
        spec, function=OperatorFunction.NONE, shift=0.0, scale=1.0, damping=0.0
    )


def build(
    problem: Problem,
    spec: OperatorSpec,
    *,
    budget_bytes: int,
    factors: Factors | None = None,
    cancelled: Callable[[], bool] = never,
) -> KroneckerOperator:
    """Find the blocks of an operator, prove them, and make its factors.

    Args:
        problem: The objective at its current parameters.
        spec: The operator.
        budget_bytes: Memory for factors.
        factors: Of another function of the same operator, which it shares; None: its own.
        cancelled: Polled between mini-batches.

    Returns:
        An operator that is ready to multiply.

    Raises:
        InvalidSpec: If the loss has no such gradients, or an inverse does not exist.
        CurvatureUnverified: If the traced model is not the model.
        OutOfMemory: If the factors do not fit.
    """
    check_fisher(problem.loss.spec.name, spec)
    if factors is None:
        problem = problem.restricted(spec)
        reduce = spec.sharing is WeightSharing.REDUCE
        reading = read(problem, reduce=reduce)
        factors = Factors(problem, factors_of(spec), reading)
        _check_fits(factors, reading, budget_bytes)
    operator = KroneckerOperator(factors, spec)
    try:
        operator.make_ready(cancelled=cancelled)
    except BaseException:
        operator.close()
        raise
    return operator


def _check_fits(factors: Factors, reading: Reading, budget_bytes: int) -> None:
    need = factors.nbytes
    if need <= budget_bytes:
        return
    largest = max(reading.blocks, key=lambda block: block.nbytes_each)
    said = largest.said
    msg = (
        f"the factors take {need} bytes, and {budget_bytes} are left of the session's "
        f"budget_bytes; the largest are those of {', '.join(said.parameters)} "
        f"({said.inputs} inputs, {said.outputs} outputs): choose parameters with params, "
        "or make the session with a larger budget_bytes"
    )
    raise OutOfMemory(msg, needed_bytes=need, available_bytes=budget_bytes)
