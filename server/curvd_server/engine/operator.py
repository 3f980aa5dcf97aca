"""Operators: products over the mini-batches, with a plan that `building` chose.

Everything here is synchronous and belongs to whoever has the turn of its device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from curvd.contract import OperatorSpec, PlanReport, Stage, Tier
from curvd.errors import InvalidVector, OutOfMemory
from curvd.tensors import Pool
from curvd_server.engine.batch_product import BatchProduct, DoesNotFit
from curvd_server.engine.finite import because_of, is_finite, not_finite
from curvd_server.engine.linearization_cache import Counters, LinearizationCache
from curvd_server.engine.native_code import NativeCode
from curvd_server.engine.objective import Array, Problem, check_cancelled, never
from curvd_server.engine.operators import definition
from curvd_server.engine.program import Compiler, Interruptible
from curvd_server.engine.threads import computing_with
from curvd_server.engine.tuning import Choice, Plan, is_alike, steps
from curvd_server.engine.verification import Reference, check_repeatable
from curvd_server.system import advance, enter_stage, yield_point

SHARED = 16
"""Columns that share one linearisation when it has to be recomputed."""


class Operator:
    """``scale * A + damping * I`` on the parameter space of one problem.

    Args:
        problem: The objective at one parameter version.
        spec: Which operator.
        choice: The plan and its evidence.
        budget_bytes: Memory for cached linearisations.
        compiler: Makes native code of what is used long enough; None: nothing does.
        results: Memory of results on the host; None: fresh for each.
        sizes: Bytes of each linearisation, where they were measured before.
    """

    def __init__(
        self,
        problem: Problem,
        spec: OperatorSpec,
        choice: Choice,
        budget_bytes: int,
        compiler: Compiler | None = None,
        results: Pool | None = None,
        *,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.problem, self.spec = problem, spec
        self.counters = Counters()
        self._choice, self._budget_bytes = choice, budget_bytes
        # What is computed in one step: a mini-batch, or some of them joined.
        self._work = problem.joined(choice.plan.batches_at_once)
        self._cache = LinearizationCache(
            self._work,
            spec,
            choice.plan.mode,
            budget_bytes,
            self.counters,
            None if sizes is None else list(sizes),
        )
        # Native code makes all rows at once: one more vector of all parameters.
        self._native = NativeCode(None if self.is_lean else compiler)
        self._product = BatchProduct(
            problem,
            spec,
            self._cache,
            choice.plan.columns_at_once,
            self.counters,
            self._native.is_ready,
        )
        self._seconds = 0.0
        self._compiler, self._results = compiler, results
        self.reference: Reference | None = None
        """Of a first tier: what its successor is compared with, too."""
        penalised = definition(spec.kind).adds_weight_decay
        self._decay = problem.decay if penalised else problem.decay.none()
        self.mixes = not choice.plan.batched
        """Whether columns of several requests go through together."""

    @property
    def plan(self) -> Plan:
        """How products are computed; hand it to `build` for a similar problem."""
        return self._choice.plan

    @property
    def spent_s(self) -> float:
        """Seconds that it has computed, at earlier versions and tiers included."""
        return self._native.spent_s

    @property
    def tier(self) -> Tier:
        """How much was prepared."""
        return self._choice.tier

    @property
    def choice(self) -> Choice:
        """The plan, its evidence, and how it was chosen."""
        return self._choice

    @property
    def is_lean(self) -> bool:
        """Whether little of the parameters' size is to be held beside them."""
        return bool(self._choice.evidence.projections)

    def settle(self, busy: float) -> None:
        """Take note that its plan has stood another choice.

        Args:
            busy: How busy the machine was this time.
        """
        self._choice = dataclasses.replace(self._choice, busy=busy)

    @property
    def report(self) -> PlanReport:
        """The plan and the evidence that it is right."""
        cached, sizes = self._cache.indices(), self._cache.sizes()
        width = self._product.width
        transient = max(sizes) * width
        column_bytes = self.problem.layout.size * self.problem.result_dtype.itemsize
        cached_total = sum(sizes[i] for i in cached)
        return PlanReport(
            mode=self._mode_name(len(cached)),
            columns_at_once=width,
            batches=self.problem.batches,
            kept_batches=min(
                len(cached) * self.plan.batches_at_once, self.problem.batches
            ),
            kept_bytes=cached_total,
            compiled=self.is_compiled,
            symmetry_gap=self._choice.evidence.symmetry_gap,
            difference_gap=self._choice.evidence.difference_gap,
            seconds_per_product=self._seconds,
            peak_bytes=self.problem.device_bytes
            + cached_total
            + transient
            + 3 * width * column_bytes,
            tier=self.tier,
            busy=self._choice.busy,
            revision=self._choice.revision,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each mini-batch's linearisation."""
        return tuple(self._cache.sizes())

    @property
    def is_compiled(self) -> bool:
        """Whether native code computes it, on all but odd mini-batches."""
        return self._native.is_ready()

    def at(self, problem: Problem) -> Operator:
        """Make this operator for new parameters, with the same plan.

        Nothing is measured or linearised before the first product. This operator
        stays valid until it is closed.
        """
        here = problem.restricted(self.spec)
        moved = Operator(
            here,
            self.spec,
            self._choice,
            self._budget_bytes,
            self._compiler,
            self._results,
        )
        moved._cache.measured_sizes = self._cache.measured_sizes
        moved._product.width = self._product.width
        moved._seconds, moved._native.spent_s = self._seconds, self._native.spent_s
        moved.mixes = self.mixes
        return moved

    def with_choice(self, choice: Choice, budget_bytes: int) -> Operator:
        """Make this operator with another plan; nothing is computed yet.

        Args:
            choice: The plan and its evidence.
            budget_bytes: Memory for cached linearisations.
        """
        made = Operator(
            self.problem,
            self.spec,
            choice,
            budget_bytes,
            self._compiler,
            self._results,
        )
        made._native.spent_s = self._native.spent_s
        return made

    def close(self) -> None:
        """Return the memory of all cached linearisations, now."""
        self._cache.clear()

    def make_ready(self, *, cancelled: Callable[[], bool] = never) -> None:
        """Warm up, and find out what holds for products of this plan.

        Of a large model it was found out when it was verified.

        Args:
            cancelled: Polled between mini-batches.

        Raises:
            NotDeterministic: If two products disagree.
        """
        self._linearise(cancelled)
        if self.is_lean:
            column = torch.ones(1, 1, dtype=self.problem.result_dtype)
            column = column.to(self.problem.device).expand(1, self.problem.layout.size)
            self._timed(lambda: self._product.run(0, column))
        else:
            self._check_repeatable()
        self._consider_compiling()
        if not self.is_lean:
            self.examine_company(cancelled=cancelled)

    def _linearise(self, cancelled: Callable[[], bool]) -> None:
        """Linearise the mini-batches that fit the budget."""
        indices = self._cache.indices()
        enter_stage(Stage.WARMING, total=len(indices))
        for index in indices:
            check_cancelled(cancelled)
            self._cache.get(index)
            advance()
        check_cancelled(cancelled)

    def _timed(self, product: Callable[[], None]) -> None:
        """Make one mini-batch's product, and note what one of all would take."""
        start = time.perf_counter()
        product()
        if self.problem.device.type == "cuda":
            torch.cuda.synchronize(self.problem.device)
        self._seconds = (time.perf_counter() - start) * self._work.batches

    def _check_repeatable(self) -> None:
        """Refuse an operator whose product differs between two evaluations."""
        p = self.problem
        generator = torch.Generator().manual_seed(1)
        column = torch.randn(1, p.layout.size, generator=generator)
        column = column.to(p.device, p.result_dtype)
        first, second = torch.empty_like(column), torch.empty_like(column)
        yield_point()
        self._timed(lambda: self._batch_product(0, column, first, [1], never))
        yield_point()
        self._batch_product(0, column, second, [1], never)
        p.model.company.all_pass(
            lambda: check_repeatable("product", first[0], second[0])
        )

    def examine_company(self, *, cancelled: Callable[[], bool] = never) -> None:
        """Find out whether columns of several requests may go through together."""
        if not self.plan.batched:
            return
        p = self.problem
        generator = torch.Generator().manual_seed(2)
        shape = (self._product.width, p.layout.size)
        V = torch.randn(shape, generator=generator, dtype=p.result_dtype).to(p.device)
        on_cpu = p.device.type == "cpu"

        def product(columns: Tensor, index: int) -> Tensor:
            rows = torch.zeros_like(columns)
            with Interruptible() if on_cpu else contextlib.nullcontext():
                self._batch_product(index, columns, rows, [len(columns)], cancelled)
            return rows

        # The last mini-batch may be smaller than the others.
        self.mixes = all(
            is_alike(functools.partial(product, index=index), V)
            for index in sorted({0, self._work.batches - 1})
        )

    def apply(
        self,
        columns: Array,
        *,
        counts: Sequence[int] = (),
        cancelled: Callable[[], bool] = never,
    ) -> Tensor:
        """Multiply columns.

        Args:
            columns: ``V: [K, P]``, any K.
            counts: Columns of each request in ``V``, which has the same bits as if it
                were alone; none: it is one.
            cancelled: Polled between mini-batches.

        Returns:
            ``(scale * A + damping * I) V^T``, transposed: ``[K, P]`` in
            `Problem.result_dtype` on the problem's device.

        Raises:
            InvalidVector: If the shape is not ``[K, P]``.
            Cancelled: If the caller gave up.
            OutOfMemory: If one column does not fit even with nothing cached.
            NotFinite: If a number is NaN or infinite.
        """
        V = self._checked(columns)
        out = self._empty(len(V))
        requests = counts if counts and not self.mixes else (len(V),)
        start = 0
        for sizes in self._steps(requests):
            stop = start + sum(sizes)
            self._multiply(V[start:stop], out[start:stop], sizes, cancelled)
            start = stop
        return out

    def stream(
        self,
        columns: Array,
        *,
        at_once: int | None = None,
        cancelled: Callable[[], bool] = never,
    ) -> Iterator[tuple[int, Tensor]]:
        """Multiply columns and hand results out as they are ready.

        Args:
            columns: ``V: [K, P]``.
            at_once: Columns per result; by default what the plan does best.
            cancelled: Polled between mini-batches.

        Yields:
            The index of the first column, and the rows ``[k, P]``.
        """
        V = self._checked(columns)
        start = 0
        for sizes in self._steps((len(V),), at_once):
            stop = start + sum(sizes)
            out = self._empty(stop - start)
            self._multiply(V[start:stop], out, sizes, cancelled)
            yield start, out
            start = stop

    def _steps(
        self, counts: Sequence[int], at_once: int | None = None
    ) -> Iterator[list[int]]:
        """Cut requests into what is multiplied before the next linearisation."""
        width = self._product.width
        most = at_once or max(width, 1 if self._cache.keeps_all() else SHARED)
        return steps(counts, at_once or width, most)

    def _empty(self, columns: int) -> Tensor:
        """Find memory for a result.

        Fresh pages of one column cost 2 % of the gpt's product in `bench/engine.py`,
        and 10 % in a virtual machine whose host has to find them first.
        """
        p, shape = self.problem, (columns, self.problem.layout.size)
        if self._results is None or p.device.type != "cpu":
            return torch.empty(shape, dtype=p.result_dtype, device=p.device)
        memory = self._results.take(math.prod(shape) * p.result_dtype.itemsize)
        return torch.from_numpy(memory).view(p.result_dtype).view(shape)

    def _checked(self, columns: Array) -> Tensor:
        V = torch.from_numpy(columns) if isinstance(columns, np.ndarray) else columns
        size = self.problem.layout.size
        if V.ndim != 2 or V.shape[1] != size or not V.is_floating_point():
            msg = (
                f"columns must be floating point [K, P={size}], "
                f"got {V.dtype} {list(V.shape)}"
            )
            raise InvalidVector(msg, shape=tuple(V.shape), P=size)
        return V

    def _multiply(
        self,
        V: Tensor,
        out: Tensor,
        sizes: Sequence[int],
        cancelled: Callable[[], bool],
    ) -> None:
        """Write the product of columns to `out`: joining results would copy them."""
        V = V.to(out.device, out.dtype).contiguous()
        start = time.perf_counter()
        for index in range(self._work.batches):
            self._batch_product(index, V, out, sizes, cancelled)
        self._decay.add_product(out, V, self.problem.layout)
        if self.spec.scale != 1.0:
            out *= self.spec.scale
        if self.spec.damping:
            out.add_(V, alpha=self.spec.damping)
        if not self.problem.model.company.shares and not is_finite(out):
            because = because_of(self.problem, lambda index: self._share(index, V))
            raise not_finite(out, self.problem.layout, because)
        self.counters.columns += len(V)
        self._native.spent_s += time.perf_counter() - start
        self._consider_compiling()

    def _share(self, index: int, V: Tensor) -> Tensor:
        """Multiply by one mini-batch's share of the operator, without scale and damping."""
        share = torch.zeros_like(V)
        self._batch_product(index, V, share, [len(V)], never)
        return share

    def _consider_compiling(self) -> None:
        with computing_with(self.plan.threads):
            self._native.consider(
                self._cache.peek(0), self._product.blocks, self._product.width
            )

    def _batch_product(
        self,
        index: int,
        V: Tensor,
        out: Tensor,
        sizes: Sequence[int],
        cancelled: Callable[[], bool],
    ) -> None:
        """Add one mini-batch's product; see `BatchProduct.add`."""
        width = self._product.width
        try:
            with computing_with(self.plan.threads):
                self._product.add(index, V, out, sizes, cancelled)
        except DoesNotFit as error:
            need = self.report.peak_bytes
            msg = (
                f"one column does not fit the device with nothing cached (predicted peak "
                f"{need} bytes); use a smaller batch_size"
            )
            raise OutOfMemory(msg, peak_bytes=need) from error
        finally:
            if self._product.width < width:
                self.mixes = False  # it was found out for other shapes

    def _mode_name(self, cached: int) -> str:
        if cached == self._work.batches:
            return f"kept_{self.plan.mode}"
        return f"{'partly_kept' if cached else 'recomputed'}_{self.plan.mode}"
