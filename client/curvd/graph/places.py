"""Where the code of a module can keep something, as far as names and attributes lead.

From what the layers hold and from their ``forward``: containers and objects in one another,
methods and functions by the names that code uses, and their globals, defaults, attributes and
what they close over. Nothing is run to find out, and torch's own code is not looked at.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_DICTS = (dict, OrderedDict, defaultdict)
_LISTS = (list, deque)
_HELD = (*_DICTS, *_LISTS, set)
_OPAQUE = (nn.Module, Tensor, torch.dtype, torch.device)
"""What is not looked into; a module's layers are looked at one by one."""
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))
"""What holds nothing, as most of what is met does."""
_CODE: tuple[type, ...] = (
    types.FunctionType,
    types.MethodType,
    functools.partial,
    staticmethod,
    classmethod,
    property,
    functools.cached_property,
)
_LRU = type(functools.lru_cache(None)(len))
_TORCHS = ("torch", "builtins", "typing", "functools", "collections", "curvd")
"""Packages whose own names are not the caller's."""
_PARTS = 10_000
"""Attributes, names and elements that are looked at; who has more holds data, or a trainer."""
_DEPTH = 20
"""Of containers in one another, of which torch.export puts copies in place."""
_TOO_MANY = -1
"""In place of a module's identity: not all was looked at."""
_MISSING = object()


def has_no_values(item: Any) -> bool:
    """Tell what only a trace makes."""
    if isinstance(item, tuple | list):
        return any(map(has_no_values, item))
    if not isinstance(item, Tensor):
        return False
    return isinstance(item, FakeTensor) or item.device.type == "meta"


class _Names:
    """Some names of a namespace: attributes, keys, globals."""

    def __init__(self, space: Any, names: Iterable[Any] | None = None) -> None:
        self._space, self._all = space, names is None
        self._before = {n: space[n] for n in (space if names is None else names)}

    def clean(self) -> bool:
        """Restore what has no values now, and what torch.export put copies of in place."""
        found = False
        for name in list(self._space if self._all else self._before):
            item, was = self._space.get(name), self._before.get(name, _MISSING)
            if was is item or not (has_no_values(item) or _is_copy(item, was)):
                continue
            found |= has_no_values(item)
            if was is _MISSING:
                del self._space[name]
            else:
                self._space[name] = was
        return found


class _Elements:
    """A list, a deque or a set."""

    def __init__(self, held: Any) -> None:
        self._held, self._before = held, list(held)

    def clean(self) -> bool:
        """Take out what has no values."""
        known = set(map(id, self._before))
        lost = [i for i in self._held if has_no_values(i) and id(i) not in known]
        if lost:
            kept = [i for i in self._held if not has_no_values(i) or id(i) in known]
            self._held.clear()
            getattr(self._held, "update" if isinstance(self._held, set) else "extend")(
                kept
            )
        return bool(lost)


class _Cell:
    """A variable that functions close over."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell, self._before = cell, cell.cell_contents

    def clean(self) -> bool:
        """Restore it."""
        found = has_no_values(self._cell.cell_contents)
        found = found and self._cell.cell_contents is not self._before
        if found:
            self._cell.cell_contents = self._before
        return found


class _Slots:
    """The attributes of an object that has no dictionary."""

    def __init__(self, item: Any, names: Iterable[str]) -> None:
        self._item = item
        self._before = {n: getattr(item, n, _MISSING) for n in names}

    def clean(self) -> bool:
        """Restore them."""
        found = False
        for name, was in self._before.items():
            now = getattr(self._item, name, _MISSING)
            if now is not was and has_no_values(now):
                found = True
                if was is _MISSING:
                    delattr(self._item, name)
                else:
                    setattr(self._item, name, was)
        return found


class _Remembered:
    """A function's results, of which nothing can be said but how many there are."""

    def __init__(self, function: Any) -> None:
        self._function, self._before = function, function.cache_info().misses

    def clean(self) -> bool:
        """Forget them, if there are more than before."""
        found: bool = self._function.cache_info().misses != self._before
        if found:
            self._function.cache_clear()
        return found


def reaches(module: nn.Module, other: nn.Module) -> bool | None:
    """Tell whether the code of a module can reach another one, or a layer of it.

    Args:
        module: Whose code it is.
        other: What may be reached; if it is the same, by another way than from a layer to its
            children: a parent in a list, a bound method, a global.

    Returns:
        Whether it can; None: as far as one looked it cannot, and there is more.
    """
    met: set[int] = set()
    for _ in places(module, met):
        pass
    if not met.isdisjoint(map(id, other.modules())):
        return True
    return None if _TOO_MANY in met else False


Place = _Names | _Elements | _Cell | _Slots | _Remembered


