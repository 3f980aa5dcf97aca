"""Products of the engine against curvlinops and in units of one gradient.

    python bench/engine.py [--check] [mlp] [resnet18] [gpt]

One thread, CPU time, rounds that take every contestant in turn, medians. A gradient is
`torch.autograd.grad` of the loss over the same mini-batches, in the same rounds. Every
product is compared with its definition in float64. With --check the exit status is 1 if
a target is missed. What bounds a result stands beside it: its FLOPs (matrix products and
convolutions only) in those of a gradient, the gradients that it would take with all of
them at the speed of a large matrix product, measured in the same rounds, and what they
take alone, on the same operands with nothing between them.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from engine_contestants import GIB, Product, alike, loop_over_blocks, ours, theirs
from engine_models import CASES, Contest, contest
from engine_table import (
    PEAK_FLOPS,
    WARMING,
    Entry,
    Row,
    Table,
    flops,
    matrix_product,
    peak_mib,
    products_alone,
    race,
)
from engine_truth import AGREEMENT, Reference, error
from torch import Tensor

from curvd.tensors import Pool, tune_allocator
from curvd_server.engine import Compiler, use_differentiable_attention
from curvd_server.engine.operator import Operator

EXACT = 1e-4
"""Largest relative error of a float32 product against float64."""
MOST_PEERS = 3
"""Runs of curvlinops' wide products that count; ours have to be told from a lone column."""
BOUND_ROUNDS = 3
"""Of which the first warms."""
AGAIN = "1 again"
"""Lone columns after the wide ones; what runs between is compared with both."""
SLACK = 1.05
"""How much more a column of many may take than a lone one: the clock's noise."""


@dataclass(frozen=True)
class Truths:
    """What the products should be, by row of `Contest.columns`."""

    hessian: dict[int, Tensor]
    ggn: Tensor
    blocks: Tensor
    gaps: tuple[float, float]
    """Of Hessian and GGN to central differences."""


def truths(c: Contest, V: Tensor) -> Truths:
    """Compute the definitions for the first column, and the last of each width."""
    truth = Reference(c)
    wanted = [0, *(width - 1 for width in c.case.widths)]
    hessian = dict(zip(wanted, truth.hessian(V[wanted]), strict=True))
    ggn = truth.ggn(V[0])
    blocks = truth.hessian(V[:1], c.layers)[0]
    gaps = truth.hessian_gap(V[0], hessian[0]), truth.ggn_gap(V[0], ggn)
    return Truths(hessian, ggn, blocks, gaps)


@dataclass(frozen=True)
class Team:
    """Everybody who multiplies on one model."""

    hessian: Operator
    eager: Operator | None
    """The Hessian without native code, if the other has it."""
    ggn: Operator
    blocks: Operator
    peer: Product
    peer_ggn: Product
    results: Pool
    """Memory of our results."""


