"""The truth about a linearisation: finite differences, symmetry and repeatability.

An AD mode is trusted only after it reproduced central differences of the gradient, in
float64, on an excerpt of the session's own data. Two precautions keep the reference
meaningful (it is the formulas that are verified, and they do not depend on the point):

* the parameters are moved a little, so that no ReLU sits exactly on its kink and no
  layer initialised with zeros hides the rows of the layers before it;
* several step widths are tried and the best one counts per parameter, because with
  millions of ReLUs only a tiny step crosses no kink, while a larger one rounds less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from curvd.types import OperatorKind, OperatorSpec
from curvd_server.curvature import MODES, block_ranges
from curvd_server.data import Batch, rows_of
from curvd_server.objective import Problem
from curvd_server.outputs import metric
from curvd_server.program import Rows
from curvd_server.streamed import on_host

STEPS = (1e-6, 1e-5, 1e-7, 1e-8, 1e-9, 1e-4)
"""Step widths relative to the parameters' scale, the usually best first."""
EXCELLENT, TOLERANCE = 1e-7, 1e-4
"""Gap at which no further step is tried, and above which a mode is refused.

A correct mode reaches 1e-9; the wrong ones known to us are off by 1e-2 and more.
"""
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.5}
"""How far two correct modes may differ in a session's own precision."""
EXCERPT_ROWS = 4


@dataclass(frozen=True, slots=True)
class Evidence:
    """How far a mode is from the truth."""

    symmetry_gap: float
    difference_gap: float
    wrong: tuple[str, ...]
    """Parameters whose rows disagree; empty if the mode is right."""
    failure: str = ""
    """What torch said if the mode could not run at all."""

    @property
    def ok(self) -> bool:
        """Whether the mode may be used."""
        return not (self.wrong or self.failure)


