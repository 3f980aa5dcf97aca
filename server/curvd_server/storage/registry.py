"""Models and datasets: what is checked, and how they get their ids.

A client names a builder that the server's operator allowed and sends JSON, or it sends
a graph of allowed operators; the tensors follow. Nothing is unpickled, and nothing is
registered that a session could not use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from curvd.contract import (
    DatasetInfo,
    DatasetSpec,
    ModelInfo,
    ModelSpec,
    SerializedGraph,
    TensorInfo,
    convert_sessions,
)
from curvd.errors import (
    DataLoss,
    DatasetNotFound,
    InvalidSpec,
    LimitExceeded,
    ModelNotFound,
    StateMismatch,
)
from curvd.tensors import Header
from curvd.v1 import graph_pb2 as graph_pb
from curvd_server.graph import canonical
from curvd_server.storage.blob_store import BlobStore
from curvd_server.storage.blobs import Blob
from curvd_server.storage.catalogue import Catalogue
from curvd_server.storage.finite_values import check_finite_data, check_finite_state
from curvd_server.storage.records import StoredDataset, StoredModel
from curvd_server.system import calling

I = TypeVar("I", ModelInfo, DatasetInfo)  # noqa: E741

MAX_CONFIG_BYTES = 1 << 20

_KINDS = {"B": "floating", "F": "floating", "I": "integer", "U": "integer"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The tensors that a model's state consists of."""

    tensors: Mapping[str, TensorInfo]
    """Every entry of the state, further names of tied ones included."""
    ties: Mapping[str, str]
    """Further name of a tied tensor -> the name that it goes by."""
    buffers: frozenset[str] = frozenset()
    """Those that are no parameters."""


