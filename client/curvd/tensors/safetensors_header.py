"""The header of a safetensors file: what it says, read and written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from curvd.errors import InvalidTensors
from curvd.tensors.buffer_pool import Buffer

MAX_HEADER_BYTES = 4 << 20
"""Largest JSON header that is accepted: about 40,000 tensors."""

LONGEST_NAME = 1024
"""Characters in the name of a tensor."""

MOST_AXES = 32
"""Axes that NumPy of every supported version has."""

_METADATA = "__metadata__"

_SMALL_HEADER = 1 << 12
"""Headers up to here are not parsed twice."""

_ALIGNMENT = 64
"""Payloads start at a multiple of this, so that a mapped file has aligned arrays."""

_NUMPY = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAME = {dtype: name for name, dtype in _NUMPY.items()}
ITEM_BYTES: Mapping[str, int] = {
    **{name: d.itemsize for name, d in _NUMPY.items()},
    "BF16": 2,  # NumPy has no such type; arrays of it are handled as uint16 bits.
}
"""Element types that may travel, and their sizes."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the payload."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def stop(self) -> int:
        """Offset after its last byte in the payload."""
        return self.start + self.nbytes

    def view(self, payload: Buffer) -> NDArray[np.generic]:
        """Look at this tensor in a payload.

        Args:
            payload: [bytes] The whole payload.

        Returns:
            A view of its memory in this tensor's shape; BF16 as uint16 bits.
        """
        raw = payload[self.start : self.stop]
        return raw.view(_NUMPY.get(self.dtype, np.dtype("<u2"))).reshape(self.shape)


Header = Mapping[str, TensorHeader]
"""Tensor name to its place, in the order of the payload."""


def header_of(arrays: Mapping[str, NDArray[np.generic]]) -> Header:
    """Lay arrays out one after the other.

    Args:
        arrays: Name to array, any layout.

    Returns:
        Their header.

    Raises:
        InvalidTensors: If an element type cannot travel.
    """
    header, start = {}, 0
    for name, array in arrays.items():
        dtype = _NAME.get(array.dtype.newbyteorder("="))
        if dtype is None:
            msg = f"tensor {name!r} has dtype {array.dtype}; known: {', '.join(_NAME.values())}"
            raise InvalidTensors(msg, tensor=name, dtype=array.dtype)
        header[name] = TensorHeader(dtype, tuple(array.shape), start)
        start = header[name].stop
    return header


def dump_header(header: Header, metadata: Mapping[str, str] | None = None) -> bytes:
    """Serialise a header; the inverse of `load_header`.

    Args:
        header: What to write.
        metadata: What `load_metadata` is to find in it.

    Returns:
        8-byte little-endian length and JSON, padded with spaces.
    """
    entries: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    entries |= {
        name: {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [t.start, t.stop],
        }
        for name, t in header.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@lru_cache(maxsize=64)
def dump_one(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Serialise the header of a file with one tensor.

    Args:
        name: Its name.
        dtype: Its safetensors element type.
        shape: Its shape.

    Returns:
        As from `dump_header`.
    """
    return dump_header({name: TensorHeader(dtype, shape, 0)})


def load_header(text: bytes) -> Header:
    """Parse and check the JSON of a header.

    Args:
        text: The JSON, without the 8-byte length.

    Returns:
        The tensors in the order of the payload.

    Raises:
        InvalidTensors: If it is not JSON, an entry is malformed, an element type is
            unknown, or the tensors overlap or leave gaps.
    """
    # Vectors of one session all have the same header.
    return (
        _load_small_header(text) if len(text) <= _SMALL_HEADER else _load_header(text)
    )


@lru_cache(maxsize=64)
def _load_small_header(text: bytes) -> Header:
    return MappingProxyType(_load_header(text))


def _load_header(text: bytes) -> dict[str, TensorHeader]:
    try:
        # As text: of bytes json takes other encodings and lone surrogates, too.
        entries = json.loads(text.decode(), object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise TypeError
        _check_metadata(entries.pop(_METADATA, {}))
        tensors = {name: _entry(name, entry) for name, entry in entries.items()}
    except InvalidTensors:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        msg = f"the safetensors header is not a JSON object of tensors: {error}"
        raise InvalidTensors(msg) from None
    header = dict(
        sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    )
    end = 0
    for name, tensor in header.items():
        if tensor.start != end:
            what = (
                "overlaps the one before it"
                if tensor.start < end
                else "leaves a gap before it"
            )
            msg = f"tensor {name!r} starts at byte {tensor.start}, expected {end}: it {what}"
            raise InvalidTensors(msg, tensor=name, start=tensor.start, expected=end)
        end = tensor.stop
    return header


def _check_metadata(found: object) -> None:
    """Refuse what the format does not allow beside tensors."""
    if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
        return
    msg = (
        f"{_METADATA} of a safetensors header is a map of strings to strings, and not "
        f"{json.dumps(found)[:80]}: write it as such, or leave it out"
    )
    raise InvalidTensors(msg)


def load_metadata(text: bytes) -> Mapping[str, str]:
    """Find what a header says beside its tensors.

    Args:
        text: The JSON, which `load_header` has checked.

    Returns:
        Texts by name.
    """
    if _METADATA.encode() not in text:
        return {}
    found: dict[str, str] = json.loads(text.decode()).get(_METADATA, {})
    return found


def payload_bytes(header: Header) -> int:
    """Size of the payload that a header describes.

    Args:
        header: The header, from `load_header` or `header_of`.

    Returns:
        Its bytes.
    """
    return max((t.stop for t in header.values()), default=0)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        msg = "a name occurs twice"
        raise ValueError(msg)
    return entries


def _entry(name: str, entry: object) -> TensorHeader:
    if len(name) > LONGEST_NAME or not _is_text(name):
        msg = (
            f"the name of a tensor is Unicode text of at most {LONGEST_NAME} characters, "
            f"got {name[:80]!a} of {len(name)}"
        )
        raise InvalidTensors(msg)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        msg = f"tensor {name!r} needs dtype, shape and data_offsets, and nothing else"
        raise InvalidTensors(msg, tensor=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        msg = f"tensor {name!r} has element type {dtype!r}; known: {', '.join(ITEM_BYTES)}"
        raise InvalidTensors(msg, tensor=name, dtype=dtype)
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        msg = f"tensor {name!r}: shape and data_offsets must be natural numbers"
        raise InvalidTensors(msg, tensor=name)
    # As NumPy counts: an axis of no elements does not make the others harmless.
    if len(shape) > MOST_AXES or _addresses(shape, dtype) >= 1 << 63:
        msg = (
            f"tensor {name!r} has shape {str(shape)[:200]}: no array can have it; at most "
            f"{MOST_AXES} axes, and less than 2**63 bytes without those of length 0"
        )
        raise InvalidTensors(msg, tensor=name)
    tensor = TensorHeader(dtype, tuple(shape), offsets[0])
    if tensor.stop != offsets[1]:
        msg = (
            f"tensor {name!r} of shape {shape} and type {dtype} has {tensor.nbytes} "
            f"bytes, but its offsets span {offsets[1] - offsets[0]}"
        )
        raise InvalidTensors(msg, tensor=name)
    return tensor


def _addresses(shape: list[int], dtype: str) -> int:
    return math.prod(n or 1 for n in shape) * ITEM_BYTES[dtype]


def _is_text(value: str) -> bool:
    """Tell whether a string has no lone surrogates, which JSON can write."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _naturals(value: object) -> bool:
    # bool is an int in Python, and JSON's true is no size.
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
