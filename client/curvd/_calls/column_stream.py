"""Products of many columns, which go on at the first column that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from curvd._calls.tensor_stream import TensorStream, Wanted, expecting, widened
from curvd.contract import Rpc
from curvd.errors import CurvdError, VersionMismatch
from curvd.tensors import Buffer, Operand, chunks, safetensors_header

T = TypeVar("T")


class ColumnStream(TensorStream[T]):
    """A product of K columns, which goes on at the first column that is missing.

    Args:
        rpc: MatMat.
        header: What to compute.
        operand: What to multiply; None if it does not travel.
        wanted: The result, [K, P].
        block: Columns to hand out together as soon as they are there; 0: all at the
            end, in one array. Blocks are not checked against a checksum.
    """

    def __init__(
        self,
        rpc: Rpc,
        header: Any,
        operand: Operand | None,
        wanted: Wanted[T],
        *,
        block: int = 0,
    ) -> None:
        super().__init__(rpc, header, operand, wanted)
        assert wanted.shape is not None
        self._columns, size = wanted.shape
        self._column_bytes = size * safetensors_header.ITEM_BYTES[wanted.travels_as]
        self._block, self._version = block, 0
        self._original = type(header)()
        self._original.CopyFrom(header)

    def recovers(self, error: BaseException) -> bool:
        """Begin anew if the parameters changed, and nothing was handed out."""
        ours = self._first > 0 and not self._original.HasField("expected_version")
        if isinstance(error, VersionMismatch) and ours and not self._block:
            self._held = 0
            return True
        return False

    def feed(self, part: Any) -> Iterator[Any]:
        """Receive the next columns.

        Yields:
            Blocks [k, P], if they were asked for.

        Raises:
            Internal: If the server breaks the contract.
        """
        if not self._block or not isinstance(part, memoryview):
            yield from super().feed(part)
            return
        try:
            self._assembler = self._assembler or self._receiver()
            for piece in self._assembler.feed(part):
                self._held += piece.nbytes
                own, dtype = self.wanted.travels_as, self.wanted.dtype
                rows = widened(piece, own, dtype, self.allocate)
                yield rows.reshape(piece.nbytes // self._column_bytes, -1)
            self.progressed()
        except CurvdError as error:
            raise self._malformed(error) from error

    def _resume(self) -> None:
        """Ask for the columns that are not there."""
        self._first = self._held // (self._column_bytes or 1)
        if self._original.operand.WhichOneof("source") == "stored":
            self._first = 0  # there is no part of it to ask for
        self._held = self._first * self._column_bytes
        self._header.CopyFrom(self._original)
        self._header.checksum = not self._block and (
            self.wanted.verify or self._first > 0
        )
        if self._first:
            # Another operand, so another request; but of the same parameter version.
            self._header.request_id += f".{self._first}"
            self._header.expected_version = self._version
            if self._original.operand.HasField("probe"):
                self._header.operand.probe.first_index += self._first
                self._header.operand.probe.columns -= self._first

    def _arrived(self) -> int:
        # Blocks are counted when they are handed out.
        return 0 if self._block else super()._arrived()

    def _leave_out(self, nbytes: int) -> None:
        if nbytes:
            why = f"it leaves out {nbytes} bytes, and nobody asked for that"
            raise self._malformed(why)
        self._version = self._result_header.version

    def _payload(self) -> Buffer:
        return self._raw[self._held :]

    def _receiver(self) -> chunks.Assembler:
        assert self.wanted.shape is not None
        shape = (self._columns - self._first, self.wanted.shape[1])
        if not self._block:
            return self._receiving(shape)
        return chunks.Assembler(
            expecting(
                self.rpc,
                self.wanted.travels_as,
                shape,
                self._block * self._column_bytes,
            ),
            max_bytes=self.wanted.nbytes,
            allocate=self.allocate,
        )
