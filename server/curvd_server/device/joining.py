"""Which products of a lane run together, and what each of them gets of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from curvd.tensors import Pool
from curvd_server.device.lanes import Lane
from curvd_server.device.requests import Columns, Multiplies, Ticket
from curvd_server.system import CALLING, TRACED, Poll, together

_LITTLE_BYTES = 1 << 20
"""Operands up to here are joined even if their columns share nothing: each run has a cost
of its own. Larger ones run alone, for joining copies them, and the first result would
wait for the last."""


class Joining:
    """Joins requests into one, and parts the result.

    Args:
        run_columns: Columns that run together at most, unless one request has more.
        run_bytes: Operand bytes that run together at most, likewise.
    """

    def __init__(self, run_columns: int, run_bytes: int) -> None:
        self._run_columns, self._run_bytes = run_columns, run_bytes
        self._pool = Pool(run_bytes)

    def take(
        self, lane: Lane, dropped: Callable[[Ticket[Any]], None]
    ) -> list[Ticket[Any]]:
        """Take what runs together from the front of a lane; skip the cancelled.

        Args:
            lane: The lane, which nobody else looks at meanwhile.
            dropped: Is told of each request that was skipped.

        Returns:
            Requests that run now; none if nobody wants any of them.
        """
        taken: list[Ticket[Any]] = []
        columns = nbytes = 0
        share = lane.operator is not None and lane.operator.shares
        most_bytes = self._run_bytes if share else min(self._run_bytes, _LITTLE_BYTES)
        while lane.tickets:
            ticket = lane.tickets[0]
            head = ticket.columns
            if taken and (
                head is None
                or ticket.alone
                or columns + len(head) > self._run_columns
                or nbytes + head.nbytes > most_bytes
            ):
                break
            lane.tickets.popleft()
            if not (ticket.running() or ticket.set_running_or_notify_cancel()):
                dropped(ticket)
                continue
            taken.append(ticket)
            if head is None or ticket.alone:
                break
            columns, nbytes = columns + len(head), nbytes + head.nbytes
        return taken

    def compute(
        self, operator: Multiplies | None, tickets: Sequence[Ticket[Any]], poll: Poll
    ) -> list[Any]:
        """Compute for the first caller, at whose expense what follows is; tell all traces.

        Args:
            operator: What the requests multiply; None: the one request is a job.
            tickets: The requests.
            poll: Says whether to stop.

        Returns:
            The result of each request.
        """
        waited_for = (ticket for ticket in tickets if ticket.waits is None)
        caller = CALLING.set(tickets[0].caller)
        traced = TRACED.set(together(ticket.traced for ticket in waited_for))
        try:
            return self._computed(operator, tickets, poll)
        finally:
            TRACED.reset(traced)
            CALLING.reset(caller)

    def _computed(
        self, operator: Multiplies | None, tickets: Sequence[Ticket[Any]], poll: Poll
    ) -> list[Any]:
        if operator is None:
            (ticket,) = tickets
            assert ticket.job is not None
            return [ticket.job(poll)]
        parts = [t.columns for t in tickets if t.columns is not None]
        if len(parts) == 1:
            return [operator.apply(parts[0], cancelled=poll)]
        counts = [len(part) for part in parts]
        rows = operator.apply(self._joined(parts), counts=counts, cancelled=poll)
        ends = np.cumsum(counts)
        return [
            rows[end - len(part) : end] for part, end in zip(parts, ends, strict=True)
        ]

    def _joined(self, parts: list[Columns]) -> Columns:
        """Put columns into one array; its memory is that of an earlier run."""
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        dtype = np.result_type(*parts)
        memory = self._pool.take(math.prod(shape) * dtype.itemsize)
        return np.concatenate(parts, out=memory.view(dtype).reshape(shape))
