"""Products of the engine against curvlinops and in units of one gradient.

    python bench/engine.py [--check] [mlp] [resnet18] [gpt]

One thread, CPU time, rounds that take every contestant in turn, medians. A gradient is
`torch.autograd.grad` of the loss over the same mini-batches. With --check the exit
status is 1 if a target is missed; what bounds a result is its FLOP count, in gradients,
in the last column (matrix products and convolutions only).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from curvd.types import DatasetSpec, Dtype, LossSpec, OperatorSpec
from curvd_server.builders import BUILDERS
from curvd_server.compilation import Compiler
from curvd_server.engine import Operator, build
from curvd_server.objective import Problem
from curvd_server.plans import Plan
from curvd_server.rewrites import use_differentiable_attention

GIB = 2**30
EXACT = 1e-4
"""Largest relative error of a float32 product against float64."""


@dataclass(frozen=True)
class Case:
    """A model with mini-batches, and what its products have to reach."""

    builder: str
    config: Mapping[str, Any]
    batch_size: int
    batches: int
    widths: tuple[int, ...]
    hessian: float
    """Gradients per product, at most."""
    gain: float
    """Times faster than curvlinops, at least, for one column."""
    gain_many: float
    """The same for many columns."""
    compiled: bool = False
    """Whether what has to be reached may be reached in native code, after a minute."""


CASES = {
    "mlp": Case(
        "mlp", {"widths": [784, 1024, 1024, 10]}, 128, 4, (8, 32), 1.9, 2, 1.15
    ),
    "resnet18": Case("resnet18", {}, 8, 2, (8,), 2.1, 1.6, 1.6),
    "gpt": Case(
        "gpt",
        {"vocabulary": 1024, "context": 64, "layers": 8, "width": 320, "heads": 5},
        2,
        4,
        (8, 32),
        1.9,
        2,
        1.5,
        compiled=True,
    ),
}


class TokenLoss(nn.Module):
    """Cross entropy over all targets, with the attribute that curvlinops reads."""

    reduction = "mean"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Contest:
    """Everything that runs on one model."""

    case: Case
    module: nn.Module
    data: list[tuple[Tensor, Tensor]]
    problem: Problem
    exact: Problem
    """In float64."""
    exact_operators: dict[str, Operator] = field(default_factory=dict)

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())

    def gradient(self) -> None:
        """One gradient of the whole objective, the unit of the table."""
        for x, y in self.data:
            loss = TokenLoss()(self.module(x), y)
            torch.autograd.grad(loss, self.parameters)

    def columns(self, count: int) -> Tensor:
        g = torch.Generator().manual_seed(1)
        return torch.randn(count, self.problem.layout.size, generator=g)


def contest(case: Case) -> Contest:
    """Make a model with data; nothing is trained, speed does not depend on it."""
    torch.manual_seed(0)
    module = BUILDERS[case.builder](case.config).eval()
    n = case.batch_size * case.batches
    if case.builder == "gpt":
        x = torch.randint(0, case.config["vocabulary"], (n, case.config["context"]))
        y = x.roll(-1, 1)
    else:
        x = torch.randn(n, *((784,) if case.builder == "mlp" else (3, 32, 32)))
        y = torch.randint(0, 10, (n,))
    spec = DatasetSpec(inputs=("x",), target="y", batch_size=case.batch_size)
    loss = LossSpec(name="cross_entropy")
    problems = [
        Problem.load(module, {}, {"x": x, "y": y}, spec, loss, dtype=dtype)
        for dtype in (Dtype.FLOAT32, Dtype.FLOAT64)
    ]
    pairs = list(zip(x.split(case.batch_size), y.split(case.batch_size), strict=True))
    return Contest(case, module, pairs, *problems)


def ours(c: Contest, budget_bytes: int = 16 * GIB, **spec: Any) -> Operator:
    """Build as a session does."""
    operator = build(c.problem, OperatorSpec(**spec), budget_bytes=budget_bytes)
    report = operator.report
    print(
        f"    {spec or 'hessian'}: {report.mode}, {operator.plan.batches_at_once} "
        f"mini-batches and {report.columns_at_once} columns at once, "
        f"kept {report.kept_bytes / 2**20:.0f} MiB, gaps: differences "
        f"{report.difference_gap:.0e}, symmetry {report.symmetry_gap:.0e}",
        flush=True,
    )
    return operator


def compiled(c: Contest, plan: Plan) -> Operator:
    """Build as a session does, and wait for the native code that a session gets."""
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder), after_s=0.0)
        start = time.perf_counter()
        operator = build(
            c.problem,
            OperatorSpec(),
            budget_bytes=16 * GIB,
            plan=Plan("program", batches_at_once=plan.batches_at_once),
            compiler=compiler,
        )
        compiler.wait()
        seconds = time.perf_counter() - start
        used = operator.is_compiled
        print(f"    compiled in {seconds:.0f} s, taken over: {used}", flush=True)
        compiler.close()
    return operator


def theirs(c: Contest, kind: type) -> Callable[[Tensor], Tensor]:
    """Make curvlinops' operator; its columns trail."""
    operator = kind(
        c.module,
        TokenLoss(),
        c.parameters,
        c.data,
        check_deterministic=False,
        num_data=len(c.data) * c.case.batch_size,
    )
    return lambda V: (operator @ V.T).T


