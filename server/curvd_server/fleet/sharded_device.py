"""A fleet whose workers share the parameters of every model, behind the device protocol.

Each worker has a slice of every parameter, of every vector that is multiplied and of every
result, and its share of the data. What is no product, and algorithms, are as for any fleet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from curvd.contract import (
    DatasetSpec,
    Dtype,
    LossSpec,
    Mode,
    ModelSpec,
    OperatorSpec,
    PlanReport,
    Tier,
    WorkerInfo,
)
from curvd_server.device.factored import FactoredOperator
from curvd_server.device.protocols import Array
from curvd_server.device.torch_device import TorchDevice
from curvd_server.engine import Memory, check_finite_gradient
from curvd_server.fleet import messages
from curvd_server.fleet.device import FleetDevice
from curvd_server.fleet.fleet import Fleet
from curvd_server.fleet.in_step import InStep
from curvd_server.fleet.operator import FleetOperator
from curvd_server.fleet.problem import FleetProblem, forgotten_on_error
from curvd_server.fleet.seats import OperatorEntry, ProblemEntry, Request
from curvd_server.fleet.shards import one_each
from curvd_server.fleet.slices import Slices
from curvd_server.system import Poll, given_up


class ShardedDevice(FleetDevice):
    """Loads objectives onto workers, a slice of each parameter onto each.

    Args:
        fleet: The workers, two at least.
        front: The front's own device, on which models are tried, and queries about data
            points run.
        plans: Plans of earlier operators.
    """

    def __init__(self, fleet: Fleet, front: TorchDevice, plans: Memory) -> None:
        super().__init__(fleet, front, plans, shards=len(fleet.seats))
        self.in_step = InStep(fleet)

    def workers(self) -> tuple[tuple[WorkerInfo, ...], int]:
        """Describe the workers by rank, and count how often one became ready."""
        return self.fleet.describe(dict.fromkeys(self.in_step.ranks, 1))

    def load(
        self,
        model: ModelSpec,
        state: Mapping[str, Array],
        arrays: Mapping[str, Array],
        data: DatasetSpec,
        loss: LossSpec,
        mode: Mode,
        dtype: Dtype,
        params: tuple[str, ...] = (),
    ) -> ShardedProblem:
        """Bring a model, a dataset and a loss together; see `FleetDevice.load`."""
        batches = -(-len(arrays[data.target]) // data.batch_size)
        deal = one_each(batches, self.shards)
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
            parts=tuple(part for (part,) in deal.values()),
            counted=None,
            steps=max(part.stop - part.start for (part,) in deal.values()),
        )
        entry = ProblemEntry(
            number=number,
            root=number,
            load=load,
            state=tuple(state.values()),
            arrays=tuple(arrays[name] for name in data.names),
            deal=deal,
        )
        problem = self.made(*self.brought(entry))
        with forgotten_on_error(self.fleet, messages.Close(problems=(number,))):
            self.in_step.ask(
                self.in_step.same(messages.Try(problem=number)), cancelled=given_up
            )
        return problem

    def made(
        self,
        entry: ProblemEntry,
        loaded: messages.Loaded,
        counted: tuple[float, ...],
    ) -> ShardedProblem:
        """Make the front's side of a problem; see `FleetDevice`."""
        return ShardedProblem(self, entry, loaded, counted)


