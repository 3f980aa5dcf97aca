"""Random modules through a real server: equal to torch, or refused; no third outcome.

    python tests/fuzz_modules.py [--modules 2000] [--seed 0] [--case N]
                                 [--plan double_backward]

Each module of `support.grammar` is given to `session_for` as a user would. What is
accepted must have torch's own loss and gradient, by ``.backward()`` over the
mini-batches, and the products of central differences of that gradient, to 1e-6. What is
refused must be refused with an error of ours that is no defect (`Internal`); and a module
whose gradient is that of its forward pass must not be refused.
"""

from __future__ import annotations

import argparse
import collections
import functools
import sys
import tempfile
import time
import traceback
import warnings

import numpy as np
import torch
from support.grammar import Case, cases, derive
from torch import nn

import curvd
from curvd_server.engine import building
from curvd_server.engine.tuning.autotune import Plan

TOLERANCE = 1e-6
STEPS = (1e-5, 1e-6, 1e-4, 1e-7)
"""Of central differences; kinks and rounding want different ones, the best counts."""


class Reference:
    """What torch computes: the objective over all mini-batches, by ``.backward()``."""

    def __init__(self, case: Case) -> None:
        self.case = case
        case.module.double()
        if case.mode is not None:
            case.module.train(case.mode == "batch_statistics")
        self.parameters = [p for p in case.module.parameters() if p.requires_grad]

    def gradient(self) -> tuple[float, torch.Tensor]:
        """Loss and gradient of the whole objective."""
        case, total, value = self.case, len(self.case.targets), 0.0
        size = sum(p.numel() for p in self.parameters)
        gradient = torch.zeros(size, dtype=torch.float64)
        counted = 0.0
        tensors = (wide(t).split(case.batch_size) for t in (case.inputs, case.targets))
        for x, y in zip(*tensors, strict=True):
            for p in self.parameters:
                p.grad = None
            loss = case.loss(case.module(x), y)
            if case.kind == "counted":
                loss, weight = loss
                counted += float(weight)
            loss.backward()
            share = len(y) / total if case.kind == "mean" else 1.0
            value += share * loss.item()
            gradient += share * nn.utils.parameters_to_vector([
                torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
                for p in self.parameters
            ])
        norm = counted if case.kind == "counted" else 1.0
        return value / norm, gradient / norm

    def product(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Central difference of the gradient along v."""
        start = nn.utils.parameters_to_vector(self.parameters).detach()
        ends = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(start + sign * step * v, self.parameters)
            ends.append(self.gradient()[1])
        nn.utils.vector_to_parameters(start, self.parameters)
        return (ends[0] - ends[1]) / (2 * step)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers in float64, others as they are."""
    return tensor.double() if tensor.is_floating_point() else tensor


def off(got: np.ndarray, want: torch.Tensor) -> float:
    """Relative error."""
    return float(np.linalg.norm(got - want.numpy()) / (want.norm() + 1e-3))


def padding(module: nn.Module) -> list[int]:
    """List the coordinates of rows that never train, which are constants."""
    start, found = 0, []
    padded = {
        id(layer.weight): layer
        for layer in module.modules()
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None
    }
    for p in module.parameters():
        if p.requires_grad:
            if id(p) in padded:
                row = start + padded[id(p)].padding_idx * p.shape[1]
                found += range(row, row + p.shape[1])
            start += p.numel()
    return found


def attempt(client: curvd.Client, seed: int) -> str:
    """Try a module.

    Returns:
        ``equal``, or the error that refuses it; anything in capitals is a failure.
    """
    case = derive(seed)
    warnings.simplefilter("ignore")
    options = {"batch_size": case.batch_size, "mode": case.mode, "dtype": "F64"}
    generator = torch.Generator().manual_seed(seed)
    try:
        session = client.session_for(
            case.module, case.loss, (case.inputs, case.targets), **options
        )
        value, gradient = session.gradient()
        v = torch.randn(len(gradient), generator=generator, dtype=torch.float64)
        v[padding(case.module)] = 0.0
        product = session.hessian() @ v.numpy()
    except curvd.CurvdError as error:
        if isinstance(error, curvd.Internal) or case.honest:
            return f"REFUSED {type(error).__name__}: {error}"
        return type(error).__name__
    truth = Reference(case)
    want, slope = truth.gradient()
    errors = {
        "loss": abs(value - want) / (abs(want) + 1e-3),
        "gradient": off(gradient, slope),
        "product": min(off(product, truth.product(v, step)) for step in STEPS),
    }
    with torch.no_grad():
        for parameter in truth.parameters:
            parameter.mul_(1.1)
    session.update_parameters(case.module.state_dict())
    errors["updated"] = off(session.gradient()[1], truth.gradient()[1])
    session.delete()
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    return f"WRONG {wrong}" if wrong else "equal"


def run(target: str, seeds: range) -> collections.Counter[str]:
    """Try the modules of some seeds; print those that fail."""
    counts: collections.Counter[str] = collections.Counter()
    with curvd.connect(target, deadline_s=600) as client:
        for seed in seeds:
            try:
                outcome = attempt(client, seed)
            except Exception:
                outcome = f"RAISED {traceback.format_exc()}"
            counts[outcome.partition(" ")[0]] += 1
            if outcome.partition(" ")[0].isupper():
                sys.stderr.write(f"seed {seed} {derive(seed).said}: {outcome}\n")
                sys.stderr.flush()
    return counts


def take_plan(mode: str) -> None:
    """Let servers of this process verify one plan, and race others only if it is wrong.

    Racing takes most of the time, and finds nothing out about what is exported.
    """
    build = functools.partial(building.build, plan=Plan(mode))
    building.build = build  # type: ignore[assignment]


def main() -> int:
    """Serve, try, count."""
    from curvd_server.app import serve_in_thread
    from curvd_server.config import ServerConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=2000)
    parser.add_argument(
        "--seed", type=int, default=0, help="other seeds, other modules"
    )
    parser.add_argument(
        "--case", type=int, help="one module, by the number in a report"
    )
    parser.add_argument("--plan", help="a mode of AD; by default the server's choice")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.plan:
        take_plan(options.plan)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(listen="127.0.0.1:0", data_dir=folder)
        with serve_in_thread(config) as target:
            seeds = cases(options.seed, options.modules)
            if options.case is not None:
                seeds = range(options.case, options.case + 1)
            counts = run(target, seeds)
    for outcome, count in counts.most_common():
        print(f"{count:6}  {outcome}")
    made = [tuple(derive(seed).said) for seed in seeds]
    print(f"{len(set(made))} different structures in cases {seeds[0]} to {seeds[-1]}")
    print(f"{time.process_time() - start:.0f} s of CPU")
    return int(any(outcome.isupper() for outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
