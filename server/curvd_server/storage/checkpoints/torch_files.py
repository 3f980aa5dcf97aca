"""What `torch.distributed.checkpoint` and `torch.save` write, read without torch."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from curvd.errors import InvalidTensors
from curvd.tensors import Box
from curvd_server.storage.assembly import Piece
from curvd_server.storage.checkpoints import pickled
from curvd_server.storage.checkpoints.files import File
from curvd_server.storage.checkpoints.pickled import Record

METADATA = ".metadata"
_MOST_METADATA_BYTES = 64 << 20
_MOST_PICKLE_BYTES = 1 << 20
"""Of what is known of one tensor."""
_METADATA_OF = "torch.distributed.checkpoint.metadata "

_TYPES = {
    "float32": ("F32", "<f4"),
    "float64": ("F64", "<f8"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "int64": ("I64", "<i8"),
    "int32": ("I32", "<i4"),
    "int16": ("I16", "<i2"),
    "int8": ("I8", "i1"),
    "uint8": ("U8", "u1"),
    "bool": ("BOOL", "?"),
}
"""torch's name -> safetensors element type, and NumPy's; BF16 as bits."""
_STORAGES = {
    "torch FloatStorage": "float32",
    "torch DoubleStorage": "float64",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}


def pieces_of_distributed(root: Path, folder: Path) -> Iterator[Piece]:
    """Read a folder of `torch.distributed.checkpoint`.

    Args:
        root: Where all its files must be.
        folder: The folder, which has a file `METADATA`.

    Yields:
        A piece for each chunk of each tensor; what is no tensor is passed over.

    Raises:
        InvalidTensors: If its metadata is none.
    """
    file = File.at(root, folder / METADATA)
    if file.size > _MOST_METADATA_BYTES:
        msg = (
            f"the metadata of the checkpoint has {file.size} bytes; the limit is "
            f"{_MOST_METADATA_BYTES}"
        )
        raise InvalidTensors(msg, bytes=file.size)
    metadata = _filled(pickled.read(file.read(0, file.size).tobytes()), "Metadata")
    files: dict[str, File] = {}
    with _as_damage():
        places = _places(metadata["storage_data"])
        for name, known in metadata["state_dict_metadata"].items():
            if not isinstance(name, str):
                raise TypeError(name)
            if known.name == f"{_METADATA_OF}TensorStorageMetadata":
                yield from _tensor(root, folder, files, name, known.state, places)


def _tensor(
    root: Path,
    folder: Path,
    files: dict[str, File],
    name: str,
    known: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]],
) -> Iterator[Piece]:
    properties = known["properties"].state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    torchs = dtype.name.removeprefix("torch ")
    shape = _sizes(known["size"])
    for chunk in known["chunks"]:
        start, sizes = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
        if math.prod(shape) and not math.prod(sizes):
            continue  # of a rank that has none of it
        # Of other types may be what nobody reads, such as the states of optimisers.
        element = _TYPES[torchs][0] if torchs in _TYPES else torchs
        read = functools.partial(
            _chunk, root, folder, files, places[name, start], torchs, sizes
        )
        yield Piece(name, element, Box(shape, start), sizes, read)


def _chunk(
    root: Path,
    folder: Path,
    files: dict[str, File],
    place: Mapping[str, Any],
    dtype: str,
    sizes: tuple[int, ...],
) -> NDArray[Any]:
    """Read one chunk from where the metadata says that it is."""
    with _as_damage():
        path, offset, length = (place[k] for k in ("relative_path", "offset", "length"))
        extensions = place.get("transform_descriptors")
    if not isinstance(path, str) or "/" in path or path in {"", ".", ".."}:
        msg = f"the checkpoint names the file {str(path)[:80]!r}, which is not in it"
        raise InvalidTensors(msg)
    if extensions:
        msg = (
            f"{path} was written through an extension (compressed, perhaps), which is not "
            "read here: save the checkpoint without"
        )
        raise InvalidTensors(msg)
    if path not in files:
        files[path] = File.at(root, folder / path)
    if type(offset) is not int or type(length) is not int:
        msg = f"the metadata of the checkpoint places a chunk at {str(offset)[:80]}"
        raise InvalidTensors(msg)
    return saved(files[path], offset, length, dtype, sizes)


def saved(
    file: File, offset: int, nbytes: int, dtype: str, sizes: tuple[int, ...]
) -> NDArray[Any]:
    """Read one tensor that `torch.save` wrote.

    Args:
        file: Where it is.
        offset: Of its first byte.
        nbytes: Of all that was written for it.
        dtype: The type that it should have, by torch's name.
        sizes: The shape that it should have.

    Returns:
        Its values; bfloat16 as uint16 bits.

    Raises:
        InvalidTensors: If it is something else.
    """
    data = file.read(offset, nbytes)
    with _as_damage(), zipfile.ZipFile(io.BytesIO(data.tobytes())) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        for info in members.values():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > nbytes:
                msg = f"{info.filename} is compressed, which torch does not do"
                raise InvalidTensors(msg)
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            msg = (
                "the checkpoint was written on a big-endian machine: save it on another"
            )
            raise InvalidTensors(msg)
        if members["data.pkl"].file_size > _MOST_PICKLE_BYTES:
            msg = f"what is known of a tensor has more than {_MOST_PICKLE_BYTES} bytes"
            raise InvalidTensors(msg)
        record = pickled.read(archive.read(members["data.pkl"]))
        if record.name == "torch._utils _rebuild_parameter":
            record = record.args[0]
        if record.name != "torch._utils _rebuild_tensor_v2":
            msg = f"a {record.name[:80]!r} where a plain tensor belongs"
            raise InvalidTensors(msg)
        storage, first, shape, strides = record.args[:4]
        kind, storage_type, key = storage.args[:3]
        if kind != "storage" or _STORAGES.get(storage_type.name) != dtype:
            msg = f"a tensor of {storage_type.name[:80]} where {dtype} belongs"
            raise InvalidTensors(msg)
        raw = archive.read(members[f"data/{key}"])
    return _strided(raw, dtype, first, _sizes(shape), _sizes(strides), sizes)


def _strided(
    raw: bytes,
    dtype: str,
    first: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    wanted: tuple[int, ...],
) -> NDArray[Any]:
    """See a storage as a tensor, if all of that is within it."""
    flat = np.frombuffer(raw, _TYPES[dtype][1])
    if shape != wanted or len(strides) != len(shape) or type(first) is not int:
        msg = f"a tensor of shape {list(shape)} where {list(wanted)} belongs"
        raise InvalidTensors(msg)
    if not math.prod(shape):
        return np.empty(shape, flat.dtype)
    last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if first < 0 or last >= flat.size:
        msg = f"a tensor whose last element is at {last} of {flat.size}"
        raise InvalidTensors(msg)
    item = flat.itemsize
    view = as_strided(flat[first:], shape, [item * s for s in strides], writeable=False)
    return np.array(view, order="C")


def _places(
    storage: Mapping[Record, Record],
) -> dict[tuple[str, tuple[int, ...]], Mapping[str, Any]]:
    """Find where each chunk is, by the name of its tensor and its offset."""
    found = {}
    for index, info in storage.items():
        at = index.state.get("offset")
        if at is not None:
            found[index.state["fqn"], _sizes(at)] = info.state
    return found


def _filled(record: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(record, Record) or record.name != _METADATA_OF + name:
        msg = (
            f"{METADATA} of the checkpoint is not what torch.distributed.checkpoint "
            f"writes: a {name} should be in it"
        )
        raise InvalidTensors(msg)
    if not isinstance(record.state, dict) or not isinstance(
        record.state.get("state_dict_metadata"), dict
    ):
        msg = f"{METADATA} of the checkpoint names no tensors"
        raise InvalidTensors(msg)
    return record.state


def _sizes(value: Any) -> tuple[int, ...]:
    """Read a `torch.Size`, or a tuple of numbers."""
    sizes = value.args[0] if isinstance(value, Record) and value.args else value
    if not isinstance(sizes, tuple) or not all(
        type(n) is int and 0 <= n < 1 << 62 for n in sizes
    ):
        msg = f"{str(sizes)[:80]} where sizes belong"
        raise InvalidTensors(msg)
    return sizes


@contextlib.contextmanager
def _as_damage() -> Iterator[None]:
    """Take whatever is not where it belongs for damage."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        NotImplementedError,
        RuntimeError,  # of zipfile: encrypted
        EOFError,
    ) as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        msg = f"the checkpoint is damaged, or not of torch's own format ({what})"
        raise InvalidTensors(msg) from error
