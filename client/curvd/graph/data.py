"""Data as people hold it, as tensors: arrays, a tokenizer's batch, loaders, data sets."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvd.errors import InvalidSpec
from curvd.tensors import not_dense

LABELS = "labels"
"""Where a mapping has its targets, as transformers have them."""
_ROWS = 256
"""Data points of a data set that are read together."""
_NARROW = (torch.uint16, torch.uint32, torch.uint64)
"""Types that torch has, but hardly an operator for."""
_FORMS = (
    "a pair (inputs, targets), a mapping with 'labels', a DataLoader, a Dataset, or an "
    "iterable of mini-batches of either kind"
)


@dataclass(frozen=True, slots=True)
class Data:
    """Inputs and targets of all data points."""

    inputs: Any
    """A tensor [N, ...], a tuple of arguments, or a dict of keyword arguments."""
    targets: Any
    """[N, ...]."""
    batch_size: int | None
    """That of the mini-batches that the data came in; None: it came whole."""


def opened(data: Any, module: nn.Module | None) -> Data:
    """Read data in whatever way it is held.

    Args:
        data: A pair of inputs and targets; a mapping with ``labels``; a DataLoader, a
            Dataset or an iterable of such, whose last entry is the target.
        module: The model: arrays that are no tensors become its type. None: they keep
            their own.

    Returns:
        The data as tensors.

    Raises:
        InvalidSpec: If it is none of these, has no numbers, or its mini-batches do not
            fit together.
    """
    dtype = _type_of(module)
    if isinstance(data, TensorDataset):
        return _whole(data.tensors, dtype)
    if isinstance(data, Dataset):
        found = _joined(DataLoader(data, batch_size=_ROWS), dtype)
        return Data(found.inputs, found.targets, None)
    if isinstance(data, DataLoader):
        found = _joined(data, dtype)
        return Data(found.inputs, found.targets, data.batch_size or found.batch_size)
    if isinstance(data, Mapping) or _is_pair(data):
        return _whole(data, dtype)
    if _is_array(data) or isinstance(data, str) or not isinstance(data, Iterable):
        msg = f"data must be {_FORMS}; got {_named(data)} without targets"
        raise InvalidSpec(msg)
    if isinstance(data, tuple) and any(map(_is_array, data)):
        msg = (
            f"data is a pair, (inputs, targets), got a tuple of {len(data)}: several "
            "inputs go into a tuple of their own, ((a, b), targets)"
        )
        raise InvalidSpec(msg, given=len(data))
    return _joined(data, dtype)


def tensors_of(inputs: Any, module: nn.Module) -> Any:
    """Make tensors of inputs in whatever arrays they are held.

    Args:
        inputs: An array, a tuple of arguments, or a mapping of keyword arguments.
        module: The model that they are for.

    Returns:
        The same with tensors, in a tuple or a dict if they were in such.

    Raises:
        InvalidSpec: If something has no numbers.
    """
    return _arguments(inputs, _type_of(module))


def by_name(data: Any, inputs: tuple[str, ...], target: str) -> Mapping[str, Any]:
    """Give names to the tensors of a loader, a data set or an iterable of mini-batches.

    Args:
        data: As for `opened`, but for a mapping.
        inputs: Names of the inputs, in order.
        target: Name of the target.

    Returns:
        Tensors by name.

    Raises:
        InvalidSpec: If there are more names than inputs, or fewer.
    """
    found = opened(data, None)
    leaves = pytree.tree_leaves(found.inputs)
    if len(leaves) != len(inputs):
        msg = (
            f"the data has {len(leaves)} inputs and a target, but inputs= names "
            f"{len(inputs)}: {', '.join(inputs)}"
        )
        raise InvalidSpec(msg, given=len(leaves), expected=len(inputs))
    if isinstance(found.inputs, Mapping) and not {*inputs} - {*found.inputs}:
        leaves = [found.inputs[name] for name in inputs]
    return {**dict(zip(inputs, leaves, strict=True)), target: found.targets}


def _whole(entry: Any, dtype: torch.dtype | None) -> Data:
    """Read a pair, a mapping, or several inputs and the target after them."""
    if isinstance(entry, Mapping):
        if LABELS not in entry:
            known = ", ".join(map(repr, entry)) or "nothing"
            msg = (
                f"a mapping has the targets as {LABELS!r}; this {type(entry).__name__} "
                f"has {known}: add them, or pass the pair (mapping, targets)"
            )
            raise InvalidSpec(msg)
        inputs = {name: entry[name] for name in entry if name != LABELS}
        return Data(_arguments(inputs, dtype), _targets(entry[LABELS], dtype), None)
    *several, targets = entry
    given = several[0] if len(several) == 1 else tuple(several)
    return Data(_arguments(given, dtype), _targets(targets, dtype), None)


def _joined(batches: Iterable[Any], dtype: torch.dtype | None) -> Data:
    """Lay mini-batches one after the other."""
    found = list(_read(batches, dtype))
    if not found:
        raise _empty(batches)
    first = pytree.tree_structure(found[0].inputs)
    given = [_in_order(batch.inputs, found[0].inputs) for batch in found]
    for number, inputs in enumerate(given):
        if pytree.tree_structure(inputs) != first:
            msg = (
                "the mini-batches of the data have different inputs: the first has "
                f"{_shown(given[0])}, number {number} {_shown(inputs)}; give all the same"
            )
            raise InvalidSpec(msg, batch=number)
    inputs = pytree.tree_map(lambda *leaves: _concatenated("inputs", leaves), *given)
    targets = _concatenated("targets", [batch.targets for batch in found])
    return Data(inputs, targets, len(found[0].targets))


def _empty(batches: Any) -> InvalidSpec:
    """Say why there is no mini-batch."""
    if isinstance(batches, DataLoader):
        why = "it has no data points: has a filter or a slice left none?"
        if batches.drop_last:
            why = (
                f"it drops what does not fill a mini-batch of {batches.batch_size}: pass "
                "one with drop_last=False"
            )
        msg = f"the data has no mini-batches: this DataLoader is empty, as {why}"
        return InvalidSpec(msg)
    msg = (
        f"the data has no mini-batches: this {type(batches).__name__} is empty, or was "
        "read before; pass one that begins anew, such as a list or a DataLoader"
    )
    return InvalidSpec(msg)


def _in_order(value: Any, like: Any) -> Any:
    """Give mappings with the keys of another its order: they are matched by name."""
    if not isinstance(value, dict) or not isinstance(like, dict):
        return value
    if value.keys() != like.keys():
        return value
    return {name: _in_order(value[name], like[name]) for name in like}


def _shown(inputs: Any) -> str:
    """Name the inputs of a mini-batch, or count them."""
    if isinstance(inputs, dict):
        return ", ".join(map(repr, [*inputs][:8])) or "none"
    return f"{len(inputs)}" if isinstance(inputs, tuple) else "one"


def _read(batches: Iterable[Any], dtype: torch.dtype | None) -> Iterator[Data]:
    for batch in batches:
        several = isinstance(batch, tuple | list) and len(batch) > 1
        if not (several or isinstance(batch, Mapping)):
            msg = (
                "a mini-batch is inputs and targets, (inputs, targets), or a mapping "
                f"with {LABELS!r}; the data has one that is {_named(batch)}: data must "
                f"be {_FORMS}"
            )
            raise InvalidSpec(msg)
        found = _whole(batch, dtype)
        _check_batch(found)
        yield found


def _check_batch(batch: Data) -> None:
    """Refuse single data points in place of mini-batches."""
    leaves = [batch.targets, *pytree.tree_leaves(batch.inputs)]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    single = isinstance(batch.targets, numbers.Number)
    lengths = {x.shape[0] if x.dim() else None for x in tensors}
    if single or (isinstance(batch.targets, Tensor) and len(lengths) > 1):
        inputs = ", ".join(
            str(list(x.shape)) for x in tensors if x is not batch.targets
        )
        targets = batch.targets if single else list(batch.targets.shape)
        msg = (
            "a mini-batch has one leading axis B in its inputs and its targets; the data "
            f"has one with inputs {inputs[:80]}, targets {targets}: are they single data "
            "points? give the DataLoader a batch_size, or stack them"
        )
        raise InvalidSpec(msg)


def _concatenated(what: str, leaves: Any) -> Any:
    if not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        return leaves[0]  # an option; a target that is none is refused later
    shapes = list(dict.fromkeys(tuple(leaf.shape[1:]) for leaf in leaves))
    if len(shapes) > 1:
        said = " and ".join(f"[B{''.join(f', {n}' for n in s)}]" for s in shapes[:2])
        msg = (
            f"the mini-batches have {what} of different shapes, {said}; one data set has "
            "one: pad all to one length, as with padding='max_length'"
        )
        raise InvalidSpec(msg)
    return torch.cat(list(leaves))


def _arguments(inputs: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(inputs, Mapping):
        return {n: _leaf(f"input {n!r}", v, dtype) for n, v in inputs.items()}
    if isinstance(inputs, tuple | list) and not _is_numbers(inputs):
        return tuple(_leaf(f"input {n}", v, dtype) for n, v in enumerate(inputs))
    return _leaf("the input", inputs, dtype)


def _targets(value: Any, dtype: torch.dtype | None) -> Any:
    found = _leaf("the targets", value, dtype)
    if isinstance(value, Tensor) or not isinstance(found, Tensor):
        return found
    # NumPy counts in whatever is wide enough, losses of torch in int64.
    whole = not (found.is_floating_point() or found.is_complex())
    return found.long() if whole and found.dtype is not torch.bool else found


def _leaf(what: str, value: Any, dtype: torch.dtype | None) -> Any:
    """Make a tensor of an array; what is none stays what it is, an option."""
    remedy = not_dense(value)
    if remedy is None and hasattr(value, "toarray") and hasattr(value, "nnz"):
        remedy = "sparse: pass .toarray()"  # SciPy's, which has no __array__
    if remedy is not None:
        msg = f"{what}: a {type(value).__name__} that is {remedy}"
        raise InvalidSpec(msg, type=type(value).__name__)
    if isinstance(value, Tensor):
        return value
    if _is_numbers(value):
        value = _array(what, value)
    elif not isinstance(value, np.ndarray) and hasattr(value, "__array__"):
        value = np.asarray(value)  # a column of a table, or another library's
    elif isinstance(value, list | tuple | dict):
        return pytree.tree_map(lambda v: _leaf(what, v, dtype), value)
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind not in "biufc":
        msg = (
            f"{what}: an array of {value.dtype} has no numbers to compute with; texts "
            "become numbers in a tokenizer, and rows of different lengths by padding"
        )
        raise InvalidSpec(msg, dtype=value.dtype)
    native = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
    if not native.flags.writeable:
        native = native.copy()  # torch has no tensors that cannot be written
    tensor = torch.from_numpy(native.reshape(value.shape))
    if tensor.is_floating_point():
        return tensor if dtype is None else tensor.to(dtype)
    return tensor.long() if tensor.dtype in _NARROW else tensor


def _array(what: str, value: Any) -> Any:
    """Make an array of lists of numbers."""
    try:
        return np.asarray(value)
    except ValueError:
        msg = (
            f"{what}: lists of different lengths are no array [N, ...]; pad them to one, "
            "as with tokenizer(texts, padding=True)"
        )
        raise InvalidSpec(msg) from None


def _is_pair(data: Any) -> bool:
    """Tell inputs and targets from two mini-batches, which come in a list."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    return isinstance(data, tuple) or not all(map(_is_batch, data))


def _is_batch(entry: Any) -> bool:
    """Tell whether an entry may be a mini-batch: inputs with their targets."""
    if isinstance(entry, Mapping):
        return LABELS in entry
    return isinstance(entry, tuple | list) and len(entry) > 1 and not _is_array(entry)


def _is_array(value: Any) -> bool:
    held = isinstance(value, Tensor | np.ndarray) or hasattr(value, "__array__")
    return held or _is_numbers(value)


def _is_numbers(value: Any) -> bool:
    """Tell whether it is a list of numbers, or of such lists, to whatever depth."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
        if isinstance(value, numbers.Number | np.generic):
            return True
    return False


def _type_of(module: nn.Module | None) -> torch.dtype | None:
    if module is None:
        return None
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floating, None)


def _named(value: Any) -> str:
    return f"a {type(value).__name__}"
