"""The models of `bench/engine.py`, their data, and what their products have to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvd.contract import DatasetSpec, LossSpec
from curvd_server.engine import Problem
from curvd_server.models import BUILDERS


@dataclass(frozen=True)
class Case:
    """A model with mini-batches, and what its products have to reach."""

    builder: str
    config: Mapping[str, Any]
    batch_size: int
    batches: int
    rounds: int
    """Rounds of the contest; single columns take part in all of them."""
    lone: int
    """Lone columns in a row, before the wide products and after them."""
    widths: Mapping[int, range]
    """Columns of a matrix, and the rounds in which it takes part."""
    block_rounds: int
    hessian: float
    """Gradients per product, at most."""
    gain: float
    """Times faster than curvlinops, at least, for one column."""
    gain_many: float
    """The same for many columns."""
    compiled: bool = False
    """Whether the Hessian is the one that a session has after a minute of work."""


CASES = {
    "mlp": Case(
        "mlp",
        {"widths": [784, 1024, 1024, 10]},
        batch_size=128,
        batches=4,
        rounds=6,
        lone=4,
        widths={8: range(6), 32: range(4)},
        block_rounds=5,
        hessian=1.9,
        gain=2,
        gain_many=1.15,
    ),
    "resnet18": Case(
        "resnet18",
        {},
        batch_size=8,
        batches=2,
        rounds=4,
        lone=1,
        widths={8: range(2)},
        block_rounds=1,
        hessian=2.1,
        gain=1.6,
        gain_many=1.6,
    ),
    "gpt": Case(
        "gpt",
        {"vocabulary": 1024, "context": 64, "layers": 8, "width": 320, "heads": 5},
        batch_size=2,
        batches=4,
        rounds=4,
        lone=1,
        widths={8: range(4), 32: range(1, 2)},
        block_rounds=1,
        hessian=1.9,
        gain=2,
        gain_many=1.5,
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
    """A model with its data, as everybody gets them."""

    case: Case
    module: nn.Module
    data: list[tuple[Tensor, Tensor]]
    problem: Problem

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())

    @property
    def layers(self) -> tuple[int, ...]:
        """Block sizes with one block per layer (a transformer layer is one)."""
        owners = []
        for name in self.problem.layout.names:
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

    def gradient(self) -> None:
        """One gradient of the whole objective, the unit of the table."""
        for x, y in self.data:
            loss = TokenLoss()(self.module(x), y)
            torch.autograd.grad(loss, self.parameters)

    def columns(self) -> Tensor:
        """As many columns as the widest product has; narrower ones take the first."""
        generator = torch.Generator().manual_seed(1)
        count = max(self.case.widths, default=1)
        return torch.randn(count, self.problem.layout.size, generator=generator)


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
    data = DatasetSpec(inputs=("x",), target="y", batch_size=case.batch_size)
    loss = LossSpec(name="cross_entropy")
    problem = Problem.load(module, {}, {"x": x, "y": y}, data, loss)
    pairs = list(zip(x.split(case.batch_size), y.split(case.batch_size), strict=True))
    return Contest(case, module, pairs, problem)
