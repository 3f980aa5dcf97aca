"""Products on small nets of kinds that `bench/engine.py` does not have.

    python bench/engine_nets.py [--check] [lstm] [gru] [separable] [mixer] [encoder] [unet]

Each is exported and runs as a graph, as a session's does. One thread, CPU time, rounds that
take all in turn; a gradient of the eager module is the unit. Wanted: Hessian K = 1 at most
2.1 gradients, K = 8 no more per column, GGN 1.5, and 1.6 times as fast as curvlinops where
that runs. `FLOPs` counts matrix products and convolutions, in those of the gradient; `alone`
is what they take with nothing else. Where they alone take more than is wanted, as with a
layer whose gradient has a kernel that nothing differentiates, no mending of the rest would
do: such a row is `bounded`, and is held to what all else takes beside other nets' products.
Errors are relative to double backward of the eager module in float64, which central
differences of its gradient check.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from engine_models import TokenLoss
from engine_nets_models import NETS
from engine_table import Entry, flops, products_alone, race
from torch import Tensor, nn

import curvd
from curvd.contract import DatasetSpec, LossSpec, OperatorSpec
from curvd.tensors import Pool, tune_allocator
from curvd_server.engine import Problem, use_differentiable_attention
from curvd_server.engine.building import build
from curvd_server.engine.operator import Operator
from curvd_server.graph import canonical, decode
from curvd_server.graph.execution import GraphModule, Interpreter, without_onednn

LIMITS, GAIN = {"Hessian, K=1": 2.1, "GGN, K=1": 1.5}, 1.6
SLACK = 1.05
"""How much more a column of many may take than a lone one: the clock's noise."""
BESIDE = 1.45
"""What a product takes over its matrix products alone; 1.24 to 1.47 where these bound it."""
ERROR = 2e-5
BATCHES, WIDTH, ROUNDS, BOUND_ROUNDS = 2, 8, 8, 5
GIB = 2**30


@dataclass(frozen=True)
class Contest:
    """One net with its data, as everybody gets it."""

    module: nn.Module
    data: list[tuple[Tensor, Tensor]]
    problem: Problem

    def gradient(self) -> None:
        """Compute one gradient of the eager module, the unit of the table."""
        for x, y in self.data:
            torch.autograd.grad(
                TokenLoss()(self.module(x), y), list(self.module.parameters())
            )

    def plain_gradient(self) -> None:
        """Compute it by operators whose FLOPs can be counted; oneDNN's layers cannot."""
        with without_onednn():
            self.gradient()


def contest(name: str) -> Contest:
    """Make a net with data, and its graph's objective on the same."""
    net = NETS[name]
    torch.manual_seed(0)
    module = net.make().eval()
    rows = net.batch_size * BATCHES
    x = torch.randn(rows, *net.row)
    y = torch.randint(0, net.classes, (rows, *net.targets))
    exported = curvd.export(module, x)
    problem = Problem.load(
        GraphModule(Interpreter(decode(canonical(exported.graph)))),
        dict(exported.state),
        {"x": x, "y": y},
        DatasetSpec(inputs=("x",), target="y", batch_size=net.batch_size),
        LossSpec(name="cross_entropy"),
    )
    pairs = zip(x.split(net.batch_size), y.split(net.batch_size), strict=True)
    return Contest(module, list(pairs), problem)


def truth(c: Contest, v: Tensor) -> tuple[Tensor, float]:
    """Multiply by the Hessian in float64; say how far central differences are from it."""
    module = copy.deepcopy(c.module).double()
    parameters = [dict(module.named_parameters())[n] for n in c.problem.layout.names]
    rows = v.double().split(list(c.problem.layout.sizes))
    tangents = [r.view_as(p) for r, p in zip(rows, parameters, strict=True)]

    def gradient(*, graph: bool) -> tuple[Tensor, ...]:
        losses = [TokenLoss()(module(x.double()), y) / len(c.data) for x, y in c.data]
        return torch.autograd.grad(sum(losses), parameters, create_graph=graph)

    product = torch.autograd.grad(gradient(graph=True), parameters, tangents)
    step, ends = 1e-6, []
    with torch.no_grad():
        for length in (step, -2 * step):
            for p, t in zip(parameters, tangents, strict=True):
                p += length * t
            with torch.enable_grad():
                ends.append(_flat(gradient(graph=False)))
    want = _flat(product)
    return want, _error((ends[0] - ends[1]) / (2 * step), want)


def theirs(c: Contest, kind: type, v: Tensor) -> Callable[[], Tensor] | str:
    """Make a peer's product; where it raises, say what."""
    by_name = dict(c.module.named_parameters())
    parameters = [by_name[n] for n in c.problem.layout.names]
    try:
        operator = kind(
            c.module, TokenLoss(), parameters, c.data, check_deterministic=False,
            num_data=sum(len(x) for x, _ in c.data),
        )  # fmt: skip
        operator @ v
    except Exception as error:  # a peer may raise anything
        return type(error).__name__
    return lambda: operator @ v