class ShardedProblem(FleetProblem):
    """An objective at one version of its parameters, which are in slices."""

    _device: ShardedDevice

    def gradient(self, *, cancelled: Poll) -> tuple[float, Array]:
        """Compute the loss and its gradient [P]."""
        step = self._device.in_step
        frames = step.ask(
            step.same(messages.Gradient(problem=self.entry.number)), cancelled=cancelled
        )
        answers = [frames[rank].message for rank in sorted(frames)]
        losses = [
            loss
            for answer in answers
            if isinstance(answer, messages.Gradients)
            for loss in answer.losses
        ]
        slices = Slices(self.layout, len(step.ranks))
        rows = {rank: frame.arrays[0][None] for rank, frame in frames.items()}
        loss, gradient = sum(losses), slices.whole(rows)[0]
        check_finite_gradient(loss, torch.from_numpy(gradient))
        return loss, gradient

    def check(self, *, cancelled: Poll) -> None:
        """Compute a gradient of all data, and find out whether it is that of the loss."""
        step = self._device.in_step
        check = messages.Check(problem=self.entry.number, part=0)
        step.ask(step.same(check), cancelled=cancelled)

    def build(
        self,
        spec: OperatorSpec,
        *,
        budget_bytes: int,
        cancelled: Poll,
        tier: Tier = Tier.FINAL,
    ) -> FleetOperator | FactoredOperator:
        """Verify an operator and build it, on all workers in step; it has one tier.

        A product of sums over all data, as Kronecker factors are, is made on the front.
        """
        if spec.kind.is_factored:
            return self._here().factored(spec, budget_bytes, cancelled)
        step, number = self._device.in_step, self.fleet.next_number()
        plain = replace(spec, scale=1.0, damping=0.0)
        each = budget_bytes // len(step.ranks)
        build = messages.BuildInStep(
            operator=number, problem=self.entry.number, spec=plain, budget_bytes=each
        )
        with forgotten_on_error(self.fleet, messages.Close(operators=(number,))):
            frames = step.ask(step.same(build), cancelled=cancelled)
            answers = [frames[rank].message for rank in step.ranks]
            built = [a for a in answers if isinstance(a, messages.BuiltInStep)]
            anew = messages.MakeAnew(
                operator=number,
                problem=self.entry.number,
                spec=plain,
                budget_bytes=each,
                choice=built[0].choice,
                sizes=built[0].sizes,
            )
            entry = OperatorEntry(build=anew, ranks=frozenset(step.ranks))
            # Who was lost meanwhile makes it when this is known, or by this.
            self.fleet.all(
                step.same(anew),
                cancelled=given_up,
                register=lambda: self.fleet.registry.add_operator(entry),
            )
        report = _report_of([each.report for each in built], self.batches)
        return self.made(spec, entry, report, mixes=True)

    def improve(
        self, operator: FleetOperator, *, budget_bytes: int, cancelled: Poll
    ) -> FleetOperator:
        """Keep the operator, whose first tier is its last one."""
        return operator

    def made(
        self,
        spec: OperatorSpec,
        entry: OperatorEntry,
        report: PlanReport,
        *,
        mixes: bool,
    ) -> ShardedOperator:
        """Make the front's side of an operator; see `FleetProblem`."""
        return ShardedOperator(
            self, spec, entry, report, mixes=mixes, step=self._device.in_step
        )


class ShardedOperator(FleetOperator):
    """An operator whose workers multiply slices; arguments are those, and `step`."""

    def __init__(
        self,
        problem: FleetProblem,
        spec: OperatorSpec,
        entry: OperatorEntry,
        report: PlanReport,
        *,
        mixes: bool,
        step: InStep,
    ) -> None:
        super().__init__(problem, spec, entry, report, mixes=mixes)
        self._step = step
        self._slices = Slices(self._layout, len(step.ranks))

    def rows(self, V: Array, counts: tuple[int, ...], cancelled: Poll) -> Array:
        """Multiply columns; see `FleetOperator`."""
        product = messages.Product(operator=self.entry.build.operator, counts=counts)
        requests = {
            rank: Request(product, (self._slices.of(V, rank),))
            for rank in self._step.ranks
        }
        frames = self._step.ask(requests, cancelled=cancelled)
        return self._slices.whole({r: f.arrays[0] for r, f in frames.items()})


def _report_of(reports: list[PlanReport], batches: int) -> PlanReport:
    """Put the reports of all workers together.

    Args:
        reports: By rank; all keep the same of equally many mini-batches.
        batches: Of all data.

    Returns:
        One report: times are those of the slowest worker, memory is that of all.
    """
    first = reports[0]
    keeps_all = first.kept_batches == first.batches
    kept = batches if keeps_all else min(batches, first.kept_batches * len(reports))
    return replace(
        first,
        batches=batches,
        kept_batches=kept,
        kept_bytes=sum(report.kept_bytes for report in reports),
        seconds_per_product=max(report.seconds_per_product for report in reports),
        peak_bytes=sum(report.peak_bytes for report in reports),
        difference_gap=float(np.max([report.difference_gap for report in reports])),
    )
