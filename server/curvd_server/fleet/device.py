"""A fleet behind the device protocol: the server's middle sees one device.

Products are computed where the shards are, and partial products are added on the front, in
the order of shards (`problem`, `operator`). Algorithms run on the workers, with products of
the fleet (`spread`); what is about single data points runs on the front. Everything belongs to
whoever has the device's turn.
"""

from __future__ import annotations

from dataclasses import replace

from curvd.contract import (
    DatasetSpec,
    DeviceInfo,
    Dtype,
    LossSpec,
    Mode,
    ModelSpec,
    SerializedGraph,
    WorkerInfo,
)
from curvd.errors import InvalidSpec
from curvd_server.device.torch_device import TorchDevice
from curvd_server.engine import Memory
from curvd_server.fleet import messages
from curvd_server.fleet.fleet import Fleet
from curvd_server.fleet.problem import Arrays, FleetProblem, forgotten_on_error
from curvd_server.fleet.seats import ProblemEntry, Request
from curvd_server.fleet.shards import cut, deal
from curvd_server.storage import Architecture
from curvd_server.system import given_up


class FleetDevice:
    """Loads objectives onto workers.

    Args:
        fleet: The workers.
        front: The front's own device, on which models are tried, and queries about data
            points run.
        plans: Plans of earlier operators.
        shards: Into how many shards data is cut; 0: as many as there are workers.
    """

    def __init__(
        self, fleet: Fleet, front: TorchDevice, plans: Memory, *, shards: int
    ) -> None:
        self.fleet, self.front, self.plans = fleet, front, plans
        self.shards = shards or len(fleet.seats)

    @property
    def name(self) -> str:
        """Names of the workers' devices, for example ``cuda:0,cuda:1``."""
        return ",".join(seat.device for seat in self.fleet.seats)

    @property
    def builders(self) -> tuple[str, ...]:
        """Names of the builders that are allowed, and globs over those of libraries."""
        return self.front.builders

    @property
    def torch_version(self) -> str:
        """Of torch."""
        return self.front.torch_version

    def describe(self) -> DeviceInfo:
        """Describe the host's memory, under the names of the workers' devices."""
        return replace(self.front.describe(), name=self.name)

    def workers(self) -> tuple[tuple[WorkerInfo, ...], int]:
        """Describe the workers by rank, and count how often one became ready."""
        shares = deal(cut(self.shards, self.shards), len(self.fleet.seats))
        shards = {rank: len(parts) for rank, parts in shares.items()}
        return self.fleet.describe(shards)

    def architecture(self, spec: ModelSpec) -> Architecture:
        """Find out what a builder makes of a configuration; on any thread."""
        return self.front.architecture(spec)

    async def try_model(self, spec: ModelSpec) -> Architecture | None:
        """Find out what a builder or a graph makes; see `Device.try_model`."""
        return await self.front.try_model(spec)

    async def try_graphs(
        self, model: SerializedGraph, loss: SerializedGraph, *, rows: int
    ) -> Architecture | None:
        """Check what clients drew; see `Device.try_graphs`."""
        return await self.front.try_graphs(model, loss, rows=rows)

    def load(
        self,
        model: ModelSpec,
        state: Arrays,
        arrays: Arrays,
        data: DatasetSpec,
        loss: LossSpec,
        mode: Mode,
        dtype: Dtype,
        params: tuple[str, ...] = (),
    ) -> FleetProblem:
        """Bring a model, a dataset and a loss together on the workers.

        Args:
            model: Builder and configuration, or graph.
            state: Parameters and buffers by name.
            arrays: The dataset.
            data: How it becomes mini-batches.
            loss: The loss.
            mode: How BatchNorm behaves.
            dtype: The dtype of the computation.
            params: Globs that choose the parameters; none choose all.

        Returns:
            The objective.

        Raises:
            InvalidSpec: If they do not fit each other.
        """
        batches = -(-len(arrays[data.target]) // data.batch_size)
        parts = cut(batches, self.shards)
        number = self.fleet.next_number()
        load = messages.Load(
            problem=number,
            model=model,
            state=tuple(state),
            arrays=data.names,
            data=data,
            loss=loss,
            mode=mode,
            dtype=dtype,
            params=params,
            parts=parts,
            counted=None,
        )
        entry = ProblemEntry(
            number=number,
            root=number,
            load=load,
            state=tuple(state.values()),
            arrays=tuple(arrays[name] for name in data.names),
            deal=deal(parts, len(self.fleet.seats)),
        )
        return self.made(*self.brought(entry))

    def made(
        self,
        entry: ProblemEntry,
        loaded: messages.Loaded,
        counted: tuple[float, ...],
    ) -> FleetProblem:
        """Make the front's side of a problem; arguments are those of `FleetProblem`."""
        return FleetProblem(self, entry, loaded, counted)

    def brought(
        self, entry: ProblemEntry
    ) -> tuple[ProblemEntry, messages.Loaded, tuple[float, ...]]:
        """Load shards, and divide by the targets that count in all of them."""
        number, registry = entry.number, self.fleet.registry
        with forgotten_on_error(self.fleet, messages.Close(problems=(number,))):
            # A worker that is lost between the two steps is to find it in its place.
            frames = self.fleet.all(
                {rank: entry.request(rank) for rank in entry.deal},
                cancelled=given_up,
                register=lambda: registry.add_problem(entry),
            )
            answers = [frames[rank].message for rank in sorted(frames)]
            loaded = [a for a in answers if isinstance(a, messages.Loaded)]
            counted = tuple(weight for each in loaded for weight in each.counted)
            total = sum(counted)
            if not total > 0:
                msg = "no target counts: all have ignore_index or class weight zero"
                raise InvalidSpec(msg, counted=total)
            whole = replace(entry, load=replace(entry.load, counted=total))
            normalise = messages.Normalise(problem=number, counted=total)
            self.fleet.all(
                dict.fromkeys(entry.deal, Request(normalise)),
                cancelled=given_up,
                register=lambda: registry.add_problem(whole),
            )
        return whole, loaded[0], counted
