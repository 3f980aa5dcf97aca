"""How `bench/engine.py` measures, and what it prints."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

_SIDE = 1024
PEAK_FLOPS = 2 * _SIDE**3
"""Of `matrix_product`."""
WARMING = 1
"""Rounds at the beginning that warm caches and allocators and do not count."""


@dataclass(frozen=True)
class Entry:
    """Something that runs in a contest."""

    run: Callable[[], Any]
    rounds: range
    """In which it takes part."""
    columns: int = 1


@dataclass(frozen=True)
class Runs:
    """What a contestant took, in CPU seconds per column, by round."""

    warming: Mapping[int, float]
    counted: Mapping[int, float]

    @property
    def median(self) -> float:
        """Of those that count."""
        return statistics.median(self.counted.values())

    def over(self, other: Runs) -> float:
        """Compare with another in the rounds that count for both.

        The machine's speed drifts by more than what is looked for; less within a round.
        """
        both = self.counted.keys() & other.counted.keys()
        return statistics.median(self.counted[n] / other.counted[n] for n in both)

    def mean(self, other: Runs) -> Runs:
        """Take what ran twice in the same rounds for one contestant."""
        pairs = ((self.warming, other.warming), (self.counted, other.counted))
        warming, counted = ({n: (a[n] + b[n]) / 2 for n in a} for a, b in pairs)
        return Runs(warming, counted)


def race(entries: Mapping[str, Entry]) -> tuple[dict[str, Runs], dict[str, Any]]:
    """Take every contestant in turn.

    Returns:
        Each one's runs, and its last result.
    """
    seconds: dict[str, dict[int, float]] = {name: {} for name in entries}
    results: dict[str, Any] = {}
    for index in range(max(entry.rounds.stop for entry in entries.values())):
        for name, entry in entries.items():
            if index in entry.rounds:
                results.pop(name, None)
                start = time.process_time()
                results[name] = entry.run()
                spent = time.process_time() - start
                seconds[name][index] = spent / entry.columns
    runs = {
        name: Runs(
            {n: s for n, s in times.items() if n < WARMING},
            {n: s for n, s in times.items() if n >= WARMING},
        )
        for name, times in seconds.items()
    }
    return runs, results


def matrix_product() -> Callable[[], Tensor]:
    """Make the product of two matrices that runs at the processor's peak."""
    a, b, out = (torch.ones(_SIDE, _SIDE) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def flops(run: Callable[[], Any]) -> int:
    """Count the operations of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class _Recorder(TorchDispatchMode):
    """Remembers matrix products and convolutions with their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._overloadpacket in flop_registry:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def products_alone(run: Callable[[], Any]) -> Callable[[], None]:
    """Make a run of nothing but the matrix products and convolutions of another.

    In the same order, on the same operands: what remains if all else takes no time.
    """
    with _Recorder() as recorder:
        run()

    @torch.no_grad()
    def again() -> None:
        for func, args, kwargs in recorder.calls:
            func(*args, **kwargs)

    return again


def peak_mib(run: Callable[[], Any]) -> float:
    """The process's largest resident size while `run` runs, sampled every ms."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    seen, done = [_resident_mib()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(_resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(seen)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@dataclass(frozen=True)
class Row:
    """A product: what it took, beside a peer's, and what it must take at least."""

    what: str
    mine: float
    """Gradients per column."""
    peer: float
    gain: float
    """How many times as long as ours the peer's took, in the same rounds."""
    errors: tuple[float, float]
    """Ours and the peer's, relative to float64."""
    flops: float
    """Of ours, in those of one gradient."""
    at_peak: float
    """Gradients that ours would take with all its FLOPs at the processor's peak."""
    alone: float | None
    """Gradients that its matrix products and convolutions take alone, if measured."""
    over_one: float
    """What a column took, over a lone column of ours in the same rounds."""
    cold: float | None
    """Gradients per column of our first run, if it does not count."""
    runs: Runs
    """Ours."""

    @property
    def spread(self) -> str:
        """How much longer the longest run took than the shortest."""
        counted = self.runs.counted.values()
        ratio = max(counted) / min(counted) - 1
        return f"{ratio:.1%}" if len(counted) > 1 else "one run"


@dataclass
class Table:
    """Rows as they come, and the targets missed."""

    missed: list[str] = field(default_factory=list)

    def head(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def rows(self, rows: list[Row]) -> None:
        names = (
            "ours",
            "peer",
            "gain",
            "error",
            "peer's",
            "FLOPs",
            "at peak",
            "alone",
            "of K=1",
            "cold",
            "spread",
        )
        print(" " * 26 + "".join(f"{name:>9}" for name in names))
        for r in rows:
            cold = "" if r.cold is None else f"{r.cold:.2f}"
            alone = "" if r.alone is None else f"{r.alone:.2f}"
            print(
                f"  {r.what:<24}{r.mine:>9.2f}{r.peer:>9.2f}{r.gain:>8.2f}x"
                f"{r.errors[0]:>9.0e}{r.errors[1]:>9.0e}{r.flops:>9.2f}"
                f"{r.at_peak:>9.2f}{alone:>9}{r.over_one:>8.2f}x{cold:>9}{r.spread:>9}",
                flush=True,
            )

    def most(self, what: str, value: float, limit: float, why: str = "") -> None:
        if not value <= limit:
            self.missed.append(f"{what}: {value:.3g}, want <= {limit:.3g}{why}")

    def least(self, what: str, value: float, limit: float, why: str = "") -> None:
        if not value >= limit:
            self.missed.append(f"{what}: {value:.3g}, want >= {limit:.3g}{why}")
