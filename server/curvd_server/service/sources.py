"""Where an operand comes from: the request, a formula, or the session.

A source is chosen once, from the header of the request. It tells the operand's shape as
soon as that is known, and then yields blocks of columns as they are there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Dtype, ParameterLayout, convert_enums
from curvd.errors import InvalidSpec
from curvd.tensors import Buffer, half_precision, probes, safetensors_header
from curvd.tensors import chunks as wire
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.config import LimitsConfig
from curvd_server.service import validation
from curvd_server.service.dependencies import ProductDependencies, off_the_loop
from curvd_server.service.streams import Chunks
from curvd_server.sessions import Lease

Columns = NDArray[Any]
Announce = Callable[[tuple[int, ...]], int]
"""Is told an operand's shape, [P] or [K, P], once and before anything is allocated for
it; returns how many columns a block has, or raises to refuse the operand."""

Arrived = Callable[[Buffer, int], None]
"""Is shown a block's memory, and how many bytes of it have come."""

_LARGEST = 2**63


def ignored(block: Buffer, stop: int) -> None:
    """Look at nothing of what came."""


class Source(Protocol):
    """Yields the columns of an operand."""

    @property
    def reusable(self) -> bool:
        """Whether a result may take the memory of its block, once that is multiplied."""

    def blocks(self, announce: Announce) -> AsyncIterator[Columns]:
        """Yield the operand's columns in order, block by block: [k, P].

        Args:
            announce: Told the shape first.
        """


@dataclass(frozen=True, slots=True)
class Expected:
    """What an operand must look like."""

    matrix: bool | None
    """Whether [K, P] is wanted, else [P]; None: either."""
    layout: ParameterLayout
    dtype: Dtype
    limits: LimitsConfig

    @property
    def vector_dtype(self) -> np.dtype[Any]:
        """Element type of the columns."""
        return validation.vector_dtype(self.dtype)

    def check_header(self, header: safetensors_header.Header) -> None:
        """Refuse an operand by the header of its file."""
        validation.check_operand(
            header,
            matrix=self.matrix,
            layout=self.layout,
            dtype=self.dtype,
            limits=self.limits,
        )

    def blocks(self, shape: tuple[int, ...], announce: Announce) -> Iterator[slice]:
        """Cut an operand that is there as a whole into blocks.

        Args:
            shape: Its shape, which is checked.
            announce: Told the shape first.

        Yields:
            The columns of each block.
        """
        columns = validation.check_shape(
            shape,
            matrix=self.matrix,
            layout=self.layout,
            dtype=self.dtype,
            limits=self.limits,
        )
        at_once = announce(shape)
        for start in range(0, columns, at_once):
            yield slice(start, min(start + at_once, columns))


def name_of(header: curvature_pb.ProductHeader) -> str:
    """Say where a header has its operand come from.

    Args:
        header: The header of a product.

    Returns:
        ``inline``, ``probe`` or ``stored``.
    """
    return header.operand.WhichOneof("source") or "inline"


async def check_chunks(header: curvature_pb.ProductHeader, chunks: Chunks) -> None:
    """Make sure that no operand comes beside one that does not travel.

    Args:
        header: The header of a product.
        chunks: What follows it; awaited only if nothing should.

    Raises:
        InvalidSpec: If something follows.
    """
    source = name_of(header)
    if source != "inline" and not await chunks.is_empty():
        msg = f"the operand is {source}; no chunks may follow the header"
        raise InvalidSpec(msg, source=source)


def source_of(
    header: curvature_pb.ProductHeader,
    chunks: Chunks,
    lease: Lease,
    dependencies: ProductDependencies,
    *,
    matrix: bool | None,
    arrived: Arrived = ignored,
) -> Source:
    """Choose where a product's operand comes from.

    Args:
        header: The header of the product.
        chunks: What follows it.
        lease: The lease of the session.
        dependencies: Limits, and memory for what arrives.
        matrix: Whether the operand is [K, P]; None: either.
        arrived: Looks at what travels as it is, as it comes.

    Returns:
        The source.

    Raises:
        VectorNotFound: If the session stores no such vector.
    """
    info = lease.info
    expected = Expected(matrix, info.layout, info.dtype, dependencies.limits)
    operand = header.operand
    match name_of(header):
        case "probe":
            return Probes(operand.probe, expected)
        case "stored":
            return Stored(lease.vectors.get(operand.stored).array, expected)
        case _:
            return Inline(chunks, expected, dependencies.pool.take, arrived)


