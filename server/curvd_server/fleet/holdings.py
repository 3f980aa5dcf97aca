"""What a worker holds: problems of its shards, and operators on them; a method per command.

It is the engine behind messages, as `TorchDevice` is the engine behind plain arrays. All
of it belongs to whoever has the worker's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from curvd.errors import CurvdError, Internal
from curvd.tensors import Pool
from curvd_server.device.torch_device import TorchDevice
from curvd_server.device.torch_problem import as_tensors
from curvd_server.device.translated import translated
from curvd_server.engine import Problem, check_gradient, finite_gradient, parts
from curvd_server.engine.operator import Operator
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Array
from curvd_server.fleet.messages import Answer, Part
from curvd_server.system import Poll

T = TypeVar("T")

Said = tuple[Answer, Sequence[Array]]
"""An answer, and the arrays beside it."""


@dataclass(frozen=True, slots=True)
class Held:
    """One version of an objective, as far as its data is here."""

    whole: Problem
    """All shards of this worker together; they share its parameters and data."""
    shards: tuple[Part, ...]

    @property
    def parts(self) -> dict[int, Problem]:
        """Each shard's share by index; the weight decay is in the very first one."""
        first = self.shards[0].start
        return {
            part.index: self.whole.part(
                range(part.start - first, part.stop - first),
                penalised=part.index == 0,
            )
            for part in self.shards
        }


