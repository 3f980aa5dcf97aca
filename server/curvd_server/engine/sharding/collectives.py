"""To gather a whole of slices, and to scatter a sum: each is the other's derivative.

With ``s_r`` the slice of process ``r``, ``gather`` gives every process ``(s_0, s_1, ...)``,
and ``scatter`` of each process' ``x_r`` gives process ``r`` the slice ``r`` of ``sum x``.
As linear maps between what all processes hold together they are transposes, so each is
the backward of the other and, being linear, the forward derivative of itself.

Wrappers of torch do not serve: in FSDP2 and DDP gradients are made by hooks outside the
graph, which are not differentiated again, and DTensor has no second derivative of what
attention does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvd_server.engine.objective import Array, tensor_of
from curvd_server.engine.sharding.group import Group


@dataclass(frozen=True, slots=True)
class Shards:
    """How one tensor is cut: flat, filled up with zeros, into slices of one length."""

    shape: torch.Size
    group: Group
    """The processes that have one each."""
    index: int = 0
    """Which of the group's tensors it is."""

    @property
    def length(self) -> int:
        """Elements of a slice."""
        return length_of(self.shape.numel(), self.group.world)

    def cut(self, whole: Array, rank: int | None = None) -> Tensor:
        """Copy one slice.

        Args:
            whole: The tensor, or an array, of which no more than the slice is read.
            rank: Whose; None: this process'.

        Returns:
            ``[length]``.
        """
        at = self.group.rank if rank is None else rank
        flat = whole.reshape(-1)[at * self.length : (at + 1) * self.length]
        own = tensor_of(flat)
        filled = own.new_zeros(self.length)
        filled[: len(own)] = own
        return filled

    def gathered(self, shard: Tensor) -> Tensor:
        """Put the slices of all processes together; a collective.

        Args:
            shard: ``[length]``, this process' slice.

        Returns:
            The tensor, in memory of its own.
        """
        flat = self.group.gather(shard, self.index)
        return flat[: self.shape.numel()].view(self.shape)

    def scattered(self, whole: Tensor) -> Tensor:
        """Add what the processes have, and take this one's slice; a collective.

        Slices change places, and each process adds its own in the order of ranks, so that
        bits do not depend on how a backend adds.

        Args:
            whole: This process' summand, of the tensor's shape.

        Returns:
            ``[length]``.
        """
        flat = whole.new_zeros(self.group.world * self.length)
        flat[: whole.numel()] = whole.reshape(-1)
        first, *others = self.group.exchange(flat, self.index)
        total: Tensor = first.clone()
        for other in others:
            total += other
        return total

    def elements(self, row: int) -> range:
        """List which elements of this process' slice lie in a row of the tensor.

        Args:
            row: Along the first axis.
        """
        width, start = self.shape[1:].numel(), self.group.rank * self.length
        first, last = row * width - start, (row + 1) * width - start
        return range(max(first, 0), max(0, min(last, self.length)))


def length_of(size: int, world: int) -> int:
    """Say how many elements a slice has.

    Args:
        size: Elements of the tensor.
        world: Processes that share it.
    """
    return -(-size // world)


class Gather(torch.autograd.Function):
    """Differentiates `Shards.gathered`; arguments are those."""

    @staticmethod
    def forward(shard: Tensor, shards: Shards) -> Tensor:
        """Gather."""
        return shards.gathered(shard)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Remember how it is cut."""
        ctx.shards = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Scatter."""
        return scatter(gradient, ctx.shards), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        """Gather."""
        return gather(tangent, ctx.shards)


class Scatter(torch.autograd.Function):
    """Differentiates `Shards.scattered`; arguments are those."""

    @staticmethod
    def forward(whole: Tensor, shards: Shards) -> Tensor:
        """Scatter."""
        return shards.scattered(whole)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Remember how it is cut."""
        ctx.shards = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gather."""
        return gather(gradient, ctx.shards), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        """Scatter."""
        return scatter(tangent, ctx.shards)


def gather(shard: Tensor, shards: Shards) -> Tensor:
    """Put the slices of all processes together, differentiably; see `Shards.gathered`."""
    whole: Tensor = Gather.apply(shard, shards)  # type: ignore[no-untyped-call]
    return whole


def scatter(whole: Tensor, shards: Shards) -> Tensor:
    """Add and take a slice, differentiably; see `Shards.scattered`."""
    shard: Tensor = Scatter.apply(whole, shards)  # type: ignore[no-untyped-call]
    return shard
