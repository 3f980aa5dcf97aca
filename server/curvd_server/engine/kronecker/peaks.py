"""Whether second moments are numbers: how large inputs and gradients were that they are of.

What is squared under- or overflows without a word. A block that is tiny beside the others is
as good as zero, and stays; one that counts is refused if its moments have no digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from curvd.errors import ScaleOutOfRange
from curvd_server.engine.kronecker.reading import Block


class Peaks:
    """The largest elements of what each block's moments are of.

    Args:
        dtype: Of the moments.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._inputs: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}

    def see_inputs(self, block: Block, inputs: Iterable[Tensor]) -> None:
        """Take note of inputs; those that are indices, and a bias's, are one."""
        numbers = [x for x in inputs if x.is_floating_point()]
        _see(self._inputs, id(block), numbers)

    def see_gradients(self, block: Block, gradients: Iterable[Tensor]) -> None:
        """Take note of gradients of outputs, or of parameters where there are no inputs."""
        _see(self._gradients, id(block), gradients)

    def check(self, blocks: Sequence[Block], values: Sequence[Tensor]) -> None:
        """Refuse moments that have overflowed, or of which nothing is left.

        Args:
            blocks: The blocks.
            values: Of each, its eigenvalues.

        Raises:
            ScaleOutOfRange: If a block that counts has such moments.
        """
        limits = torch.finfo(self._dtype)
        least = math.log2(limits.tiny / limits.eps)
        sizes = [self._sizes(block) for block in blocks]
        largest = max((2 * sum(size) for size in sizes), default=-math.inf)
        for block, own, found in zip(blocks, values, sizes, strict=True):
            if not own.isfinite().all():
                raise self._refusal(block, found)
            expected = 2 * sum(found)
            if expected == -math.inf or expected < largest + math.log2(limits.eps):
                continue
            if min(expected, *(2 * size for size in found)) < least:
                raise self._refusal(block, found)

    def _sizes(self, block: Block) -> tuple[float, float]:
        """Give the logarithms of the largest input and gradient of a block."""
        key = id(block)
        gradient = _log2(self._gradients.get(key))
        if key not in self._inputs:
            return 0.0, gradient
        return _log2(self._inputs[key]), gradient

    def _refusal(self, block: Block, found: tuple[float, float]) -> ScaleOutOfRange:
        limits = torch.finfo(self._dtype)
        msg = (
            f"inputs of about 2**{found[0]:.0f} and gradients of about 2**{found[1]:.0f} of "
            f"{', '.join(block.said.parameters)} have second moments that are no numbers of "
            f"{self._dtype} ({limits.tiny:.1e} to {limits.max:.1e}): scale the loss or the "
            "inputs by a power of two"
        )
        if self._dtype is not torch.float64:
            msg += ", or make the session in 'F64'"
        return ScaleOutOfRange(msg, parameters=", ".join(block.said.parameters))


def _see(found: dict[int, Tensor], key: int, tensors: Iterable[Tensor]) -> None:
    for t in tensors:
        if t.numel():
            peak = t.detach().abs().amax().double()
            found[key] = torch.maximum(found[key], peak) if key in found else peak


def _log2(peak: Tensor | None) -> float:
    size = 0.0 if peak is None else float(peak)
    return math.log2(size) if size > 0 else -math.inf
