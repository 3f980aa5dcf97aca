"""Data that is too large for the device: it stays on the host, and travels one ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch

from curvd_server.engine.objective.data import Batch, joined


class Streamed(Sequence[Batch]):
    """Mini-batches on the host that are on the device when they are asked for.

    Asking for one starts the transfer of the next, on a stream of its own, so that it
    travels while the device computes. Not thread-safe, like everything of a device.

    Args:
        host: The mini-batches, slices of the same arrays.
        device: Where they are used.
    """

    def __init__(self, host: Sequence[Batch], device: torch.device) -> None:
        self.host = host
        self._device = device
        self._ahead: tuple[int, Batch] | None = None
        stream: Any = torch.cuda.Stream
        self._stream = stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.host)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Streamed: ...

    def __getitem__(self, index: int | slice) -> Batch | Streamed:
        """Bring a mini-batch to the device; a slice of them stays where it is."""
        if isinstance(index, slice):
            return Streamed(self.host[index], self._device)
        at = range(len(self.host))[index]
        if self._ahead is not None and self._ahead[0] == at:
            batch = self._arrived(self._ahead[1])
        else:
            batch = self._arrived(self._sent(at))
        following = (at + 1) % len(self.host)  # the next pass begins with the first
        self._ahead = (following, self._sent(following)) if following != at else None
        return batch

    def streaming(self, host: Sequence[Batch]) -> Streamed:
        """Bring other mini-batches to the same device."""
        return Streamed(host, self._device)

    def joined(self, count: int) -> Streamed:
        """Take `count` mini-batches at a time as one; nothing moves."""
        return Streamed(joined(self.host, count), self._device)

    def _sent(self, at: int) -> Batch:
        """Start a transfer."""
        batch = self.host[at]
        with torch.cuda.stream(self._stream):  # nothing if there is none
            inputs = (t.to(self._device, non_blocking=True) for t in batch.inputs)
            targets = batch.targets.to(self._device, non_blocking=True)
            return Batch(batch.start, tuple(inputs), targets, batch.silent)

    def _arrived(self, batch: Batch) -> Batch:
        """Let the computation wait for a transfer, and the memory for the computation."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in (*batch.inputs, batch.targets):
                tensor.record_stream(current)
        return batch


def streamed_as(like: Sequence[Batch], host: Sequence[Batch]) -> Sequence[Batch]:
    """Have other mini-batches come to the device as some do.

    Args:
        like: Those that are there, or come when they are asked for.
        host: The others, where those lie.
    """
    return like.streaming(host) if isinstance(like, Streamed) else tuple(host)


def on_host(data: Sequence[Batch]) -> Sequence[Batch]:
    """Look at mini-batches without moving any; for their shapes."""
    return data.host if isinstance(data, Streamed) else data