def team(c: Contest, folder: Path, meanwhile: Callable[[], object]) -> Team:
    """Build all operators while a child makes native code of the Hessian.

    Args:
        c: The model.
        folder: For native code.
        meanwhile: Begins other work, once the Hessian's plan is chosen. Nothing must
            disturb that, or the comparison of native code at the end.

    Returns:
        Everybody, ready to multiply.
    """
    compiler = Compiler(folder, after_s=0.0) if c.case.compiled else None
    results = Pool(4 * GIB)
    hessian = ours(c, results, compiler)
    meanwhile()
    eager = None
    if compiler is not None:
        eager = alike(hessian, results, budget_bytes=16 * GIB, shared=False)
    ggn, blocks = ours(c, results, kind="ggn"), ours(c, results, block_sizes=c.layers)
    if compiler is not None:
        start = time.perf_counter()
        compiler.wait()
        compiler.close()
        print(
            f"    native code taken over: {hessian.is_compiled}, waited for "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    # Results of a server are seldom in fresh memory.
    results.take(max(c.case.widths) * c.problem.layout.size * 4).fill(0)
    peers = theirs(c, HessianLinearOperator), theirs(c, GGNLinearOperator)
    return Team(hessian, eager, ggn, blocks, *peers, results)


def entries(c: Contest, t: Team, V: Tensor) -> dict[str, Entry]:
    """List the contestants of one model in the order of a round."""
    case = c.case

    def product(multiply: Product, columns: int, rounds: range) -> Entry:
        return Entry(lambda: multiply(V[:columns]), rounds, columns)

    def lone(operator: Operator) -> Entry:
        # Several, each of its own vector, as the columns that they are compared with.
        columns = V[: case.lone].split(1)
        return Entry(
            lambda: torch.cat([operator.apply(v) for v in columns]), always, case.lone
        )

    # Ours side by side, then the peer's, after whose wide products everything is cold.
    always, few = range(case.rounds), range(1, case.block_rounds + 1)
    wide, wide_peers = dict[str, Entry](), dict[str, Entry]()
    for width, rounds in case.widths.items():
        wide[f"{width}"] = product(t.hessian.apply, width, rounds)
        fewer = range(rounds.start, min(rounds.stop, WARMING + MOST_PEERS))
        wide_peers[f"{width} peer"] = product(t.peer, width, fewer)
    listed = {
        "peak": Entry(matrix_product(), always),
        "unit": Entry(c.gradient, always),
        "1": lone(t.hessian),
        **wide,
        AGAIN: lone(t.hessian),
        "1 peer": product(t.peer, 1, always),
        **wide_peers,
    }
    if t.eager is not None:
        listed["eager"] = lone(t.eager)
    return listed | {
        "ggn": product(t.ggn.apply, 1, always),
        "ggn peer": product(t.peer_ggn, 1, always),
        "blocks": Entry(lambda: t.blocks.apply(V[:1]), few),
        "blocks peer": Entry(lambda: loop_over_blocks(c, V[0])[None], few),
    }


def measure(name: str, table: Table, folder: Path) -> None:
    """Run all contests of one model."""
    start = time.perf_counter()
    c = contest(CASES[name])
    case, V = c.case, c.columns()
    table.head(
        f"{name}: P = {c.problem.layout.size:,}, {case.batches} mini-batches of "
        f"{case.batch_size}"
    )
    known: list[Future[Truths]] = []
    with ThreadPoolExecutor(1) as pool:
        t = team(c, folder, lambda: known.append(pool.submit(truths, c, V)))
        want = known[0].result()
    print(f"    float64 against central differences: {want.gaps[0]:.0e}, ", end="")
    print(f"{want.gaps[1]:.0e} (GGN)")
    table.most(f"{name} float64 Hessian", want.gaps[0], AGREEMENT)
    table.most(f"{name} float64 GGN", want.gaps[1], AGREEMENT)
    rows = contest_rows(c, t, V, want)
    table.rows(list(rows.values()))
    judge(name, c, table, rows)
    del want
    memory(c, t, V[:1])
    print(f"    {time.perf_counter() - start:.0f} s")


def contest_rows(c: Contest, t: Team, V: Tensor, want: Truths) -> dict[str, Row]:
    """Race, compare with the truth, and count FLOPs; rows by contestant."""
    runs, results = race(entries(c, t, V))
    runs["1"] = runs["1"].mean(runs.pop(AGAIN))
    one = flops(c.gradient)
    unit, peak = runs["unit"].median, PEAK_FLOPS / runs["peak"].median
    print(
        f"    gradient: {unit * 1e3:.0f} ms, {one / 1e9:.1f} GFLOP, "
        f"{one / unit / peak:.0%} of {peak / 1e9:.0f} GFLOP/s (a matrix product)"
    )
    plain = t.eager or t.hessian  # operations in native code cannot be counted
    work = {
        "ggn": flops(lambda: t.ggn.apply(V[:1])),
        "blocks": flops(lambda: t.blocks.apply(V[:1])),
    }
    hessian = flops(lambda: plain.apply(V[:1]))
    alone = {
        "ggn": bound(c, lambda: t.ggn.apply(V[:1])),
        "blocks": None,
    }
    hessian_alone = bound(c, lambda: plain.apply(V[:1]))

    def row(name: str, what: str, wanted: dict[int, Tensor]) -> Row:
        peer = "1 peer" if name == "eager" else f"{name} peer"
        mine, other = (runs[n].over(runs["unit"]) for n in (name, peer))
        of = torch.stack(list(wanted.values()))
        errors = [error(results[n][list(wanted)], of) for n in (name, peer)]
        count = work.get(name, hessian)
        return Row(
            what,
            mine,
            other,
            runs[peer].over(runs[name]),
            (errors[0], errors[1]),
            count / one,
            count / peak / unit,
            alone.get(name, hessian_alone),
            runs[name].over(runs["1"]),
            runs[name].warming[0] / unit if runs[name].warming else None,
            runs[name],
        )

    native = ", compiled" if t.hessian.is_compiled else ""
    first = {0: want.hessian[0]}
    rows = {"1": row("1", f"Hessian, K=1{native}", first)}
    if t.eager is not None:
        rows["eager"] = row("eager", "Hessian, K=1, eager", first)
    for width in c.case.widths:
        ends = {i: want.hessian[i] for i in (0, width - 1)}
        rows[f"{width}"] = row(f"{width}", f"Hessian, K={width}{native}", ends)
    rows["ggn"] = row("ggn", "GGN, K=1", {0: want.ggn})
    blocks = f"{len(c.layers)} blocks (seed's loop)"
    return rows | {"blocks": row("blocks", blocks, {0: want.blocks})}


def bound(c: Contest, run: Callable[[], object]) -> float:
    """What a product's matrix products and convolutions take alone, in gradients."""
    entries = {
        "unit": Entry(c.gradient, range(BOUND_ROUNDS)),
        "alone": Entry(products_alone(run), range(BOUND_ROUNDS)),
    }
    runs, _ = race(entries)
    return runs["alone"].over(runs["unit"])


def judge(name: str, c: Contest, table: Table, rows: dict[str, Row]) -> None:
    """Compare rows with the targets, and say what bounds those that are missed."""
    case = c.case

    def why(row: Row) -> str:
        bounds = {"all its FLOPs at the peak": row.at_peak}
        if row.alone is not None:
            bounds["its matrix products alone"] = row.alone
        listed = (
            f"{what}: {gradients:.2f} gradients, {row.peer / gradients:.2f}x"
            for what, gradients in bounds.items()
        )
        return f" ({'; '.join(listed)})"

    def costs(key: str, gradients: float, gain: float) -> None:
        row, what = rows[key], f"{name} {rows[key].what}"
        table.most(f"{what} in gradients", row.mine, gradients, why(row))
        table.least(f"{what} against curvlinops", row.gain, gain, why(row))

    costs("1", case.hessian, case.gain)
    costs("ggn", 1.5, 1.3)
    for width in case.widths:
        row = rows[f"{width}"]
        what = f"{name} {row.what}"
        table.most(f"{what} per column over K=1", row.over_one, SLACK)
        table.least(f"{what} against curvlinops", row.gain, case.gain_many, why(row))
    table.least(f"{name} blocks against the loop", rows["blocks"].gain, 2.0)
    for row in rows.values():
        table.most(f"{name} {row.what} error", row.errors[0], EXACT)


def memory(c: Contest, t: Team, V: Tensor) -> None:
    """Peak memory of the process during one product, with and without what is kept."""
    t.results.clear()
    t.ggn.close()
    t.blocks.close()
    if t.eager is not None:
        t.eager.close()
    gc.collect()
    kept = peak_mib(lambda: t.hessian.apply(V))
    bare = alike(t.hessian, None, budget_bytes=0, shared=True)
    t.hessian.close()
    runs: dict[str, Callable[[], object]] = {
        "idle": lambda: None,
        "gradient": c.gradient,
        "product recomputed": lambda: bare.apply(V),
        "curvlinops": lambda: t.peer(V),
    }
    peaks = {what: peak_mib(run) for what, run in runs.items()}
    listed = ", ".join(f"{what} {mib:.0f}" for what, mib in peaks.items())
    print(f"    peak MiB: product kept {kept:.0f}, {listed}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tune_allocator()  # as the server does
    use_differentiable_attention()
    table, start = Table(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models or CASES:
            measure(name, table, Path(folder))
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s; torch {torch.__version__}, 1 thread")
    for miss in table.missed:
        print("MISSED", miss)
    print("all targets met" if not table.missed else f"{len(table.missed)} missed")
    return 1 if arguments.check and table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
