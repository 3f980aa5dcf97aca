"""One table of the RPCs, read off the contract, for both sides.

Streams that carry tensors consist of *parts*: a part is either a protobuf message (a
header or a summary) or a `memoryview` of raw chunk bytes. Chunk messages are framed
by hand, because protobuf copies ``bytes`` fields once more in each direction; what
goes over the wire is identical (tests/client/test_rpcs.py crosses both ways).
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

Part = Message | memoryview
"""What a stream carries: a message, or the bytes of one chunk."""

_CHUNK_FIELD = 2
_CHUNK_TAG = bytes([_CHUNK_FIELD << 3 | 2])


@dataclass(frozen=True, slots=True)
class Codec:
    """Serialises and parses the messages of one direction of one RPC."""

    message: type[Message]
    bulk: bool
    """Whether the message is a oneof of header, chunk and summary."""

    def dump(self, part: Part) -> bytes:
        """Serialise a part; a chunk is copied exactly once.

        Args:
            part: A message, or a chunk's bytes if the stream is bulk.

        Returns:
            The bytes of the protobuf message.
        """
        if isinstance(part, memoryview):
            return b"".join((_CHUNK_TAG, _varint(part.nbytes), part))
        return part.SerializeToString()

    def load(self, data: bytes) -> Part:
        """Parse a message; the inverse of `dump`.

        Args:
            data: The bytes of one protobuf message.

        Returns:
            A view of the chunk's bytes if it is a chunk, else the message.
        """
        if self.bulk and data[:1] == _CHUNK_TAG:
            start, size = _read_varint(data, 1)
            if start + size == len(data):
                return memoryview(data)[start:]
        message: Any = self.message.FromString(data)
        # Another order of fields, or a repeated chunk: legal protobuf, only slower.
        if self.bulk and message.WhichOneof("part") == "chunk":
            return memoryview(message.chunk)
        return cast("Message", message)


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
    chunk = descriptor.fields_by_number.get(_CHUNK_FIELD)
    bulk = chunk is not None and chunk.name == "chunk"
    return Codec(message_factory.GetMessageClass(descriptor), bulk)


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


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, start: int) -> tuple[int, int]:
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
