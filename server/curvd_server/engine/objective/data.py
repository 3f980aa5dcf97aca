"""Arrays as they arrive and mini-batches as they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvd.contract import DatasetSpec, Dtype
from curvd.errors import InvalidSpec
from curvd_server.engine.objective.chunked import chunks
from curvd_server.system import yield_point

Array = np.ndarray[Any, Any] | Tensor

TORCH_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT64: torch.float64,
    Dtype.BFLOAT16: torch.bfloat16,
}

_COPIED = 1 << 20
"""Elements that are copied in one step."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One fixed mini-batch."""

    start: int
    """Index of its first data point."""
    inputs: tuple[Tensor, ...]
    """Each ``[B, ...]``, in the order of `DatasetSpec.inputs`."""
    targets: Tensor
    """``[B, ...]``."""
    silent: bool = False
    """Whether it counts nothing: it is computed because others compute theirs meanwhile."""


def cut(
    arrays: Mapping[str, Array],
    data: DatasetSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prepare: Callable[[Tensor], Tensor],
    pin: bool = False,
    first: int = 0,
) -> tuple[Batch, ...]:
    """Cut the dataset into fixed mini-batches, the last one maybe smaller.

    Args:
        arrays: The arrays, by name, each with the leading axis ``N``.
        data: Which are inputs and targets, and the batch size.
        dtype: The dtype of floating point arrays.
        device: Where they go.
        prepare: Brings the targets, all of them, into the form that the loss wants.
        pin: Whether they are to lie in memory that a CUDA device reads by itself.
        first: Index of the first data point.

    Returns:
        The mini-batches in order.

    Raises:
        InvalidSpec: If arrays are missing or differ in length.
    """
    names = (*data.inputs, data.target)
    missing = [name for name in names if name not in arrays]
    if missing:
        msg = f"the dataset lacks {missing}; it has {sorted(arrays)}"
        raise InvalidSpec(msg, missing=missing)
    tensors: list[Tensor] = []
    for name in names:
        yield_point()
        tensor = tensor_of(arrays[name])
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        tensors.append(_placed(tensor, device, kind))
    lengths = {name: len(t) for name, t in zip(names, tensors, strict=True)}
    if len(set(lengths.values())) != 1 or not len(tensors[0]):
        msg = f"tensors of a dataset need one common length above 0, got {lengths}"
        raise InvalidSpec(msg, lengths=lengths)
    tensors[-1] = prepare(tensors[-1])
    if pin:
        tensors = [t.pin_memory() for t in tensors]
    *inputs, targets = (torch.split(t, data.batch_size) for t in tensors)
    return tuple(
        Batch(first + i * data.batch_size, tuple(t[i] for t in inputs), target)
        for i, target in enumerate(targets)
    )


def joined(batches: Sequence[Batch], count: int) -> tuple[Batch, ...]:
    """View `count` mini-batches at a time, slices of the same arrays, as one."""
    return tuple(_join(batches[i : i + count]) for i in range(0, len(batches), count))


def _join(batches: Sequence[Batch]) -> Batch:
    # Those that count nothing lie where one of the others does.
    batches = [b for b in batches if not b.silent] or batches[:1]

    def whole(parts: Sequence[Tensor]) -> Tensor:
        first, rows = parts[0], sum(len(p) for p in parts)
        return first.as_strided(
            (rows, *first.shape[1:]), first.stride(), first.storage_offset()
        )

    inputs = zip(*(b.inputs for b in batches), strict=True)
    targets = whole([b.targets for b in batches])
    first = batches[0]
    return Batch(first.start, tuple(map(whole, inputs)), targets, first.silent)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Take some data points of a mini-batch."""
    start = batch.start + (rows.start or 0)
    return Batch(start, tuple(t[rows] for t in batch.inputs), batch.targets[rows])


def tensor_of(array: Array) -> Tensor:
    """View an array as a tensor, sharing memory where it may be written to."""
    if isinstance(array, Tensor):
        return array.detach()
    # note: torch warns about read-only memory, which could be written through it.
    return torch.from_numpy(array if array.flags.writeable else _copied(array))


def _copied(array: Array) -> Array:
    """Copy an array, which may lie on a slow disk, in steps of long work."""
    own = np.empty(array.shape, array.dtype)
    here, there = own.reshape(-1), array.reshape(-1)
    for start in range(0, len(here), _COPIED):
        yield_point()
        here[start : start + _COPIED] = there[start : start + _COPIED]
    return own


def _placed(tensor: Tensor, device: torch.device, kind: torch.dtype) -> Tensor:
    """Bring a tensor somewhere, in steps of long work."""
    if tensor.dtype == kind and tensor.device == device:
        return tensor
    there = torch.empty(tensor.shape, dtype=kind, device=device)
    for chunk, values in chunks(there, tensor):
        chunk.copy_(values)
    return there


def exact(tensor: Tensor) -> Tensor:
    """Bring a tensor to the CPU, floating point ones in float64."""
    return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()
