"""Forms of what operators return, so that a second call costs no arithmetic of shapes.

Without memory an operator only finds out shapes, strides and types, and torch does that
in Python for many: a layer norm takes a thousandth of a second on any machine. What comes
out depends on the forms of the arguments and their numbers alone, so equal layers, and
the next module of the architecture, are told from memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

KEPT = 4096
"""Calls whose results are remembered; then all are forgotten."""

_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
_forms: dict[tuple[Any, str], tuple[bool, tuple[_Form, ...]]] = {}


def key_of(func: Any, given: Any) -> tuple[Any, str] | None:
    """Say what the forms of a call's results depend on.

    Args:
        func: The operator.
        given: Its arguments, tensors on ``meta`` among them.

    Returns:
        A key; None for an operator that writes to its arguments or returns views.
    """
    if not _makes_new(func):
        return None
    return func, repr((torch.get_default_dtype(), _described(given)))


def recalled(key: tuple[Any, str]) -> Any:
    """Make the results of a call that was made before.

    Args:
        key: From `key_of`.

    Returns:
        A tensor without memory, or several; None if there was no such call.
    """
    found = _forms.get(key)
    if found is None:
        return None
    is_one, forms = found
    made = tuple(
        torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        for shape, stride, dtype in forms
    )
    return made[0] if is_one else made


def remember(key: tuple[Any, str], result: Any, taken: Set[int]) -> None:
    """Remember the forms of a call's results, if they are tensors of their own.

    Args:
        key: From `key_of`.
        result: What the operator returned.
        taken: Storages that there were before, by their ``_cdata``.
    """
    is_one = isinstance(result, Tensor)
    leaves = [result] if is_one else result
    if not isinstance(leaves, list | tuple) or not leaves:
        return
    places = set(taken)
    for leaf in leaves:
        if type(leaf) is not Tensor or leaf.is_conj() or leaf.is_neg():
            return
        place = leaf.untyped_storage()._cdata
        if place in places or leaf.storage_offset():
            return
        places.add(place)
    if len(_forms) >= KEPT:
        _forms.clear()
    _forms[key] = is_one, tuple((tuple(t.shape), t.stride(), t.dtype) for t in leaves)


@functools.lru_cache(maxsize=KEPT)
def _makes_new(func: Any) -> bool:
    schema = func._schema
    passed = (*schema.arguments, *schema.returns)
    return not schema.is_mutable and all(a.alias_info is None for a in passed)


def _described(item: Any) -> Any:
    if isinstance(item, Tensor):
        signs = item.is_conj(), item.is_neg(), item.storage_offset()
        return list(item.shape), item.stride(), item.dtype, signs
    if isinstance(item, list | tuple):
        return [_described(part) for part in item]
    if isinstance(item, Mapping):
        return [(name, _described(part)) for name, part in item.items()]
    return item
