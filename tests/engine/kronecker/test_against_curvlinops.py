"""KFAC and EKFAC are those of curvlinops, in every flavour that both have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.kronecker_nets import BATCH, NETS, PER_TOKEN, Net
from torch import Tensor, nn

from curvd.contract import OperatorSpec
from curvd_server.engine.kronecker import build
from curvd_server.engine.kronecker.cotangents import cotangents

kfac = pytest.importorskip("curvlinops.kfac")
ekfac = pytest.importorskip("curvlinops.ekfac")

HUGE = 1 << 30
FISHERS = ("type-2", "mc", "empirical")
SHARINGS = ("expand", "reduce")


class ClassesSecond(nn.Module):
    """Brings logits of sequences into the order that torch's loss wants."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).movedim(-1, 1)


def ours(net: Net, **options: Any) -> Tensor:
    problem = net.problem()
    operator = build(problem, OperatorSpec(**options), budget_bytes=HUGE)
    return operator.apply(torch.eye(problem.layout.size, dtype=torch.float64)).T


def drawn_as_ours(net: Net, spec: OperatorSpec) -> Any:
    """Make curvlinops draw our targets: those whose gradients are our columns."""
    problem = net.problem()
    batches = iter(())

    def draw(self: Any, output: Tensor) -> Tensor:
        nonlocal batches
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(problem.data)
            batch = next(batches)
        z = problem.outputs(problem.parameters, batch).detach()
        (column,) = cotangents(problem, spec, z, batch)
        if net.loss == "cross_entropy":
            return (column - z.softmax(-1)).argmin(-1).flatten()
        if net.loss == "mse":  # its gradient is 2 (z - y), of which ours is the root
            return (z - column / 2).reshape(output.shape)
        return (z.sigmoid() - column).round().reshape(output.shape)

    return draw


def theirs(net: Net, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    x, y = net.data()
    module = copy.deepcopy(net.module())
    if net.terms and net.loss == "cross_entropy":
        module = ClassesSecond(module)
    kind = {"kfac": kfac.KFACLinearOperator, "ekfac": ekfac.EKFACLinearOperator}
    spec = OperatorSpec(**options)
    if options["fisher"] == "mc":
        draw = drawn_as_ours(net, spec)
        monkeypatch.setattr(kfac.KFACLinearOperator, "draw_label", draw)
    operator = kind[options["kind"]](
        module,
        net.loss_module(),
        list(module.parameters()),
        list(zip(x.split(BATCH), y.split(BATCH), strict=True)),
        fisher_type=options["fisher"],
        kfac_approx=options["sharing"],
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    size = sum(p.numel() for p in module.parameters())
    return operator @ torch.eye(size, dtype=torch.float64)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("net", [*NETS, *PER_TOKEN], ids=lambda net: net.name)
def test_kfac_is_that_of_curvlinops(net: Net, fisher: str, sharing: str, monkeypatch):
    options = {"kind": "kfac", "fisher": fisher, "sharing": sharing}
    assert error(ours(net, **options), theirs(net, monkeypatch, **options)) < 1e-12


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_ekfac_is_that_of_curvlinops(net: Net, fisher: str, sharing: str, monkeypatch):
    options = {"kind": "ekfac", "fisher": fisher, "sharing": sharing}
    assert error(ours(net, **options), theirs(net, monkeypatch, **options)) < 1e-9
