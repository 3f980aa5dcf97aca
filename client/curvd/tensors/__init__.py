"""Vectors in memory and on the wire: safetensors in chunks, layouts, half precision.

Both sides use it. Imports `curvd.contract` and `curvd.errors`, and NumPy; knows no call and
no connection.
"""

from __future__ import annotations

from curvd.tensors.allocator import (
    exact_allocator,
    trim_allocator,
    tune_allocator,
)
from curvd.tensors.boxes import Box, dump_boxes, load_boxes
from curvd.tensors.buffer_pool import Buffer, Pool
from curvd.tensors.dense import not_dense
from curvd.tensors.finite import first_beyond, first_nan, first_not_finite
from curvd.tensors.half_precision import ITEM_BYTES, NARROW, narrow, widen
from curvd.tensors.loaded import loaded
from curvd.tensors.random_probes import probes
from curvd.tensors.safetensors_header import MAX_HEADER_BYTES, Header
from curvd.tensors.vectors import (
    Array,
    Layout,
    Operand,
    arrange,
    operand,
    to_numpy,
    vector_dtype,
)

__all__ = [
    "ITEM_BYTES",
    "MAX_HEADER_BYTES",
    "NARROW",
    "Array",
    "Box",
    "Buffer",
    "Header",
    "Layout",
    "Operand",
    "Pool",
    "arrange",
    "dump_boxes",
    "exact_allocator",
    "first_beyond",
    "first_nan",
    "first_not_finite",
    "load_boxes",
    "loaded",
    "narrow",
    "not_dense",
    "operand",
    "probes",
    "to_numpy",
    "trim_allocator",
    "tune_allocator",
    "vector_dtype",
    "widen",
]