def built(c: Contest, results: Pool, kind: str) -> tuple[Operator, float]:
    """Build an operator as a session does; return the CPU seconds that it took."""
    start = time.process_time()
    operator = build(
        c.problem, OperatorSpec(kind=kind), budget_bytes=4 * GIB, results=results
    )
    return operator, time.process_time() - start


def measure(name: str, missed: list[str]) -> None:
    """Race everybody on one net, and print its rows."""
    c = contest(name)
    size = c.problem.layout.size
    V = torch.randn(WIDTH, size, generator=torch.Generator().manual_seed(1))
    want, gap = truth(c, V[0])
    results = Pool(GIB)
    hessian, hessian_s = built(c, results, "hessian")
    ggn, ggn_s = built(c, results, "ggn")
    print(
        f"\n{name}: P = {size:,}; hessian {hessian.report.mode}, ggn "
        f"{ggn.report.mode}, built in {hessian_s:.1f} and {ggn_s:.1f} CPU s; float64 "
        f"against differences {gap:.0e}",
        flush=True,
    )
    if not gap < 1e-4:
        missed.append(f"{name}: float64 and its differences part by {gap:.0e}")
    products: dict[str, Callable[[], Tensor]] = {
        "Hessian, K=1": lambda: hessian.apply(V[:1]),
        f"Hessian, K={WIDTH}": lambda: hessian.apply(V),
        "GGN, K=1": lambda: ggn.apply(V[:1]),
    }
    one, many, gauss = products
    unit = flops(c.plain_gradient)
    peers = {
        one: theirs(c, HessianLinearOperator, V[0]),
        gauss: theirs(c, GGNLinearOperator, V[0]),
    }
    entries = {
        what: Entry(run, range(ROUNDS), WIDTH if what == many else 1)
        for what, run in {
            "gradient": c.gradient,
            "plain gradient": c.plain_gradient,
            **products,
        }.items()
    } | {
        f"{what} peer": Entry(run, range(ROUNDS))
        for what, run in peers.items()
        if callable(run)
    }
    runs, found = race(entries)
    plain = runs["plain gradient"].over(runs["gradient"])
    print(f"  the gradient by operators that can be differentiated takes {plain:.2f}")
    names = ("ours", "peer", "gain", "FLOPs", "alone", "limit", "")
    print(f"  {'':<14}" + "".join(f"{n:>12}" for n in names))
    for what, run in products.items():
        mine = runs[what].over(runs["gradient"])
        spent = flops(run) / unit / (WIDTH if what == many else 1)
        alone = _alone(c, run) / (WIDTH if what == many else 1)
        peer, gain = peers.get(what, ""), None
        if callable(peer):
            gain = runs[f"{what} peer"].over(runs[what])
            peer = f"{runs[f'{what} peer'].over(runs['gradient']):.2f}"
        gains = "" if gain is None else f"{gain:.2f}x"
        limit = LIMITS.get(what, runs[one].over(runs["gradient"]) * SLACK)
        bounded = what in LIMITS and alone > limit
        limit = alone * BESIDE if bounded else max(limit, 0.0)
        met = mine <= limit
        verdict = ("bounded" if bounded else "met") if met else "MISSED"
        print(
            f"  {what:<14}{mine:>12.2f}{peer:>12}{gains:>12}{spent:>12.2f}{alone:>12.2f}"
            f"{limit:>12.2f}{verdict:>12}",
            flush=True,
        )
        if not met:
            missed.append(
                f"{name} {what}: {mine:.2f} gradients, want <= {limit:.2f} (FLOPs "
                f"{spent:.2f}, its matrix products alone {alone:.2f})"
            )
        if gain is not None and not gain >= GAIN:
            missed.append(f"{name} {what}: {gain:.2f}x curvlinops, want >= {GAIN}")
    error = _error(found[one][0], want)
    print(f"  error {error:.0e}")
    if not error <= ERROR:
        missed.append(f"{name}: error {error:.1e}, want <= {ERROR}")


def _alone(c: Contest, run: Callable[[], object]) -> float:
    """Gradients that a product's matrix products and convolutions take alone."""
    runs, _ = race({
        "gradient": Entry(c.gradient, range(BOUND_ROUNDS)),
        "alone": Entry(products_alone(run), range(BOUND_ROUNDS)),
    })
    return runs["alone"].over(runs["gradient"])


def _flat(rows: Any) -> Tensor:
    return torch.cat([r.reshape(-1) for r in rows])


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("nets", nargs="*", metavar="net", help=", ".join(NETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tune_allocator()  # as the server does
    use_differentiable_attention()
    missed: list[str] = []
    start = time.perf_counter()
    for name in arguments.nets or NETS:
        measure(name, missed)
    print(f"\n{time.perf_counter() - start:.0f} s; torch {torch.__version__}, 1 thread")
    for miss in missed:
        print("MISSED", miss)
    print("all targets met" if not missed else f"{len(missed)} missed")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