def truth(c: Contest, V: Tensor, **spec: Any) -> Tensor:
    """The product in float64, by a mode that verified against differences."""
    key = repr(spec)
    if key not in c.exact_operators:
        plan = Plan("double_backward")
        c.exact_operators[key] = build(
            c.exact, OperatorSpec(**spec), budget_bytes=0, plan=plan
        )
    return c.exact_operators[key].apply(V.double())


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def race(entries: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Take every contestant in turn; median CPU seconds, the first round dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(rounds + 1):
        for name, run in entries.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}


def layers(c: Contest) -> tuple[int, ...]:
    """Block sizes with one block per layer (a transformer layer is one)."""
    owners = []
    for name in c.problem.layout.names:
        parts = name.split(".")
        owners.append(".".join(parts[:2]) if parts[0] == "layers" else parts[0])
    sizes, last = [], None
    for owner in owners:
        if owner == last:
            sizes[-1] += 1
        else:
            sizes.append(1)
        last = owner
    return tuple(sizes)


def loop_over_blocks(c: Contest, sizes: tuple[int, ...], V: Tensor) -> None:
    """The seed's way: one ``jvp(jacrev)`` per block, the others frozen."""
    names = c.problem.layout.names
    values = dict(c.module.named_parameters())
    v = V[0].split(list(c.problem.layout.sizes))
    for x, y in c.data:
        start = 0
        for size in sizes:
            block = range(start, start + size)
            start += size

            def loss(inner: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
                whole = {n: p.detach() for n, p in values.items()} | inner
                return TokenLoss()(torch.func.functional_call(c.module, whole, x), y)

            here = {names[i]: values[names[i]].detach() for i in block}
            tangents = {names[i]: v[i].view_as(values[names[i]]) for i in block}
            with torch.no_grad():
                torch.func.jvp(torch.func.jacrev(loss), (here,), (tangents,))


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib(run: Callable[[], Any]) -> float:
    """The process's largest resident size while `run` runs, sampled every ms."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    seen, done = [resident_mib()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(seen)


@dataclass
class Table:
    """Rows as they come, and the targets missed."""

    missed: list[str]

    def row(
        self,
        what: str,
        unit_s: float,
        mine_s: float,
        peer_s: float,
        errors: tuple[float, float],
        work: float,
    ) -> None:
        print(
            f"  {what:<22}{mine_s / unit_s:>8.2f}{peer_s / unit_s:>10.2f}"
            f"{peer_s / mine_s:>8.2f}x{errors[0]:>10.0e}{errors[1]:>10.0e}{work:>9.2f}",
            flush=True,
        )

    def want(self, what: str, value: float, limit: float, *, most: bool) -> None:
        if not (value <= limit if most else value >= limit):
            sign = "<=" if most else ">="
            self.missed.append(f"{what}: {value:.2f}, want {sign} {limit:g}")


def measure(name: str, table: Table) -> None:
    """Run all contests of one model."""
    case = CASES[name]
    c = contest(case)
    print(
        f"\n{name}: P = {c.problem.layout.size:,}, {case.batches} mini-batches of "
        f"{case.batch_size}",
        flush=True,
    )
    print("  columns: gradients per column (ours, curvlinops), gain, errors, FLOPs")
    unit = flops(c.gradient)
    hessian, peer = ours(c), theirs(c, HessianLinearOperator)
    one = single(name, c, table, hessian, peer, unit)
    if case.compiled:
        hessian.close()
        hessian = compiled(c, hessian.plan)
        one = single(name, c, table, hessian, peer, unit)
    for width in case.widths:
        many(name, c, table, hessian, peer, width, one)
    memory(c, hessian, peer)
    hessian.close()
    gauss_newton(name, c, table, unit)
    blocks(name, c, table, unit)


def single(
    name: str,
    c: Contest,
    table: Table,
    mine: Operator,
    peer: Callable[[Tensor], Tensor],
    unit: int,
) -> float:
    """One column of the Hessian; returns its cost in gradients."""
    V = c.columns(1)
    want = truth(c, V)
    errors = error(mine.apply(V), want), error(peer(V), want)
    s = race(
        {
            "unit": c.gradient,
            "mine": lambda: mine.apply(V),
            "peer": lambda: peer(V),
        },
        7 if name == "mlp" else 5,
    )
    native = mine.is_compiled
    what = "Hessian, K=1, compiled" if native else "Hessian, K=1"
    work = float("nan") if native else flops(lambda: mine.apply(V)) / unit
    table.row(what, s["unit"], s["mine"], s["peer"], errors, work)
    cost, gain = s["mine"] / s["unit"], s["peer"] / s["mine"]
    if c.case.compiled and not native:
        return cost
    table.want(f"{name} Hessian K=1 in gradients", cost, c.case.hessian, most=True)
    table.want(f"{name} Hessian K=1 against curvlinops", gain, c.case.gain, most=False)
    table.want(f"{name} Hessian K=1 error", errors[0], EXACT, most=True)
    return cost


def many(
    name: str,
    c: Contest,
    table: Table,
    mine: Operator,
    peer: Callable[[Tensor], Tensor],
    width: int,
    one: float,
) -> None:
    """Many columns of the Hessian, per column."""
    V = c.columns(width)
    few = V[[0, width - 1]]
    want = truth(c, few)
    got = mine.apply(V)[[0, width - 1]], peer(V)[[0, width - 1]]
    errors = error(got[0], want), error(got[1], want)
    s = race(
        {
            "unit": c.gradient,
            "one": lambda: mine.apply(V[:1]),
            "mine": lambda: mine.apply(V),
            "peer": lambda: peer(V),
        },
        2,
    )
    each, peer_each = s["mine"] / width, s["peer"] / width
    table.row(f"Hessian, K={width}", s["unit"], each, peer_each, errors, float("nan"))
    what = f"{name} Hessian K={width}"
    # The cost of one column comes from the same rounds; 5 % is the clock's noise.
    slack = 1.05 * s["one"] / s["unit"]
    table.want(f"{what} per column", each / s["unit"], max(slack, one), most=True)
    gain = peer_each / each
    table.want(f"{what} against curvlinops", gain, c.case.gain_many, most=False)
    table.want(f"{what} error", errors[0], EXACT, most=True)


def memory(c: Contest, mine: Operator, peer: Callable[[Tensor], Tensor]) -> None:
    """Peak memory of the process during one product."""
    V = c.columns(1)
    kept = peak_mib(lambda: mine.apply(V))
    mine.close()
    bare = build(c.problem, OperatorSpec(), budget_bytes=0, plan=mine.plan)
    base = peak_mib(lambda: None)
    recomputed = peak_mib(lambda: bare.apply(V))
    gradient, theirs_ = peak_mib(c.gradient), peak_mib(lambda: peer(V))
    print(
        f"  peak MiB: idle {base:.0f}, gradient {gradient:.0f}, product kept {kept:.0f}, "
        f"recomputed {recomputed:.0f}, curvlinops {theirs_:.0f}",
        flush=True,
    )


def gauss_newton(name: str, c: Contest, table: Table, unit: int) -> None:
    """One column of the GGN."""
    mine, peer = ours(c, kind="ggn"), theirs(c, GGNLinearOperator)
    V = c.columns(1)
    want = truth(c, V, kind="ggn")
    errors = error(mine.apply(V), want), error(peer(V), want)
    s = race(
        {"unit": c.gradient, "mine": lambda: mine.apply(V), "peer": lambda: peer(V)}, 5
    )
    work = flops(lambda: mine.apply(V)) / unit
    table.row("GGN, K=1", s["unit"], s["mine"], s["peer"], errors, work)
    table.want(f"{name} GGN K=1 in gradients", s["mine"] / s["unit"], 1.5, most=True)
    gain = s["peer"] / s["mine"]
    table.want(f"{name} GGN K=1 against curvlinops", gain, 1.3, most=False)
    table.want(f"{name} GGN K=1 error", errors[0], EXACT, most=True)
    mine.close()


def blocks(name: str, c: Contest, table: Table, unit: int) -> None:
    """One column of the block-diagonal Hessian, against the seed's loop."""
    sizes = layers(c)
    mine = ours(c, block_sizes=sizes)
    V = c.columns(1)
    want = truth(c, V, block_sizes=sizes)
    got = error(mine.apply(V), want)
    s = race(
        {
            "unit": c.gradient,
            "mine": lambda: mine.apply(V),
            "loop": lambda: loop_over_blocks(c, sizes, V),
        },
        3,
    )
    work = flops(lambda: mine.apply(V)) / unit
    what = f"{len(sizes)} blocks (seed loop)"
    table.row(what, s["unit"], s["mine"], s["loop"], (got, float("nan")), work)
    gain = s["loop"] / s["mine"]
    table.want(f"{name} blocks against the loop", gain, 2.0, most=False)
    table.want(f"{name} blocks error", got, EXACT, most=True)
    mine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    use_differentiable_attention()
    table, start = Table([]), time.perf_counter()
    for name in arguments.models or CASES:
        measure(name, table)
    print(f"\n{time.perf_counter() - start:.0f} s; torch {torch.__version__}, 1 thread")
    for miss in table.missed:
        print("MISSED", miss)
    print("all targets met" if not table.missed else f"{len(table.missed)} missed")
    return 1 if arguments.check and table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
