"""An objective of a fleet at one version of its parameters, as the front sees it.

Beside the device, which knows models and how data is cut: what is made of an objective once it
is loaded, new versions of it and operators on it, is asked of the workers that have its shards,
and is on all of them or on none.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from curvd.contract import OperatorSpec, ParameterLayout, PlanReport, Tier
from curvd_server.device.factored import FactoredOperator
from curvd_server.device.protocols import Array, Counted
from curvd_server.device.torch_problem import TorchProblem
from curvd_server.fleet import messages
from curvd_server.fleet.fleet import Fleet
from curvd_server.fleet.operator import FleetOperator, added
from curvd_server.fleet.seats import OperatorEntry, ProblemEntry, Request
from curvd_server.system import Poll, given_up

if TYPE_CHECKING:
    from curvd_server.fleet.device import FleetDevice

Arrays = Mapping[str, Array]


class FleetProblem:
    """An objective at one version of its parameters, in shards.

    Args:
        device: Where it was loaded.
        entry: How it is made.
        loaded: What the first worker said of it.
        counted: Weight of the targets that count, of each shard.
    """

    def __init__(
        self,
        device: FleetDevice,
        entry: ProblemEntry,
        loaded: messages.Loaded,
        counted: tuple[float, ...],
    ) -> None:
        self._device, self.entry, self._loaded = device, entry, loaded
        self._counted = counted
        self.fleet = device.fleet
        self._local: TorchProblem | None = None
        forget = messages.Close(problems=(entry.number,))
        weakref.finalize(self, self.fleet.forget, forget).atexit = False

    @property
    def layout(self) -> ParameterLayout:
        """What a vector of length P means."""
        return self._loaded.layout

    @property
    def batches(self) -> int:
        """Mini-batches per pass over the data."""
        return self.entry.load.parts[-1].stop

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its products."""
        return np.dtype(self._loaded.dtype)

    @property
    def lead(self) -> tuple[int, int]:
        """The shard that plans are decided on, the first that counts, and its worker."""
        part = next(index for index, weight in enumerate(self._counted) if weight > 0)
        ranks = self.entry.deal.items()
        rank = next(r for r, parts in ranks if part in {p.index for p in parts})
        return part, rank

    def with_parameters(self, values: Arrays) -> FleetProblem:
        """Make a new version on all workers, beside this one, which stays valid.

        Args:
            values: Parameters and buffers by name; what this objective does not use is
                passed over.

        Returns:
            The new version; if a worker refuses it, none has it.
        """
        used = {*self._loaded.used}
        new = {n: v for n, v in values.items() if n in used}
        move = messages.Move(
            problem=self.fleet.next_number(),
            old=self.entry.number,
            state=tuple(new),
        )
        request = Request(move, tuple(new.values()))
        requests = dict.fromkeys(self.entry.deal, request)
        return self._at(move.problem, self.state | new, requests)

    def sharing(self, other: FleetProblem) -> FleetProblem:
        """Take the parameters of the same model on other data, in the same memory.

        A worker that has no share of the other data, or is started anew, has them in
        memory of its own.
        """
        number, old = self.fleet.next_number(), self.entry.number
        share = Request(
            messages.Share(problem=number, old=old, like=other.entry.number)
        )
        state = other.state
        move = Request(
            messages.Move(problem=number, old=old, state=tuple(state)),
            tuple(state.values()),
        )
        requests = {
            rank: share if rank in other.entry.deal else move
            for rank in self.entry.deal
        }
        return self._at(number, state, requests)

    @property
    def state(self) -> dict[str, Array]:
        """All that it was made of, by name."""
        return dict(zip(self.entry.load.state, self.entry.state, strict=True))

    def _at(
        self, number: int, state: Arrays, requests: Mapping[int, Request]
    ) -> FleetProblem:
        """Make another version on all workers, or on none.

        Args:
            number: Of the version.
            state: All that it is made of.
            requests: What makes it on each worker.
        """
        load = replace(self.entry.load, problem=number, state=tuple(state))
        entry = replace(
            self.entry, number=number, load=load, state=tuple(state.values())
        )
        with forgotten_on_error(self.fleet, messages.Close(problems=(number,))):
            self.fleet.all(
                requests,
                cancelled=given_up,
                register=lambda: self.fleet.registry.add_problem(entry),
            )
        return self._device.made(entry, self._loaded, self._counted)

    def gradient(self, *, cancelled: Poll) -> tuple[float, Array]:
        """Compute the loss and its gradient [P]."""
        request = Request(messages.Gradient(problem=self.entry.number))
        frames = self.fleet.all(
            dict.fromkeys(self.entry.deal, request), cancelled=cancelled
        )
        answers = [frames[rank].message for rank in sorted(frames)]
        losses = [
            loss
            for answer in answers
            if isinstance(answer, messages.Gradients)
            for loss in answer.losses
        ]
        return sum(losses), added(frames)

    def check(self, *, cancelled: Poll) -> None:
        """Compute a gradient of all data, and find out whether it is that of the loss."""
        part, _ = self.lead
        request = Request(messages.Check(problem=self.entry.number, part=part))
        self.fleet.all(dict.fromkeys(self.entry.deal, request), cancelled=cancelled)

    def points(
        self,
        compute: Callable[[Callable[[Poll], Any]], Any],
        *,
        limit: int | None,
        expired: Callable[[], bool],
    ) -> Counted:
        """Name its data points as what a query is about: they are gone through here."""
        return self._here().points(compute, limit=limit, expired=expired)

    def _here(self) -> TorchProblem:
        """Load all of it on the front, for what is no sum over shards."""
        if self._local is None:
            load = self.entry.load
            self._local = self._device.front.load(
                load.model,
                self.state,
                dict(zip(load.arrays, self.entry.arrays, strict=True)),
                load.data,
                load.loss,
                load.mode,
                load.dtype,
                load.params,
            )
        return self._local

    def build(
        self,
        spec: OperatorSpec,
        *,
        budget_bytes: int,
        cancelled: Poll,
        tier: Tier = Tier.FINAL,
    ) -> FleetOperator | FactoredOperator:
        """Verify an operator on one shard, and build it on all; see `Problem.build`.

        A product of sums over all data, as Kronecker factors are, is made on the front.
        """
        if spec.kind.is_factored:
            return self._here().factored(spec, budget_bytes, cancelled)
        decided = self._decided(spec, budget_bytes, tier, cancelled)
        return self._built(spec, budget_bytes, decided, cancelled)

    def improve(
        self, operator: FleetOperator, *, budget_bytes: int, cancelled: Poll
    ) -> FleetOperator:
        """Make the last tier of an operator; see `Problem.improve` of the protocols."""
        spec = operator.spec
        decided = self._decided(spec, budget_bytes, Tier.FINAL, cancelled)
        operator.relax()
        final = self._built(spec, budget_bytes, decided, cancelled)
        final.spent_s = operator.spent_s
        return final

    def choose_again(
        self, operator: FleetOperator, *, budget_bytes: int, cancelled: Poll
    ) -> FleetOperator | None:
        """Keep the plan; see `FleetOperator.is_in_doubt`."""
        return None

    def move(
        self, operator: FleetOperator | FactoredOperator
    ) -> FleetOperator | FactoredOperator:
        """Make another version's operator for this one; nothing is computed yet."""
        if isinstance(operator, FactoredOperator):
            return self._here().refactored(operator)
        number, spec = self.fleet.next_number(), operator.spec
        entry = replace(
            operator.entry,
            build=replace(
                operator.entry.build, operator=number, problem=self.entry.number
            ),
        )
        follow = messages.Follow(
            operator=number,
            old=operator.entry.build.operator,
            problem=self.entry.number,
        )
        with forgotten_on_error(self.fleet, messages.Close(operators=(number,))):
            self.fleet.all(
                dict.fromkeys(entry.ranks, Request(follow)),
                cancelled=given_up,
                register=lambda: self.fleet.registry.add_operator(entry),
            )
        moved = self.made(spec, entry, operator.report, mixes=operator.mixes)
        moved.spent_s = operator.spent_s
        return moved

    def _decided(
        self, spec: OperatorSpec, budget_bytes: int, tier: Tier, cancelled: Poll
    ) -> messages.Decided:
        """Have the lead's worker verify an operator and choose a plan, or recall one."""
        (part, rank), number = self.lead, self.entry.number
        recall = messages.Recall(problem=number, part=part, spec=spec)
        key = self.fleet.all({rank: Request(recall)}, cancelled=cancelled)[rank].message
        assert isinstance(key, messages.Key)
        known = self._device.plans.get(key.key, "")
        decide = messages.Decide(
            problem=number,
            part=part,
            spec=spec,
            budget_bytes=self._budgets(budget_bytes)[str(part)],
            tier=tier,
            plans={key.key: known} if known else {},
        )
        frames = self.fleet.all({rank: Request(decide)}, cancelled=cancelled)
        decided = frames[rank].message
        assert isinstance(decided, messages.Decided)
        for name, plan in decided.plans.items():
            if plan != known:
                self._device.plans[name] = plan
        return decided

    def _built(
        self,
        spec: OperatorSpec,
        budget_bytes: int,
        decided: messages.Decided,
        cancelled: Poll,
    ) -> FleetOperator:
        number = self.fleet.next_number()
        build = messages.Build(
            operator=number,
            problem=self.entry.number,
            spec=replace(spec, scale=1.0, damping=0.0),
            budget_bytes=self._budgets(budget_bytes),
            choice=decided.choice,
            verified=decided.verified,
        )
        entry = OperatorEntry(build=build, ranks=frozenset(self.entry.deal))
        with forgotten_on_error(self.fleet, messages.Close(operators=(number,))):
            frames = self.fleet.all(
                dict.fromkeys(self.entry.deal, Request(build)),
                cancelled=cancelled,
                register=lambda: self.fleet.registry.add_operator(entry),
            )
        answers = [frames[rank].message for rank in sorted(frames)]
        built = [a for a in answers if isinstance(a, messages.Built)]
        mixes = all(each.mixes for each in built)
        return self.made(spec, entry, report_of(built), mixes=mixes)

    def made(
        self,
        spec: OperatorSpec,
        entry: OperatorEntry,
        report: PlanReport,
        *,
        mixes: bool,
    ) -> FleetOperator:
        """Make the front's side of an operator; arguments are those of its class."""
        return FleetOperator(self, spec, entry, report, mixes=mixes)

    def _budgets(self, budget_bytes: int) -> dict[str, int]:
        """Share memory among shards, by their mini-batches."""
        return {
            str(part.index): budget_bytes * (part.stop - part.start) // self.batches
            for part in self.entry.load.parts
        }


