"""A model whose parameters are this process' shards, as the engine's problem of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from curvd.contract import ParameterLayout
from curvd.errors import InvalidSpec
from curvd_server.engine.made_anew import Alive, MadeAnew
from curvd_server.engine.objective import Batch, Problem
from curvd_server.engine.objective.model import Model
from curvd_server.engine.sharding.collectives import Shards, gather


@dataclass(frozen=True, slots=True)
class ShardedModel(Model):
    """A model that gathers each parameter where it uses it."""

    shards: tuple[Shards, ...] = ()
    """How each parameter is cut."""
    gathered: list[Alive] = field(default_factory=list, compare=False, repr=False)
    """What the graphs that are being built have gathered; the innermost last."""
    latest: dict[int, int] = field(default_factory=dict, compare=False, repr=False)
    """What the latest of them keeps; see `Model.kept`."""

    def __call__(self, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        """Run the model on shards; see `Model`."""

        def use(index: int) -> Tensor:
            whole = gather(parameters[index], self.shards[index])
            if self.gathered:
                self.gathered[-1].note(index, whole)
            return whole

        wholes = [
            MadeAnew(functools.partial(use, i), s.shape, shard.dtype, shard.device)
            for i, (s, shard) in enumerate(zip(self.shards, parameters, strict=True))
        ]
        return Model.__call__(self, wholes, batch)

    @contextlib.contextmanager
    def recording(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Build a graph that keeps shards, and gathers them again; see `Model`."""
        alive = Alive(
            lambda index: self.shards[index].gathered(parameters[index].detach())
        )
        self.gathered.append(alive)
        try:
            with alive.hooks():
                yield
        finally:
            self.gathered.pop()
            self.latest.clear()
            self.latest.update(alive.kept)

    def kept(self) -> dict[int, int]:
        """Count what is kept that is no parameter; see `Model`."""
        return dict(self.latest)


def sharded(problem: Problem) -> Problem:
    """Keep this process' shards of a problem's parameters; a collective.

    The result is a problem like others, whose parameters and columns are shards, flat and
    filled up with zeros. Double backward linearises it (forward modes would need rules for
    `torch.func`, and a traced program has no place for collectives).

    Args:
        problem: This process' mini-batches, at the whole parameters, with the normaliser
            of the data of all processes. Its tensors may be freed afterwards.

    Returns:
        The problem on shards. It shares data and constants.

    Raises:
        InvalidSpec: If the processes have not equally many mini-batches, or not the same
            parameters: they would wait for each other for ever.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    _check_alike(problem, world)
    model, names = problem.model, problem.layout.names
    shards = tuple(Shards(p.shape, world) for p in problem.parameters)
    own = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    cut = zip(shards, problem.parameters, strict=True)
    return dataclasses.replace(
        problem,
        model=ShardedModel(**own | {"programs": {}}, shards=shards),
        layout=ParameterLayout.of({
            name: (s.length,) for name, s in zip(names, shards, strict=True)
        }),
        parameters=tuple(s.cut(p, rank) for s, p in cut),
    )


def _check_alike(problem: Problem, world: int) -> None:
    """Refuse what would not run in lockstep."""
    mine = torch.tensor([problem.batches, problem.layout.size, len(problem.parameters)])
    every = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(every, mine)
    found = [each.tolist() for each in every]
    if any(each != found[0] for each in found):
        batches, sizes = [n for n, *_ in found], [p for _, p, _ in found]
        msg = (
            f"processes that share parameters need equally many mini-batches of one model, "
            f"got {batches} mini-batches and {sizes} parameters by rank; cut the data evenly"
        )
        raise InvalidSpec(msg, batches=batches, sizes=sizes)
