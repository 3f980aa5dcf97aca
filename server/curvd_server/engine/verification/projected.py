"""The truth about a linearisation of a model of which no second copy fits.

What is compared is what `verify` compares: products, with central differences of
gradients in float64. But nothing of the parameters' size is held. They are moved and
widened layer by layer (`layerwise`), directions are made at each use (`patterns`), and
rows of products and of gradients are projected on a few directions as they arrive: the
relative error of a row is estimated by that of its projections.

What is multiplied is not an excerpt in float64, but the operator as it is used: in the
session's type, on the session's mini-batches, one of each shape. Those of more than
`POINTS` data points are compared with the sum over pieces, and a piece with differences.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence

import psutil
import torch
from torch import Tensor

from curvd.contract import Mode, OperatorSpec, Stage
from curvd.errors import OutOfMemory
from curvd.tensors import exact_allocator
from curvd_server.engine.made_anew import Leaves, MadeAnew
from curvd_server.engine.objective import (
    Batch,
    Problem,
    check_cancelled,
    never,
    on_host,
    rows_of,
)
from curvd_server.engine.operators import MODES, Linearisation, block_ranges
from curvd_server.engine.program import Emits
from curvd_server.engine.verification.comparison import relative
from curvd_server.engine.verification.determinism import check_repeatable
from curvd_server.engine.verification.layerwise import LayerwiseDifferences
from curvd_server.engine.verification.patterns import (
    PROJECTIONS,
    Pattern,
    Projections,
    power_of_two,
)
from curvd_server.engine.verification.verify import (
    EXCELLENT,
    STEPS,
    TOLERANCE,
    Evidence,
    Slopes,
    slopes,
    tried,
)
from curvd_server.system import advance, enter_stage, yield_point

POINTS = 16
"""Data points of a mini-batch that are differenced at once."""
NUDGE = 2.0**-5
"""How far the parameters lie from the session's, relative to their scale."""
ALLOWED = {torch.float64: TOLERANCE, torch.float32: 2e-3, torch.bfloat16: 0.1}
"""Gap above which a product in this type is refused; the wrong ones known to us are off by
1.6e-2 and more. In bfloat16 formulas are verified in float32 beside it."""
FLOORS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Rows so far below the largest, relatively, may be rounding."""
LEAN = "program"
"""The mode that verifies in little memory."""
COPIES = 4
"""Vectors of all parameters that another mode holds: moved ones, a gradient whose graph is
kept, a direction and its product."""
_MEAN_SQUARE = 1.75
"""Of the entries of a direction of scale one: that of the factors of `Pattern`."""


class ProjectedReference:
    """The reference for one large problem and operator.

    Args:
        problem: The objective.
        spec: The operator.
        verified: Sizes of mini-batches that need no comparison.
    """

    def __init__(
        self, problem: Problem, spec: OperatorSpec, verified: Collection[int] = ()
    ) -> None:
        self._problem, self._spec = problem, spec
        scales = tuple(map(power_of_two, problem.parameters))
        names = problem.layout.names
        fixed = tuple((names.index(name), row) for name, row in problem.model.fixed)
        self._nudge, self._v, self._w = (Pattern(k, scales, fixed) for k in range(3))
        self._projections = Projections(3)
        self._verified = frozenset(verified)
        self._found: dict[str, Evidence] = {}

    @exact_allocator()
    def check_objective(self) -> None:
        """Evaluate loss and gradient twice on the first mini-batch.

        Raises:
            NotDeterministic: If two evaluations differ.
            NotFinite: If they are NaN, or the gradient is infinite.
        """
        batch = self._problem.data[0]
        first = self._gradient(batch)
        second = self._gradient(batch)
        check_repeatable("loss", first[0], second[0])
        for name, a, b in zip(
            self._problem.layout.names, first[1], second[1], strict=True
        ):
            if a is not None and b is not None:
                check_repeatable(f"gradient of {name}", a, b)

    @exact_allocator()
    def check_gradients(self, cancelled: Callable[[], bool] = never) -> None:
        """Compute a gradient of all data.

        Args:
            cancelled: Polled between mini-batches.
        """
        for batch in self._problem.data:
            check_cancelled(cancelled)
            self._gradient(batch)

    @exact_allocator()
    def slopes(self) -> Slopes:
        """Give the loss's slope along a direction twice; see `Reference.slopes`."""

        def along(index: int, row: Tensor) -> Tensor:
            return torch.tensor(self._v.dot(index, row), dtype=torch.float64)

        piece = self._piece(self._batches()[0])
        differences = LayerwiseDifferences(
            self._problem, piece, self._point, self._v, along
        )
        share = float(sum(differences.gradient(0.0)[1]))
        return slopes(lambda h: (differences.loss(h), differences.loss(-h), share))

    @exact_allocator()
    def examine(self, mode: str) -> Evidence:
        """Compare a mode with the truth.

        Args:
            mode: Name in `MODES`.

        Returns:
            The gaps and the parameters that disagree.

        Raises:
            NotDeterministic: If two products differ.
        """
        if mode not in self._found:
            evidence = tried(lambda: self._examine(mode))
            if evidence.out_of_memory:  # there may be more the next time
                return evidence
            self._found[mode] = evidence
        return self._found[mode]

    def _examine(self, mode: str) -> Evidence:
        batches = self._batches()
        enter_stage(Stage.VERIFYING, mode, total=len(batches))
        subject = _Subject(self._problem, self._spec, mode, self._point)
        evidence = [
            self._of_batch(subject, batch, first=not i)
            for i, batch in enumerate(batches)
        ]
        wrong = [name for e in evidence for name in e.wrong]
        return Evidence(
            max(e.symmetry_gap for e in evidence),
            max(e.difference_gap for e in evidence),
            tuple(dict.fromkeys(wrong)),
            projections=PROJECTIONS,
        )

    def _of_batch(self, subject: _Subject, batch: Batch, *, first: bool) -> Evidence:
        """Compare the products of one mini-batch."""
        piece, names = self._piece(batch), self._problem.layout.names
        kind = self._problem.dtype
        linear = subject.linearised(piece)
        whole = range(len(names))
        product, left = self._product(subject, linear, self._v, whole, beside=self._w)
        if first:
            again, _ = self._product(subject, linear, self._v, whole)
            check_repeatable("product", torch.stack(product), torch.stack(again))
        _, right = self._product(subject, linear, self._w, whole, beside=self._v)
        symmetry = self._asymmetry(product, left, right)
        wrong = [
            name
            for block in self._probed_blocks()
            for name in self._wrong_in_block(subject, linear, block)
        ]
        del linear
        advance()
        gaps = self._difference_gaps(piece, product)
        if piece is not batch:
            beyond = self._beyond_the_pieces(subject, batch)
            gaps = list(map(max, gaps, beyond))
        wrong += [
            n for n, gap in zip(names, gaps, strict=True) if not gap <= ALLOWED[kind]
        ]
        if not wrong and not symmetry <= ALLOWED[kind]:
            wrong = [names[gaps.index(max(gaps))]]
        return Evidence(symmetry, max(gaps), tuple(wrong))

    def _difference_gaps(self, piece: Batch, product: Sequence[Tensor]) -> list[float]:
        """Best relative error per parameter over the step widths."""
        differences = LayerwiseDifferences(
            self._problem, piece, self._point, self._v, self._projections.of
        )
        kind = self._problem.dtype
        best = [math.inf] * len(product)
        for step in STEPS:
            gaps = self._gaps(product, differences.quotient(self._spec, step))
            best = [min(b, g) for b, g in zip(best, gaps, strict=True)]
            if max(best) <= (
                EXCELLENT if kind is torch.float64 else ALLOWED[kind] / 10
            ):
                break
        return best

    def _beyond_the_pieces(self, subject: _Subject, batch: Batch) -> list[float]:
        """Compare a mini-batch's product with the sum of its pieces'."""
        whole = range(len(self._problem.parameters))
        product, _ = self._product(subject, subject.linearised(batch), self._v, whole)
        total = [torch.zeros_like(row) for row in product]
        for piece in _pieces(batch):
            linear = subject.linearised(piece)
            rows, _ = self._product(subject, linear, self._v, whole)
            total = [t + r for t, r in zip(total, rows, strict=True)]
        return self._gaps(product, total)

    def _product(
        self,
        subject: _Subject,
        linear: Linearisation,
        direction: Pattern,
        block: range,
        *,
        only: range | None = None,
        beside: Pattern | None = None,
    ) -> tuple[list[Tensor], float]:
        """Multiply a direction.

        Args:
            subject: Whose operator it is.
            linear: One mini-batch's share.
            direction: What is multiplied.
            block: Indices of the parameters.
            only: Those in which the direction is not zero; all of them by default.
            beside: What the product is multiplied by.

        Returns:
            The projections of the block's rows; and ``beside`` times the product.
        """
        rows = [torch.zeros(PROJECTIONS, dtype=torch.float64) for _ in block]
        along = 0.0
        tangents = subject.tangents(direction, block, block if only is None else only)
        for index, row in subject.rows(linear, tangents, block):
            yield_point()
            if row is not None:
                rows[index - block.start] = self._projections.of(index, row)
                along += beside.dot(index, row) if beside else 0.0
            del row  # before the next one is made
        return rows, along

    def _wrong_in_block(
        self, subject: _Subject, linear: Linearisation, block: range
    ) -> list[str]:
        """Compare a block's product with the whole operator's on that block alone."""
        whole = range(len(self._problem.parameters))
        full, _ = self._product(subject, linear, self._v, whole, only=block)
        got, _ = self._product(subject, linear, self._v, block)
        cut = slice(block.start, block.stop)
        gaps = self._gaps(got, full[cut])
        allowed = ALLOWED[self._problem.dtype]
        names = self._problem.layout.names[cut]
        return [n for n, gap in zip(names, gaps, strict=True) if not gap <= allowed]

    def _probed_blocks(self) -> list[range]:
        """Choose the first, a middle and the last block of a block-diagonal operator."""
        blocks = block_ranges(self._spec, len(self._problem.parameters))
        if len(blocks) == 1:
            return []
        return [blocks[i] for i in sorted({0, len(blocks) // 2, len(blocks) - 1})]

    def _gaps(self, got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
        """Estimate the relative error per parameter."""
        pairs = list(zip(got, want, strict=True))
        distances = [float((a - b).norm()) for a, b in pairs]
        norms = [float(b.norm()) for _, b in pairs]
        return relative(distances, norms, floor=FLOORS[self._problem.dtype])

    def _asymmetry(self, product: list[Tensor], left: float, right: float) -> float:
        """Give ``|w.Av - v.Aw|`` relative to what a random ``w`` would give."""
        like = self._problem.parameters
        squares = sum(
            s**2 * p.numel() for s, p in zip(self._w.scales, like, strict=True)
        )
        scale = math.sqrt(_MEAN_SQUARE * squares / sum(p.numel() for p in like))
        length = math.hypot(*(float(row.norm()) for row in product))
        typical = length / math.sqrt(PROJECTIONS * _MEAN_SQUARE) * scale
        return abs(left - right) / max(abs(left), abs(right), typical, 1e-300)

    def _gradient(self, batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
        """Differentiate one mini-batch's share, in the session's type."""
        p = self._problem
        leaves = Leaves(
            lambda index: p.parameters[index].detach(),
            p.parameters,
            p.dtype,
            p.device,
            self._projections.of,
        )
        yield_point()
        return leaves.gradients(lambda: p.objective(leaves.tensors, batch))

    def _point(self, index: int) -> Tensor:
        """Make a parameter where it is verified: away from kinks and dead starts."""
        own = self._problem.parameters[index].clone()
        return self._nudge.add(index, own, NUDGE)

    def _batches(self) -> list[Batch]:
        """Take a mini-batch of each shape, in which a target counts if there is one."""
        found: dict[tuple[torch.Size, ...], tuple[bool, int]] = {}
        for index, batch in enumerate(on_host(self._problem.data)):
            shape = tuple(t.shape for t in (*batch.inputs, batch.targets))
            counts = bool(self._problem.loss.counts(batch.targets).sum())
            if shape not in found or (counts and not found[shape][0]):
                found[shape] = counts, index
        batches = [self._problem.data[index] for _, index in found.values()]
        return [b for b in batches if len(b.targets) not in self._verified]

    def _piece(self, batch: Batch) -> Batch:
        """Take as many data points as are differenced at once, some of which count."""
        if len(batch.targets) <= POINTS or self._problem.mode is Mode.BATCH_STATISTICS:
            return batch
        counting = self._problem.loss.counts
        pieces = list(_pieces(batch))
        return next((p for p in pieces if counting(p.targets).sum()), pieces[0])


class _Subject:
    """An operator as it is used, at parameters that are moved a little.

    A traced program takes parameters and tangents that are made at each use, and hands its
    rows out one by one. Other modes want all of them at once, and have copies.

    Args:
        problem: The session's.
        spec: The operator.
        mode: Name in `MODES`.
        point: Makes a parameter where it is, given its index.

    Raises:
        OutOfMemory: If the host cannot hold the copies.
    """

    def __init__(
        self,
        problem: Problem,
        spec: OperatorSpec,
        mode: str,
        point: Callable[[int], Tensor],
    ) -> None:
        self._origin, self._spec, self._mode = problem, spec, mode
        self._lean = mode == LEAN
        if not self._lean:
            _check_host_memory(problem)
        indices = range(len(problem.parameters))
        moved = tuple(self._tensor(i, functools.partial(point, i)) for i in indices)
        self._moved = dataclasses.replace(problem, parameters=moved)

    def linearised(self, batch: Batch) -> Linearisation:
        """Linearise a mini-batch."""
        yield_point()
        if self._lean:  # traced where tensors are plain ones
            MODES[self._mode](self._origin, self._spec, batch)
            yield_point()
        return MODES[self._mode](self._moved, self._spec, batch)

    def tangents(self, direction: Pattern, block: range, only: range) -> list[Tensor]:
        """Make a direction's tensors of a block, zeros except in some of them."""

        def make(index: int) -> Tensor:
            zeros = torch.zeros_like(self._origin.parameters[index])
            return direction.add(index, zeros) if index in only else zeros

        return [self._tensor(i, functools.partial(make, i)) for i in block]

    def rows(
        self, linear: Linearisation, tangents: Sequence[Tensor], block: range
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Multiply; yield index of the parameter, and its row."""
        yield_point()
        if self._lean and isinstance(linear, Emits):
            return linear.rows(tangents, block)
        rows = linear.product(tangents, block, batched=False)
        return zip(block, rows, strict=True)

    def _tensor(self, index: int, make: Callable[[], Tensor]) -> Tensor:
        if not self._lean:
            return make()
        like = self._origin.parameters[index]
        return MadeAnew(make, like.shape, like.dtype, like.device)


def _pieces(batch: Batch) -> Iterator[Batch]:
    for start in range(0, len(batch.targets), POINTS):
        yield rows_of(batch, slice(start, start + POINTS))


def _check_host_memory(problem: Problem) -> None:
    """Refuse what the kernel would end the process for."""
    if problem.device.type != "cpu":
        return
    needed = COPIES * sum(p.nbytes for p in problem.parameters)
    available = psutil.virtual_memory().available
    if needed > available:
        msg = (
            f"verifying an operator on {problem.layout.size} parameters without a traced "
            f"program takes {needed} bytes on the host ({COPIES} vectors), which has "
            f"{available} available; choose fewer parameters with params, or free memory"
        )
        raise OutOfMemory(msg, needed_bytes=needed, available_bytes=available)
