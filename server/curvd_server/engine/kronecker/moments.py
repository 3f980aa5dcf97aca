"""Second moments of inputs and of gradients, summed up over mini-batches.

Inputs and gradients of a block come as [G, B, S, d]: G groups, B data points, S positions
that share the weight. With *expand* each position is a row; with *reduce* inputs are
averaged and gradients summed over the positions of a data point (Eschenhagen et al.,
NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from curvd_server.engine.kronecker.reading import Block, Reading
from curvd_server.engine.kronecker.sites import Site, Sites
from curvd_server.engine.kronecker.taps import Taps
from curvd_server.system import yield_point

_BYTES = 1 << 26
"""Of rows, or of gradients of data points, that are held at once."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One block's share of a mini-batch, some data points at a time."""

    block: Block
    sites: tuple[Site, ...]
    operands: tuple[Tensor, ...]
    trailing: tuple[bool, ...]
    points: int
    """Data points of the mini-batch, B."""
    dtype: torch.dtype
    """In which moments are summed."""

    def of_sites(
        self, found: Sequence[Tensor], points: slice
    ) -> Iterator[tuple[Site, Tensor, Tensor]]:
        """Give inputs and gradients of some data points, site by site.

        Args:
            found: Gradients of the sites' outputs.
            points: The data points.

        Yields:
            A site, its inputs [G, b, S, d_in] or indices [1, b, S, 1], and its gradients
            [G, b, S, d_out].
        """
        for site, x, g, trailing in zip(
            self.sites, self.operands, found, self.trailing, strict=True
        ):
            rows = self._by_point(site.form.gradients(g), trailing)[:, points]
            yield site, self._inputs_of(site, x, trailing, points), rows.to(self.dtype)

    @property
    def one_hot(self) -> bool:
        """Whether inputs are indices."""
        return self.sites[0].form.one_hot

    def gradients(self, found: Sequence[Tensor]) -> Tensor:
        """Bring the gradients of the sites together: [G, B, S, d_out]."""
        parts = [
            self._by_point(site.form.gradients(g), trailing)
            for site, g, trailing in zip(self.sites, found, self.trailing, strict=True)
        ]
        return torch.cat(parts, 2).to(self.dtype)

    def inputs(self, points: slice) -> Tensor:
        """Bring the inputs of some data points together: [G, b, S, d_in], bias included.

        Of an embedding [1, b, S, 1]: the indices.
        """
        parts = [
            self._inputs_of(site, x, trailing, points)
            for site, x, trailing in zip(
                self.sites, self.operands, self.trailing, strict=True
            )
        ]
        return torch.cat(parts, 2)

    def _inputs_of(
        self, site: Site, x: Tensor, trailing: bool, points: slice
    ) -> Tensor:
        if site.form.one_hot:
            ids = site.form.inputs(x)[None, :, None]
            return self._by_point(ids, trailing)[:, points]
        if not trailing and len(x) == self.points:
            # Patches of a convolution are many times what they are cut out of.
            rows = site.form.inputs(x[points])
            a = rows.reshape(len(rows), points.stop - points.start, -1, rows.shape[2])
        else:
            a = self._by_point(site.form.inputs(x), trailing)[:, points]
        a = a.to(self.dtype)
        return a if site.bias is None else F.pad(a, (0, 1), value=1.0)

    def _by_point(self, rows: Tensor, trailing: bool) -> Tensor:
        """Cut rows into data points: [G, R, d] -> [G, B, S, d]."""
        groups, _, size = rows.shape
        if trailing:
            return rows.reshape(groups, -1, self.points, size).transpose(1, 2)
        return rows.reshape(groups, self.points, -1, size)

    def parts(self, each: int) -> Iterator[slice]:
        """Cut the data points so that what is made of a part fits.

        Args:
            each: Elements for one data point.
        """
        step = max(1, _BYTES // (8 * max(1, each)))
        for start in range(0, self.points, step):
            yield_point()
            yield slice(start, min(start + step, self.points))


def seen(
    reading: Reading, block: Block, sites: Sites, taps: Taps, dtype: torch.dtype
) -> Seen:
    """Pick a block's share out of a mini-batch.

    Args:
        reading: Where data points are among rows.
        block: The block.
        sites: The sites of the mini-batch's shapes.
        taps: What they saw.
        dtype: In which moments are summed.
    """
    return Seen(
        block,
        tuple(sites.linear[k] for k in block.sites),
        tuple(taps.operands[k] for k in block.sites),
        tuple(k in reading.trailing for k in block.sites),
        len(taps.outputs),
        dtype,
    )


class Moments:
    """A block's second moments of inputs and gradients, of all rows so far.

    Args:
        block: The block.
        reduce: Whether positions are reduced.
        dtype: Of the sums.
        device: Where they are.
    """

    def __init__(
        self, block: Block, *, reduce: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        groups, inputs, outputs = block.index.shape
        said = block.said
        self._reduce = reduce
        one = [inputs] * (1 if said.diagonal_inputs else 2)
        other = [outputs] * (1 if said.diagonal_outputs else 2)
        self.inputs = torch.zeros((groups, *one), dtype=dtype, device=device)
        self.gradients = torch.zeros((groups, *other), dtype=dtype, device=device)
        self.rows = 0

    def add_inputs(self, seen: Seen) -> None:
        """Add a mini-batch's rows of inputs."""
        groups, inputs, _ = seen.block.index.shape
        if seen.one_hot:
            self._add_indices(seen)
            return
        positions = 1
        for part in seen.parts(groups * inputs * self._positions(seen)):
            a = seen.inputs(part)
            positions = a.shape[2]
            self._add(self.inputs, a.mean(2) if self._reduce else a.flatten(1, 2))
        self.rows += seen.points * (1 if self._reduce else positions)

    def _positions(self, seen: Seen) -> int:
        """Guess positions of a data point from what its weight gives."""
        return max(1, sum(x.numel() for x in seen.operands) // max(1, seen.points))

    def _add_indices(self, seen: Seen) -> None:
        """Add one-hot rows, whose second moments are counts."""
        vocabulary = seen.block.index.shape[1]
        for part in seen.parts(vocabulary if self._reduce else 1):
            ids = seen.inputs(part)[0, :, :, 0]  # [b, S]
            if self._reduce:
                hot = torch.zeros(len(ids), vocabulary + 1, dtype=self.inputs.dtype)
                hot = hot.to(ids.device)
                # What carries no derivative counts into a column of its own.
                where = ids.where(ids >= 0, vocabulary)
                hot.scatter_add_(1, where, torch.ones_like(where, dtype=hot.dtype))
                self._add(self.inputs, hot[None, :, :-1] / ids.shape[1])
            else:
                used = ids[ids >= 0]
                ones = torch.ones_like(used, dtype=self.inputs.dtype)
                self.inputs[0].index_add_(0, used, ones)
            self.rows += len(ids) if self._reduce else ids.numel()

    def add_gradients(self, seen: Seen, found: Sequence[Tensor]) -> None:
        """Add rows of gradients, of one column.

        Args:
            seen: The block's share of a mini-batch.
            found: Gradients of the outputs of its sites.
        """
        gradients = seen.gradients(found)
        reduced = gradients.sum(2) if self._reduce else gradients.flatten(1, 2)
        self._add(self.gradients, reduced)

    def factors(self, normaliser: float) -> tuple[Tensor, Tensor]:
        """Divide the sums: the factors of the inputs and of the gradients."""
        return self.inputs.div_(max(1, self.rows)), self.gradients.div_(normaliser)

    @staticmethod
    def _add(place: Tensor, rows: Tensor) -> None:
        """Add second moments of rows, [G, R, d], or their diagonal."""
        if place.ndim == 2:
            place += rows.square().sum(1)
        else:
            place.baddbmm_(rows.mT, rows)


def corrected(
    seen: Seen, found: Sequence[Tensor], left: Tensor | None, right: Tensor | None
) -> Tensor:
    """Sum the squares of data points' gradients along eigenvectors: [G, d_in, d_out].

    ``sum_n (sum_s (Q_A^T a_ns) (Q_G^T g_ns)^T)^2``, elementwise (George et al., NeurIPS
    2018).

    Args:
        seen: The block's share of a mini-batch.
        found: Gradients of the outputs of its sites.
        left: [G, d_in, d_in] Eigenvectors of the inputs' factor; None: unit vectors.
        right: [G, d_out, d_out] Likewise of the gradients'.
    """
    gradients = seen.gradients(found)
    g = gradients if right is None else gradients @ right[:, None]
    shape = seen.block.index.shape
    total = torch.zeros(shape, dtype=g.dtype, device=g.device)
    groups, inputs, outputs = shape
    if seen.one_hot:
        if left is None:
            _add_tables(total[0], seen.inputs(slice(0, seen.points))[0, :, :, 0], g[0])
            return total
        left_of = left[0]
        for part in seen.parts(inputs * outputs + g.shape[2] * inputs):
            ids = seen.inputs(part)[0, :, :, 0]
            a = left_of[ids.clamp_min(0)] * (ids >= 0)[..., None]
            total[0] += (a.mT @ g[0, part]).square().sum(0)
        return total
    positions = g.shape[2]
    for part in seen.parts(groups * (inputs * outputs + positions * inputs)):
        a = seen.inputs(part)
        a = a if left is None else a @ left[:, None]
        if positions == 1:
            total += a[:, :, 0].square().mT @ g[:, part, 0].square()
        else:
            total += (a.mT @ g[:, part]).square().sum(1)
    return total


def _add_tables(total: Tensor, ids: Tensor, g: Tensor) -> None:
    """Add squares of the gradients of a table, whose rows are chosen by indices.

    Args:
        total: [V, d], written to.
        ids: [B, S] Rows of the table; negative: none.
        g: [B, S, d].
    """
    used = ids >= 0
    point = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    pairs, place = torch.unique(
        torch.stack((point[used], ids[used])), dim=1, return_inverse=True
    )
    sums = torch.zeros(pairs.shape[1], g.shape[2], dtype=g.dtype, device=g.device)
    sums.index_add_(0, place, g[used])
    total.index_add_(0, pairs[1], sums.square())
