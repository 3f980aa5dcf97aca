"""Factors of a version of the parameters: eigenvectors and eigenvalues of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import (
    FactorBlockKind,
    OperatorKind,
    OperatorSpec,
    Stage,
    WeightSharing,
)
from curvd_server.engine.kronecker import tied
from curvd_server.engine.kronecker.cotangents import cotangents
from curvd_server.engine.kronecker.moments import Moments, Seen, corrected, seen
from curvd_server.engine.kronecker.peaks import Peaks
from curvd_server.engine.kronecker.reading import Block, Reading
from curvd_server.engine.kronecker.rows import Rows
from curvd_server.engine.kronecker.taps import Taps, tap
from curvd_server.engine.kronecker.tied import WholeMoments
from curvd_server.engine.objective import (
    Batch,
    Problem,
    check_cancelled,
    never,
    rows_of,
)
from curvd_server.system import advance, enter_stage, yield_point

Function = Callable[[Tensor], Tensor]
"""Maps eigenvalues to those of a function of the operator."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A block as ``(Q_A kron Q_G) diag(values) (Q_A kron Q_G)^T`` for each group."""

    index: Tensor
    """[G, d_in, d_out] Indices into the vector of length P."""
    left: Tensor | None
    """[G, d_in, d_in] ``Q_A``, eigenvectors in columns; None: unit vectors."""
    right: Tensor | None
    """[G, d_out, d_out] ``Q_G``."""
    values: Tensor
    """[G, d_in, d_out], not negative."""

    def product(self, V: Tensor, out: Tensor, function: Function) -> None:
        """Multiply by a function of the block.

        Args:
            V: [K, P].
            out: [K, P], whose elements of this block are written to.
            function: Of the eigenvalues.
        """
        X = V[:, self.index]
        if self.left is not None:
            X = self.left.mT @ X
        if self.right is not None:
            X = X @ self.right
        X = X * function(self.values)
        if self.right is not None:
            X = X @ self.right.mT
        if self.left is not None:
            X = self.left @ X
        out[:, self.index.flatten()] = X.flatten(1)

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        tensors = (self.index, self.left, self.right, self.values)
        return sum(t.nbytes for t in tensors if t is not None)


class Factors:
    """The factors of one version, made when they are first asked for.

    Args:
        problem: The objective at that version.
        spec: Kind, Fisher's type and sharing; nothing else matters.
        reading: The blocks.
    """

    def __init__(self, problem: Problem, spec: OperatorSpec, reading: Reading) -> None:
        self.problem, self.spec, self.reading = problem, spec, reading
        self._spectra: tuple[Spectrum, ...] | None = None
        self.sharers = 0
        """Operators that hold them."""

    @property
    def is_made(self) -> bool:
        """Whether they are there."""
        return self._spectra is not None

    @property
    def nbytes(self) -> int:
        """Memory that they hold; before they are made, that they will."""
        if self._spectra is not None:
            return sum(s.nbytes for s in self._spectra)
        size = self.problem.result_dtype.itemsize
        pairs = [block.nbytes_each for block in self.reading.blocks]
        return sum(size * numbers + 8 * indices for numbers, indices in pairs)

    def spectra(self, cancelled: Callable[[], bool] = never) -> tuple[Spectrum, ...]:
        """Give the blocks, in the order of their parameters.

        Args:
            cancelled: Polled between mini-batches while they are made.
        """
        if self._spectra is None:
            self._spectra = _Making(self.problem, self.spec, self.reading).run(
                cancelled
            )
        return self._spectra

    def drop(self) -> None:
        """Return their memory; they are made again if somebody asks."""
        self._spectra = None

    def eigenvalues(self, cancelled: Callable[[], bool] = never) -> Tensor:
        """Give all eigenvalues, in no order: [P]."""
        found = [s.values.flatten() for s in self.spectra(cancelled)]
        here = torch.cat(found)
        missing = self.problem.layout.size - len(here)
        return torch.cat((here, here.new_zeros(missing))) if missing else here