class Registry:
    """Registers models and datasets. Methods block; call them off the event loop.

    Args:
        catalogue: Where they are kept.
        blobs: Where their tensors are.
        architecture: Finds out what a builder makes of a configuration, or what a
            graph needs.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        blobs: BlobStore,
        architecture: Callable[[ModelSpec], Architecture],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalogue, self._blobs, self._clock = catalogue, blobs, clock
        self._architecture = architecture

    def knows(self, spec: ModelSpec, digest: str) -> bool:
        """Tell whether a model was registered before; see `model`."""
        try:
            self._catalogue.model(_model_id(spec, digest))
        except (ModelNotFound, DataLoss):
            return False
        return True

    def model(
        self,
        spec: ModelSpec,
        digest: str,
        architecture: Architecture | None = None,
        share_with: Sequence[str] = (),
    ) -> ModelInfo | None:
        """Find a model, or make it if its bytes are there.

        Args:
            spec: Builder and configuration, or graph.
            digest: The digest of the state's safetensors file.
            architecture: The tensors of its state, if that was found out before.
            share_with: Whom the caller shares it with; none: as before.

        Returns:
            The model; None if the bytes are missing and would be welcome.

        Raises:
            BuilderNotFound: If no such builder is allowed.
            InvalidSpec: If the builder refuses the configuration.
            InvalidGraph: If the graph is not one that this server runs.
            InvalidTensors: If the bytes are no safetensors file.
            StateMismatch: If they are not the state of that architecture.
        """
        model_id = _model_id(spec, digest)
        try:
            known = self._catalogue.model(model_id)
        except (ModelNotFound, DataLoss):
            architecture = architecture or self._architecture(spec)
        else:
            if not self._blobs.is_sound(digest):
                return None  # what was damaged since is welcome once more
            shared = _shared(known.info, share_with)
            if shared is not known.info:
                self._catalogue.add_model(dataclasses.replace(known, info=shared))
            return shared
        if not self._blobs.is_sound(digest):
            return None
        blob = self._blobs.open(digest)
        check_state(blob, architecture, complete=True)
        info = ModelInfo(
            id=model_id,
            spec=spec,
            tensors=_tensors(blob.header),
            state_bytes=blob.total_bytes,
            graph_digest=spec.graph.digest,
            owner=calling().name,
            shared_with=tuple(share_with),
            create_time_s=self._clock(),
        )
        model = StoredModel(
            info=info,
            digest=digest,
            ties=architecture.ties,
            buffers=architecture.buffers,
        )
        self._catalogue.add_model(model)
        return info

    def dataset(
        self,
        spec: DatasetSpec,
        digest: str,
        *,
        name: str = "",
        partial: bool = False,
        share_with: Sequence[str] = (),
    ) -> DatasetInfo | None:
        """Find a dataset, or make it if its bytes are there.

        Args:
            spec: How its tensors become mini-batches.
            digest: The digest of their safetensors file.
            name: The name of the file, if it lies on the server.
            partial: Whether the file may have further tensors.
            share_with: Whom the caller shares it with; none: as before.

        Returns:
            The dataset; None if the bytes are missing.

        Raises:
            InvalidSpec: If tensors and specification do not fit each other.
            InvalidTensors: If the bytes are no safetensors file.
        """
        dataset_id = _hash(
            **_owner(),
            inputs=spec.inputs,
            target=spec.target,
            batch_size=spec.batch_size,
            input_style=spec.input_style,
            tensors=digest,
        )
        if not self._blobs.is_sound(digest):
            return None
        with contextlib.suppress(DatasetNotFound, DataLoss):
            known = self._catalogue.dataset(dataset_id)
            shared = _shared(known.info, share_with)
            if shared is not known.info:
                self._catalogue.add_dataset(dataclasses.replace(known, info=shared))
            return shared
        blob = self._blobs.open(digest)
        used = {n: t for n, t in blob.header.items() if n in spec.names}
        chosen = dataclasses.replace(blob, header=used) if partial else blob
        info = DatasetInfo(
            id=dataset_id,
            spec=spec,
            tensors=_tensors(chosen.header),
            data_points=check_dataset(chosen, spec),
            total_bytes=blob.total_bytes,
            name=name,
            owner=calling().name,
            shared_with=tuple(share_with),
            create_time_s=self._clock(),
        )
        self._catalogue.add_dataset(StoredDataset(info=info, digest=digest))
        return info

    def models(self, after: int = 0) -> Iterator[tuple[int, ModelInfo]]:
        """Find the models that the caller may know of; see `Catalogue.visible_models`.

        Args:
            after: Number of the last one that is known already; 0: none is.

        Returns:
            Number and model, oldest first.
        """
        return self._catalogue.visible_models(after)

    def datasets(self, after: int = 0) -> Iterator[tuple[int, DatasetInfo]]:
        """Find the datasets that the caller may know of, likewise.

        Args:
            after: Number of the last one that is known already; 0: none is.

        Returns:
            Number and dataset, oldest first.
        """
        return self._catalogue.visible_datasets(after)

    def release(self, digest: str) -> None:
        """Remove a blob that came to nothing, unless something else needs it."""
        self._blobs.release(digest)


def model_spec(
    builder: str, config_json: str, graph: graph_pb.Graph | None = None
) -> ModelSpec:
    """Read what a client says about an architecture.

    Args:
        builder: Name of a builder.
        config_json: A JSON object, or nothing.
        graph: The architecture itself, instead of both.

    Returns:
        The specification.

    Raises:
        LimitExceeded: If the configuration or the graph is too large.
        InvalidSpec: If it is not a JSON object, or there are both.
    """
    if graph is not None:
        if builder or config_json:
            msg = f"a model is made by a builder or a graph, not both; got {builder!r}"
            raise InvalidSpec(msg, builder=builder)
        return ModelSpec(builder="", graph=SerializedGraph(canonical(graph)))
    if len(config_json) > MAX_CONFIG_BYTES:
        msg = (
            f"config_json has {len(config_json)} bytes; the limit is {MAX_CONFIG_BYTES}"
        )
        raise LimitExceeded(msg, bytes=len(config_json), limit=MAX_CONFIG_BYTES)
    return ModelSpec(
        builder=builder, config=convert_sessions.config_from_json(config_json)
    )


def check_state(blob: Blob, expected: Architecture, *, complete: bool) -> None:
    """Compare tensors with an architecture.

    Args:
        blob: Parameters and buffers by name; tied ones under one or all names.
        expected: What the architecture has.
        complete: Whether all of them are needed.

    Raises:
        StateMismatch: If a tensor is missing, unknown, misshapen or of another kind,
            or tied ones differ (the message names every one of them), or a value is
            not finite.
    """
    known, given = expected.tensors, blob.header
    there = {expected.ties.get(name, name) for name in given}
    missing = [n for n in known if n not in expected.ties and n not in there]
    problems = {
        "missing": missing if complete else [],
        "unknown": [name for name in given if name not in known],
        "of another shape": [
            f"{name} {list(given[name].shape)} instead of {list(known[name].shape)}"
            for name in given
            if name in known and given[name].shape != known[name].shape
        ],
        "of another type": [
            f"{name} {given[name].dtype} instead of {known[name].dtype}"
            for name in given
            if name in known and _kind(given[name].dtype) != _kind(known[name].dtype)
        ],
        "tied, but different": [
            f"{name} and {home}"
            for name, home in expected.ties.items()
            if name in given and home in given and not _same(blob, name, home)
        ],
    }
    found = {what: names for what, names in problems.items() if names}
    if found:
        msg = "the tensors do not fit the model: " + "; ".join(
            f"{what}: {', '.join(names)}" for what, names in found.items()
        )
        raise StateMismatch(msg, **{w.split()[-1]: len(n) for w, n in found.items()})
    for name, tensor in given.items():
        is_buffer = name in expected.buffers
        check_finite_state(name, tensor.dtype, blob.arrays[name], is_buffer=is_buffer)


def check_dataset(blob: Blob, spec: DatasetSpec) -> int:
    """Compare tensors with what is said about them.

    Args:
        blob: The tensors.
        spec: How they become mini-batches.

    Returns:
        N.

    Raises:
        InvalidSpec: If names or leading axes do not fit, or a value is not finite.
    """
    names, given = spec.names, blob.header
    if set(names) != set(given):
        msg = (
            f"the tensors are {', '.join(given) or 'none'}, but inputs and target name "
            f"{', '.join(names)}"
        )
        raise InvalidSpec(msg, given=tuple(given), expected=names)
    lengths = {name: t.shape[:1] for name, t in given.items()}
    (data_points, *_) = lengths[spec.target] or (0,)
    if len(set(lengths.values())) != 1 or not data_points:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in given.items())
        msg = f"all tensors must have the same leading axis N > 0; got {shapes}"
        raise InvalidSpec(msg)
    for name in names:
        check_finite_data(name, given[name].dtype, blob.arrays[name])
    return data_points


def _tensors(header: Header) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(n, t.dtype, t.shape) for n, t in header.items())


def _kind(dtype: str) -> str:
    return dtype if dtype == "BOOL" else _KINDS[dtype[0]]


def _same(blob: Blob, a: str, b: str) -> bool:
    views: list[Any] = [blob.arrays[a], blob.arrays[b]]
    if blob.header[a].dtype != blob.header[b].dtype:
        return False
    # As bits, so that NaN equals itself.
    bits = [np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in views]
    return bool(np.array_equal(bits[0], bits[1]))


def _model_id(spec: ModelSpec, digest: str) -> str:
    by = {"graph": spec.graph.digest} if spec.graph else {"builder": spec.builder}
    return _hash(**_owner(), **by, config=spec.config, state=digest)


def _owner() -> dict[str, str]:
    """Say whose id it is.

    What two callers register has two ids, and tells neither of the other. Ids of what is
    nobody's in particular are as they always were.
    """
    name = calling().name
    return {"owner": name} if name else {}


def _shared(known: I, share_with: Sequence[str]) -> I:
    """Share what is registered with others than before, if any are named."""
    if not share_with or tuple(share_with) == known.shared_with:
        return known
    return dataclasses.replace(known, shared_with=tuple(share_with))


def _hash(**content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
