"""Products of exported graphs beside those of the same modules run eagerly.

    python bench/graph.py [--check] [mlp] [resnet18] [gpt]

Both are the engine's, with the same plan. One thread, CPU time, rounds that take the two
in turn; the ratio is the median of the rounds' ratios. With --check the exit status is 1
above 1.05. ``forward_over_reverse`` runs the graph at every product and shows what
interpreting costs; the other modes run it once per linearisation.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import curvd
from curvd.contract import DatasetSpec, LossSpec, OperatorSpec
from curvd_server.engine import Problem, use_differentiable_attention
from curvd_server.engine.operators.linearize import MODES
from curvd_server.graph import canonical, decode
from curvd_server.graph.execution import GraphModule, Interpreter
from curvd_server.models import BUILDERS

LIMIT = 1.05
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "mlp": ("mlp", {"widths": [64, 64, 64, 10]}, 16),
    "resnet18": ("resnet18", {"width": 16}, 4),
    "gpt": (
        "gpt",
        {"vocabulary": 256, "context": 32, "layers": 4, "width": 64, "heads": 4},
        4,
    ),
}


def data_of(name: str, config: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "gpt":
        shape = (rows, config["context"])
        x = torch.randint(0, config["vocabulary"], shape, generator=generator)
        return x, x.roll(-1, 1)
    shape = (rows, 64) if name == "mlp" else (rows, 3, 16, 16)
    x = torch.randn(*shape, generator=generator)
    return x, torch.randint(0, 10, (rows,), generator=generator)


def problems(name: str) -> tuple[Problem, Problem]:
    """The same objective of the module and of its graph."""
    builder, config, rows = CASES[name]
    torch.manual_seed(0)
    module: nn.Module = BUILDERS[builder](config).eval()
    x, y = data_of(name, config, rows)
    exported = curvd.export(module, x)
    graph = GraphModule(Interpreter(decode(canonical(exported.graph))))
    spec = DatasetSpec(inputs=("x",), target="y", batch_size=rows)
    loss = LossSpec(name="cross_entropy")
    eager, interpreted = (
        Problem.load(m, dict(exported.state), {"x": x, "y": y}, spec, loss)
        for m in (module, graph)
    )
    return eager, interpreted


def timed(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def ratio(pair: list[Callable[[], Any]], seconds: float) -> tuple[float, float, int]:
    """Median of graph over eager, the eager median in ms, and the rounds."""
    for run in pair:
        run()
    ratios, eager, end = [], [], time.monotonic() + seconds
    while time.monotonic() < end or len(ratios) < 15:
        order = pair if len(ratios) % 2 else pair[::-1]
        took = [timed(run) for run in order]
        first, second = took if len(ratios) % 2 else took[::-1]
        ratios.append(second / first)
        eager.append(first)
    return statistics.median(ratios), 1e3 * statistics.median(eager), len(ratios)


def _product(tangents: list[Tensor], linear: Any) -> Any:
    return linear.product(tangents, range(len(tangents)), batched=False)


def _linearised(mode: Any, problem: Problem) -> Any:
    return mode(problem, OperatorSpec(), problem.data[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    use_differentiable_attention()
    worst = 0.0
    print(f"{'case':10s} {'mode':22s} {'what':12s} {'eager ms':>9s} {'ratio':>7s}")
    for name in arguments.cases:
        pair = problems(name)
        for mode, linearise in MODES.items():
            linear = [linearise(p, OperatorSpec(), p.data[0]) for p in pair]
            tangents = [torch.ones_like(p) for p in pair[0].parameters]
            rows = [
                torch.cat([r.reshape(-1) for r in _product(tangents, one)])
                for one in linear
            ]
            assert torch.equal(*rows), (name, mode)
            product = functools.partial(_product, tangents)
            runs = {"product": [functools.partial(product, one) for one in linear]}
            if mode != "forward_over_reverse":
                again = functools.partial(_linearised, linearise)
                runs["linearise"] = [functools.partial(again, p) for p in pair]
            for what, both in runs.items():
                found, eager_ms, rounds = ratio(both, arguments.seconds)
                if what == "product":
                    worst = max(worst, found)
                print(
                    f"{name:10s} {mode:22s} {what:12s} {eager_ms:9.2f} {found:7.3f}"
                    f"  ({rounds} rounds)",
                    flush=True,
                )
    print(f"worst product: {worst:.3f}, limit {LIMIT}")
    return int(arguments.check and worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