class Inline:
    """An operand that comes after the header, as a safetensors file.

    Args:
        chunks: The bytes of the file.
        expected: What is accepted.
        allocate: Returns memory of so many bytes for a block.
        arrived: Looks at blocks that travel in the type that is computed in, piece by
            piece, when they were found to be finite.
    """

    reusable = True

    def __init__(
        self,
        chunks: Chunks,
        expected: Expected,
        allocate: Callable[[int], Buffer],
        arrived: Arrived = ignored,
    ) -> None:
        self._chunks, self._expected, self._allocate = chunks, expected, allocate
        self._arrived = arrived
        self._dtype = expected.vector_dtype
        self._travels_as = ""
        self._checked = 0

    async def blocks(self, announce: Announce) -> AsyncIterator[Columns]:
        """Receive the columns, checked: [k, P].

        Args:
            announce: Told the shape first.
        """
        size = self._expected.layout.size

        def accept(header: safetensors_header.Header) -> int:
            self._expected.check_header(header)
            self._travels_as = header["v"].dtype
            item = safetensors_header.ITEM_BYTES[self._travels_as]
            return announce(header["v"].shape) * size * item

        assembler = wire.Assembler(
            accept,
            max_bytes=self._expected.limits.operand_bytes,
            allocate=self._allocate,
            arrived=self._check,
        )
        with self._chunks.received_into(assembler.buffer_for, assembler.landed):
            async for chunk in self._chunks:
                for piece in assembler.feed(chunk):
                    columns = await self._widened(piece)
                    del piece
                    self._checked += columns.size
                    yield columns.reshape(-1, size)
                    del columns
        assembler.finish()

    def _check(self, piece: Buffer, start: int, stop: int) -> None:
        """Refuse NaN and infinity while the bytes are in the cache."""
        if self._travels_as in half_precision.NARROW:
            return  # they are looked at when they are widened
        # A value that is cut by a message is looked at when its rest is there.
        first, last = start // self._dtype.itemsize, stop // self._dtype.itemsize
        values = piece.view(self._dtype)[first:last]
        validation.check_finite(
            values, layout=self._expected.layout, first=self._checked + first
        )
        self._arrived(piece, stop)

    async def _widened(self, piece: Buffer) -> Columns:
        if self._travels_as not in half_precision.NARROW:
            return piece.view(self._dtype)
        count = piece.nbytes // half_precision.ITEM_BYTES
        values = self._allocate(count * self._dtype.itemsize).view(self._dtype)

        def work(out: Columns) -> None:
            half_precision.widen(piece, self._travels_as, out)
            validation.check_finite(
                out, layout=self._expected.layout, first=self._checked
            )

        await off_the_loop(work, values)
        return values


class Nothing:
    """No operand: the result is there already, so there is no shape to tell."""

    reusable = False

    async def blocks(self, announce: Announce) -> AsyncIterator[Columns]:
        """Yield nothing.

        Args:
            announce: Not called.
        """
        return
        yield  # makes it a generator


class Probes:
    """Random columns of a seed; see docs/probes.md.

    Args:
        message: Distribution, seed and indices.
        expected: What is accepted.

    Raises:
        InvalidSpec: If the seed or an index is out of range.
    """

    reusable = True

    def __init__(self, message: curvature_pb.ProbeOperand, expected: Expected) -> None:
        self._distribution = convert_enums.distribution_from_proto(message.distribution)
        self._message, self._expected = message, expected
        for name, value in (
            ("seed", message.seed),
            ("first_index", message.first_index + max(0, message.columns - 1)),
        ):
            if value >= _LARGEST:
                msg = f"probe.{name} must stay below 2**63, got {value}"
                raise InvalidSpec(msg, **{name: value})

    async def blocks(self, announce: Announce) -> AsyncIterator[Columns]:
        """Make the columns: [k, P].

        Args:
            announce: Told the shape first.
        """
        count, size = self._message.columns, self._expected.layout.size
        # A matrix may have no columns: its stream broke after the last one.
        shape = (count, size) if count or self._expected.matrix else (size,)
        for block in self._expected.blocks(shape, announce):
            yield await asyncio.to_thread(self._columns, block)

    def _columns(self, block: slice) -> Columns:
        first = self._message.first_index
        return probes(
            self._distribution,
            self._message.seed,
            range(first + block.start, first + block.stop),
            self._expected.layout.size,
            dtype=self._expected.vector_dtype,
        )


class Stored:
    """A vector that the session stores, whose memory stays the session's.

    Args:
        array: [P] or [K, P].
        expected: What is accepted.
    """

    reusable = False

    def __init__(self, array: Columns, expected: Expected) -> None:
        self._array, self._expected = array, expected

    async def blocks(self, announce: Announce) -> AsyncIterator[Columns]:
        """Look at the columns: [k, P].

        Args:
            announce: Told the shape first.
        """
        array = self._array
        for block in self._expected.blocks(array.shape, announce):
            yield array.reshape(-1, array.shape[-1])[block]
