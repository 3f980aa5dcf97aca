"""Uploads that are addressed by content: ask first, send what is missing, go on."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from curvd._calls.base import Call, Unary
from curvd.contract import (
    RPCS,
    DatasetInfo,
    DatasetSpec,
    ModelInfo,
    Part,
    Rpc,
    convert_enums,
    convert_sessions,
    enums,
)
from curvd.errors import InvalidSpec, InvalidTensors, Unavailable
from curvd.exported import ExportedModel, named
from curvd.tensors import Box, dump_boxes, not_dense, safetensors_header, to_numpy
from curvd.tensors import chunks as wire
from curvd.v1 import session_service_pb2 as session_pb

T = TypeVar("T")

Tensors = Mapping[str, Any] | str | os.PathLike[str]
"""NumPy arrays or torch tensors by name, or the path of a safetensors file."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total, perhaps from another thread."""


@dataclass(frozen=True)
class Blob:
    """One safetensors file, in memory or mapped, without a copy of its tensors."""

    header: safetensors_header.Header
    segments: tuple[memoryview, ...]

    @cached_property
    def total_bytes(self) -> int:
        """Its size."""
        return sum(segment.nbytes for segment in self.segments)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of it, as lower-case hexadecimal digits."""
        sha = hashlib.sha256()
        for segment in self.segments:
            sha.update(segment)
        return sha.hexdigest()

    def chunks(self, offset: int) -> Iterator[memoryview]:
        """Cut what follows an offset into chunks.

        Args:
            offset: Bytes to leave out.

        Returns:
            The chunks.
        """
        return wire.packed(_after(self.segments, offset))


class Upload(Call[T]):
    """A header with everything about a resource, and its tensors if they are missing.

    Args:
        rpc: Which method.
        header: Its header message.
        slot: Name of the header's field for the upload.
        blob: The tensors.
        read: Makes the result from the response.
        progress: Told how far the upload is.
    """

    def __init__(
        self,
        rpc: Rpc,
        header: Any,
        slot: str,
        blob: Blob,
        read: Callable[[Any], T],
        progress: Progress | None,
    ) -> None:
        super().__init__(rpc)
        self._header, self._blob, self._read = header, blob, read
        self._upload: session_pb.Upload = getattr(header, slot)
        self._upload.digest = blob.digest
        self._upload.total_bytes = blob.total_bytes
        self._progress = progress or (lambda done, total: None)
        self._furthest = 0
        self._response: Any = None

    def restart(self) -> None:
        """Ask again how much the server has."""
        super().restart()
        self._asking = True
        self._upload.offset = 0

    def feed(self, part: Part) -> Iterator[Any]:
        """Keep the response."""
        self._response = part
        yield from ()

    def conclude(self) -> None:
        """Finish, or go on from the offset that the server named.

        Raises:
            Unavailable: If all bytes were sent and the server still lacks some.
        """
        if self._response.WhichOneof("outcome") != "upload_needed":
            self._progress(self._blob.total_bytes, self._blob.total_bytes)
            self.done = True
            return
        committed = self._response.upload_needed.committed_bytes
        if not self._asking and committed <= self._upload.offset:
            msg = (
                f"the server holds {committed} of {self._blob.total_bytes} bytes after "
                f"an upload from offset {self._upload.offset}"
            )
            raise Unavailable(msg)
        if committed > self._furthest:
            self._furthest = committed
            self.progressed()
        self._asking, self._upload.offset = False, committed

    def result(self) -> T:
        """Read the response."""
        return self._read(self._response)

    def _request(self) -> Iterator[Part]:
        yield self.rpc.request.message(header=self._header)
        if self._asking:
            return
        done, total = self._upload.offset, self._blob.total_bytes
        self._progress(done, total)
        for chunk in self._blob.chunks(done):
            yield chunk
            done += chunk.nbytes
            self._progress(done, total)


def register_model(
    model: str | ExportedModel,
    config: Mapping[str, Any] | None,
    state: Tensors | None,
    progress: Progress | None,
    share_with: Sequence[str] = (),
) -> Upload[ModelInfo]:
    """Register an architecture with its state."""
    if not isinstance(model, str | ExportedModel):
        what = type(model).__name__
        msg = (
            f"register_model takes the name of a builder or what curvd.export returns, "
            f"got a {what}: pass curvd.export(module, inputs), or use session_for"
        )
        raise InvalidSpec(msg, model=what)
    if isinstance(model, ExportedModel):
        if config:
            msg = f"an exported model takes no config; got {sorted(config)}"
            raise InvalidSpec(msg)
        header = session_pb.RegisterModelHeader(graph=model.graph)
        state = model.state if state is None else state
    elif state is None:
        msg = f"builder {model!r} needs a state: module.state_dict(), or arrays by name"
        raise InvalidSpec(msg, builder=model)
    else:
        header = session_pb.RegisterModelHeader(
            builder=model, config_json=convert_sessions.config_to_json(config or {})
        )
    header.share_with.extend(names_of(share_with))
    return Upload(
        RPCS["RegisterModel"],
        header,
        "state",
        blob_of(state),
        lambda response: convert_sessions.model_from_proto(response.model),
        progress,
    )


def register_dataset(
    tensors: Tensors | Iterable[Any] | None,
    *,
    name: str | None,
    digest: str | None,
    inputs: Sequence[str] | str,
    target: str,
    batch_size: int,
    input_style: enums.InputStyle | str,
    progress: Progress | None,
    share_with: Sequence[str],
) -> Call[DatasetInfo]:
    """Register tensors, or a dataset of the server, as fixed mini-batches."""
    if [tensors, name, digest].count(None) != 2:
        msg = "give tensors, or the name or digest of what lies on the server"
        raise InvalidSpec(msg)
    spec = DatasetSpec(
        inputs=(inputs,) if isinstance(inputs, str) else tuple(inputs),
        target=target,
        batch_size=batch_size,
        input_style=input_style,  # type: ignore[arg-type]
    )
    header = session_pb.RegisterDatasetHeader(
        inputs=spec.inputs,
        target=spec.target,
        batch_size=spec.batch_size,
        input_style=convert_enums.input_style_to_proto(spec.input_style),
        name=name,
        share_with=names_of(share_with),
    )
    rpc = RPCS["RegisterDataset"]
    if tensors is None:
        if digest is not None:
            header.tensors.digest = digest
        return Unary(rpc, rpc.request.message(header=header), _dataset)
    blob = blob_of(named(tensors, spec.inputs, spec.target))
    _check_dataset(blob.header, spec)
    return Upload(rpc, header, "tensors", blob, _dataset, progress)


def register_like(
    spec: DatasetSpec | None, data: Any, batch_size: int | None
) -> Call[DatasetInfo]:
    """Register other data under the names that a session's have."""
    if spec is None:
        msg = (
            "the names of this session's inputs are not known here, as it was found by its "
            "id: pass what client.register_dataset returns, or the id of a dataset"
        )
        raise InvalidSpec(msg)
    return register_dataset(
        data,
        name=None,
        digest=None,
        inputs=spec.inputs,
        target=spec.target,
        batch_size=spec.batch_size if batch_size is None else batch_size,
        input_style=spec.input_style,
        progress=None,
        share_with=(),
    )


