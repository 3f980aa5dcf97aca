"""What consumes a weight, as rows: inputs ``a`` and gradients ``g`` with ``dL/dW = Σ a g^T``.

Rows come as [G, R, d]: G groups that have a weight each, R positions of all data points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Form(Protocol):
    """How the operands of a linear operation become rows."""

    @property
    def one_hot(self) -> bool:
        """Whether inputs are indices, [R], in place of rows with a single one."""

    def inputs(self, x: Tensor) -> Tensor:
        """Make rows of what the weight is applied to: [G, R, d_in], or [R]."""

    def gradients(self, g: Tensor) -> Tensor:
        """Make rows of the gradient of the output: [G, R, d_out]."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """``x @ W``, or ``W @ x`` if transposed."""

    transposed: bool
    one_hot: bool = False

    def inputs(self, x: Tensor) -> Tensor:
        """See `Form`."""
        return (x.mT if self.transposed else x)[None]

    def gradients(self, g: Tensor) -> Tensor:
        """See `Form`."""
        return (g.mT if self.transposed else g)[None]


@dataclass(frozen=True, slots=True)
class Matrices:
    """A batch of ``x @ W``, or of ``W @ x``: of one weight, or of one for each."""

    transposed: bool
    grouped: bool
    one_hot: bool = False

    def inputs(self, x: Tensor) -> Tensor:
        """See `Form`."""
        return self._rows(x)

    def gradients(self, g: Tensor) -> Tensor:
        """See `Form`."""
        return self._rows(g)

    def _rows(self, value: Tensor) -> Tensor:
        rows = value.mT if self.transposed else value
        return rows if self.grouped else rows.flatten(0, 1)[None]


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution of any number of axes: rows are patches, in groups of channels."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    one_hot: bool = False

    def inputs(self, x: Tensor) -> Tensor:
        """See `Form`."""
        widths = [pad for p in reversed(self.padding) for pad in (p, p)]
        x = F.pad(x, widths) if any(widths) else x
        seen = patches(x, self.kernel, self.stride, self.dilation)
        return _grouped(seen.flatten(2, 1 + len(self.kernel)), self.groups)

    def gradients(self, g: Tensor) -> Tensor:
        """See `Form`."""
        return _grouped(g[:, :, None], self.groups)


@dataclass(frozen=True, slots=True)
class TransposedConvolution:
    """A transposed convolution: one of its input with zeros in between, by the flipped kernel.

    A row is a position of the output, as of other convolutions, so that what the positions
    share is weight and bias together.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    one_hot: bool = False

    def inputs(self, x: Tensor) -> Tensor:
        """See `Form`."""
        x = self._spread(x)
        ones = (1,) * len(self.kernel)
        seen = patches(x, self.kernel, ones, self.dilation)
        axes = tuple(range(2, 2 + len(self.kernel)))
        return _grouped(seen.flip(axes).flatten(2, axes[-1]), self.groups)

    def gradients(self, g: Tensor) -> Tensor:
        """See `Form`."""
        return _grouped(g[:, :, None], self.groups)

    def _spread(self, x: Tensor) -> Tensor:
        """Put zeros between elements and around them, so that every output has a patch."""
        widths: list[int] = []
        for axis, (size, stride, pad, step, more) in enumerate(
            zip(
                self.kernel,
                self.stride,
                self.padding,
                self.dilation,
                self.output_padding,
                strict=True,
            ),
            2,
        ):
            shape = [*x.shape]
            shape[axis] = (shape[axis] - 1) * stride + 1
            wide = x.new_zeros(shape)
            places = [slice(None)] * x.ndim
            places[axis] = slice(None, None, stride)
            wide[tuple(places)] = x
            x, around = wide, step * (size - 1) - pad
            widths = [around, around + more, *widths]
        return F.pad(x, widths)  # negative ones cut off


def _grouped(value: Tensor, groups: int) -> Tensor:
    """Make rows of [B, channels, features, *positions]."""
    value = value.flatten(3)
    count, channels, features, positions = value.shape
    value = value.reshape(count, groups, channels // groups * features, positions)
    return value.permute(1, 0, 3, 2).flatten(1, 2)


def patches(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Cut out what each position of a convolution sees: [B, C, *kernel, *positions]."""
    axes = range(2, 2 + len(kernel))
    for axis, size, stride, step in zip(axes, kernel, strides, dilation, strict=True):
        x = x.unfold(axis, (size - 1) * step + 1, stride)[..., ::step]
    count = len(kernel)
    order = (0, 1, *range(2 + count, 2 + 2 * count), *range(2, 2 + count))
    return x.permute(order)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of a table, chosen by index."""

    padding: int
    """The row that carries no derivative; negative: none."""
    one_hot: bool = True

    def inputs(self, x: Tensor) -> Tensor:
        """See `Form`; the index of padding is -1."""
        ids = x.reshape(-1)
        return ids if self.padding < 0 else ids.where(ids != self.padding, -1)

    def gradients(self, g: Tensor) -> Tensor:
        """See `Form`."""
        return g.reshape(1, -1, g.shape[-1])


@dataclass(frozen=True, slots=True)
class Added:
    """A bias by itself: the input is a one, the output its own axes together."""

    axes: tuple[int, ...]
    """Of what it is added to, that it varies along."""
    one_hot: bool = False

    def inputs(self, x: Tensor) -> Tensor:
        """See `Form`; of the sum itself, whose values do not matter."""
        rows = math.prod(n for i, n in enumerate(x.shape) if i not in self.axes)
        return torch.ones((1, rows, 1), dtype=x.dtype, device=x.device)

    def gradients(self, g: Tensor) -> Tensor:
        """See `Form`."""
        others: Sequence[int] = [i for i in range(g.ndim) if i not in self.axes]
        size = math.prod(g.shape[i] for i in self.axes)
        return g.permute(*others, *self.axes).reshape(1, -1, size)