def places(wrapper: nn.Module, met: set[int] | None = None) -> Iterator[Place]:
    """List where the code of a module can keep something, from the module inwards.

    Args:
        wrapper: The module.
        met: Takes the identities of modules that are reached, but as children.

    Yields:
        The places.
    """
    layers = list(wrapper.modules())
    known: dict[int, Any] = {id(m._modules): m._modules for m in layers}
    ahead: deque[Any] = deque()

    def meet(items: Iterable[Any]) -> None:
        for item in items:
            if type(item) in _PLAIN:
                continue
            if met is not None and isinstance(item, nn.Module):
                met.add(id(item))
            if id(item) not in known and not isinstance(item, _OPAQUE):
                known[id(item)] = item
                ahead.append(item)

    meet(vars(layer) for layer in layers)
    kinds = {kind for layer in layers for kind in type(layer).__mro__}
    methods: dict[str, list[Any]] = {}
    for kind in kinds:
        if not _is_of_torch(kind):
            for name, value in vars(kind).items():
                if isinstance(value, (*_CODE, _LRU)):
                    methods.setdefault(name, []).append(value)
                else:
                    meet([value])
    meet(methods.get("forward", ()))
    left = _PARTS
    while ahead and left > 0:
        left -= 1
        item = ahead.popleft()
        with contextlib.suppress(Exception):  # of objects that only look like one
            if isinstance(item, _HELD):
                left -= len(item)
                if left > 0:
                    yield _Names(item) if isinstance(item, _DICTS) else _Elements(item)
                    meet(item.values() if isinstance(item, _DICTS) else item)
            elif isinstance(item, _LRU):
                yield _Remembered(item)
                meet([item.__wrapped__])
            elif isinstance(item, tuple):
                left -= len(item)
                meet(item if left > 0 else ())
            elif isinstance(item, weakref.ref):
                meet([item()])
            elif isinstance(item, _CODE):
                yield from _of_code(item, meet, methods)
            elif _is_callers(item):
                meet([vars(item)] if hasattr(item, "__dict__") else ())
                slots = [
                    name
                    for kind in type(item).__mro__
                    for name in _names(vars(kind).get("__slots__", ()))
                ]
                if slots:
                    yield _Slots(item, slots)
                    meet(getattr(item, name, None) for name in slots)
    if ahead and met is not None:
        met.add(_TOO_MANY)


def _of_code(
    item: Any,
    meet: Callable[[Iterable[Any]], None],
    methods: Mapping[str, list[Any]],
) -> Iterator[Place]:
    """List where a function can keep something: variables, defaults, names, attributes.

    Args:
        item: The function, or what stands for it.
        meet: Takes what is to be looked at next.
        methods: Those of the layers, by name; the ones that it names are looked at, too.
    """
    function = item
    while not isinstance(function, types.FunctionType):
        if isinstance(function, functools.partial):
            meet([function.args, function.keywords])
        if isinstance(function, types.MethodType):
            meet([function.__self__])
        following = (
            getattr(function, name, None) for name in ("__func__", "func", "fget")
        )
        function = next((f for f in following if f is not None), None)
        if function is None:
            return
    if _is_of_torch(function):
        return
    meet([function.__dict__, function.__defaults__, function.__kwdefaults__])
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # of a variable that has no value yet
            yield _Cell(cell)
            meet([cell.cell_contents])
    space, names = function.__globals__, _names_in(function.__code__)
    meet(method for name in names for method in methods.get(name, ()))
    own = [name for name in names if name in space]
    yield _Names(space, own)
    for name in own:
        value = space[name]
        if isinstance(value, types.ModuleType):
            if not _is_of_torch(value):
                there = [n for n in names if n in vars(value)]
                yield _Names(vars(value), there)
                meet(vars(value)[n] for n in there)
        elif not isinstance(value, type):
            meet([value])
        elif not _is_of_torch(value):
            meet(vars(value).values())


@functools.lru_cache(4096)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """List the names that a function's code uses, and that of functions in it."""
    found = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(dict.fromkeys(_names_in(constant)))
    return (*found,)


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_callers(item: Any) -> bool:
    """Tell whether an object may hold what the caller put there."""
    if isinstance(item, type | types.ModuleType):
        return False
    return type(item).__module__.partition(".")[0] not in ("torch", "builtins", "curvd")


def _is_of_torch(item: Any) -> bool:
    """Tell whether a class, a function or a module of Python is torch's, or Python's own."""
    name = item.__name__ if isinstance(item, types.ModuleType) else item.__module__
    return str(name).partition(".")[0] in _TORCHS


def _is_copy(item: Any, was: Any, depth: int = _DEPTH) -> bool:
    """Tell whether containers in one another hold the very objects that others do."""
    if type(item) is not type(was) or not isinstance(item, (*_DICTS, *_LISTS, tuple)):
        return False
    return (
        depth > 0
        and len(item) == len(was)
        and all(
            a is b or _is_copy(a, b, depth - 1)
            for a, b in zip(_parts(item), _parts(was), strict=True)
        )
    )


def _parts(container: Any) -> list[Any]:
    if isinstance(container, Mapping):
        return [*container, *container.values()]
    return list(container)
