"""Graphs that were decoded and tried without memory, kept by their content.

Decoding, looking operators up and the run without memory depend on a graph and the size
of a mini-batch alone, and take longer than to compute with a small model: a fifth of what
the second session of an architecture costs a server.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

from curvd.contract import SerializedGraph
from curvd_server.graph import decode
from curvd_server.graph.execution import DryRun, Interpreter, dry_run

SIZES = 16
"""Of mini-batches, whose runs are kept for each graph; the latest."""


class TriedGraphs:
    """Graphs, and what their runs without memory found out; for any thread.

    Args:
        most: How many graphs are kept, the latest used.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Interpreter, dict[int, DryRun]]] = (
            OrderedDict()
        )

    def __len__(self) -> int:
        return len(self._kept)

    def tried(
        self, graph: SerializedGraph, rows: int, limit_bytes: int
    ) -> tuple[Interpreter, tuple[Tensor, ...]]:
        """Decode a graph and run it without memory, or find both done.

        Args:
            graph: Its bytes, which are hashed each time.
            rows: Data points of a mini-batch.
            limit_bytes: Memory that there is now for values that are needed together.

        Returns:
            What runs it, and its outputs, which have shapes and types only.

        Raises:
            InvalidGraph: If it is not sound.
            LimitExceeded: If it needs too much memory or time.
        """
        digest = graph.digest
        with self._lock:
            kept = self._kept.get(digest)
        interpreter, runs = kept or (Interpreter(decode(graph)), {})
        run = runs.get(rows)
        if (
            run is None or run.peak_bytes > limit_bytes
        ):  # then it is refused, and says why
            run = dry_run(interpreter, batch=rows, limit_bytes=limit_bytes)
        with self._lock:
            interpreter, runs = self._kept.setdefault(digest, (interpreter, runs))
            self._kept.move_to_end(digest)
            runs.pop(rows, None)
            runs[rows] = run
            if len(runs) > SIZES:
                del runs[next(iter(runs))]
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return interpreter, run.outputs
