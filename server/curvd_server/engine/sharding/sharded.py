"""A model whose parameters are this process' shards, as the engine's problem of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvd.contract import ParameterLayout
from curvd.errors import InvalidSpec
from curvd_server.engine.made_anew import Alive, MadeAnew
from curvd_server.engine.objective import (
    Array,
    Batch,
    Company,
    Problem,
    on_host,
    streamed_as,
)
from curvd_server.engine.objective.model import Model
from curvd_server.engine.sharding.collectives import Shards, gather
from curvd_server.engine.sharding.group import Group


@dataclass(frozen=True, slots=True)
class ShardedModel(Model):
    """A model that gathers each parameter where it uses it."""

    group: Group = field(kw_only=True)
    """The processes that have the shards."""
    cuts: Mapping[str, Shards] = field(default_factory=dict)
    """How each parameter is cut, by name."""
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    """Shards of those that are not differentiated."""
    gathered: list[Alive] = field(default_factory=list, compare=False, repr=False)
    """What the graphs that are being built have gathered; the innermost last."""
    latest: dict[int, int] = field(default_factory=dict, compare=False, repr=False)
    """What the latest of them keeps; see `Model.kept`."""

    @property
    def company(self) -> Company:
        """Who computes it; see `Model`."""
        return self.group

    def __call__(self, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        """Run the model on shards; see `Model`."""

        def use(index: int, name: str, shard: Tensor) -> Tensor:
            whole = gather(shard, self.cuts[name])
            if self.gathered:
                self.gathered[-1].note(index, whole)
            return whole

        state = dict(self.constants)
        for index, (name, shard) in enumerate(self._held(parameters)):
            state[name] = MadeAnew(
                functools.partial(use, index, name, shard),
                self.cuts[name].shape,
                shard.dtype,
                shard.device,
            )
        if self.gathered or not torch.is_grad_enabled():
            return self.run(state, batch)
        with self._regathering(parameters):
            return self.run(state, batch)

    def restricted(
        self, names: Sequence[str], others: Mapping[str, Tensor]
    ) -> ShardedModel:
        """Differentiate fewer parameters; see `Model`."""
        return dataclasses.replace(
            self,
            names=tuple(names),
            frozen={**self.frozen, **others},
            fixed=tuple(f for f in self.fixed if f[0] in names),
        )

    def exactly(self, constants: Mapping[str, Tensor]) -> ShardedModel:
        """Take constants in float64 on the CPU; see `Model`."""
        frozen = {n: t.to("cpu", torch.float64) for n, t in self.frozen.items()}
        return dataclasses.replace(self, constants=constants, frozen=frozen)

    @contextlib.contextmanager
    def recording(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Build a graph that keeps shards, and gathers them again; see `Model`."""
        with self._regathering(parameters) as alive:
            yield
        self.latest.clear()
        self.latest.update(alive.kept)

    @contextlib.contextmanager
    def _regathering(self, parameters: Sequence[Tensor]) -> Iterator[Alive]:
        """Have graphs that are built inside gather again what they need backwards."""
        held = self._held(parameters)

        def again(index: int) -> Tensor:
            name, shard = held[index]
            return self.cuts[name].gathered(shard.detach())

        alive = Alive(again)
        self.gathered.append(alive)
        try:
            with alive.hooks():
                yield alive
        finally:
            self.gathered.pop()

    def kept(self) -> dict[int, int]:
        """Count what is kept that is no parameter; see `Model`."""
        return dict(self.latest)

    def _held(self, parameters: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """List all shards by name."""
        return [*zip(self.names, parameters, strict=True), *self.frozen.items()]


class Cutter:
    """Cuts parameters as they are loaded, and remembers how; for `Problem.load`.

    Args:
        group: The processes that have the shards.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.shards: dict[str, Shards] = {}
        """By name."""

    def __call__(self, name: str, whole: Array) -> Tensor:
        """Copy this process' shard of a parameter."""
        shape = torch.Size(whole.shape)
        shards = Shards(shape, self.group, len(self.shards))
        self.shards[name] = shards
        return shards.cut(whole)


def sharded(problem: Problem, cut: Cutter) -> Problem:
    """Make a problem of shards one whose model gathers them; nothing is computed.

    The result is a problem like others, whose parameters and columns are shards, flat and
    filled up with zeros. Double backward linearises it (forward modes would need rules for
    `torch.func`, and a traced program has no place for collectives).

    Args:
        problem: Loaded with `cut`; this process' mini-batches, as many as the others have,
            with the normaliser of the data of all processes.
        cut: Has cut its parameters.

    Returns:
        The problem on shards. It shares data and constants.
    """
    model = problem.model
    own = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    frozen = {n: own["constants"][n] for n in cut.shards if n not in model.names}
    changes = {
        "programs": {},
        "constants": {n: t for n, t in own["constants"].items() if n not in frozen},
        "fixed": tuple(
            (name, at)
            for name, row in model.fixed
            for at in cut.shards[name].elements(row)
        ),
    }
    made = ShardedModel(
        **own | changes, group=cut.group, cuts=cut.shards, frozen=frozen
    )
    return dataclasses.replace(problem, model=made)


def in_step(problem: Problem, own: int, steps: int) -> Problem:
    """Give a process as many mini-batches as the others have.

    Args:
        problem: Its mini-batches, at least one.
        own: How many of them count.
        steps: How many all have.

    Returns:
        The problem; further mini-batches are its first one, and count nothing.
    """
    data = list(on_host(problem.data))
    silent = dataclasses.replace(data[0], silent=True)
    data = [*data[:own], *[silent] * (steps - own)]
    return dataclasses.replace(problem, data=streamed_as(problem.data, data))


def whole_layout(problem: Problem) -> ParameterLayout:
    """Say what vectors of whole parameters mean.

    Args:
        problem: From `sharded`.
    """
    cuts = _model(problem).cuts
    return ParameterLayout.of({n: tuple(cuts[n].shape) for n in problem.layout.names})


def moved(problem: Problem, values: Mapping[str, Array]) -> Problem:
    """Make a new version of a problem on shards.

    Args:
        problem: From `sharded`; it stays valid.
        values: Whole parameters and constants by name.

    Returns:
        The version, with this process' shards of them.

    Raises:
        InvalidSpec: If a name is unknown or a shape differs.
    """
    model = _model(problem)
    frozen, rest = dict(model.frozen), dict[str, Array]()
    for name, value in values.items():
        cut = model.cuts.get(name)
        if cut is None:
            rest[name] = value
            continue
        if tuple(value.shape) != tuple(cut.shape):
            msg = (
                f"parameter {name!r}: got shape {tuple(value.shape)}, want "
                f"{tuple(cut.shape)}"
            )
            raise InvalidSpec(msg, parameter=name)
        shard = cut.cut(value)
        if name in frozen:
            frozen[name] = shard.to(frozen[name])
        else:
            rest[name] = shard
    made = problem.with_parameters(rest)
    return dataclasses.replace(
        made, model=dataclasses.replace(_model(made), frozen=frozen)
    )


def used_names(problem: Problem) -> tuple[str, ...]:
    """Name the parameters and constants that a problem depends on.

    Args:
        problem: From `sharded`.
    """
    model = _model(problem)
    return (*problem.layout.names, *model.constants, *model.frozen)


def held_bytes(problem: Problem) -> int:
    """Count the memory of this process' shards."""
    shards = (*problem.parameters, *_model(problem).frozen.values())
    return sum(shard.nbytes for shard in shards)


def _model(problem: Problem) -> ShardedModel:
    assert isinstance(problem.model, ShardedModel)
    return problem.model
