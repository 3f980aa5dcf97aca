"""Answers of influence: all scores as they come, sums over groups, or the extremes."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import InfluenceOptions
from curvd.errors import InvalidSpec, InvalidVector
from curvd.tensors import chunks as wire
from curvd.tensors import safetensors_header
from curvd_server.service.query_call import QueryCall


class Sink(Protocol):
    """Takes scores, a block of queries after the other."""

    async def begin(self) -> None:
        """Say what comes."""

    async def take(self, scores: Tensor, unknown: Tensor) -> None:
        """Take those of the next queries, [m, N], and which of these have none, [m]."""

    async def skip(self, count: int) -> None:
        """Take note of queries that have none."""

    async def end(self) -> None:
        """Send what was not sent yet."""


def groups_of(
    array: NDArray[Any] | None, data_points: int, options: InfluenceOptions
) -> Tensor | None:
    """Judge which group each data point belongs to.

    Args:
        array: What travelled; None: nothing did.
        data_points: N.
        options: Which exclude groups.

    Returns:
        [N]; None if there are no groups.

    Raises:
        InvalidSpec: If only ends of the scores, or none, are asked for.
        InvalidVector: If it is of another shape, type or range.
    """
    if array is None:
        return None
    if array.dtype != np.int64 or array.shape != (data_points,):
        msg = f"groups are I64 [{data_points}], got {array.dtype} {list(array.shape)}"
        raise InvalidVector(msg, data_points=data_points)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= data_points:
        msg = f"groups are numbered from 0 to {data_points - 1} at most, got {low} to {high}"
        raise InvalidVector(msg, low=low, high=high)
    if options.top or options.self_only:
        msg = (
            f"groups exclude top and self_only, got top {options.top}; drop one of them"
        )
        raise InvalidSpec(msg, top=options.top)
    return torch.from_numpy(array)


def sink_of(
    call: QueryCall, options: InfluenceOptions, groups: Tensor | None, count: int
) -> Sink:
    """Choose what becomes of the scores.

    Args:
        call: The call.
        options: What is asked for.
        groups: [N] The group of each data point; None: each is its own.
        count: M.

    Returns:
        The sink.
    """
    if options.self_only:
        return _Nothing()
    if options.top:
        return _Extremes(call, min(options.top, call.data_points))
    return _Rows(call, groups, count)


class _Nothing:
    """Sends no scores."""

    async def begin(self) -> None:
        """Do nothing."""

    async def take(self, scores: Tensor, unknown: Tensor) -> None:
        """Do nothing."""

    async def skip(self, count: int) -> None:
        """Do nothing."""

    async def end(self) -> None:
        """Do nothing."""


class _Rows:
    """Sends all scores, or their sums over groups, as they come: [M, N] or [M, G].

    Args:
        call: The call.
        groups: [N] The group of each data point; None: each is its own.
        count: M.
    """

    def __init__(self, call: QueryCall, groups: Tensor | None, count: int) -> None:
        self._call, self._groups = call, groups
        width = call.data_points if groups is None else int(groups.max()) + 1
        self._shape = (count, width)

    async def begin(self) -> None:
        """Send the header of the file."""
        header = {"scores": safetensors_header.TensorHeader("F32", self._shape, 0)}
        await self._call.send(memoryview(safetensors_header.dump_header(header)))

    async def take(self, scores: Tensor, unknown: Tensor) -> None:
        """Send the next rows."""
        scores = scores.double().cpu()
        if self._groups is not None:
            sums = scores.new_zeros(len(scores), self._shape[1])
            scores = sums.index_add_(1, self._groups, scores)
        scores[unknown.cpu()] = torch.nan
        await self._send(scores.float().numpy())

    async def skip(self, count: int) -> None:
        """Send rows of NaN."""
        await self._send(np.full((count, self._shape[1]), np.nan, np.float32))

    async def end(self) -> None:
        """Do nothing: all was sent."""

    async def _send(self, rows: NDArray[np.float32]) -> None:
        for chunk in wire.pieces(wire.bytes_of(rows)):
            await self._call.send(chunk)


class _Extremes:
    """Keeps the k largest and the k smallest scores of each query.

    Args:
        call: The call.
        k: How many of either.
    """

    def __init__(self, call: QueryCall, k: int) -> None:
        self._call, self._k = call, k
        self._indices: list[NDArray[np.int64]] = []
        self._scores: list[NDArray[np.float32]] = []

    async def begin(self) -> None:
        """Do nothing: all is sent at the end."""

    async def take(self, scores: Tensor, unknown: Tensor) -> None:
        """Keep the ends of the next rows."""
        ends = [scores.topk(self._k, largest=largest) for largest in (True, False)]
        indices = torch.stack([e.indices for e in ends], 1)
        values = torch.stack([e.values for e in ends], 1).float()
        indices[unknown], values[unknown] = -1, torch.nan
        self._indices.append(indices.cpu().numpy())
        self._scores.append(values.cpu().numpy())

    async def skip(self, count: int) -> None:
        """Keep rows without data points."""
        shape = (count, 2, self._k)
        self._indices.append(np.full(shape, -1, np.int64))
        self._scores.append(np.full(shape, np.nan, np.float32))

    async def end(self) -> None:
        """Send what was kept."""
        await self._call.send_tensors({
            "indices": np.concatenate(self._indices),
            "top_scores": np.concatenate(self._scores),
        })
