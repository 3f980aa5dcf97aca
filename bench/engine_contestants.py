"""Who multiplies in `bench/engine.py`: our operators, curvlinops' and the seed's loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from engine_models import Contest, TokenLoss
from torch import Tensor

from curvd.contract import OperatorSpec
from curvd.tensors import Pool
from curvd_server.engine import Compiler
from curvd_server.engine.building import build
from curvd_server.engine.operator import Operator
from curvd_server.engine.tuning.plan import Choice
from curvd_server.engine.verification.verify import Evidence

GIB = 2**30

Product = Callable[[Tensor], Tensor]
"""``[K, P] -> [K, P]``."""


def ours(
    c: Contest, results: Pool, compiler: Compiler | None = None, **spec: Any
) -> Operator:
    """Build as a session does; memory of results is used again, as on its device."""
    start = time.perf_counter()
    operator = build(
        c.problem,
        OperatorSpec(**spec),
        budget_bytes=16 * GIB,
        compiler=compiler,
        results=results,
    )
    report = operator.report
    name = " ".join(f"{key}={value}" for key, value in spec.items()) or "hessian"
    print(
        f"    {name}: {report.mode}, {operator.plan.batches_at_once} mini-batches and "
        f"{report.columns_at_once} columns at once, kept "
        f"{report.kept_bytes / 2**20:.0f} MiB, gaps: differences "
        f"{report.difference_gap:.0e}, symmetry {report.symmetry_gap:.0e}; built in "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return operator


def alike(
    operator: Operator, results: Pool | None, *, budget_bytes: int, shared: bool
) -> Operator:
    """Make an operator of the same plan and evidence; its products are checked anyway.

    Args:
        operator: Whose plan.
        results: Memory of its results.
        budget_bytes: Memory for cached linearisations.
        shared: Whether it runs the same traced programs, and their native code.

    Returns:
        An operator that is warm.
    """
    problem, report = operator.problem, operator.report
    if not shared:
        model = dataclasses.replace(problem.model, programs={})
        problem = dataclasses.replace(problem, model=model)
    evidence = Evidence(report.symmetry_gap, report.difference_gap, wrong=())
    choice = Choice(operator.plan, evidence)
    copy = Operator(problem, operator.spec, choice, budget_bytes, results=results)
    copy.warm()
    return copy


def theirs(c: Contest, kind: type) -> Product:
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


def loop_over_blocks(c: Contest, v: Tensor) -> Tensor:
    """The seed's way: one ``jvp(jacrev)`` per block, the others frozen."""
    names = c.problem.layout.names
    values = {n: p.detach() for n, p in c.module.named_parameters()}
    pieces = v.split(list(c.problem.layout.sizes))
    tangents = {n: t.view_as(values[n]) for n, t in zip(names, pieces, strict=True)}
    out = torch.zeros_like(v)
    places = dict(zip(names, out.split(list(c.problem.layout.sizes)), strict=True))
    for x, y in c.data:
        start = 0
        for size in c.layers:
            inside = names[start : start + size]
            start += size

            def loss(inner: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
                output = torch.func.functional_call(c.module, values | inner, x)
                return TokenLoss()(output, y)

            here = {n: values[n] for n in inside}
            along = {n: tangents[n] for n in inside}
            with torch.no_grad():
                rows = torch.func.jvp(torch.func.jacrev(loss), (here,), (along,))[1]
            for n in inside:
                places[n] += rows[n].reshape(-1) / len(c.data)
    return out