class Holdings:
    """Answers commands.

    Args:
        device: Where the worker computes.
        idle_bytes: Memory of results that is kept for the next ones.
    """

    in_step: frozenset[type[Any]] = frozenset()
    """Commands that all workers work on at once, and stop at the same place."""

    def __init__(self, device: TorchDevice, idle_bytes: int) -> None:
        self.device, self._results = device, Pool(idle_bytes)
        self._problems: dict[int, Held] = {}
        self._operators: dict[int, dict[int, Operator]] = {}
        self._paces: dict[int, float] = {}
        self._methods: dict[type[Any], Callable[[Any, list[Array], Poll], Said]] = {
            messages.Load: self._load,
            messages.Normalise: self._normalise,
            messages.Move: self._move,
            messages.Share: self._share,
            messages.Recall: self._recall,
            messages.Decide: self._decide,
            messages.Build: self._build,
            messages.Follow: self._follow,
            messages.Relax: self._relax,
            messages.Close: self._close,
            messages.Product: self._product,
            messages.Gradient: self._gradient,
            messages.Check: self._check,
        }

    def answer(self, message: Any, arrays: list[Array], cancelled: Poll) -> Said:
        """Do what a command says.

        Args:
            message: The command.
            arrays: Those beside it.
            cancelled: Polled between mini-batches.

        Returns:
            The answer, and the arrays beside it.

        Raises:
            CurvdError: If it cannot be done.
        """
        method = self._methods.get(type(message))
        if method is None:
            msg = f"{type(message).__name__} is no command"
            raise Internal(msg)
        with translated():
            return method(message, arrays, cancelled)

    def alive(self) -> messages.Alive:
        """Say that the worker is not frozen; on any thread."""
        return messages.Alive()

    def expected_s(self, message: messages.Product, columns: int) -> float:
        """Guess how long a product takes: as long as it took before it was last moved.

        Args:
            message: The product.
            columns: K.

        Returns:
            Seconds; infinite if it was never computed.
        """
        return columns * self._paces.get(message.operator, float("inf"))

    def took(self, message: messages.Product, columns: int, seconds: float) -> None:
        """Take note of how long a product took."""
        if columns and message.operator in self._operators:
            self._paces[message.operator] = seconds / columns

    def _load(self, m: messages.Load, arrays: list[Array], cancelled: Poll) -> Said:
        state = dict(zip(m.state, arrays, strict=False))
        data = dict(zip(m.arrays, arrays[len(m.state) :], strict=True))
        whole = self.device.objective(
            m.model,
            state,
            data,
            m.data,
            m.loss,
            m.mode,
            m.dtype,
            params=m.params,
            first=m.parts[0].start * m.data.batch_size,
        )
        held = self._problems[m.problem] = Held(whole, m.parts)
        counted = tuple(part.counted() for part in held.parts.values())
        if m.counted is not None:
            self._normalised(m.problem, m.counted)
        used = (*whole.layout.names, *whole.model.constants)
        dtype = str(whole.result_dtype).removeprefix("torch.")
        return messages.Loaded(
            layout=whole.layout, used=used, dtype=dtype, counted=counted
        ), ()

    def _normalise(
        self, m: messages.Normalise, arrays: list[Array], cancelled: Poll
    ) -> Said:
        self._normalised(m.problem, m.counted)
        return messages.Done(), ()

    def _normalised(self, number: int, counted: float) -> None:
        held = self._problem(number)
        self._problems[number] = Held(held.whole.normalised(counted), held.shards)

    def _move(self, m: messages.Move, arrays: list[Array], cancelled: Poll) -> Said:
        old = self._problem(m.old)
        values = as_tensors(dict(zip(m.state, arrays, strict=True)))
        self._problems[m.problem] = Held(old.whole.with_parameters(values), old.shards)
        return messages.Done(), ()

    def _share(self, m: messages.Share, arrays: list[Array], cancelled: Poll) -> Said:
        old, like = self._problem(m.old), self._problem(m.like)
        self._problems[m.problem] = Held(old.whole.sharing(like.whole), old.shards)
        return messages.Done(), ()

    def _recall(self, m: messages.Recall, arrays: list[Array], cancelled: Poll) -> Said:
        part = self._problem(m.problem).parts[m.part]
        return messages.Key(key=parts.structure_of(part, m.spec)), ()

    def _decide(self, m: messages.Decide, arrays: list[Array], cancelled: Poll) -> Said:
        plans = dict(m.plans)
        choice, verified = parts.decide(
            self._problem(m.problem).parts[m.part],
            m.spec,
            budget_bytes=m.budget_bytes,
            memory=plans,
            tier=m.tier,
            cancelled=cancelled,
        )
        return messages.Decided(choice=choice, verified=verified, plans=plans), ()

    def _build(self, m: messages.Build, arrays: list[Array], cancelled: Poll) -> Said:
        built = {
            index: parts.follow(
                part,
                m.spec,
                m.choice,
                budget_bytes=m.budget_bytes[str(index)],
                verified=m.verified,
                results=self._results,
                cancelled=cancelled,
            )
            for index, part in self._problem(m.problem).parts.items()
        }
        self._operators[m.operator] = built
        reports = tuple(operator.report for operator in built.values())
        mixes = all(operator.mixes for operator in built.values())
        return messages.Built(reports=reports, mixes=mixes), ()

    def _follow(self, m: messages.Follow, arrays: list[Array], cancelled: Poll) -> Said:
        here = self._problem(m.problem).parts
        self._operators[m.operator] = {
            index: operator.at(here[index])
            for index, operator in self._operator(m.old).items()
        }
        return messages.Done(), ()

    def _relax(self, m: messages.Relax, arrays: list[Array], cancelled: Poll) -> Said:
        for operator in self._operator(m.operator).values():
            operator.close()
        return messages.Done(), ()

    def _close(self, m: messages.Close, arrays: list[Array], cancelled: Poll) -> Said:
        for number in m.operators:
            self._paces.pop(number, None)
            for operator in self._operators.pop(number, {}).values():
                operator.close()
        for number in m.problems:
            self._problems.pop(number, None)
        return messages.Done(), ()

    def _product(
        self, m: messages.Product, arrays: list[Array], cancelled: Poll
    ) -> Said:
        (columns,) = arrays
        rows = [
            operator.apply(columns, counts=m.counts, cancelled=cancelled)
            for operator in self._operator(m.operator).values()
        ]
        return messages.Arrived(), [row.cpu().numpy() for row in rows]

    def _gradient(
        self, m: messages.Gradient, arrays: list[Array], cancelled: Poll
    ) -> Said:
        here = self._problem(m.problem).parts.values()
        pairs = [finite_gradient(part, cancelled=cancelled) for part in here]
        losses = tuple(loss for loss, _ in pairs)
        return messages.Gradients(losses=losses), [
            row.cpu().numpy() for _, row in pairs
        ]

    def _check(self, m: messages.Check, arrays: list[Array], cancelled: Poll) -> Said:
        for index, part in self._problem(m.problem).parts.items():
            if index == m.part:
                check_gradient(part, cancelled)
            else:
                part.gradient(cancelled=cancelled)
        return messages.Done(), ()

    def _problem(self, number: int) -> Held:
        return _known(self._problems, number, "problem")

    def _operator(self, number: int) -> dict[int, Operator]:
        return _known(self._operators, number, "operator")


def _known(held: dict[int, T], number: int, what: str) -> T:
    try:
        return held[number]
    except KeyError:
        msg = f"this worker has no {what} {number}; it has {sorted(held)}"
        raise Internal(msg) from None


def refused(error: CurvdError) -> Said:
    """Answer with one of our errors."""
    values = {str(k): str(v) for k, v in error.metadata.items()}
    refusal = messages.Refused(reason=error.reason, message=str(error), values=values)
    return refusal, ()


def use_device(name: str) -> str:
    """Name a worker's device as torch does: all indices of the CPU are one."""
    kind = torch.device(name).type
    return kind if kind == "cpu" else name
