"""Tensors of a safetensors file that are boxes of larger ones: the slices of one rank.

The file says so in its metadata: under `KEY` a JSON object from the name of a tensor to
``[shape, start]``, the sizes of the whole tensor and the index of the box's first element.
Tensors that are not named there are whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from curvd.errors import InvalidTensors

KEY = "curvd.boxes"


@dataclass(frozen=True, slots=True)
class Box:
    """Where a part of a tensor belongs."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: tuple[int, ...]
    """Index of the first element."""


def dump_boxes(boxes: Mapping[str, Box]) -> dict[str, str]:
    """Write boxes as metadata of a safetensors file.

    Args:
        boxes: Tensor name -> its place; whole tensors are left out.

    Returns:
        The metadata.
    """
    entries = {name: [list(box.shape), list(box.start)] for name, box in boxes.items()}
    return {KEY: json.dumps(entries, separators=(",", ":"))} if entries else {}


def load_boxes(metadata: Mapping[str, str]) -> dict[str, Box]:
    """Read boxes off the metadata of a safetensors file; the inverse of `dump_boxes`.

    Args:
        metadata: What the file's header says beside its tensors.

    Returns:
        Tensor name -> its place. Whether it fits the tensor is not looked at.

    Raises:
        InvalidTensors: If they are written in another way.
    """
    try:
        entries = json.loads(metadata.get(KEY, "{}"))
        return {name: _box(*entry) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        msg = (
            f"the metadata {KEY!r} of a safetensors file must be a JSON object from "
            f"names to [shape, start], each a list of natural numbers: {error}"
        )
        raise InvalidTensors(msg) from None


def _box(shape: object, start: object) -> Box:
    for sizes in (shape, start):
        if not isinstance(sizes, list) or not all(
            type(n) is int and 0 <= n < 1 << 62 for n in sizes
        ):
            msg = f"got {str(sizes)[:80]}"
            raise TypeError(msg)
    return Box(tuple(shape), tuple(start))  # type: ignore[arg-type]