class _Making:
    """Goes through the data: once for factors, and for EKFAC once more along them."""

    def __init__(self, problem: Problem, spec: OperatorSpec, reading: Reading) -> None:
        self._problem, self._spec, self._reading = problem, spec, reading
        self._reduce = spec.sharing is WeightSharing.REDUCE
        self._dtype, self._device = problem.result_dtype, problem.device
        blocks = [b for b in reading.blocks if b.sites]
        self._moments = {
            id(b): WholeMoments(b, dtype=self._dtype, device=self._device)
            if b.turned
            else Moments(b, reduce=self._reduce, dtype=self._dtype, device=self._device)
            for b in blocks
        }
        self._kronecker = blocks
        self._of_rows = [
            b
            for b in reading.blocks
            if b.said.kind in (FactorBlockKind.DENSE, FactorBlockKind.DIAGONAL)
        ]
        self._squares = [self._zeros(b) for b in self._of_rows]
        self._peaks = Peaks(self._dtype)

    def _zeros(self, block: Block) -> Tensor:
        size = block.said.outputs
        dense = block.said.kind is FactorBlockKind.DENSE
        shape = (size, size) if dense else (size,)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def run(self, cancelled: Callable[[], bool]) -> tuple[Spectrum, ...]:
        """Make the spectra of all blocks.

        Raises:
            ScaleOutOfRange: If second moments are no numbers of their type.
        """
        corrects = self._spec.kind is OperatorKind.EKFAC and bool(self._kronecker)
        total = self._problem.batches * (2 if corrects else 1)
        enter_stage(Stage.WARMING, total=total)
        for batch in self._batches(cancelled):
            self._sum_up(batch)
            advance()
        found = {id(b): self._decomposed(b) for b in self._kronecker}
        if corrects:
            for s in found.values():
                s.values.zero_()
            for batch in self._batches(cancelled):
                self._correct(batch, found)
                advance()
            for s in found.values():
                s.values.div_(self._problem.normaliser)
        squares = dict(zip(map(id, self._of_rows), self._squares, strict=True))
        blocks = self._reading.blocks
        spectra = tuple(
            found[id(b)]
            if id(b) in found
            else self._spectrum_of_rows(b, squares.get(id(b)))
            for b in blocks
        )
        self._peaks.check(blocks, [s.values for s in spectra])
        return spectra

    def _batches(self, cancelled: Callable[[], bool]) -> Iterator[Batch]:
        for batch in self._problem.data:
            check_cancelled(cancelled)
            yield_point()
            yield batch

    def _columns(
        self, batch: Batch, found: Taps
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield gradients of the outputs, and what they are at every site."""
        for column in cotangents(self._problem, self._spec, found.outputs, batch):
            yield_point()
            yield column, found.gradients(column) if self._kronecker else []

    def _seen(self, batch: Batch) -> tuple[Taps, list[Seen]]:
        sites = self._reading.sites(self._problem, batch)
        taps = tap(self._problem, batch, sites)
        return taps, [
            seen(self._reading, block, sites, taps, self._dtype)
            for block in self._kronecker
        ]

    def _sum_up(self, batch: Batch) -> None:
        taps, blocks = self._seen(batch)
        for one in blocks:
            self._peaks.see_inputs(one.block, self._inputs_of(one))
            self._moments[id(one.block)].add_inputs(one)
        rest = self._reading.rest
        rows = Rows(self._problem, rest, vectorised=self._reading.vectorised)
        for column, found in self._columns(batch, taps):
            for one in blocks:
                of_sites = [found[k] for k in one.block.sites]
                self._peaks.see_gradients(one.block, of_sites)
                self._moments[id(one.block)].add_gradients(one, of_sites)
            if rest:
                self._add_rows(rows, batch, column)

    def _add_rows(self, rows: Rows, batch: Batch, column: Tensor) -> None:
        """Add the second moments of what has no Kronecker product."""
        for start in range(0, len(column), rows.at_once):
            yield_point()
            part = slice(start, min(start + rows.at_once, len(column)))
            found = rows(rows_of(batch, part), column[part])
            cut = found.split([b.said.outputs for b in self._of_rows], 1)  # type: ignore[no-untyped-call]
            for b, place, R in zip(self._of_rows, self._squares, cut, strict=True):
                self._peaks.see_gradients(b, [R])
                if place.ndim == 1:
                    place += R.square().sum(0)
                else:
                    place.addmm_(R.T, R)

    @staticmethod
    def _inputs_of(one: Seen) -> list[Tensor]:
        """Give what a block's second moments of inputs are of, a bias's one included."""
        biased = any(site.bias is not None for site in one.sites)
        return [*one.operands, *([torch.ones(1)] if biased else [])]

    def _decomposed(self, block: Block) -> Spectrum:
        """Find eigenvectors and eigenvalues of both factors."""
        yield_point()
        moments = self._moments.pop(id(block))
        inputs, gradients = moments.factors(self._problem.normaliser)
        a, left = self._eigenpairs(inputs)
        g, right = self._eigenpairs(gradients)
        index = block.index.to(self._device)
        return Spectrum(index, left, right, a[:, :, None] * g[:, None, :])

    def _eigenpairs(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decompose a factor, or take the diagonal that there is of it."""
        if matrix.ndim == 2:
            return matrix, None
        values, vectors = torch.linalg.eigh(matrix.double())
        return values.clamp_min(0).to(self._dtype), vectors.to(self._dtype)

    def _correct(self, batch: Batch, found: dict[int, Spectrum]) -> None:
        taps, blocks = self._seen(batch)
        for _, gradients in self._columns(batch, taps):
            for one in blocks:
                spectrum = found[id(one.block)]
                of_sites = [gradients[k] for k in one.block.sites]
                squares = tied.corrected if one.block.turned else corrected
                spectrum.values.add_(
                    squares(one, of_sites, spectrum.left, spectrum.right)
                )

    def _spectrum_of_rows(self, block: Block, squares: Tensor | None) -> Spectrum:
        index = block.index.to(self._device)
        if squares is None:
            zeros = torch.zeros(index.shape, dtype=self._dtype, device=self._device)
            return Spectrum(index, None, None, zeros)
        squares.div_(self._problem.normaliser)
        if squares.ndim == 1:
            return Spectrum(index, None, None, squares.reshape(index.shape))
        values, vectors = self._eigenpairs(squares[None])
        return Spectrum(index, None, vectors, values.reshape(index.shape))
