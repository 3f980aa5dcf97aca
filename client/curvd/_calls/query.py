"""A query as a call without I/O: a stream of progress that ends with a result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from curvd._calls.base import Call
from curvd._calls.query_answer import Answer
from curvd.contract import RPCS, Part, QueryProgress
from curvd.errors import CurvdError, Internal
from curvd.tensors import Operand, chunks, safetensors_header

T = TypeVar("T")
Read = Callable[[Answer], T]
"""Makes a result."""
Observe = Callable[[QueryProgress], None]


class QueryCall(Call[T]):
    """A stream of progress that ends with a result.

    Args:
        name: The name of the method.
        request: The request, or the header of the request's stream.
        read: Makes the result.
        operands: Tensors to send, by name, with their shapes.
        arrays: Tensors to send, by name, of any type, in place of operands.
        max_bytes: Largest result.
        total: Products at most; None: unknown.
    """

    def __init__(
        self,
        name: str,
        request: Message,
        read: Read[T],
        *,
        operands: Mapping[str, tuple[Operand, tuple[int, ...]]] | None = None,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        max_bytes: int = 0,
        total: int | None = None,
    ) -> None:
        super().__init__(RPCS[name])
        self._message, self._read = request, read
        self._operands, self._max_bytes = operands, max_bytes
        self._arrays = arrays
        self.observe: Observe = lambda progress: None
        """Called with the progress as it arrives."""
        self._latest: QueryProgress | None = None
        self._total = total

    def restart(self) -> None:
        """Ask for the whole result again."""
        super().restart()
        self._header: Any = None
        self._summary: Any = None
        self._payload = np.empty(0, np.uint8)
        self._assembler: chunks.Assembler | None = None
        self._history: list[QueryProgress] = []

    def feed(self, part: Part) -> Iterator[Any]:
        """Take one part of the response."""
        if isinstance(part, memoryview):
            self._assembler = self._assembler or chunks.Assembler(
                max_bytes=self._max_bytes
            )
            try:
                for piece in self._assembler.feed(part):
                    self._payload = piece
            except CurvdError as error:
                raise self._malformed(error) from error
        else:
            kind = part.WhichOneof("part")
            if kind == "header":
                self._header = getattr(part, kind)
            elif kind == "summary":
                self._summary = getattr(part, kind)
            elif kind == "progress":
                self._latest = _progress(getattr(part, kind), self._total)
                self._history.append(self._latest)
                self.observe(self._latest)
        yield from ()

    def conclude(self) -> None:
        """Check that nothing is missing.

        Raises:
            Internal: If something is.
        """
        if self._header is None or self._summary is None:
            why = "the header or the summary is missing"
            raise self._malformed(why)
        try:
            tensors = self._assembler.finish() if self._assembler else {}
            arrays = {n: t.view(self._payload) for n, t in tensors.items()}
            history = tuple(self._history)
            answer = Answer(self._header, self._summary, arrays, history)
            self._result = self._read(answer)
        except (CurvdError, LookupError) as error:
            raise self._malformed(error) from error
        self.done = True

    def result(self) -> T:
        """Hand out the result."""
        return self._result

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Add to whatever ends the query early how far it was: the best so far."""
        try:
            yield
        except BaseException as stopped:
            if self._latest is not None:
                stopped.add_note(
                    f"{self.rpc.name} had {self._latest} when it was stopped"
                )
            raise

    def _request(self) -> Iterator[Part]:
        if self._arrays is not None:
            yield self.rpc.request.message(header=self._message)
            if self._arrays:
                yield from chunks.chunks(self._arrays)
            return
        if self._operands is None:
            yield self._message
            return
        yield self.rpc.request.message(header=self._message)
        header, start = {}, 0
        for name, (value, shape) in self._operands.items():
            dtype = "F64" if value.dtype == np.float64 else "F32"
            header[name] = safetensors_header.TensorHeader(dtype, shape, start)
            start = header[name].stop
        yield memoryview(safetensors_header.dump_header(header))
        yield from chunks.packed(
            chunks.bytes_of(piece)
            for value, _ in self._operands.values()
            for piece in value.values()
        )

    def _malformed(self, why: object) -> Internal:
        msg = f"the server's answer to {self.rpc.name} breaks the contract: {why!r}"
        return Internal(msg, rpc=self.rpc.name)


def _progress(message: Any, total: int | None) -> QueryProgress:
    return QueryProgress(
        iteration=message.iteration,
        products=message.products,
        estimates=tuple(message.estimates),
        residuals=tuple(message.residuals),
        elapsed_s=message.elapsed_s,
        total=total,
        share=message.share if message.HasField("share") else None,
    )
