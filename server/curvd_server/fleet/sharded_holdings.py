"""What a worker holds that shares the parameters of every model with the others.

What all compute at once runs in step: the front sends it to all of them, one command after
the other, and each goes through its own mini-batches with its own shards. Whoever fails
leaves the group, which the others notice at once, and the front brings all together again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from curvd.errors import Cancelled
from curvd_server.device.torch_device import TorchDevice
from curvd_server.device.torch_problem import as_tensors
from curvd_server.engine import check_gradient
from curvd_server.engine.on_shards import build_in_step, made_anew
from curvd_server.engine.operator import Operator
from curvd_server.engine.sharding import (
    Cutter,
    Group,
    held_bytes,
    in_step,
    moved,
    sharded,
    used_names,
    whole_layout,
)
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Array
from curvd_server.fleet.holdings import Held, Holdings, Said
from curvd_server.system import Poll


class ShardedHoldings(Holdings):
    """Answers commands, some of them in step with the other workers.

    Args:
        device: Where the worker computes.
        idle_bytes: Memory of results that is kept for the next ones.
        rank: Of this worker.
        world: How many share the parameters.
    """

    in_step = frozenset({
        messages.Try,
        messages.BuildInStep,
        messages.Product,
        messages.Gradient,
        messages.Check,
    })

    def __init__(
        self, device: TorchDevice, idle_bytes: int, rank: int, world: int
    ) -> None:
        super().__init__(device, idle_bytes)
        self._group = Group(rank, world)
        self._methods |= {
            messages.Join: self._join,
            messages.Try: self._try,
            messages.BuildInStep: self._build_in_step,
            messages.MakeAnew: self._make_anew,
        }
        for kind in (messages.Recall, messages.Decide, messages.Build):
            del self._methods[kind]

    def alive(self) -> messages.Alive:
        """Say how much of parameters is here; on any thread."""
        held = {id(h.whole.parameters): held_bytes(h.whole) for h in self._all()}
        return messages.Alive(
            parameter_bytes=sum(held.values()),
            whole_bytes=self._group.most_whole_bytes,
        )

    def _all(self) -> list[Held]:
        return list(self._problems.values())

    def _join(self, m: messages.Join, arrays: list[Array], cancelled: Poll) -> Said:
        # What is cached decides what is sent, and some may have cached more than others.
        for operator in self._operators.values():
            for part in operator.values():
                part.close()
        self._group.join(m.place, torch.device(self.device.name))
        return messages.Done(), ()

    def _load(self, m: messages.Load, arrays: list[Array], cancelled: Poll) -> Said:
        state = dict(zip(m.state, arrays, strict=False))
        data = dict(zip(m.arrays, arrays[len(m.state) :], strict=True))
        cut, (part,) = Cutter(self._group), m.parts
        loaded = self.device.objective(
            m.model,
            state,
            data,
            m.data,
            m.loss,
            m.mode,
            m.dtype,
            params=m.params,
            first=part.start * m.data.batch_size,
            held=cut,
        )
        own = part.stop - part.start
        counted = loaded.counted() if own else 0.0
        whole = sharded(in_step(loaded, own, m.steps), cut)
        self._problems[m.problem] = Held(whole, m.parts)
        if m.counted is not None:
            self._normalised(m.problem, m.counted)
        return messages.Loaded(
            layout=whole_layout(whole),
            used=used_names(whole),
            dtype=str(whole.result_dtype).removeprefix("torch."),
            counted=(counted,),
        ), ()

    def _move(self, m: messages.Move, arrays: list[Array], cancelled: Poll) -> Said:
        old = self._problem(m.old)
        used = used_names(old.whole)
        given = zip(m.state, arrays, strict=True)
        values = as_tensors({name: a for name, a in given if name in used})
        self._problems[m.problem] = Held(moved(old.whole, values), old.shards)
        return messages.Done(), ()

    def _try(self, m: messages.Try, arrays: list[Array], cancelled: Poll) -> Said:
        problem = self._problem(m.problem).whole

        def work(cancelled: Poll) -> Said:
            problem.check_targets()
            return messages.Done(), ()

        return self._together(work, cancelled)

    def _build_in_step(
        self, m: messages.BuildInStep, arrays: list[Array], cancelled: Poll
    ) -> Said:
        problem = self._problem(m.problem).whole

        def work(cancelled: Poll) -> Said:
            operator = build_in_step(
                problem,
                m.spec,
                budget_bytes=m.budget_bytes,
                results=self._results,
                cancelled=cancelled,
            )
            self._operators[m.operator] = {self._group.rank: operator}
            return messages.BuiltInStep(
                choice=operator.choice, report=operator.report, sizes=operator.sizes
            ), ()

        return self._together(work, cancelled)

    def _make_anew(
        self, m: messages.MakeAnew, arrays: list[Array], cancelled: Poll
    ) -> Said:
        if m.operator in self._operators:
            return messages.Done(), ()  # it was built here, and is warm
        operator = made_anew(
            self._problem(m.problem).whole,
            m.spec,
            m.choice,
            budget_bytes=m.budget_bytes,
            sizes=m.sizes,
            results=self._results,
        )
        self._operators[m.operator] = {self._group.rank: operator}
        return messages.Done(), ()

    def _follow(self, m: messages.Follow, arrays: list[Array], cancelled: Poll) -> Said:
        here = self._problem(m.problem).whole
        made = {rank: old.at(here) for rank, old in self._operator(m.old).items()}
        self._operators[m.operator] = made
        return messages.Done(), ()

    def _product(
        self, m: messages.Product, arrays: list[Array], cancelled: Poll
    ) -> Said:
        operator, (columns,) = self._one(m.operator), arrays

        def work(cancelled: Poll) -> Said:
            rows = operator.apply(columns, counts=m.counts, cancelled=cancelled)
            return messages.Arrived(), [rows.cpu().numpy()]

        return self._together(work, cancelled)

    def _gradient(
        self, m: messages.Gradient, arrays: list[Array], cancelled: Poll
    ) -> Said:
        problem = self._problem(m.problem).whole

        def work(cancelled: Poll) -> Said:
            loss, row = problem.gradient(cancelled=cancelled)
            return messages.Gradients(losses=(loss,)), [row.cpu().numpy()]

        return self._together(work, cancelled)

    def _check(self, m: messages.Check, arrays: list[Array], cancelled: Poll) -> Said:
        problem = self._problem(m.problem).whole

        def work(cancelled: Poll) -> Said:
            check_gradient(problem, cancelled)
            return messages.Done(), ()

        return self._together(work, cancelled)

    def _one(self, number: int) -> Operator:
        (operator,) = self._operator(number).values()
        return operator

    def _together(self, work: Callable[[Poll], Said], cancelled: Poll) -> Said:
        """Run what all workers run now, and find out that they did the same.

        Args:
            work: Called with a poll that says the same to all.
            cancelled: Whether this one was told to stop.

        Returns:
            What it returns.

        Raises:
            Broken: If others have left, or done something else.
        """
        try:
            said = work(lambda: self._group.anyone(cancelled()))
            self._group.meet()
        except Cancelled:
            raise  # all have stopped at the same place
        except BaseException:
            self._group.leave()
            raise
        return said
