"""One table of the RPCs, read off the contract, for both sides.

Streams that carry tensors consist of *parts*: a part is either a protobuf message (a
header or a summary) or a `memoryview` of raw chunk bytes. A unary message with tensors
is `Framed`: the message, and the bytes beside it. Bytes are framed by hand, because
protobuf copies ``bytes`` fields once more in each direction; what goes over the wire is
identical (tests/contract/test_rpcs.py crosses both ways).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message import Message

from curvd.v1 import (
    curvature_service_pb2,
    query_service_pb2,
    session_service_pb2,
)


@dataclass(frozen=True, slots=True)
class Framed:
    """A message whose field 2, ``tensors``, is beside it."""

    message: Any
    tensors: tuple[memoryview, ...]
    """Its bytes, in order; one view if they were received."""


Part = Message | memoryview
"""What a stream carries: a message, or the bytes of one chunk."""
Joined = tuple[memoryview, ...]
"""Chunks that follow one another, and travel as one."""

_BYTES_FIELD = 2
BYTES_TAG = bytes([_BYTES_FIELD << 3 | 2])
"""What stands before the length of a chunk."""
_LENGTH_DELIMITED = 2


@dataclass(frozen=True, slots=True)
class Codec:
    """Serialises and parses the messages of one direction of one RPC."""

    message: type[Message]
    bulk: bool = False
    """Whether the message is a oneof of header, chunk and summary."""
    framed: bool = False
    """Whether it has tensors beside it."""

    def dump(self, part: Part | Framed | Joined) -> bytes:
        """Serialise a part; a chunk is copied exactly once.

        Args:
            part: A message, a chunk's bytes if the stream is bulk, in one piece or in
                several, or both if framed.

        Returns:
            The bytes of the protobuf message.
        """
        return b"".join(self.views(part))

    def views(self, part: Part | Framed | Joined) -> tuple[memoryview, ...]:
        """Serialise a part without copying its tensors.

        Args:
            part: The part, as for `dump`.

        Returns:
            The bytes of the protobuf message, in order.
        """
        if isinstance(part, memoryview):
            return memoryview(BYTES_TAG + _varint(part.nbytes)), part
        if isinstance(part, tuple):
            size = sum([view.nbytes for view in part])
            return memoryview(BYTES_TAG + _varint(size)), *part
        if isinstance(part, Framed):
            rest = part.message.SerializeToString()
            size = sum([view.nbytes for view in part.tensors])
            head = b"".join((rest, BYTES_TAG, _varint(size)))
            return memoryview(head), *part.tensors
        return (memoryview(part.SerializeToString()),)

    def load(self, data: bytes | memoryview) -> Part | Framed:
        """Parse a message; the inverse of `dump`.

        Args:
            data: The bytes of one protobuf message.

        Returns:
            A view of the chunk's bytes if it is a chunk, else the message.
        """
        if self.framed:
            return self._load_framed(data)
        if self.bulk and data[:1] == BYTES_TAG:
            start, size = read_varint(data, 1)
            if start + size == len(data):
                return memoryview(data)[start:]
        message: Any = _parsed(self.message, data)
        # Another order of fields, or a repeated chunk: legal protobuf, only slower.
        if self.bulk and message.WhichOneof("part") == "chunk":
            return memoryview(message.chunk)
        return cast("Message", message)

    def _load_framed(self, data: bytes | memoryview) -> Framed:
        """Take the tensors out, and let protobuf parse what is left."""
        view, rest, tensors, at = memoryview(data), [], memoryview(b""), 0
        while at < len(data):
            tag = data[at]
            start, size = read_varint(data, at + 1)
            if tag & 7 != _LENGTH_DELIMITED or tag > 0x7F or size < 0:
                # Not as we write it, or malformed: protobuf decides.
                message: Any = _parsed(self.message, data)
                return Framed(message, (memoryview(message.tensors),))
            if tag == BYTES_TAG[0]:
                tensors = view[start : start + size]
            else:
                rest.append(view[at : start + size])
            at = start + size
        if at > len(data):
            rest = [view]  # cut off: protobuf says so
        return Framed(self.message.FromString(b"".join(rest)), (tensors,))


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method of the contract."""

    service: str
    """Full name, for example ``curvd.v1.CurvatureService``."""
    name: str
    client_streams: bool
    server_streams: bool
    request: Codec
    response: Codec

    @property
    def path(self) -> str:
        """The HTTP/2 path."""
        return f"/{self.service}/{self.name}"

    @property
    def shape(self) -> str:
        """``unary_unary``, ``stream_unary``, ``unary_stream`` or ``stream_stream``.

        The name of the channel method and of the handler factory in grpcio.
        """
        ends = (
            "stream" if s else "unary"
            for s in (self.client_streams, self.server_streams)
        )
        return "_".join(ends)


def _codec(descriptor: Descriptor) -> Codec:
    field = descriptor.fields_by_number.get(_BYTES_FIELD)
    name = "" if field is None or field.type != field.TYPE_BYTES else field.name
    return Codec(
        message_factory.GetMessageClass(descriptor),
        bulk=name == "chunk",
        framed=name == "tensors",
    )


def _rpc(method: MethodDescriptor) -> Rpc:
    return Rpc(
        service=method.containing_service.full_name,
        name=method.name,
        client_streams=method.client_streaming,
        server_streams=method.server_streaming,
        request=_codec(method.input_type),
        response=_codec(method.output_type),
    )


RPCS: Mapping[str, Rpc] = {
    method.name: _rpc(method)
    for file in (session_service_pb2, curvature_service_pb2, query_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every method of the contract by its name, which is unique across services."""
BY_PATH: Mapping[str, Rpc] = {rpc.path: rpc for rpc in RPCS.values()}
"""The same by their HTTP/2 paths."""


def _parsed(kind: type[Message], data: bytes | memoryview) -> Any:
    # It takes any buffer; the stubs of protobuf know only bytes.
    return kind.FromString(cast("bytes", data))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes | memoryview, start: int) -> tuple[int, int]:
    """Read a varint of at most 5 bytes.

    Args:
        data: Where to read.
        start: Index of its first byte.

    Returns:
        Index after its last byte, and its value; (start, -1) if it is malformed.
    """
    value = 0
    for i, byte in enumerate(data[start : start + 5]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return start + i + 1, value
    return start, -1