def names_of(share_with: Sequence[str]) -> Sequence[str]:
    """Read whom a thing is shared with: names, or only one."""
    return (share_with,) if isinstance(share_with, str) else share_with


def _dataset(response: session_pb.RegisterDatasetResponse) -> DatasetInfo:
    return convert_sessions.dataset_from_proto(response.dataset)


def blob_of(
    tensors: Tensors,
    see: Callable[[Any], NDArray[Any] | None] = to_numpy,
    boxes: Mapping[str, Box] | None = None,
) -> Blob:
    """Lay tensors out as one safetensors file.

    Args:
        tensors: The tensors, or the path of such a file.
        see: Sees each as NumPy.
        boxes: Of those that are parts of larger ones, where they belong.

    Returns:
        The file.

    Raises:
        InvalidTensors: If there is no such file, or a tensor is none.
    """
    if isinstance(tensors, str | os.PathLike):
        return _mapped(Path(tensors))
    if not isinstance(tensors, Mapping):
        raise _no_mapping(tensors)
    arrays = {}
    for name, value in tensors.items():
        if getattr(value, "is_meta", False):
            msg = (
                f"tensor {name!r} is on torch's meta device and has no values: "
                "load them first, for example with module.to_empty(device='cpu')"
            )
            raise InvalidTensors(msg, tensor=name)
        if remedy := not_dense(value):
            msg = f"tensor {name!r} is {remedy}"
            raise InvalidTensors(msg, tensor=name, type=type(value).__name__)
        array = see(value)
        if array is None:
            msg = (
                f"tensor {name!r} is a {type(value).__name__}, "
                "not a NumPy array or torch tensor: pass np.asarray(...) of numbers"
            )
            raise InvalidTensors(msg, tensor=name, type=type(value).__name__)
        arrays[name] = array
    header = safetensors_header.header_of(arrays)
    metadata = dump_boxes(boxes or {})
    first = memoryview(safetensors_header.dump_header(header, metadata))
    return Blob(header, (first, *map(wire.bytes_of, arrays.values())))


