"""The truth about a linearisation: finite differences, symmetry and repeatability.

An AD mode is trusted only after it reproduced central differences of the gradient, in
float64, on an excerpt of the session's own data. Two precautions keep the reference
meaningful (it is the formulas that are verified, and they do not depend on the point):

* the parameters are moved a little, so that no ReLU sits exactly on its kink and no
  layer initialised with zeros hides the rows of the layers before it;
* several step widths are tried and the best one counts per parameter, because with
  millions of ReLUs only a tiny step crosses no kink, while a larger one rounds less.

A model may fill the machine, so little is held at once (`HELD`): the parameters of the
excerpt move in place, random directions are made anew wherever they are needed, and a
difference quotient is accumulated where backward passes leave the gradient.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from curvd.contract import OperatorSpec, Stage
from curvd.errors import InvalidSpec, OutOfMemory
from curvd_server.engine.objective import Problem, distance, norm
from curvd_server.engine.operators import Linearisation, block_ranges
from curvd_server.engine.verification.comparison import linearised, product, relative
from curvd_server.engine.verification.determinism import check_objective
from curvd_server.engine.verification.finite_differences import (
    Direction,
    FiniteDifferences,
    filled,
    scale_of,
)
from curvd_server.system import advance, enter_stage, is_out_of_memory

STEPS = (1e-6, 1e-5, 1e-7, 1e-8, 1e-9, 1e-4)
"""Step widths relative to the parameters' scale, the usually best first."""
EXCELLENT, TOLERANCE = 1e-7, 1e-4
"""Gap at which no further step is tried, and above which a mode is refused.

A correct mode reaches 1e-9; the wrong ones known to us are off by 1e-2 and more.
"""
WIDER = (1e-3, 1e-2, 0.1)
"""Steps for a loss that is so large beside its slope that differences over the others are lost
in its rounding."""
SHRUNK = (1.0, 0.1, 0.01)
"""Where modes are compared: at the session's parameters, and where products there are too
small, as a confident classifier's, nearer to zero: it is formulas that are compared."""
ROUNDING = 1e-7
"""Size of products, relative to those of cotangents of one, of which differences of gradients
have no four digits in float64: their rounding is 2e-16 over a step of 1e-4."""
KEPT_BYTES = 64 << 20
"""Difference quotients up to here are kept for the next mode."""
HELD = 3
"""Float64 vectors of all parameters that an examination holds at once, on the host.

The parameters themselves; and a direction and its product, or a product and the
difference quotient that it is compared with. Vectorised products, which are chosen for
small models only, need three more.
"""


