"""A call of QueryService under way: what its methods share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import RPCS, OperatorSpec, convert, convert_enums
from curvd.tensors import chunks as wire
from curvd.tensors import safetensors_header
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.config import LimitsConfig
from curvd_server.device import Batcher
from curvd_server.engine.data_points import Points
from curvd_server.engine.objective import Problem
from curvd_server.linalg import LowRank, Products, Progress, Query, Tensors
from curvd_server.service import query_validation as check
from curvd_server.service.query_run import Cost, QueryRun
from curvd_server.service.streams import Send
from curvd_server.service.validation import check_finite, vector_dtype
from curvd_server.sessions import Lease, Vector
from curvd_server.system import default_bytes

R = TypeVar("R")

_OF_SYSTEM = 3
"""Vectors that are held of a system: its solution, its residual, and a closing product."""
_OF_BLOCK = 11
"""Vectors that an iteration holds of a column: block CG; MINRES and CG hold fewer."""
_PAUSE, _LONGEST_PAUSE_S = 0.1, 30.0
"""Between messages that say which share of the work is done: of the time so far, at most."""
_ENOUGH = 16
"""So many columns together have most of what a block gains."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a query's work."""

    start: float
    stop: float
    tolerance: float

    def done(self, residuals: Sequence[float]) -> float:
        """Tell how much of all work is done: residuals fall about geometrically.

        Args:
            residuals: The relative ones of the part; none: it has hardly begun.

        Returns:
            In [start, stop].
        """
        worst = max(residuals, default=1.0)
        if not 0 < self.tolerance < 1 or not 0 < worst < 1:
            return self.start
        inside = min(1.0, math.log(worst) / math.log(self.tolerance))
        return self.start + inside * (self.stop - self.start)