def report_of(built: Sequence[messages.Built]) -> PlanReport:
    """Put the reports of all shards together.

    Args:
        built: What each worker said, by rank.

    Returns:
        One report: times are those of the slowest worker, memory is that of all.
    """
    reports = [report for each in built for report in each.reports]
    kept = sum(report.kept_batches for report in reports)
    total = sum(report.batches for report in reports)
    kind = "kept" if kept == total else "partly_kept" if kept else "recomputed"
    first = reports[0]
    plain = first.mode.removeprefix("partly_")
    mode = f"{kind}_{plain.removeprefix('kept_').removeprefix('recomputed_')}"
    return replace(
        first,
        mode=mode,
        columns_at_once=min(report.columns_at_once for report in reports),
        batches=total,
        kept_batches=kept,
        kept_bytes=sum(report.kept_bytes for report in reports),
        seconds_per_product=max(
            sum(report.seconds_per_product for report in each.reports) for each in built
        ),
        peak_bytes=sum(max(r.peak_bytes for r in each.reports) for each in built),
    )


@contextlib.contextmanager
def forgotten_on_error(fleet: Fleet, close: messages.Close) -> Iterator[None]:
    """Have all workers drop what some of them may have made when others could not.

    Args:
        fleet: The workers.
        close: What they drop if an error is raised inside.

    Yields:
        Nothing.
    """
    try:
        yield
    except BaseException:
        fleet.forget(close)
        raise
