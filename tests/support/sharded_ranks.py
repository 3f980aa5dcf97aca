"""Processes that share a model's parameters; `together` starts them, a function in each."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import torch
from support.forked import Forked
from support.zoo import ANIMALS, REFUSED, Animal
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from curvd.contract.enums import Dtype
from curvd.contract.specs import DatasetSpec, LossSpec, OperatorSpec
from curvd.errors import CurvatureUnverified
from curvd_server.engine import use_differentiable_attention
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.on_shards import build_in_step
from curvd_server.engine.operator import Operator
from curvd_server.engine.sharding import (
    Broken,
    Cutter,
    Group,
    Shards,
    gather,
    in_step,
    scatter,
    sharded,
    whole_layout,
)
from curvd_server.engine.tuning import Choice, Plan
from curvd_server.engine.verification import Evidence

VOCABULARY, WIDTH, LENGTH, POINTS, BATCH = 11, 8, 5, 8, 2


class Transformer(nn.Module):
    """Tied embeddings, two encoder layers, a causal mask."""

    def __init__(self, width: int = WIDTH, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) / 10)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2, 4 * width, dropout=0.0, activation="gelu", batch_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=self.places.dtype)
        x = self.tokens(tokens) + self.places
        for layer in self.layers:
            x = layer(x, src_mask=mask.triu(1))
        return self.head(self.norm(x))


GROUP: list[Group] = []
"""That of this process."""


def problem_of(
    points: range, width: int = WIDTH, layers: int = 2, cut: Cutter | None = None
) -> Problem:
    """Some data points, and the normaliser of all of them."""
    torch.manual_seed(0)
    module = Transformer(width, layers).double()
    every = torch.randint(VOCABULARY, (POINTS, LENGTH + 1))
    mine = every[points.start : points.stop]
    problem = Problem.load(
        module,
        {},
        {"x": mine[:, :-1], "y": mine[:, 1:]},
        DatasetSpec(inputs=("x",), target="y", batch_size=BATCH),
        LossSpec(name="cross_entropy"),
        dtype=Dtype.FLOAT64,
        first=points.start,
        held=cut,
    )
    return problem.normalised(float(POINTS * LENGTH))


def shared(points: range, width: int = WIDTH, layers: int = 2) -> Problem:
    """The same on this process' shards, in two steps."""
    cut = Cutter(GROUP[0])
    problem = problem_of(points, width, layers, cut)
    return sharded(in_step(problem, problem.batches, 2), cut)