def _no_mapping(given: Any) -> InvalidTensors:
    """Say how values without names get theirs."""
    what, remedy = f"a {type(given).__name__}", "pass a dict"
    if hasattr(given, "state_dict"):
        remedy = f"pass {_name_of(given)}.state_dict()"
    elif inspect.isgenerator(given):
        what = f"the generator {given.__name__}"
        remedy = (
            "a generator is spent once it is read: pass module.state_dict(), or a dict "
            "such as dict(module.named_parameters())"
        )
    elif isinstance(given, Iterable):
        remedy = "pass a dict such as {name: value}, or module.state_dict()"
    msg = (
        f"tensors are arrays by name or the path of a safetensors file, got {what}; "
        f"{remedy}"
    )
    return InvalidTensors(msg, type=type(given).__name__)


def _name_of(given: Any) -> str:
    return (
        "module" if hasattr(given, "named_parameters") else type(given).__name__.lower()
    )


def _mapped(path: Path) -> Blob:
    try:
        file = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}"
        raise InvalidTensors(msg, path=path) from error
    except ValueError:
        msg = f"{path} is empty"
        raise InvalidTensors(msg, path=path) from None
    stop = 8 + int.from_bytes(file[:8].tobytes(), "little")
    if file.size < stop or stop > 8 + safetensors_header.MAX_HEADER_BYTES:
        msg = f"{path} is no safetensors file: its header does not end"
        raise InvalidTensors(msg, path=path)
    header = safetensors_header.load_header(file[8:stop].tobytes())
    if file.size != stop + safetensors_header.payload_bytes(header):
        msg = (
            f"{path} has {file.size - stop} bytes of payload, but its header "
            f"describes {safetensors_header.payload_bytes(header)}"
        )
        raise InvalidTensors(msg, path=path)
    return Blob(header, (file.data,))


def _check_dataset(header: safetensors_header.Header, spec: DatasetSpec) -> None:
    names = spec.names
    if set(names) != set(header):
        msg = (
            f"the tensors are {', '.join(header) or 'none'}, but inputs and target "
            f"name {', '.join(names)}"
        )
        raise InvalidSpec(msg, given=tuple(header), expected=names)
    lengths = {name: t.shape[:1] for name, t in header.items()}
    if len(set(lengths.values())) != 1 or lengths[spec.target] in ((), (0,)):
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in header.items())
        msg = f"all tensors must have the same leading axis N > 0; got {shapes}"
        raise InvalidSpec(msg)


def _after(segments: Sequence[memoryview], offset: int) -> Iterator[memoryview]:
    for segment in segments:
        if offset < segment.nbytes:
            yield segment[offset:]
        offset = max(0, offset - segment.nbytes)
