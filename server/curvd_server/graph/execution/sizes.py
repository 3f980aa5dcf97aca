"""Operators on sizes and on sequences: numbers of ordinary size, nothing else."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from curvd.contract import graph_ops


def _number(function: Callable[..., Any]) -> Callable[..., Any]:
    """Restrict a function of Python's to numbers of ordinary size."""

    def compute(*numbers: Any) -> Any:
        if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            if not all(isinstance(n, bool) for n in numbers):
                msg = (
                    f"sizes must be numbers, got {[type(n).__name__ for n in numbers]}"
                )
                raise TypeError(msg)
        result = function(*numbers)
        if not isinstance(result, bool) and not -(2**63) <= result < 2**63:
            msg = f"a size is {result:.3g}"
            raise OverflowError(msg)
        return result

    return compute


def _size(tensor: Tensor, axis: int) -> int:
    if not isinstance(tensor, Tensor) or type(axis) is not int:
        msg = "sym.size takes a tensor and an axis"
        raise TypeError(msg)
    return int(tensor.shape[axis])


def _numel(tensor: Any) -> int:
    if not isinstance(tensor, Tensor):
        msg = "sym.numel takes a tensor"
        raise TypeError(msg)
    return tensor.numel()


def _item(sequence: Any, index: Any) -> Any:
    if not isinstance(sequence, tuple | list) or type(index) is not int:
        msg = "sym.item takes a sequence and an index"
        raise TypeError(msg)
    return sequence[index]


SIZES: Mapping[str, Callable[..., Any]] = MappingProxyType({
    "size": _size,
    "numel": _numel,
    "item": _item,
    "add": _number(python.add),
    "sub": _number(python.sub),
    "mul": _number(python.mul),
    "floordiv": _number(python.floordiv),
    "mod": _number(python.mod),
    "truediv": _number(python.truediv),
    "neg": _number(python.neg),
    "min": _number(min),
    "max": _number(max),
    "int": _number(math.trunc),
    "float": _number(float),
    "eq": _number(python.eq),
    "ne": _number(python.ne),
    "lt": _number(python.lt),
    "le": _number(python.le),
    "gt": _number(python.gt),
    "ge": _number(python.ge),
    "and": _number(python.and_),
    "or": _number(python.or_),
    "not": _number(python.not_),
})
assert SIZES.keys() == graph_ops.SIZE_OPERATORS
