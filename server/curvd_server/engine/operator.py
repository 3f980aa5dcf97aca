"""Operators: built once with evidence and a plan, applied any number of times.

    problem = Problem.load(module, parameters, arrays, data, loss)
    operator = build(problem, OperatorSpec(), budget_bytes=2**30)
    rows = operator.apply(columns)            # [K, P] -> [K, P]
    operator = operator.at(problem.with_parameters(new))

Everything here is synchronous and belongs to whoever has the turn of its device.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvd.contract import OperatorSpec, PlanReport
from curvd.errors import InvalidVector, OutOfMemory
from curvd.tensors import Pool
from curvd_server.engine.objective import (
    Array,
    Problem,
    check_cancelled,
    never,
    on_host,
    tangents_of,
)
from curvd_server.engine.operators import (
    MODES,
    Linearisation,
    block_ranges,
    definition,
    kept_bytes,
)
from curvd_server.engine.program import Compilable, Compiler, Emits, Interruptible, Job
from curvd_server.engine.tuning import Choice, Memory, Plan, choose, is_alike, steps
from curvd_server.engine.verification import check_objective, check_repeatable
from curvd_server.system import is_out_of_memory, yield_point

TUNING_S = 6.0
"""Default time for measuring candidate plans."""
EMITTED_BYTES = 64 << 20
"""A column of this size has its rows added one by one, so that they take no memory."""
SHARED = 16
"""Columns that share one linearisation when it has to be recomputed."""


@dataclass(slots=True)
class Counters:
    """Work done so far; for tests and metrics."""

    linearisations: int = 0
    """Mini-batches linearised (forward and first backward)."""
    batch_products: int = 0
    """Mini-batches multiplied, each with one chunk of columns."""
    columns: int = 0
    """Columns returned."""


def build(
    problem: Problem,
    spec: OperatorSpec,
    *,
    budget_bytes: int,
    plan: Plan | None = None,
    memory: Memory | None = None,
    compiler: Compiler | None = None,
    results: Pool | None = None,
    tuning_s: float = TUNING_S,
    cancelled: Callable[[], bool] = never,
) -> Operator:
    """Verify an operator, choose its plan and warm it up.

    Args:
        problem: The objective at its current parameters.
        spec: The operator.
        budget_bytes: Memory for kept linearisations.
        plan: Taken if it verifies; else candidates are timed.
        memory: Plans of earlier operators, and where this one's is kept.
        compiler: Makes native code of what is used long enough; None: nothing does.
        results: Memory of results on the host; None: fresh for each.
        tuning_s: Time for timing candidates.
        cancelled: Polled between mini-batches and candidates.

    Returns:
        An operator that is ready to multiply.

    Raises:
        InvalidSpec: If the operator's parameters or blocks are not the problem's, or
            its loss has no such operator.
        NotDeterministic: If two evaluations disagree.
        CurvatureUnverified: If no AD mode is right.
    """
    problem = problem.restricted(spec)
    definition(spec.kind).check_loss(problem.loss.spec.name, spec)
    check_objective(problem)
    check_cancelled(cancelled)
    choice = choose(
        problem,
        spec,
        plan=plan,
        memory={} if memory is None else memory,
        budget_bytes=budget_bytes,
        budget_s=tuning_s,
        cancelled=cancelled,
    )
    operator = Operator(problem, spec, choice, budget_bytes, compiler, results)
    operator.warm(cancelled=cancelled)
    operator.check_repeatable()
    operator.examine_company(cancelled=cancelled)
    return operator


class Operator:
    """``scale * A + damping * I`` on the parameter space of one problem.

    Args:
        problem: The objective at one parameter version.
        spec: Which operator.
        choice: The plan and its evidence.
        budget_bytes: Memory for kept linearisations.
        compiler: Makes native code of what is used long enough; None: nothing does.
        results: Memory of results on the host; None: fresh for each.
    """

    def __init__(
        self,
        problem: Problem,
        spec: OperatorSpec,
        choice: Choice,
        budget_bytes: int,
        compiler: Compiler | None = None,
        results: Pool | None = None,
    ) -> None:
        self.problem, self.spec = problem, spec
        self.counters = Counters()
        self._choice, self._budget_bytes = choice, budget_bytes
        self._blocks = block_ranges(spec, len(problem.parameters))
        self._width = choice.plan.columns_at_once
        # What is computed in one step: a mini-batch, or some of them joined.
        self._work = problem.joined(choice.plan.batches_at_once)
        self._kept: list[Linearisation | None] = [None] * self._work.batches
        self._bytes: list[int] | None = None
        self._seconds = self._spent_s = 0.0
        self._compiler, self._jobs = compiler, list[Job]()
        self._results = results
        penalised = definition(spec.kind).adds_weight_decay
        self._decay = problem.decay if penalised else problem.decay.none()
        self.mixes = not choice.plan.batched
        """Whether columns of several requests go through together."""

    @property
    def plan(self) -> Plan:
        """How products are computed; hand it to `build` for a similar problem."""
        return self._choice.plan

    @property
    def report(self) -> PlanReport:
        """The plan and the evidence that it is right."""
        kept = self._kept_indices()
        transient = max(self._batch_bytes()) * self._width
        column_bytes = self.problem.layout.size * self.problem.result_dtype.itemsize
        kept_total = sum(self._batch_bytes()[i] for i in kept)
        return PlanReport(
            mode=self._mode_name(len(kept)),
            columns_at_once=self._width,
            batches=self.problem.batches,
            kept_batches=min(
                len(kept) * self.plan.batches_at_once, self.problem.batches
            ),
            kept_bytes=kept_total,
            compiled=self.is_compiled,
            symmetry_gap=self._choice.evidence.symmetry_gap,
            difference_gap=self._choice.evidence.difference_gap,
            seconds_per_product=self._seconds,
            peak_bytes=self.problem.device_bytes
            + kept_total
            + transient
            + 3 * self._width * column_bytes,
        )

    @property
    def is_compiled(self) -> bool:
        """Whether native code computes it, on all but odd mini-batches."""
        return bool(self._jobs) and all(j.routine.native for j in self._jobs)

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
        moved._width, moved._bytes = self._width, self._bytes
        moved._seconds, moved._spent_s = self._seconds, self._spent_s
        moved.mixes = self.mixes
        return moved

    def close(self) -> None:
        """Return the memory of all kept linearisations, now."""
        self._kept = [None] * self._work.batches

    def warm(self, *, cancelled: Callable[[], bool] = never) -> None:
        """Linearise the mini-batches that fit the budget, and time a product."""
        for index in self._kept_indices():
            check_cancelled(cancelled)
            self._linearisation(index)
        check_cancelled(cancelled)
        column = torch.ones(
            1, self.problem.layout.size, dtype=self.problem.result_dtype
        ).to(self.problem.device)
        start = time.perf_counter()
        self._batch_product(0, column, torch.empty_like(column), [1], never)
        if self.problem.device.type == "cuda":
            torch.cuda.synchronize(self.problem.device)
        self._seconds = (time.perf_counter() - start) * self._work.batches
        self._consider_compiling()

    def check_repeatable(self) -> None:
        """Refuse an operator whose product differs between two evaluations."""
        p = self.problem
        generator = torch.Generator().manual_seed(1)
        column = torch.randn(1, p.layout.size, generator=generator)
        column = column.to(p.device, p.result_dtype)
        first, second = torch.empty_like(column), torch.empty_like(column)
        for out in (first, second):
            yield_point()
            self._batch_product(0, column, out, [1], never)
        check_repeatable("product", first[0], second[0])

    def examine_company(self, *, cancelled: Callable[[], bool] = never) -> None:
        """Find out whether columns of several requests may go through together."""
        if not self.plan.batched:
            return
        p = self.problem
        generator = torch.Generator().manual_seed(2)
        shape = (self._width, p.layout.size)
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
            OutOfMemory: If one column does not fit even with nothing kept.
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
        all_kept = len(self._kept_indices()) == self._work.batches
        most = at_once or max(self._width, 1 if all_kept else SHARED)
        return steps(counts, at_once or self._width, most)

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
        self.counters.columns += len(V)
        self._spent_s += time.perf_counter() - start
        self._consider_compiling()

    def _consider_compiling(self) -> None:
        """Ask for native code of the common mini-batch, if it is kept and one block.

        More blocks would be as many programs, and columns that go through together
        would be others again.
        """
        if self._compiler is None or self._width > 1 or len(self._blocks) > 1:
            return
        linear = self._kept[0]
        if isinstance(linear, Compilable) and not self._jobs:
            self._jobs = linear.jobs(self._blocks[0])
        if not self.is_compiled:
            self._compiler.consider(self._jobs, self._spent_s)

    def _batch_product(
        self,
        index: int,
        V: Tensor,
        out: Tensor,
        sizes: Sequence[int],
        cancelled: Callable[[], bool],
    ) -> None:
        """Add one mini-batch's product, in pieces of these sizes or what of them fits.

        The first mini-batch overwrites `out`, which saves clearing it.
        """
        check_cancelled(cancelled)
        linear = self._linearisation(index)
        ends = list(itertools.accumulate(sizes))
        start, added = 0, set[int]()
        while start < len(V):
            check_cancelled(cancelled)
            end = next(end for end in ends if end > start)
            stop = min(start + self._width, end)
            try:
                for at, row in self._rows(linear, V[start:stop]):
                    if at not in added:
                        self._add(at, row, out[start:stop], first=index == 0)
                    added.add(at)
                    del row  # before the next one is made
            except RuntimeError as error:
                # Rows that were added stay added: the same columns go on behind them.
                if not is_out_of_memory(error) or (added and stop > start + 1):
                    raise
                linear = self._relieve(index, linear, error)
                continue
            self.counters.batch_products += 1
            start = stop
            added.clear()

    def _rows(
        self, linear: Linearisation, V: Tensor
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Multiply one chunk of columns by every diagonal block.

        Yields:
            Index of a parameter, and its row. The first comes when all are computed,
            except that one large column's come as they are computed.
        """
        batched = len(V) > 1
        columns = V.to(self.problem.dtype) if batched else V[0].to(self.problem.dtype)
        tangents = tangents_of(columns, self.problem.layout)
        large = not batched and V.nbytes >= EMITTED_BYTES and not self.is_compiled
        if large and isinstance(linear, Emits):
            for b in self._blocks:
                yield from linear.rows(tangents[b.start : b.stop], b)
            return
        found = deque[Tensor | None]()
        for b in self._blocks:
            yield_point()  # of an opening; a product goes on
            found += linear.product(tangents[b.start : b.stop], b, batched=batched)
        for at in range(len(tangents)):
            yield at, found.popleft()

    def _add(self, at: int, row: Tensor | None, out: Tensor, *, first: bool) -> None:
        p = self.problem.layout.parameters[at]
        place = out[:, p.offset : p.offset + p.size].view(len(out), *p.shape)
        if row is not None:
            place.copy_(row) if first else place.add_(row)
        elif first:
            place.zero_()

    def _linearisation(self, index: int) -> Linearisation:
        kept = self._kept[index]
        if kept is not None:
            return kept
        self.counters.linearisations += 1
        mode = MODES[self.plan.mode]
        fresh = mode(self._work, self.spec, self._work.data[index])
        if index in self._kept_indices():
            self._kept[index] = fresh
        return fresh

    def _kept_indices(self) -> range:
        """Say which mini-batches are kept: the first that fit the budget."""
        total = 0
        for index, size in enumerate(self._batch_bytes()):
            total += size
            if total > self._budget_bytes or not size:
                return range(index)
        return range(self._work.batches)

    def _batch_bytes(self) -> list[int]:
        """Bytes of each linearisation: the first is measured, the others by rows."""
        if self._bytes is None:
            data = on_host(self._work.data)
            first = kept_bytes(self.plan.mode, self._work, self.spec, data[0])
            rows = len(data[0].targets)
            self._bytes = [-(-first * len(b.targets) // rows) for b in data]
        return self._bytes

    def _relieve(
        self, index: int, linear: Linearisation, error: RuntimeError
    ) -> Linearisation:
        """Make room after running out of memory: halve the chunk, then keep less."""
        if self.problem.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._width > 1:
            self._width //= 2
            self.mixes = False  # it was found out for other shapes
            return linear
        if not any(self._kept):
            need = self.report.peak_bytes
            msg = (
                f"one column does not fit the device with nothing kept (predicted peak "
                f"{need} bytes); use a smaller batch_size"
            )
            raise OutOfMemory(msg, peak_bytes=need) from error
        self._budget_bytes = 0
        self._kept = [None] * self._work.batches
        del linear
        return self._linearisation(index)

    def _mode_name(self, kept: int) -> str:
        if kept == self._work.batches:
            return f"kept_{self.plan.mode}"
        return f"{'partly_kept' if kept else 'recomputed'}_{self.plan.mode}"
