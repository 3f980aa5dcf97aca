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
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shards:
    """How one tensor is cut: flat, filled up with zeros, into slices of one length."""

    shape: torch.Size
    world: int
    """Processes of the group, the default one of `torch.distributed`."""

    @property
    def length(self) -> int:
        """Elements of a slice."""
        return -(-self.shape.numel() // self.world)

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """Copy one slice.

        Args:
            whole: The tensor.
            rank: Whose.

        Returns:
            ``[length]``.
        """
        flat = whole.detach().reshape(-1)
        own = flat[rank * self.length : (rank + 1) * self.length]
        filled = whole.new_zeros(self.length)
        filled[: len(own)] = own
        return filled

    def gathered(self, shard: Tensor) -> Tensor:
        """Put the slices of all processes together; a collective.

        Args:
            shard: ``[length]``, this process' slice.

        Returns:
            The tensor, in memory of its own.
        """
        flat = shard.new_empty(self.world * self.length)
        dist.all_gather(list(torch.split(flat, self.length)), shard.contiguous())
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
        flat = whole.new_zeros(self.world * self.length)
        flat[: whole.numel()] = whole.reshape(-1)
        arrived = torch.empty_like(flat)
        dist.all_to_all_single(arrived, flat)
        first, *others = arrived.view(self.world, self.length)
        total: Tensor = first.clone()
        for other in others:
            total += other
        return total


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
