"""The product of one mini-batch: chunks of columns, and what to do when they do not fit."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curvd.contract import OperatorSpec
from curvd_server.engine.linearization_cache import Counters, LinearizationCache
from curvd_server.engine.objective import Problem, check_cancelled, tangents_of
from curvd_server.engine.operators import Linearisation, block_ranges
from curvd_server.engine.program import Emits, Interruptible
from curvd_server.system import is_out_of_memory, is_shared, yield_point

EMITTED_BYTES = 64 << 20
"""A column of this size has its rows added one by one, so that they take no memory."""
LONG_CHUNK_S = 2e-3
"""A chunk of columns that takes longer has yield points between its operations, while
several callers want the device: each of them costs some microseconds."""


class BatchProduct:
    """Multiplies columns by one mini-batch's share of an operator.

    Args:
        problem: The objective.
        spec: The operator; gives the diagonal blocks.
        cache: Linearises its mini-batches.
        width: Columns that go through together.
        counters: Where products are counted.
        is_native: Tells whether native code computes it, whose rows come all at once.
    """

    def __init__(
        self,
        problem: Problem,
        spec: OperatorSpec,
        cache: LinearizationCache,
        width: int,
        counters: Counters,
        is_native: Callable[[], bool],
    ) -> None:
        self._problem, self._cache, self._counters = problem, cache, counters
        self._is_native = is_native
        self.blocks = block_ranges(spec, len(problem.parameters))
        self.width = width
        """Columns that go through together; fewer after the memory ran out."""
        # Of chunks of so many columns, while callers shared the device. What a GPU is
        # given takes no time here.
        self._chunk_s: dict[int, float] = {}

    def add(
        self,
        index: int,
        V: Tensor,
        out: Tensor,
        sizes: Sequence[int],
        cancelled: Callable[[], bool],
    ) -> None:
        """Add one mini-batch's product, in chunks of these sizes or what of them fits.

        The first mini-batch overwrites `out`, which saves clearing it.

        Args:
            index: Which mini-batch.
            V: ``[K, P]``.
            out: ``[K, P]``, written to.
            sizes: Columns of each chunk.
            cancelled: Polled before each chunk.

        Raises:
            Cancelled: If the caller gave up.
            DoesNotFit: If one column runs out of memory with nothing cached.
        """
        check_cancelled(cancelled)
        linear = self._cache.get(index)
        ends = list(itertools.accumulate(sizes))
        start, added = 0, set[int]()
        while start < len(V):
            check_cancelled(cancelled)
            end = next(end for end in ends if end > start)
            stop = min(start + self.width, end)
            try:
                with self._giving_way(stop - start):
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
            self._counters.batch_products += 1
            start = stop
            added.clear()

    def _giving_way(self, columns: int) -> contextlib.AbstractContextManager[object]:
        """Let others go within a chunk that takes long, if they want short turns.

        The operations and their order stay the same, and so do the bits.

        Args:
            columns: Of the chunk.
        """
        if not is_shared():
            return contextlib.nullcontext()
        if self._chunk_s.get(columns, 0.0) > LONG_CHUNK_S:
            return Interruptible()
        return self._timed(columns)

    @contextlib.contextmanager
    def _timed(self, columns: int) -> Iterator[None]:
        start_s = time.thread_time()
        yield
        self._chunk_s[columns] = time.thread_time() - start_s

    def run(self, index: int, V: Tensor) -> None:
        """Multiply by one mini-batch's share, and keep nothing of the product.

        Args:
            index: Which mini-batch.
            V: ``[K, P]``.
        """
        for _ in self._rows(self._cache.get(index), V):
            yield_point()

    def _rows(
        self, linear: Linearisation, V: Tensor
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Multiply one chunk of columns by every diagonal block.

        Yields:
            Index of a parameter, and its row. The first comes when all are computed,
            except that one large column's come as they are computed.
        """
        batched, dtype = len(V) > 1, self._problem.dtype
        columns = V.to(dtype) if batched else V[0].to(dtype)
        tangents = tangents_of(columns, self._problem.layout)
        large = not batched and V.nbytes >= EMITTED_BYTES and not self._is_native()
        if large and isinstance(linear, Emits):
            for b in self.blocks:
                yield from linear.rows(tangents[b.start : b.stop], b)
            return
        found = deque[Tensor | None]()
        for b in self.blocks:
            yield_point()  # of an opening; a product goes on
            found += linear.product(tangents[b.start : b.stop], b, batched=batched)
        for at in range(len(tangents)):
            yield at, found.popleft()

    def _add(self, at: int, row: Tensor | None, out: Tensor, *, first: bool) -> None:
        p = self._problem.layout.parameters[at]
        place = out[:, p.offset : p.offset + p.size].view(len(out), *p.shape)
        if row is not None:
            place.copy_(row) if first else place.add_(row)
        elif first:
            place.zero_()

    def _relieve(
        self, index: int, linear: Linearisation, error: RuntimeError
    ) -> Linearisation:
        """Make room after running out of memory: halve the chunk, then keep less."""
        if self._problem.model.company.shares:
            raise error  # nothing is decided here alone
        if self._problem.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.width > 1:
            self.width //= 2
            return linear
        if self._cache.is_empty():
            raise DoesNotFit from error
        self._cache.give_up()
        del linear
        return self._cache.get(index)


class DoesNotFit(Exception):
    """One column does not fit the device with nothing cached."""
