"""Operands that do not travel: made from a formula, or stored before."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import convert_enums
from curvd.errors import InvalidSpec
from curvd.tensors import probes
from curvd.v1 import curvature_service_pb2 as curvature_pb

Columns = NDArray[Any]

_LARGEST = 2**63


class Probes:
    """Random columns of a seed; see docs/probes.md.

    Args:
        message: Which.
        size: P.
        dtype: Element type.

    Raises:
        InvalidSpec: If the seed or an index is out of range.
    """

    def __init__(
        self, message: curvature_pb.ProbeOperand, size: int, dtype: np.dtype[Any]
    ) -> None:
        self._distribution = convert_enums.distribution_from_proto(message.distribution)
        self._seed, self._first = message.seed, message.first_index
        self._count, self._size, self._dtype = message.columns, size, dtype
        for name, value in (
            ("seed", message.seed),
            ("first_index", message.first_index + max(0, message.columns - 1)),
        ):
            if value >= _LARGEST:
                msg = f"probe.{name} must stay below 2**63, got {value}"
                raise InvalidSpec(msg, **{name: value})

    @property
    def shape(self) -> tuple[int, ...]:
        """[P] or [K, P]."""
        return (self._count, self._size) if self._count else (self._size,)

    def columns(self, start: int, stop: int) -> Columns:
        """Make some of the columns.

        Args:
            start: Index of the first.
            stop: Index after the last.

        Returns:
            [stop - start, P]
        """
        indices = range(self._first + start, self._first + stop)
        return probes(
            self._distribution, self._seed, indices, self._size, dtype=self._dtype
        )


class Stored:
    """A vector that the session stores.

    Args:
        array: [P] or [K, P].
    """

    def __init__(self, array: Columns) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """[P] or [K, P]."""
        return self._array.shape

    def columns(self, start: int, stop: int) -> Columns:
        """Look at some of the columns.

        Args:
            start: Index of the first.
            stop: Index after the last.

        Returns:
            A view [stop - start, P]; its memory is the session's.
        """
        return self._array.reshape(-1, self._array.shape[-1])[start:stop]