@dataclass(frozen=True, slots=True)
class Slopes:
    """A loss's slope along a direction, twice."""

    difference: float
    """By central differences of the loss."""
    gradient: float
    """The gradient's share of the direction."""
    loss: float
    """The loss itself."""
    rounding: float
    """What its rounding is of a difference, over the widest of `STEPS`."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """How far a mode is from the truth."""

    symmetry_gap: float
    difference_gap: float
    wrong: tuple[str, ...]
    """Parameters whose rows disagree; empty if the mode is right."""
    failure: str = ""
    """What torch said if the mode could not run at all."""
    out_of_memory: bool = False
    """Whether that was for want of memory."""
    is_rounding: bool = False
    """Whether the rows that disagree are too small to be told from rounding."""
    projections: int = 0
    """By how many projections rows were compared; 0: entry by entry."""

    @property
    def ok(self) -> bool:
        """Whether the mode may be used."""
        return not (self.wrong or self.failure)


class Reference:
    """The reference for one problem and operator.

    Modes are compared with the same differences, so these are made once: they are kept
    between two examinations as far as they are small (`KEPT_BYTES`).

    Args:
        problem: The objective.
        spec: The operator.

    Raises:
        OutOfMemory: If the host cannot hold what an examination takes.
    """

    def __init__(self, problem: Problem, spec: OperatorSpec) -> None:
        _check_host_memory(problem)
        self._problem, self._spec = problem, spec
        scales = tuple(map(scale_of, problem.parameters))
        names = problem.layout.names
        fixed = tuple((names.index(name), row) for name, row in problem.model.fixed)
        self._company = problem.model.company
        # Parts of one direction differ, or an exchange of parts would go unseen.
        first = 3 * self._company.rank
        self._perturbation, *self._directions = (
            Direction(first + k, scales, fixed) for k in range(3)
        )
        for direction in (self._perturbation, *self._directions):
            direction.keep(problem.parameters)
        self._found: dict[tuple[str, bool], Evidence] = {}
        self._quotients: dict[tuple[float, float], list[Tensor]] = {}
        self._keeps = 8 * len(STEPS) * problem.layout.size <= KEPT_BYTES

    def examine(self, mode: str, *, batched: bool) -> Evidence:
        """Compare a mode with the truth.

        Args:
            mode: Name in `MODES`.
            batched: Whether to examine its vectorised product.

        Returns:
            The gaps and the parameters that disagree.
        """
        key = mode, batched
        if key not in self._found:
            evidence = tried(lambda: self._examine(mode, batched=batched))
            if evidence.out_of_memory:  # there may be more the next time
                return evidence
            self._found[key] = evidence
        return self._found[key]

    def is_sum_over_data(self) -> bool:
        """Tell whether the gradient is the sum of the data points' own gradients."""
        try:
            return max(relative(*self._differences().beyond_the_sum())) <= TOLERANCE
        except (ValueError, InvalidSpec):  # of statistics that one data point has not
            return False

    def slopes(self) -> Slopes:
        """Give the loss's slope along a random direction twice, as alike as they get."""
        return slopes(self._differences().slopes)

    def _differences(self, shrink: float = 1.0) -> FiniteDifferences:
        return FiniteDifferences(
            self._problem, self._perturbation, self._directions[0], shrink
        )

    def check_objective(self) -> None:
        """Evaluate loss and gradient twice; see `determinism.check_objective`."""
        check_objective(self._problem)

    def check_gradients(self, cancelled: Callable[[], bool]) -> None:
        """Compute a gradient of all data.

        Args:
            cancelled: Polled between mini-batches.
        """
        self._problem.gradient(cancelled=cancelled)

    def _examine(self, mode: str, *, batched: bool) -> Evidence:
        detail = f"{mode}, vectorised" if batched else mode
        for shrink in SHRUNK:
            enter_stage(Stage.VERIFYING, detail, total=1 + len(STEPS))
            evidence = self._examined_at(shrink, mode, batched=batched)
            if not evidence.is_rounding:
                break
        return evidence

    def _examined_at(self, shrink: float, mode: str, *, batched: bool) -> Evidence:
        """Examine a mode at parameters that are so many times the session's."""
        differences = self._differences(shrink)
        small = differences.problem
        linear = linearised(mode, small, self._spec, small.data[0])
        crossed = [
            name
            for block in self._probed_blocks()
            for name in self._wrong_in_block(small, linear, block)
        ]
        first, symmetry = self._products(small, linear, batched=batched)
        del linear  # what it keeps belongs to the parameters before they move
        advance()
        gaps = self._difference_gaps(differences, first, shrink)
        names = self._problem.layout.names
        wrong = [n for n, gap in zip(names, gaps, strict=True) if not gap <= TOLERANCE]
        if not wrong and not symmetry <= TOLERANCE:
            wrong = [names[gaps.index(max(gaps))]]
        evidence = Evidence(symmetry, max(gaps), tuple(dict.fromkeys(wrong + crossed)))
        if evidence.ok or crossed:
            return evidence
        at = [i for i, name in enumerate(names) if name in wrong]
        units = self._company.norms([*map(norm, differences.unit_gradient())])
        sizes = self._company.norms([*map(norm, first)])
        is_rounding = all(sizes[i] <= ROUNDING * units[i] for i in at)
        return replace(evidence, is_rounding=is_rounding)

    def _products(
        self, small: Problem, linear: Linearisation, *, batched: bool
    ) -> tuple[list[Tensor], float]:
        """Multiply both directions.

        Returns:
            The first one's product, and ``|w.Av - v.Aw|`` relative to what a random
            ``w`` would give.
        """
        v, w = self._directions
        like, whole = small.parameters, range(len(small.parameters))
        if batched:
            stacked = [
                torch.stack(pair)
                for pair in zip(v.tensors(like), w.tensors(like), strict=True)
            ]
            both = product(linear, stacked, whole, batched=True)
            del stacked
            first, second = (
                filled([r if r is None else r[k] for r in both], like) for k in (0, 1)
            )
            right = v.dot(second)
        else:
            right = v.dot(
                filled(product(linear, w.tensors(like), whole, batched=False), like)
            )
            rows = product(linear, v.tensors(like), whole, batched=False)
            first = filled(rows, like)
        left = w.dot(first)
        squares = sum(s**2 * p.numel() for s, p in zip(w.scales, like, strict=True))
        elements: float = sum(p.numel() for p in like)
        left, right, squares, elements = self._company.total([
            left,
            right,
            squares,
            elements,
        ])
        (size,) = self._company.norms([math.hypot(*map(norm, first))])
        typical = size * math.sqrt(squares / elements)
        return first, abs(left - right) / max(abs(left), abs(right), typical, 1e-300)

    def _difference_gaps(
        self, differences: FiniteDifferences, rows: Sequence[Tensor], shrink: float
    ) -> list[float]:
        """Best relative error per parameter over the step widths."""
        best = [math.inf] * len(rows)
        for step in STEPS:
            gaps = self._gaps(rows, self._quotient(differences, step, shrink))
            best = [min(b, g) for b, g in zip(best, gaps, strict=True)]
            advance()
            if max(best) <= EXCELLENT:
                break
        return best

    def _quotient(
        self, differences: FiniteDifferences, step: float, shrink: float
    ) -> list[Tensor]:
        key = step, shrink
        if key in self._quotients:
            return self._quotients[key]
        quotient = differences.quotient(self._spec, step)
        if self._keeps:
            self._quotients[key] = quotient
        return quotient

    def _probed_blocks(self) -> list[range]:
        """Choose the first, a middle and the last block of a block-diagonal operator."""
        blocks = block_ranges(self._spec, len(self._problem.parameters))
        if len(blocks) == 1:
            return []
        return [blocks[i] for i in sorted({0, len(blocks) // 2, len(blocks) - 1})]

    def _wrong_in_block(
        self, small: Problem, linear: Linearisation, block: range
    ) -> list[str]:
        """Compare a block's product with the whole operator's on that block alone."""
        like, cut = small.parameters, slice(block.start, block.stop)
        tangents = self._directions[0].tensors(like)
        for index, tangent in enumerate(tangents):
            if index not in block:
                tangent.zero_()
        full = product(linear, tangents, range(len(like)), batched=False)
        want = filled(full[cut], like[cut])
        del full
        got = filled(product(linear, tangents[cut], block, batched=False), like[cut])
        names = self._problem.layout.names[cut]
        gaps = self._gaps(got, want)
        return [n for n, gap in zip(names, gaps, strict=True) if not gap <= TOLERANCE]

    def _gaps(self, got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
        """Relative error per parameter."""
        found = self._company.norms([*map(distance, got, want), *map(norm, want)])
        return relative(found[: len(got)], found[len(got) :])


def slopes(at: Callable[[float], tuple[float, float, float]]) -> Slopes:
    """Choose the step at which the difference of a loss is most like its gradient.

    Args:
        at: Takes a step; returns the loss ahead and behind, and the gradient's share.

    Returns:
        What was found there.
    """
    best, gap, rounding = Slopes(math.inf, 0.0, math.nan, math.inf), math.inf, math.inf
    for step in (*STEPS, *WIDER):
        is_wide = step in WIDER
        if is_wide and not rounding > TOLERANCE * abs(best.gradient):
            break
        ahead, behind, share = at(step)
        loss, difference = (ahead + behind) / 2, (ahead - behind) / (2 * step)
        found = abs(difference - share) / max(abs(difference), abs(share), 1e-300)
        if not is_wide:
            rounding = min(rounding, sys.float_info.epsilon * abs(loss) / step)
        if not found >= gap and (not is_wide or found <= 10 * TOLERANCE):
            best, gap = Slopes(difference, share, loss, rounding), found
        if gap <= TOLERANCE:
            break
    return replace(best, rounding=rounding)


def tried(examine: Callable[[], Evidence]) -> Evidence:
    """Examine a mode, which fails in whatever way torch says "not implemented".

    Args:
        examine: Compares it.

    Returns:
        The evidence, that of a failure included.
    """
    try:
        return examine()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        said = f"{error}".split("\n")[0][:300]
        short = is_out_of_memory(error)
        return Evidence(math.inf, math.inf, (), said, out_of_memory=short)


def whole_bytes(problem: Problem) -> int:
    """Count what an examination takes on the host: float64 vectors, and constants."""
    frozen = sum(t.numel() for t in problem.model.constants.values())
    return 8 * (HELD * problem.layout.size + frozen)


def _check_host_memory(problem: Problem) -> None:
    """Refuse what the kernel would end the process for."""
    needed = whole_bytes(problem)
    available = psutil.virtual_memory().available
    if needed > available:
        msg = (
            f"verifying an operator on {problem.layout.size} parameters takes {needed} "
            f"bytes on the host ({HELD} float64 vectors), which has {available} "
            "available; choose fewer parameters with params, or free memory"
        )
        raise OutOfMemory(msg, needed_bytes=needed, available_bytes=available)
