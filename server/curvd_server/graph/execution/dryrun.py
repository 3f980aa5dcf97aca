"""A graph is run without memory and within limits before anything is allocated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvd.errors import CurvdError, InvalidGraph, LimitExceeded
from curvd_server.graph.execution.interpret import Interpreter, Step, filled
from curvd_server.graph.execution.operators import DTYPES, given_to
from curvd_server.graph.execution.work import check_work
from curvd_server.system import yield_point

LIMIT_S = 20.0
"""A graph of ten thousand nodes takes about a second."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run without memory found out."""

    outputs: tuple[Tensor, ...]
    """They have shapes and types only."""
    peak_bytes: int
    """Memory of the values that are needed at the same time, at its most."""


def dry_run(interpreter: Interpreter, *, batch: int, limit_bytes: int) -> DryRun:
    """Run a graph on the device ``meta``.

    Args:
        interpreter: The graph.
        batch: How many data points.
        limit_bytes: Memory that values which are needed at the same time may have.

    Returns:
        The outputs, and what memory it needs; the same for every run that is not refused.

    Raises:
        InvalidGraph: If an operator refuses its arguments.
        LimitExceeded: If it needs too much memory or time.
    """
    graph, meta = interpreter.graph, torch.device("meta")
    values: list[Any] = [
        torch.empty((batch, *i.shape), dtype=DTYPES[i.dtype], device=meta)
        for i in graph.inputs
    ]
    values += [
        torch.empty(t.shape, dtype=DTYPES[t.dtype], device=meta) for t in graph.tensors
    ]
    steps = interpreter.bound(
        DTYPES[graph.dtype], meta, batch_statistics=bool(interpreter.was_training)
    )
    live = _Live(limit_bytes)
    for index, value in enumerate(values):
        live.add(index, value, "the data and tensors of the graph")
    values += [None] * len(graph.nodes)
    end_s = time.thread_time() + LIMIT_S
    with torch.no_grad():
        for step in steps:
            yield_point()
            _compute(step, values)
            live.add(step.index, values[step.index], f"operator {step.node}")
            for index in step.done:
                live.drop(index)
            if time.thread_time() > end_s:
                msg = (
                    f"trying the graph without memory took longer than {LIMIT_S} s of a "
                    "processor; use a graph of fewer operators"
                )
                raise LimitExceeded(msg, seconds=LIMIT_S)
    outputs = tuple(values[index] for index in graph.outputs)
    for output in outputs:
        if not isinstance(output, Tensor):
            msg = f"the graph returns {type(output).__name__}, not a tensor"
            raise InvalidGraph(msg)
    return DryRun(outputs, live.peak_bytes)


def _compute(step: Step, values: list[Any]) -> None:
    try:
        arguments = [filled(a, values) for a in step.arguments]
        options = {name: filled(o, values) for name, o in step.options.items()}
        check_work(step.node, given_to(step.node, arguments, options))
        step.run(values)
    except (CurvdError, MemoryError):
        raise
    except Exception as error:  # whatever torch says about arguments that do not fit
        if "can't allocate memory" in str(error):
            raise MemoryError from error
        first_line = str(error).partition("\n")[0][:300]
        msg = (
            f"operator {step.node} refuses its arguments: {type(error).__name__}: "
            f"{first_line}"
        )
        raise InvalidGraph(
            msg, operator=step.node.operator, source=step.node.source
        ) from error


class _Live:
    """Counts the memory of values that are needed at the same time.

    Args:
        limit_bytes: What they may have together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.peak_bytes = 0
        """The most that they had together."""
        self._limit = limit_bytes
        self._total = 0
        self._storages: dict[int, tuple[set[int], int]] = {}
        """Storage -> who uses it, and its bytes."""
        self._held: dict[int, list[int]] = {}

    def add(self, index: int, result: Any, what: str) -> None:
        """Count a value; views of what is counted cost nothing."""
        tensors: Sequence[Any] = (
            result if isinstance(result, list | tuple) else [result]
        )
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            users, size = self._storages.get(storage._cdata, (set(), storage.nbytes()))
            if not users:
                self._total += size
            users.add(index)
            self._storages[storage._cdata] = users, size
            self._held.setdefault(index, []).append(storage._cdata)
        self.peak_bytes = max(self.peak_bytes, self._total)
        if self._total > self._limit:
            msg = (
                f"{what} need {self._total} bytes with all that is needed at the same "
                f"time; the device has {self._limit}: use smaller mini-batches, or a "
                "smaller model"
            )
            raise LimitExceeded(msg, bytes=self._total, limit=self._limit)

    def drop(self, index: int) -> None:
        """Forget a value."""
        for storage in self._held.pop(index, ()):
            users, size = self._storages[storage]
            users.discard(index)
            if not users:
                self._total -= size
                del self._storages[storage]
