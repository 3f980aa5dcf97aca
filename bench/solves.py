"""Products that systems with many right-hand sides take, on the curvature of trained nets.

    python bench/solves.py [--check] [--nets mlp cnn gpt]

The Gauss-Newton matrix is dense and comes from torch.func (see solves_nets.py); right-hand
sides are gradients of the losses of test points; dampings are shares of its largest
eigenvalue. `alone` is conjugate gradients column by column, `default` what Solve does
unless told otherwise, `sketch` the default with a Nystroem sketch of that damping, its
products counted. Every solution is compared with its true residual. With --check the exit
status is 1 if a target is missed:

- the default takes at most 1.05 times the products of columns alone, everywhere;
- with 64 sides at the smallest damping, at most 0.2 times;
- with a sketch and 4 to 16 sides there, at most 0.5 times;
- four dampings in one run, no more than one by one;
- a sketch made 30 training steps ago, at most 1.4 times the iterations of a fresh one.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from solves_nets import NETS, Trained
from torch import Tensor

from curvd_server.linalg import (
    LowRank,
    Products,
    SolveResult,
    nystrom,
    solve,
    solve_dampings,
)
from curvd_server.linalg.base import drain

DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4)
TOLERANCES = (1e-3, 1e-6)
SIDES = (1, 16, 64)
SKETCHED = (4, 8, 16)
RANK, STEPS = 100, 30


@dataclass(frozen=True)
class Row:
    """Counts, and how many there may be for each of the peer's."""

    what: str
    ours: int
    peer: int
    most: float

    @property
    def good(self) -> bool:
        """Whether the target is met."""
        return self.ours <= self.most * self.peer

    def __str__(self) -> str:
        verdict = "ok" if self.good else "MISSED"
        ratio = self.ours / self.peer
        counts = f"{self.ours:7} {self.peer:7} {ratio:6.2f} {self.most:5.2f}"
        return f"{self.what:58} {counts}  {verdict}"


@dataclass(frozen=True, eq=False)
class Curvature:
    """A dense matrix, its largest eigenvalue, and right-hand sides."""

    G: Tensor
    largest: float
    sides: Tensor

    def products(self) -> Products:
        """Make a map that counts."""
        return Products(lambda V: V @ self.G, size=len(self.G), dtype=self.G.dtype)

    def solve(
        self,
        sides: int,
        share: float,
        tolerance: float,
        *,
        block: int | None = None,
        sketch: LowRank | None = None,
    ) -> SolveResult:
        """Solve, and refuse an answer whose residual is not what was asked for."""
        B, damping = self.sides[:sides], share * self.largest
        found = drain(
            solve(
                self.products(),
                B,
                damping=damping,
                tolerance=tolerance,
                block=block,
                preconditioner=sketch,
            )
        )
        X = found.solution
        true = (B - X @ self.G - damping * X).norm(dim=1) / B.norm(dim=1)
        assert float(true.max()) <= 1.01 * tolerance, float(true.max())
        return found

    @functools.cache  # noqa: B019
    def alone(self, sides: int, share: float, tolerance: float) -> int:
        """Count the products of columns alone."""
        return self.solve(sides, share, tolerance, block=1).products

    def sketch(self, rank: int, **given: float) -> tuple[LowRank, int]:
        """Sketch it: what was found, and its products."""
        found = drain(nystrom(self.products(), rank, **given))
        return found.sketch, found.products


def curvature(net: Trained) -> Curvature:
    """Compute a net's curvature where it is."""
    G = net.ggn()
    return Curvature(G, float(torch.lobpcg(G)[0]), net.gradients(max(SIDES)))


def systems(name: str, at: Curvature) -> Iterator[Row]:
    """Compare the default with columns alone."""
    for share in DAMPINGS:
        for tolerance in TOLERANCES:
            for sides in SIDES:
                alone = at.alone(sides, share, tolerance)
                ours = at.solve(sides, share, tolerance).products
                hard = share == min(DAMPINGS) and sides == max(SIDES)
                what = f"{label(name, share, tolerance, sides)}, default / alone"
                yield Row(what, ours, alone, 0.2 if hard else 1.05)


def sketches(name: str, at: Curvature) -> Iterator[Row]:
    """Compare a sketch, made for these sides, with columns alone."""
    share = min(DAMPINGS)
    for tolerance in TOLERANCES:
        for sides in SKETCHED:
            alone = at.alone(sides, share, tolerance)
            sketch, cost = at.sketch(
                len(at.G),
                damping=share * at.largest,
                columns=sides,
                tolerance=tolerance,
            )
            ours = cost + at.solve(sides, share, tolerance, sketch=sketch).products
            what = f"{label(name, share, tolerance, sides)}, sketch / alone"
            yield Row(what, ours, alone, 0.5)


def together(name: str, at: Curvature) -> Iterator[Row]:
    """Compare all dampings in one run with one after the other."""
    dampings = [share * at.largest for share in DAMPINGS]
    for tolerance in TOLERANCES:
        for sides in SIDES[:2]:
            B = at.sides[:sides]
            ours = drain(
                solve_dampings(at.products(), B, dampings, tolerance=tolerance)
            )
            for one, damping in zip(ours, dampings, strict=True):
                X = one.solution
                true = (B - X @ at.G - damping * X).norm(dim=1) / B.norm(dim=1)
                assert float(true.max()) <= 1.01 * tolerance, float(true.max())
            each = sum(at.solve(sides, s, tolerance).products for s in DAMPINGS)
            what = (
                f"{name}, four dampings, to {tolerance:.0e}, {sides:2}, one run / each"
            )
            yield Row(what, ours[-1].products, each, 1.0)


def drift(net: Trained, before: Curvature) -> Iterator[Row]:
    """Use a sketch after the net has been trained on."""
    old, _ = before.sketch(RANK)
    net.train(STEPS)
    now = curvature(net)
    fresh, _ = now.sketch(RANK)
    moved = float((now.G - before.G).norm() / before.G.norm())
    print(f"{net.name}: {STEPS} steps move the curvature by {moved:.0%}")
    for share in DAMPINGS[1:]:
        for tolerance in TOLERANCES:
            counts = [
                now.solve(1, share, tolerance, sketch=sketch).iterations
                for sketch in (old, fresh)
            ]
            what = f"{label(net.name, share, tolerance, 1)}, old / fresh sketch"
            yield Row(what, *counts, 1.4)


def label(name: str, share: float, tolerance: float, sides: int) -> str:
    return f"{name}, {share:.0e} of largest, to {tolerance:.0e}, {sides:2}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--nets", nargs="+", default=[make.__name__ for make in NETS])
    given = parser.parse_args()
    missed = []
    print(f"{'':58} {'ours':>7} {'peer':>7} {'ratio':>6} {'most':>5}")
    for make in NETS:
        if make.__name__ not in given.nets:
            continue
        net = make()
        at = curvature(net)
        stages = [
            functools.partial(stage, net.name, at)
            for stage in (systems, sketches, together)
        ]
        if make is NETS[0]:
            stages.append(functools.partial(drift, net, at))
        for stage in stages:
            for row in stage():
                print(row, flush=True)
                missed += [] if row.good else [row.what]
    print(f"{len(missed)} missed" + "".join(f"\n  {what}" for what in missed))
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
