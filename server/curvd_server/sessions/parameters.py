"""The current values of a session's parameters and buffers, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from curvd.tensors import chunks, safetensors_header
from curvd_server.storage import Architecture, Blob, BlobStore, StoredModel


@dataclass(frozen=True)
class State:
    """Parameters and buffers under the names that they go by."""

    header: safetensors_header.Header
    """Sorted by name, as if they were one safetensors file."""
    arrays: Mapping[str, NDArray[Any]]
    """BF16 as uint16 bits."""

    def digest(self) -> str:
        """Hash the values.

        Returns:
            SHA-256 over the safetensors file of these tensors, sorted by name, tied
            ones once; what `curvd.tensors.chunks.digest` says about the same arrays.
        """
        sha = hashlib.sha256(safetensors_header.dump_header(self.header))
        for array in self.arrays.values():
            sha.update(chunks.bytes_of(array))
        return sha.hexdigest()


def state_of(blobs: BlobStore, model: StoredModel, sources: Mapping[str, str]) -> State:
    """Put a session's values together.

    Args:
        blobs: Where they are.
        model: Where they come from originally.
        sources: Tensor name -> digest of the blob with another value.

    Returns:
        Views of snapshots of the files.
    """
    opened = {
        digest: blobs.open(digest) for digest in {model.digest, *sources.values()}
    }
    found = home_names(opened[model.digest], model.ties)
    tensors: dict[str, tuple[safetensors_header.TensorHeader, NDArray[Any]]] = {}
    start = 0
    for name in sorted(found):
        blob, given = opened[model.digest], found[name]
        if name in sources:
            blob = opened[sources[name]]
            given = home_names(blob, model.ties)[name]
        there = blob.header[given]
        placed = safetensors_header.TensorHeader(there.dtype, there.shape, start)
        tensors[name] = placed, blob.arrays[given]
        start = placed.stop
    return State(
        header={name: header for name, (header, _) in tensors.items()},
        arrays={name: array for name, (_, array) in tensors.items()},
    )


def home_names(blob: Blob, ties: Mapping[str, str]) -> dict[str, str]:
    """Find tensors by the names that they go by.

    Args:
        blob: Tensors, tied ones under any of their names.
        ties: Further name -> the name that it goes by.

    Returns:
        The name that each goes by -> its name in the blob.
    """
    return {ties.get(name, name): name for name in blob.header}


def architecture_of(model: StoredModel) -> Architecture:
    """Say what new values must look like.

    Args:
        model: As it was registered.

    Returns:
        Its tensors under all their names.
    """
    by_home = {model.ties.get(t.name, t.name): t for t in model.info.tensors}
    tensors = {**by_home, **{n: by_home[h] for n, h in model.ties.items()}}
    return Architecture(tensors, model.ties, model.buffers)
