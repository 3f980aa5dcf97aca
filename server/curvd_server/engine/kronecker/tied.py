"""A weight that is used in several layouts: factors of its whole gradients.

An embedding that is the output layer, too, has inputs on one side in one place and on the
other in the other, so there are no rows ``a g^T`` of both. But each data point has one gradient
D [d_in, d_out], the sum over all places, and its second moments along either side are factors:

    ``L = sum_n D_n D_n^T``,  ``R = sum_n D_n^T D_n``,  block ``L kron R / tr L``

(Shampoo's statistics, Gupta, Koren & Singer, ICML 2018; of this power and scale the closest to
the Fisher after one step of the power iteration that finds the best Kronecker product, Morwani
et al., arXiv 2406.17748). Its trace is the Fisher's own. EKFAC's correction holds as it is:
squares of D along the eigenvectors of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvd_server.engine.kronecker.moments import Seen
from curvd_server.engine.kronecker.reading import Block


class WholeMoments:
    """Second moments of the whole gradients of a tied weight.

    Args:
        block: The block.
        dtype: Of the sums.
        device: Where they are.
    """

    def __init__(
        self, block: Block, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        _, inputs, outputs = block.index.shape
        said = block.said
        one = [inputs] * (1 if said.diagonal_inputs else 2)
        other = [outputs] * (1 if said.diagonal_outputs else 2)
        self.left = torch.zeros(one, dtype=dtype, device=device)
        self.right = torch.zeros(other, dtype=dtype, device=device)

    def add_inputs(self, seen: Seen) -> None:
        """Do nothing: inputs alone say nothing of whole gradients."""

    def add_gradients(self, seen: Seen, found: Sequence[Tensor]) -> None:
        """Add the gradients of a mini-batch, of one column.

        Args:
            seen: The block's share of a mini-batch.
            found: Gradients of the outputs of its sites.
        """
        for D in whole_gradients(seen, found):
            for place, rows in ((self.left, D.mT), (self.right, D)):
                if place.ndim == 1:
                    place += rows.square().sum((0, 1))
                else:
                    place += (rows.mT @ rows).sum(0)

    def factors(self, normaliser: float) -> tuple[Tensor, Tensor]:
        """Divide the sums: ``L / tr L`` and ``R``, each [1, …]."""
        left = self.left
        trace = left.sum() if left.ndim == 1 else left.diagonal().sum()
        scale = torch.where(trace > 0, trace, 1.0)
        return (left / scale)[None], self.right[None] / normaliser


def whole_gradients(seen: Seen, found: Sequence[Tensor]) -> Iterator[Tensor]:
    """Sum the gradients of data points over all places of a tied weight.

    Args:
        seen: The block's share of a mini-batch.
        found: Gradients of the outputs of its sites.

    Yields:
        [b, d_in, d_out] of some data points after the other.
    """
    _, inputs, outputs = seen.block.index.shape
    for points in seen.parts(inputs * outputs):
        count = points.stop - points.start
        total: Tensor | None = None
        places = zip(seen.of_sites(found, points), seen.block.turned, strict=True)
        for (site, a, g), turned in places:
            D = _looked_up(a[0], g[0], site.weight) if site.form.one_hot else a.mT @ g
            D = D.reshape(count, *D.shape[-2:])
            D = D.mT if turned else D
            total = D if total is None else total + D
        assert total is not None
        yield total


def _looked_up(ids: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """Put gradients to the rows of a table that were chosen: [b, V, d].

    Args:
        ids: [b, S, 1] Rows of the table; negative: none.
        g: [b, S, d].
        weight: [1, V, d].
    """
    rows = weight.shape[1]
    table = g.new_zeros(len(g), rows + 1, g.shape[2])
    # What carries no derivative goes to a row of its own.
    where = ids.where(ids >= 0, rows).expand(-1, -1, g.shape[2])
    return table.scatter_add_(1, where, g)[:, :rows]


def corrected(
    seen: Seen, found: Sequence[Tensor], left: Tensor | None, right: Tensor | None
) -> Tensor:
    """Sum the squares of whole gradients along eigenvectors: [1, d_in, d_out].

    Args:
        seen: The block's share of a mini-batch.
        found: Gradients of the outputs of its sites.
        left: [1, d_in, d_in] Eigenvectors of L; None: unit vectors.
        right: [1, d_out, d_out] Likewise of R.
    """
    shape = seen.block.index.shape
    total = torch.zeros(shape, dtype=seen.dtype, device=found[0].device)
    for D in whole_gradients(seen, found):
        D = D if left is None else left[0].mT @ D
        D = D if right is None else D @ right[0]
        total[0] += D.square().sum(0)
    return total
