"""Caches of the caller's code, which no run here may fill with tensors that have no values.

Code that computes something once, a table of positions, a mask, keeps it: in an attribute, in
an object of its own, in a global, by ``functools.lru_cache``. A trace runs that code on tensors
without values. Left in such a place, one of them would be what the caller's module returns, or
fails on, ever after.

So a module is called once as its owner calls it before it is run in any other way: then what
it keeps is there, with values (`called`). What it keeps for one batch size only is taken away
again where a trace has put it: from what the module holds (`unfilled`), and from wherever else
(`take_back`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from curvd.graph.checkpoints import plain_checkpoints
from curvd.graph.manifest import Inputs
from curvd.graph.quiet import quiet

_DICTS = (dict, OrderedDict, defaultdict)
_LISTS = (list, deque)
_OPAQUE = (
    nn.Module,
    Tensor,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
)
"""What is not looked into; a module's layers are looked at one by one."""
_PARTS = 10_000
"""Attributes and elements that are looked at; whoever holds more holds data or a trainer."""
_LRU = type(functools.lru_cache(None)(len))
_MISSING = object()


def called(wrapper: nn.Module, rows: Inputs) -> None:
    """Call a module as its owner does, so that it keeps what it computes once.

    What had a value before has it afterwards: running statistics, counters, the random
    numbers to come. What was not there stays, as after any call.

    Args:
        wrapper: Calls the module.
        rows: What with. If it fails on them, others say so.
    """
    if any(map(is_lazy, (*wrapper.parameters(), *wrapper.buffers()))):
        return  # its first call is its owner's
    held = [(vars(layer), dict(vars(layer))) for layer in wrapper.modules()]
    state = {name: buffer.clone() for name, buffer in wrapper.named_buffers()}
    devices = {t.device.index for t in rows.leaves if t.device.type == "cuda"}
    random = torch.random.fork_rng(devices=[d for d in devices if d is not None])
    arguments = (rows.args, dict(rows.kwargs))
    try:
        # note: a forward that differentiates needs gradients to be on.
        with torch.enable_grad(), random, plain_checkpoints(), quiet():
            torch.func.functional_call(wrapper, state, arguments)
    except Exception:  # of the module's own code
        return
    finally:
        for now, before in held:
            for name, value in before.items():
                if value is not None and now.get(name) is not value:
                    now[name] = value


@contextlib.contextmanager
def unfilled(wrapper: nn.Module) -> Iterator[None]:
    """Take back what a trace leaves without values in what a module holds.

    Nothing else is touched: a training may go on beside this.

    Args:
        wrapper: The module, with its layers.
    """
    held = list(_containers(wrapper))
    try:
        yield
    finally:
        for container, before in held:
            _empty(container, before)


def take_back(made: Sequence[weakref.ref[Tensor]]) -> bool:
    """Take tensors without values out of wherever they were put.

    Args:
        made: All that a run made. It has ended, and holds none of them.

    Returns:
        Whether there were any.
    """
    left = [tensor for known in made if (tensor := known()) is not None]
    if not left:
        return False
    lost = set(map(id, left))
    for holder in gc.get_referrers(*left):
        if isinstance(holder, _LRU):
            holder.cache_clear()
        elif isinstance(holder, _DICTS):
            for name in [k for k, v in holder.items() if id(v) in lost]:
                del holder[name]
        elif isinstance(holder, _LISTS) and holder is not left:
            kept = [item for item in holder if id(item) not in lost]
            holder.clear()
            holder.extend(kept)
        elif not isinstance(holder, _OPAQUE):
            attributes = _state_of(holder) or {}
            for name in [k for k, v in attributes.items() if id(v) in lost]:
                delattr(holder, name)
    return True


def has_no_values(item: Any) -> bool:
    """Tell what only a trace makes."""
    if not isinstance(item, Tensor):
        return False
    return isinstance(item, FakeTensor) or item.device.type == "meta"


def _containers(wrapper: nn.Module) -> Iterator[tuple[Any, Any]]:
    """List what can hold tensors, from the module inwards, and copies."""
    known: dict[int, Any] = {id(vars(m)): vars(m) for m in wrapper.modules()}
    ahead: deque[Any] = deque(known.values())
    left = _PARTS
    while ahead:
        container = ahead.popleft()
        left -= len(container)
        if left < 0:
            return
        is_dict = isinstance(container, _DICTS)
        yield container, dict(container) if is_dict else list(container)
        for part in container.values() if is_dict else container:
            inner = part if isinstance(part, _DICTS + _LISTS) else _state_of(part)
            if inner is not None and id(inner) not in known:
                known[id(inner)] = inner
                ahead.append(inner)


def _state_of(item: Any) -> dict[str, Any] | None:
    """Find the attributes of an object of the caller's own."""
    held = None
    if not isinstance(item, _OPAQUE):
        with contextlib.suppress(Exception):  # of a proxy that stands for nothing yet
            held = item.__dict__
    return held if type(held) is dict else None


def _empty(container: Any, before: Any) -> None:
    """Restore the places of a container that hold tensors without values now, or copies.

    torch.export puts copies of containers in place of those that a module holds.
    """
    if isinstance(container, _DICTS):
        for name, item in list(container.items()):
            was = before.get(name, _MISSING)
            if was is item:
                continue
            if has_no_values(item) and was is _MISSING:
                del container[name]
            elif has_no_values(item) or _is_copy(item, was):
                container[name] = was
    elif any(map(has_no_values, container)):
        known = set(map(id, before))
        kept = [i for i in container if not has_no_values(i) or id(i) in known]
        container.clear()
        container.extend(kept)


def _is_copy(item: Any, was: Any) -> bool:
    """Tell whether a container holds the very objects that another does."""
    if type(item) is not type(was) or not isinstance(item, _DICTS + _LISTS):
        return False
    return len(item) == len(was) and all(
        a is b for a, b in zip(_parts(item), _parts(was), strict=True)
    )


def _parts(container: Any) -> list[Any]:
    if isinstance(container, _DICTS):
        return [*container, *container.values()]
    return list(container)