def even(rank: int) -> range:
    """Half of the data points."""
    return range(rank * POINTS // 2, (rank + 1) * POINTS // 2)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def column(size: int) -> Tensor:
    """The vector that is multiplied."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def truth(kind: str, points: range = range(POINTS)) -> Tensor:
    """``H v``, ``G v`` or the gradient by eager torch, on data in one process."""
    use_differentiable_attention()
    problem = problem_of(points)
    sizes = [p.numel() for p in problem.parameters]
    v = [
        t.reshape(p.shape)
        for t, p in zip(
            column(sum(sizes)).split(sizes), problem.parameters, strict=True
        )
    ]
    total = torch.zeros(sum(sizes), dtype=torch.float64)
    for batch in problem.data:
        leaves = [p.detach().requires_grad_() for p in problem.parameters]
        if kind != "ggn":
            loss = problem.objective(leaves, batch)
            rows = torch.autograd.grad(loss, leaves, create_graph=True)
            if kind == "hessian":
                rows = torch.autograd.grad(rows, leaves, v)
        else:
            z = problem.outputs(leaves, batch)
            u = torch.zeros_like(z, requires_grad=True)
            back = torch.autograd.grad(z, leaves, u, create_graph=True)
            (pushed,) = torch.autograd.grad(back, u, v)
            fixed = z.detach()
            middle = torch.func.jvp(
                torch.func.grad(lambda o, b=batch: problem.batch_loss(o, b)),
                (fixed,),
                (pushed,),
            )[1]
            z = problem.outputs(leaves, batch)
            rows = torch.autograd.grad(z, leaves, middle)
        total += flat(rows).detach()
    return total


def operator_of(problem: Problem, kind: str) -> Operator:
    """The engine's operator on shards, as it is."""
    choice = Choice(Plan("double_backward"), Evidence(0.0, 0.0, ()))
    return Operator(problem, OperatorSpec(kind=kind), choice, budget_bytes=1 << 30)


def products(rank: int, world: int) -> dict[str, Any]:
    """Products of the Hessian and of the GGN, twice each, and a gradient."""
    return products_on(shared(even(rank)))


def uneven(rank: int, world: int) -> dict[str, Any]:
    """The same where one process has a mini-batch for the second step, and one none."""
    points = range(2) if rank else range(2, 6)
    return products_on(shared(points))


def products_on(problem: Problem) -> dict[str, Any]:
    """Products of a problem on shards, put together."""
    mine = own_columns(problem)
    told: dict[str, Any] = {
        "elements": sum(p.numel() for p in problem.parameters),
        "of": whole_layout(problem).size,
    }
    for kind in ("hessian", "ggn"):
        operator = operator_of(problem, kind)
        for attempt in ("first", "kept"):
            row = operator.apply(mine[None])[0]
            told[f"{kind} {attempt}"] = together_of(problem, row).tolist()
    _, gradient = problem.gradient()
    told["gradient"] = together_of(problem, gradient).tolist()
    return told


def held(rank: int, world: int) -> dict[str, float]:
    """What a process holds between two products, in units of all parameters.

    Whole tensors that were gathered are watched; the rest is what the operator keeps.
    """
    gathered: list[StorageWeakRef] = []
    original = Shards.gathered

    def watched(self: Shards, shard: Tensor) -> Tensor:
        whole = original(self, shard)
        gathered.append(StorageWeakRef(whole.untyped_storage()))
        return whole

    problem = shared(even(rank), width=768)
    nbytes = 8 * whole_layout(problem).size
    Shards.gathered = watched
    try:
        operator = operator_of(problem, "hessian")
        for _ in range(2):
            operator.apply(torch.ones(1, problem.layout.size, dtype=torch.float64))
    finally:
        Shards.gathered = original
    shards = sum(p.nbytes for p in problem.parameters)
    report = operator.report
    return {
        "whole": nbytes,
        "shards": shards / nbytes,
        "kept": report.kept_bytes / nbytes,
        "kept_batches": report.kept_batches,
        "gathered": len(gathered),
        "alive": sum(not ref.expired() for ref in gathered),
    }


def derivatives(rank: int, world: int) -> list[bool]:
    """Gather and scatter against what they are, in both modes."""
    torch.manual_seed(3)
    cut = Shards(torch.Size((3, 5)), GROUP[0])
    shards = torch.randn(world, cut.length, dtype=torch.float64)
    wholes = torch.randn(world, 3, 5, dtype=torch.float64)

    def dense(all_shards: Tensor) -> Tensor:
        return all_shards.reshape(-1)[:15].view(3, 5)

    own = shards[rank].clone().requires_grad_()
    whole = gather(own, cut)
    right = [torch.equal(whole, dense(shards))]
    back = torch.autograd.grad(whole, own, wholes[rank], create_graph=True)[0]
    total = torch.zeros(world * cut.length, dtype=torch.float64)
    total[:15] = wholes.sum(0).reshape(-1)
    right.append(torch.allclose(back, total.view(world, -1)[rank]))
    x = wholes[rank].clone().requires_grad_()
    part = scatter(x, cut)
    right.append(torch.allclose(part, total.view(world, -1)[rank]))
    (pulled,) = torch.autograd.grad(part, x, shards[rank])
    right.append(torch.allclose(pulled, dense(shards)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(shards[rank], shards[rank] * 2)
        made = torch.autograd.forward_ad.unpack_dual(gather(dual, cut))
        right.append(torch.allclose(made.tangent, 2 * dense(shards)))
        dual = torch.autograd.forward_ad.make_dual(wholes[rank], wholes[rank] * 2)
        made = torch.autograd.forward_ad.unpack_dual(scatter(dual, cut))
        right.append(torch.allclose(made.tangent, 2 * total.view(world, -1)[rank]))
    return right


def animal_problem(animal: Animal, points: slice, cut: Cutter | None) -> Problem:
    """Some of an animal's data, in mini-batches of three."""
    torch.manual_seed(0)
    data = {name: t[points] for name, t in animal.arrays().items()}
    problem = Problem.load(
        animal.module(),
        {},
        data,
        DatasetSpec(inputs=("x",), target="y", batch_size=3),
        animal.loss,
        animal.mode,
        Dtype.FLOAT64,
        first=points.start,
        held=cut,
    )
    return problem.normalised(7.0)


def zoo(rank: int, world: int) -> dict[str, Any]:
    """How far each animal's products are from those on whole parameters; or why not."""
    found: dict[str, Any] = {}
    for animal in (*ANIMALS, REFUSED):
        cut = Cutter(GROUP[0])
        half = slice(3 * rank, 3 * rank + 3)
        problem = sharded(in_step(animal_problem(animal, half, cut), 1, 1), cut)
        try:
            operator = build_in_step(problem, OperatorSpec(), budget_bytes=1 << 20)
        except CurvatureUnverified as error:
            found[animal.name] = error.metadata["parameters"]
            continue
        whole = animal_problem(animal, slice(0, 6), None)
        want = operator_of(whole, "hessian").apply(column(whole.layout.size)[None])[0]
        rows = operator.apply(own_columns(problem)[None])[0]
        gap = (together_of(problem, rows) - want).norm() / want.norm()
        found[animal.name] = float(gap)
    return found


def own_columns(problem: Problem) -> Tensor:
    """This process' slice of `column`."""
    layout, group = whole_layout(problem), GROUP[0]
    v = column(layout.size).split([p.size for p in layout.parameters])
    pairs = zip(layout.parameters, v, strict=True)
    return flat([Shards(torch.Size(p.shape), group).cut(t) for p, t in pairs])


def together_of(problem: Problem, rows: Tensor) -> Tensor:
    """A vector of which each process has its slice."""
    layout, group = whole_layout(problem), GROUP[0]
    cuts = [Shards(torch.Size(p.shape), group) for p in layout.parameters]
    pieces = rows.split([c.length for c in cuts])
    return flat([c.gathered(t) for c, t in zip(cuts, pieces, strict=True)])


def strayed(rank: int, world: int) -> str:
    """What is said when one process gathers another tensor of the same size."""
    group = GROUP[0]
    cut = Shards(torch.Size((4,)), group, index=rank)
    cut.gathered(torch.ones(2))
    try:
        group.meet()
    except Broken as error:
        return str(error)
    return ""


def everything(rank: int, world: int) -> dict[str, Any]:
    """What each function says; processes are slow to start."""
    functions = (derivatives, uneven, products, zoo, held, strayed)
    return {f.__name__: f(rank, world) for f in functions}


PROGRAM = """
import warnings
warnings.simplefilter("error", FutureWarning)
from support.sharded_ranks import main
main()
"""


def together(directory: Any, world: int = 2) -> list[Any]:
    """Run `everything` in some processes; what each returned, by rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OUT": str(directory)}
    errors = [directory / f"{rank}.err" for rank in range(world)]
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                Forked(
                    PROGRAM,
                    *(directory / "store", world, rank),
                    stderr=errors[rank],
                    environment=environment,
                )
            )
            for rank in range(world)
        ]
        for rank in range(world):
            assert ranks[rank].wait() == 0, errors[rank].read_text()[-3000:]
    return [
        json.loads((directory / f"{rank}.json").read_text()) for rank in range(world)
    ]


def main() -> None:
    """Be one rank."""
    store, world, rank = sys.argv[1:]
    use_differentiable_attention()
    GROUP.append(Group(int(rank), int(world)))
    GROUP[0].join(store, torch.device("cpu"))
    with open(f"{os.environ['OUT']}/{rank}.json", "w") as file:
        json.dump(everything(int(rank), int(world)), file)
    os._exit(0)  # gloo's threads do not always let a process end by itself
