"""What a blob is: a safetensors file under the SHA-256 of its bytes, judged and read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from curvd.errors import InvalidSpec, InvalidTensors, LimitExceeded
from curvd.tensors import Buffer, safetensors_header

_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_digest(digest: str) -> str:
    """Refuse what is no SHA-256, and so could be a path.

    Args:
        digest: The digest that a caller gave, not checked yet.

    Returns:
        The digest.

    Raises:
        InvalidSpec: Unless it is 64 lower-case hexadecimal digits.
    """
    if _DIGEST.fullmatch(digest) is None:
        msg = f"digest must be 64 lower-case hexadecimal digits, got {digest[:80]!r}"
        raise InvalidSpec(msg, digest=digest[:80])
    return digest


@dataclass(frozen=True)
class Blob:
    """A complete safetensors file, in memory."""

    digest: str
    header: safetensors_header.Header
    arrays: Mapping[str, NDArray[Any]]
    """Tensor name to a view of a snapshot of the file, which all who have the blob open
    share; BF16 as uint16 bits. Writes stay private."""
    total_bytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What its header says beside the tensors."""


def read_header(data: Buffer) -> tuple[safetensors_header.Header, int]:
    """Read and check the header of a safetensors file.

    Args:
        data: [bytes] The file.

    Returns:
        The header, and the offset of the payload.

    Raises:
        InvalidTensors: If it is malformed, or the payload has another size.
        LimitExceeded: If it is too large.
    """
    length, size = int.from_bytes(data[:8].tobytes(), "little"), data.nbytes
    start = 8 + length
    if length > safetensors_header.MAX_HEADER_BYTES:
        msg = (
            f"the safetensors header announces {length} bytes; the limit is "
            f"{safetensors_header.MAX_HEADER_BYTES}. Send fewer tensors, or flatten them into one"
        )
        raise LimitExceeded(
            msg, header_bytes=length, limit=safetensors_header.MAX_HEADER_BYTES
        )
    if size < start:
        msg = f"the file has {size} bytes and ends within its header of {start}"
        raise InvalidTensors(msg, total_bytes=size)
    header = safetensors_header.load_header(data[8:start].tobytes())
    if size - start != safetensors_header.payload_bytes(header):
        msg = (
            f"the file has {size - start} bytes of payload, but its header describes "
            f"{safetensors_header.payload_bytes(header)}"
        )
        raise InvalidTensors(msg, payload_bytes=size - start)
    return header, start