@dataclass
class QueryCall:
    """What the methods share while a query runs."""

    name: str
    lease: Lease
    spec: OperatorSpec | None
    """The operator; None: the query is about data points."""
    run: QueryRun
    batcher: Batcher
    limits: LimitsConfig
    stack: contextlib.ExitStack
    send: Send
    part: Share | None = None
    """The part of the work that goes on, of queries whose progress says how much is done."""
    done: float = 0.0
    """Share of the work that is done."""
    silent_until_s: float = 0.0
    """Since the query began; no progress is sent before."""

    @property
    def products(self) -> Products:
        """The map of a query about an operator."""
        assert isinstance(self.run.subject, Products)
        return self.run.subject

    @property
    def points(self) -> Points:
        """The data points of a query about them."""
        assert isinstance(self.run.subject, Points)
        return self.run.subject

    def points_beside(
        self, problem: Problem | None = None, *, lease: Lease | None = None
    ) -> Points:
        """Name data points that a query about an operator asks besides.

        Args:
            problem: What they belong to; None: the session's.
            lease: Of which session; None: that of the call.

        Returns:
            The data points; they have no limit, and no time.
        """

        def never() -> bool:
            self.run.expired()  # raises if the query was given up
            return False

        asked = lease or self.lease
        own = asked.problem.points(self.run.compute, limit=None, expired=never)
        assert isinstance(own, Points)
        return own if problem is None else own.of(problem)

    @property
    def size(self) -> int:
        """P, the length of a vector."""
        return self.lease.info.layout.size

    @property
    def data_points(self) -> int:
        """N, how many the session has."""
        return self.lease.info.data_points

    @property
    def parameters(self) -> int:
        """T, how many tensors a vector consists of."""
        return len(self.lease.info.layout.parameters)

    @property
    def block(self) -> int:
        """Probes that are multiplied together."""
        return max(8, self._at_once)

    @property
    def _at_once(self) -> int:
        assert self.lease.operator is not None
        return self.lease.operator.report.columns_at_once

    def vectors_bytes(self, count: int) -> int:
        """Compute the memory of so many vectors."""
        return count * self.size * vector_dtype(self.lease.info.dtype).itemsize

    @property
    def room_bytes(self) -> int:
        """Memory that one query takes where it may choose, also of a small host's."""
        memory_bytes = self.limits.memory_bytes or default_bytes()
        return min(self.limits.pending_bytes, memory_bytes) // 8

    def fitting(self, each: int, most: int) -> int:
        """Count what takes so many vectors each and may be in memory together."""
        # It is as much "under way" as the operands of a MatMat.
        fits = self.room_bytes // max(1, self.vectors_bytes(each))
        return max(1, min(fits, most))

    def krylov_block(self, steps: int, samples: int) -> int:
        """Count the Krylov spaces that may be in memory together."""
        return self.fitting(steps + 3, min(samples, self._at_once))

    def together(self, columns: int, block: int) -> int:
        """Count the columns of a system that are minimised together.

        Args:
            columns: How many there are.
            block: How many the caller wants at most; 0: as many as fit.

        Returns:
            At least 1.
        """
        return min(columns, block or max(_ENOUGH, self.fitting(_OF_BLOCK, columns)))

    async def begin(self) -> None:
        """Send the header."""
        info, operator = self.lease.info, self.lease.operator
        await self._part(
            header=curvature_pb.ResultHeader(
                version=info.version,
                parameters_digest=info.parameters_digest,
                model_id=info.model_id,
                dataset_id=info.dataset_id,
                plan=None
                if operator is None
                else convert.plan_to_proto(operator.report),
            )
        )

    def reserve(self, vectors: int) -> None:
        """Make room for so many vectors until the call ends."""
        self.stack.enter_context(self.batcher.reserve(1, self.vectors_bytes(vectors)))

    def reserve_bytes(self, nbytes: int) -> None:
        """Make room for so many bytes until the call ends."""
        self.stack.enter_context(self.batcher.reserve(1, nbytes))

    async def received(
        self,
        chunks: AsyncIterator[memoryview],
        accept: Callable[[safetensors_header.Header], int],
    ) -> Mapping[str, NDArray[Any]]:
        """Receive the tensors that travel with a query.

        Args:
            chunks: Their file.
            accept: Judges its header, before anything is allocated.

        Returns:
            The tensors by name, not checked for finite values.
        """
        assembler = wire.Assembler(accept, max_bytes=2 * self.limits.operand_bytes)
        payload = np.empty(0, np.uint8)
        async for chunk in chunks:
            for piece in assembler.feed(chunk):
                payload = piece
        return {n: t.view(payload) for n, t in assembler.finish().items()}

    async def operands(
        self,
        chunks: AsyncIterator[memoryview],
        names: Mapping[str, str],
        block: int,
        dampings: int,
    ) -> Mapping[str, NDArray[Any]]:
        """Receive the tensors of Solve.

        Args:
            chunks: The file of those that travel.
            names: Names of stored ones, by what they are; empty: they are not stored.
            block: Columns that are to be solved together; 0: as many as fit.
            dampings: How many there are, if several in one run; else 0.

        Returns:
            All of them.
        """
        layout, dtype = self.lease.info.layout, self.lease.info.dtype
        stored = {
            what: self.lease.vectors.get(name).array
            for what, name in names.items()
            if name
        }

        def accept(header: safetensors_header.Header) -> int:
            columns = check.systems(
                header, stored, layout=layout, dtype=dtype, limits=self.limits
            )
            together = self.together(columns, block)
            own = len(header) + len(stored) + _OF_SYSTEM
            # Alone, all columns take each step at once.
            at_once = columns if together == 1 else together
            each = _OF_BLOCK + 2 * dampings
            self.reserve((own + dampings) * columns + each * at_once)
            return 0

        tensors = await self.received(chunks, accept)
        for tensor in tensors.values():
            check_finite(tensor.reshape(-1, layout.size), layout=layout)
        return {**tensors, **stored}

    async def drive(self, query: Query[R]) -> R:
        """Run an algorithm and send its progress."""
        result: R = await self.run.drive(query, self._progress)
        return result

    async def send_tensors(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Send the result's file."""
        for chunk in wire.chunks(arrays):
            await self.send(chunk)

    async def finish(self, summary: Any) -> None:
        """Send the summary."""
        await self._part(summary=summary)

    def summary(self, stopped: Any) -> query_pb.QuerySummary:
        """Say what it cost until now, and why it ended."""
        cost = self.run.cost
        return query_pb.QuerySummary(
            stopped=convert_enums.stop_to_proto(stopped),
            products=cost.products,
            elapsed_s=cost.elapsed_s,
            queue_s=cost.queue_s,
            compute_s=cost.compute_s,
            plans=map(convert.plan_to_proto, self.run.plans),
        )

    async def answer(self, result: Any, tensors: Tensors) -> None:
        """Send the tensors of a result, and a summary of its attributes by their names."""
        cost = self.summary(result.stopped)
        if tensors:
            await self.send_tensors({n: to_numpy(t) for n, t in tensors.items()})
        response: Any = RPCS[self.name].response.message()
        summary = type(response.summary)()
        _summarise(result, summary, cost)
        await self.finish(summary)

    def stored(self, name: str) -> Tensor:
        """Bring vectors that the session stores to the device: [s, P]."""
        array = self.lease.vectors.get(name).array
        check.stored(name, array, self.size)
        return self.tensor(array.reshape(-1, array.shape[-1]))

    def known(self, name: Any) -> LowRank:
        """Bring what the session stores of the operator's largest eigenvalues.

        Args:
            name: The name of vectors with values, of any parameter version.

        Returns:
            The vectors, and the values with the operator's scale and damping.

        Raises:
            InvalidSpec: If the vectors have no values.
            InvalidVector: If they are in other parameters than the operator.
        """
        stored, spec = self.lease.vectors.get(name), self.spec
        assert spec is not None
        check.with_values(name, stored.values)
        check.of_layout(name, stored.layout, self.lease.info.layout)
        vectors = self.stored(name)
        self.reserve(len(vectors))
        values = np.array(stored.values, dtype=np.float64)
        return LowRank(vectors, values * spec.scale + spec.damping)

    def store(
        self, name: str, vectors: Tensor, values: Sequence[float] | None = None
    ) -> None:
        """Keep vectors in the session.

        Args:
            name: Their name.
            vectors: [P] or [K, P].
            values: [K] Eigenvalues that belong to them, as the operator has them.
        """
        spec = self.spec
        assert spec is not None
        own = [
            (value - spec.damping) / spec.scale for value in values or () if spec.scale
        ]
        self.put(name, to_numpy(vectors), tuple(own))

    def put(
        self, name: str, array: NDArray[Any], values: tuple[float, ...] = ()
    ) -> None:
        """Keep vectors in the session, as they are.

        Args:
            name: Their name.
            array: [P] or [K, P].
            values: [K] Eigenvalues that belong to them, without scale and damping.
        """
        info = self.lease.info
        vector = Vector(array, info.version, values=values, layout=info.layout)
        self.lease.vectors.put(name, vector)

    def columns(self, array: NDArray[Any]) -> Tensor:
        """Bring an operand to the device, [K, P] whether it had columns or not."""
        return self.tensor(array.reshape(-1, array.shape[-1]))

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """Bring an operand to the device."""
        products = self.products
        return torch.from_numpy(array).to(products.device, products.dtype)

    def begin_part(self, start: float, stop: float, *, tolerance: float) -> None:
        """Begin a part of the work: progress says from now on how much is done.

        Args:
            start: Share of the work before it.
            stop: Share of the work before it and in it.
            tolerance: Where its relative residuals are to go.
        """
        self.part = Share(start, stop, tolerance)

    async def _progress(self, progress: Progress, cost: Cost) -> None:
        if self.part is not None:
            await self._progress_of(self.part, progress, cost)
            return
        await self._part(
            progress=query_pb.QueryProgress(
                iteration=progress.iteration,
                products=progress.products,
                estimates=progress.estimates,
                residuals=progress.residuals,
                elapsed_s=cost.elapsed_s,
            )
        )

    async def _progress_of(self, part: Share, progress: Progress, cost: Cost) -> None:
        """Send few bytes, and ever more rarely: what travels is the answer."""
        self.done = max(self.done, part.done(progress.residuals))
        if cost.elapsed_s < self.silent_until_s:
            return
        pause_s = min(_LONGEST_PAUSE_S, _PAUSE * cost.elapsed_s)
        self.silent_until_s = cost.elapsed_s + pause_s
        await self._part(
            progress=query_pb.QueryProgress(
                iteration=progress.iteration,
                products=cost.products,
                residuals=[max(progress.residuals)] if progress.residuals else (),
                elapsed_s=cost.elapsed_s,
                share=self.done,
            )
        )

    async def _part(self, **part: Any) -> None:
        await self.send(RPCS[self.name].response.message(**part))


def to_numpy(vectors: Tensor | NDArray[Any]) -> NDArray[Any]:
    """Bring vectors to where they are sent from."""
    if isinstance(vectors, Tensor):
        vectors = vectors.cpu().numpy()
    return np.ascontiguousarray(vectors)


def _summarise(result: Any, summary: Any, cost: query_pb.QuerySummary) -> None:
    for field in summary.DESCRIPTOR.fields:
        if field.name == "query":
            summary.query.CopyFrom(cost)
        elif field.message_type is not None:  # a part, of the same result
            _summarise(result, getattr(summary, field.name), cost)
        else:
            value = getattr(result, field.name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                getattr(summary, field.name).extend(value)
            else:
                setattr(summary, field.name, value)
