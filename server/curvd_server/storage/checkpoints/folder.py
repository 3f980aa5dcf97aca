"""Which checkpoints there are, and of which kind each is."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from curvd.errors import CheckpointNotFound, InvalidSpec, InvalidTensors, LimitExceeded
from curvd.tensors import MAX_HEADER_BYTES, Box, safetensors_header
from curvd_server.storage.assembly import Piece
from curvd_server.storage.checkpoints.files import File
from curvd_server.storage.checkpoints.torch_files import METADATA, pieces_of_distributed

_SUFFIX, _INDEX = ".safetensors", ".safetensors.index.json"
_PART = re.compile(r"[A-Za-z0-9_=+@,-][A-Za-z0-9_.=+@,-]{0,254}")
_LONGEST = 1024
_MOST_INDEX_BYTES = 16 << 20
_MOST_LISTED = 1000


class Checkpoints:
    """The checkpoints below one folder.

    Args:
        root: The folder; None if there are none.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = None if root is None else root.resolve()

    def pieces(self, name: str) -> list[Piece]:
        """Find out what is in a checkpoint; its values are not read yet.

        Args:
            name: The name that a caller gave, not checked yet.

        Returns:
            A piece for each chunk of each tensor, under the checkpoint's own names.

        Raises:
            InvalidSpec: If it is no name, and so could lead elsewhere.
            CheckpointNotFound: If there is no such checkpoint.
            InvalidTensors: If it is damaged.
            FailedPrecondition: If a file of it cannot be read, or is a link that leads out.
        """
        parts = check_name(name)
        if self._root is None:
            msg = (
                "this server has no folder of checkpoints; its operator can name one with "
                "checkpoints_root"
            )
            raise CheckpointNotFound(msg, name=name)
        path = self._root.joinpath(*parts)
        if (path / METADATA).is_file():
            return list(pieces_of_distributed(self._root, path))
        return list(self._of_safetensors(name, path))

    def _of_safetensors(self, name: str, path: Path) -> Iterator[Piece]:
        assert self._root is not None
        if not path.is_dir():
            file = path if path.is_file() else path.with_name(path.name + _SUFFIX)
            if not file.is_file() or not file.name.endswith((_SUFFIX, _INDEX)):
                raise self._not_found(name)
            indices = [file] if file.name.endswith(_INDEX) else []
            files = {} if indices else {file.name: None}
            folder = file.parent
        else:
            folder = path
            indices = sorted(path.glob(f"*{_INDEX}"))
            files = dict.fromkeys(sorted(f.name for f in path.glob(f"*{_SUFFIX}")))
        if len(indices) > 1:
            names = ", ".join(i.name for i in indices)
            msg = f"checkpoint {name!r} has {len(indices)} indices ({names}): name one"
            raise InvalidSpec(msg, name=name)
        wanted: dict[str, Any] = files
        if indices:
            wanted = _of_index(File.at(self._root, indices[0]))
        if not wanted:
            raise self._not_found(name)
        for file_name, tensors in wanted.items():
            yield from _of_file(File.at(self._root, folder / file_name), tensors)

    def _not_found(self, name: str) -> CheckpointNotFound:
        assert self._root is not None
        folder = self._root.joinpath(*name.split("/")[:-1])
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        names = [n for n in there if not n.startswith(".")][:_MOST_LISTED]
        last = name.split("/")[-1]
        near = difflib.get_close_matches(last, names, n=3) or names[:3]
        hint = f"; near it are {', '.join(map(repr, near))}" if near else ""
        if last in names:
            hint = "; what lies there is none of these, and pickles of torch.save are not read"
        msg = (
            f"no checkpoint {name!r} lies on this server: a file of safetensors, a folder "
            f"of them, or one of torch.distributed.checkpoint, with its {METADATA}{hint}"
        )
        return CheckpointNotFound(msg, name=name)


def check_name(name: str) -> list[str]:
    """Refuse what is no name, and so could lead out of the folder.

    Args:
        name: The name that a caller gave, not checked yet.

    Returns:
        Its parts.

    Raises:
        InvalidSpec: Unless parts are letters, digits and ``_.=+@,-``, and none begins
            with a dot.
    """
    parts = name.split("/")
    if len(name) > _LONGEST or not all(map(_PART.fullmatch, parts)):
        msg = (
            f"the name of a checkpoint is a path from checkpoints_root of at most "
            f"{_LONGEST} characters, whose parts have letters, digits and '_.=+@,-' and do "
            f"not begin with a dot, got {name[:80]!r}"
        )
        raise InvalidSpec(msg, name=name[:80])
    return parts


def _of_index(index: File) -> dict[str, list[str]]:
    """Read which file has which tensors."""
    if index.size > _MOST_INDEX_BYTES:
        msg = f"{index.path.name} has {index.size} bytes; the limit is {_MOST_INDEX_BYTES}"
        raise LimitExceeded(msg, bytes=index.size, limit=_MOST_INDEX_BYTES)
    try:
        places = json.loads(index.read(0, index.size).tobytes().decode())["weight_map"]
        found: dict[str, list[str]] = {}
        for tensor, file_name in places.items():
            if not file_name.endswith(_SUFFIX) or not _PART.fullmatch(file_name):
                raise ValueError(file_name)
            found.setdefault(file_name, []).append(tensor)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        msg = (
            f"{index.path.name} is no index: it must be JSON with a weight_map from names "
            f"of tensors to files beside it ({str(error)[:80]!r})"
        )
        raise InvalidTensors(msg) from None
    return found


def _of_file(file: File, tensors: list[str] | None) -> Iterator[Piece]:
    """List the tensors of one file; None: all of them."""
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        msg = (
            f"{file.path.name} announces a header of {length} bytes; the limit is "
            f"{MAX_HEADER_BYTES}: is it a safetensors file?"
        )
        raise LimitExceeded(msg, header_bytes=length, limit=MAX_HEADER_BYTES)
    header = safetensors_header.load_header(file.read(8, length).tobytes())
    missing = [name for name in tensors or () if name not in header]
    if missing:
        msg = (
            f"{file.path.name} lacks {', '.join(missing)[:200]}, which its index names"
        )
        raise InvalidTensors(msg, file=file.path.name)
    for name in header if tensors is None else tensors:
        tensor = header[name]
        box = Box(tensor.shape, (0,) * len(tensor.shape))
        read = functools.partial(_tensor_of, file, 8 + length, tensor)
        yield Piece(name, tensor.dtype, box, tensor.shape, read)


def _tensor_of(
    file: File, payload: int, tensor: safetensors_header.TensorHeader
) -> NDArray[Any]:
    data = file.read(payload + tensor.start, tensor.nbytes)
    return safetensors_header.TensorHeader(tensor.dtype, tensor.shape, 0).view(data)