class Truth:
    """The reference for one problem and operator, evaluated once for all modes."""

    def __init__(self, problem: Problem, spec: OperatorSpec) -> None:
        excerpt = problem.excerpt(EXCERPT_ROWS)
        generator = torch.Generator().manual_seed(0)
        scales = [_scale(p) for p in excerpt.parameters]
        draw = [
            [
                s * _normal(p, generator)
                for s, p in zip(scales, excerpt.parameters, strict=True)
            ]
            for _ in range(3)
        ]
        for name, row in excerpt.model.fixed:
            for direction in draw:
                direction[excerpt.layout.names.index(name)][row] = 0.0
        self._problem = _moved(excerpt, draw[0], 0.03)
        self._spec = spec
        self._directions = draw[1:]

    def examine(self, mode: str, *, batched: bool) -> Evidence:
        """Compare a mode with the truth.

        Args:
            mode: Name in `MODES`.
            batched: Whether to examine its vectorised product.

        Returns:
            The gaps and the parameters that disagree.
        """
        # A mode fails in whatever way torch chooses to say "not implemented".
        try:
            return self._examine(mode, batched=batched)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            return Evidence(math.inf, math.inf, (), f"{error}".split("\n")[0][:300])

    def is_sum_over_data(self) -> bool:
        """Tell whether the gradient is the sum of the data points' own gradients."""
        problem, whole = self._problem, self._problem.data[0]
        if len(whole.targets) == 1:
            return True
        want = _gradient(problem)
        parts = (slice(0, 1), slice(1, None))
        rows = [
            _gradient(dataclasses.replace(problem, data=(rows_of(whole, part),)))
            for part in parts
        ]
        got = [a + b for a, b in zip(*rows, strict=True)]
        return max(_gaps(got, want)) <= TOLERANCE

    def _examine(self, mode: str, *, batched: bool) -> Evidence:
        linear = MODES[mode](self._problem, self._spec, self._problem.data[0])
        whole = range(len(self._problem.parameters))
        if batched:
            stacked = [
                torch.stack(pair) for pair in zip(*self._directions, strict=True)
            ]
            rows = self._filled(linear.product(stacked, whole, batched=True), 2)
            first, second = ([r[k] for r in rows] for k in (0, 1))
        else:
            first, second = (
                self._filled(linear.product(d, whole, batched=False))
                for d in self._directions
            )
        gaps = self._difference_gaps(first)
        symmetry = _asymmetry(self._directions, first, second)
        names = self._problem.layout.names
        wrong = [n for n, gap in zip(names, gaps, strict=True) if not gap <= TOLERANCE]
        if not wrong and not symmetry <= TOLERANCE:
            wrong = [names[gaps.index(max(gaps))]]
        for block in self._probed_blocks():
            wrong += self._examine_block(linear.product, block, first)
        return Evidence(symmetry, max(gaps), tuple(dict.fromkeys(wrong)))

    def _filled(self, rows: Rows, columns: int | None = None) -> list[Tensor]:
        lead = () if columns is None else (columns,)
        return [
            torch.zeros(*lead, *p.shape, dtype=p.dtype) if r is None else r
            for r, p in zip(rows, self._problem.parameters, strict=True)
        ]

    def _difference_gaps(self, rows: Sequence[Tensor]) -> list[float]:
        """Best relative error per parameter over the step widths."""
        best = [math.inf] * len(rows)
        for k in range(len(STEPS)):
            gaps = _gaps(rows, self._differences(k))
            best = [min(b, g) for b, g in zip(best, gaps, strict=True)]
            if max(best) <= EXCELLENT:
                break
        return best

    def _differences(self, step: int) -> list[Tensor]:
        if step not in self._known:
            self._known[step] = self._quotient(self._directions[0], STEPS[step])
        return self._known[step]

    @cached_property
    def _known(self) -> dict[int, list[Tensor]]:
        return {}

    def _quotient(self, direction: Sequence[Tensor], step: float) -> list[Tensor]:
        """Multiply `direction` by the operator without any second derivative."""
        ahead = _moved(self._problem, direction, step)
        behind = _moved(self._problem, direction, -step)
        if self._spec.kind is OperatorKind.HESSIAN:
            pairs = zip(_gradient(ahead), _gradient(behind), strict=True)
            return [(a - b) / (2 * step) for a, b in pairs]
        problem, batch = self._problem, self._problem.data[0]
        with torch.no_grad():
            z, za, zb = (
                p.outputs(p.parameters, batch) for p in (problem, ahead, behind)
            )
        pushed = metric(problem, self._spec, z, batch)((za - zb) / (2 * step))
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in problem.parameters]
            outputs = problem.outputs(leaves, batch)
            rows = torch.autograd.grad(outputs, leaves, pushed, allow_unused=True)
        return self._filled(list(rows))

    def _probed_blocks(self) -> list[range]:
        """Choose the first, a middle and the last block of a block-diagonal operator."""
        blocks = block_ranges(self._spec, len(self._problem.parameters))
        if len(blocks) == 1:
            return []
        return [blocks[i] for i in sorted({0, len(blocks) // 2, len(blocks) - 1})]

    def _examine_block(
        self,
        product: Callable[..., Rows],
        block: range,
        whole: Sequence[Tensor],
    ) -> list[str]:
        """Compare a block's product with the whole operator's on that block alone."""
        inside = self._directions[0][block.start : block.stop]
        masked = [
            d if i in block else torch.zeros_like(d)
            for i, d in enumerate(self._directions[0])
        ]
        full = product(masked, range(len(whole)), batched=False)
        want = self._filled(full)[block.start : block.stop]
        rows = product(inside, block, batched=False)
        got = [
            torch.zeros_like(w) if r is None else r
            for r, w in zip(rows, want, strict=True)
        ]
        names = self._problem.layout.names[block.start : block.stop]
        gaps = _gaps(got, want)
        return [n for n, gap in zip(names, gaps, strict=True) if not gap <= TOLERANCE]


def disagreements(
    problem: Problem, spec: OperatorSpec, mode: str, reference: str, *, batched: bool
) -> tuple[str, ...]:
    """Compare two modes in the session's own precision, shapes and blocks.

    The excerpt is small and in float64; a mode whose work depends on the shape of the
    mini-batch, or on the block, is also held against another one here.

    Args:
        problem: The objective.
        spec: The operator.
        mode: Name in `MODES` of the mode in question.
        reference: Of one that reproduced the truth.
        batched: Whether to examine the vectorised product.

    Returns:
        Names of the parameters whose rows disagree on some mini-batch.
    """
    tolerance = AGREEMENT[problem.dtype]
    generator = torch.Generator().manual_seed(4)
    tangents = [_normal(p, generator).mul_(_scale(p)).to(p) for p in problem.parameters]
    wrong: list[str] = []
    for batch in _one_of_each_shape(problem):
        ours = MODES[mode](problem, spec, batch)
        theirs = MODES[reference](problem, spec, batch)
        got: list[Tensor] = []
        want: list[Tensor] = []
        for block in block_ranges(spec, len(tangents)):
            inside = tangents[block.start : block.stop]
            want += _wide(theirs.product(inside, block, batched=False), inside)
            if batched:
                twice = [torch.stack((t, t)) for t in inside]
                rows = ours.product(twice, block, batched=True)
                got += _wide([r if r is None else r[1] for r in rows], inside)
            else:
                got += _wide(ours.product(inside, block, batched=False), inside)
        gaps = _gaps(got, want, floor=tolerance)
        names = problem.layout.names
        wrong += [n for n, g in zip(names, gaps, strict=True) if not g <= tolerance]
    return tuple(dict.fromkeys(wrong))


def _wide(rows: Rows, like: Sequence[Tensor]) -> list[Tensor]:
    pairs = zip(rows, like, strict=True)
    return [(torch.zeros_like(t) if r is None else r).double() for r, t in pairs]


def _one_of_each_shape(problem: Problem) -> list[Batch]:
    shapes = {
        tuple(t.shape for t in (*batch.inputs, batch.targets)): index
        for index, batch in enumerate(on_host(problem.data))
    }
    return [problem.data[index] for index in shapes.values()]


def _gradient(problem: Problem) -> list[Tensor]:
    _, rows = problem.batch_gradient(problem.data[0])
    return [
        torch.zeros_like(p) if r is None else r
        for r, p in zip(rows, problem.parameters, strict=True)
    ]


def _gaps(
    got: Sequence[Tensor], want: Sequence[Tensor], *, floor: float = 1e-6
) -> list[float]:
    """Relative error per parameter; rows far below the largest may be rounding."""
    norms = [float(w.norm()) for w in want]
    least = floor * math.hypot(*norms) + 1e-300
    triples = zip(got, want, norms, strict=True)
    return [float((g - w).norm()) / (n + least) for g, w, n in triples]


def _asymmetry(
    directions: Sequence[Sequence[Tensor]],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
) -> float:
    """``|w.Av - v.Aw|`` relative to what a random ``w`` would give."""
    v, w = directions
    left, right = _dot(w, first), _dot(v, second)
    elements = sum(t.numel() for t in w)
    typical = math.sqrt(_dot(w, w) * _dot(first, first) / elements)
    return abs(left - right) / max(abs(left), abs(right), typical, 1e-300)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def _moved(problem: Problem, direction: Sequence[Tensor], step: float) -> Problem:
    pairs = zip(problem.layout.names, problem.parameters, direction, strict=True)
    return problem.with_parameters({name: p + step * d for name, p, d in pairs})


def _scale(parameter: Tensor) -> float:
    """Give the typical size of a parameter's entries; not too small if all are zero."""
    if not parameter.numel():
        return 0.0
    return max(float(parameter.square().mean().sqrt()), 1e-2)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float64, generator=generator)
