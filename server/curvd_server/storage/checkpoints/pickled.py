"""What a pickle says, without doing it.

torch writes the metadata of checkpoints, and what is known of a tensor, as pickles. Here
their opcodes are walked as data: lists, tuples, dicts, numbers and texts become themselves,
and whatever a pickle would import, call or build becomes a `Record` of the name and the
arguments. No name is looked up and nothing is called, whatever the pickle says; an opcode
that torch does not write is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from curvd.errors import InvalidTensors

PERSISTENT = "persistent"
"""Name of records that stand for what a pickle refers to outside itself."""


_MOST_TIMES = 10_000
"""One opcode in a row."""
_MOST_WAITING = 100_000
"""Values, and marks, that wait for an opcode that takes them."""


@dataclass(eq=False, slots=True)
class Record:
    """What would be an object, or a name that would be imported."""

    name: str
    """Module and name, a blank between."""
    args: Any = None
    """What it would be called with; None for a name that is not called."""
    state: Any = None
    """What it would be filled with."""


class _Mark:
    """Where a sequence began."""


def read(data: bytes) -> Any:
    """Walk a pickle.

    Args:
        data: The pickle, as anybody may have written it.

    Returns:
        What it says.

    Raises:
        InvalidTensors: If it is none, or says something that torch does not write.
    """
    reader = _Reader()
    try:
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return reader.pop()
            reader.take(opcode.name, arg)
    except InvalidTensors:
        raise
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        DeprecationWarning,  # a wrong escape, where a program has warnings as errors
    ) as error:
        msg = f"a pickle of the checkpoint is damaged: {str(error)[:200]}"
        raise InvalidTensors(msg) from None
    msg = "a pickle of the checkpoint ends too early"
    raise InvalidTensors(msg)


class _Reader:
    """A stack machine without a call.

    What torch writes is shallow, and its values are taken in batches of a thousand. What
    only piles up, or repeats itself, is refused where that shows, and not when megabytes
    of it have been walked.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.latest, self.times = "", 0

    def take(self, name: str, arg: Any) -> None:
        """Take one opcode."""
        self.times = self.times + 1 if name == self.latest else 1
        self.latest = name
        if self.times > _MOST_TIMES or len(self.stack) > _MOST_WAITING:
            msg = f"{self.times} times {name} in a row, {len(self.stack)} values that wait"
            raise ValueError(msg)
        if name in _NOTHING:
            return
        if name in _VALUES:
            self.stack.append(arg)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _STEPS:
            _STEPS[name](self, arg)
        else:
            msg = (
                f"a pickle of the checkpoint has the opcode {name}, which torch does not "
                "write: save the checkpoint with torch's default options"
            )
            raise InvalidTensors(msg, opcode=name)

    def pop(self) -> Any:
        """Take the top, which is no mark."""
        value = self.stack.pop()
        if value is _Mark:
            msg = "a mark where a value belongs"
            raise ValueError(msg)
        return value

    def top(self, kind: type) -> Any:
        """Look at the top, which must be of a kind."""
        value = self.stack[-1]
        if not isinstance(value, kind):
            msg = f"a {type(value).__name__} where a {kind.__name__} belongs"
            raise TypeError(msg)
        return value

    def since_mark(self) -> list[Any]:
        """Take all that follows the last mark, and the mark."""
        values = []
        while (value := self.stack.pop()) is not _Mark:
            values.append(value)
        return values[::-1]

    def collect(self, count: int) -> None:
        """Make a tuple of the last values."""
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(values[::-1]))

    def extend(self, values: list[Any]) -> None:
        """Add values to the list on top."""
        self.top(list).extend(values)

    def put(self, values: list[Any]) -> None:
        """Add keys and values to the dict on top."""
        entries = self.top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            entries[_plain_key(key)] = value

    def name(self) -> None:
        """Make a name of a module and what is in it."""
        what, module = self.pop(), self.pop()
        if not isinstance(what, str) or not isinstance(module, str):
            msg = "a name that is no text"
            raise TypeError(msg)
        self.stack.append(Record(f"{module} {what}"))

    def call(self) -> None:
        """Note a call, instead of making it."""
        args = self.pop()
        called = self.top(Record)
        self.stack[-1] = Record(called.name, args)

    def build(self) -> None:
        """Note what an object would be filled with."""
        state = self.pop()
        self.top(Record).state = state

    def remember(self, key: int | None) -> None:
        """Keep the top for later."""
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]


def _plain_key(key: Any) -> Any:
    """Refuse keys whose hash would be a walk through something deep."""
    for part in key if isinstance(key, tuple) else (key,):
        if not isinstance(part, str | int | float | bytes | Record | None):
            msg = f"a {type(part).__name__} as a key"
            raise TypeError(msg)
    return key


_NOTHING = frozenset({"PROTO", "FRAME"})
_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "STRING",
})  # fmt: skip
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
    "MARK": lambda: _Mark,
}
_STEPS: Mapping[str, Callable[[_Reader, Any], Any]] = {
    "TUPLE": lambda r, _: r.stack.append(tuple(r.since_mark())),
    "TUPLE1": lambda r, _: r.collect(1),
    "TUPLE2": lambda r, _: r.collect(2),
    "TUPLE3": lambda r, _: r.collect(3),
    "LIST": lambda r, _: r.stack.append(r.since_mark()),
    "FROZENSET": lambda r, _: r.stack.append(r.since_mark()),
    "APPEND": lambda r, _: r.extend([r.pop()]),
    "APPENDS": lambda r, _: r.extend(r.since_mark()),
    "ADDITEMS": lambda r, _: r.extend(r.since_mark()),
    "SETITEM": lambda r, _: r.put([r.pop(), r.pop()][::-1]),
    "SETITEMS": lambda r, _: r.put(r.since_mark()),
    "GLOBAL": lambda r, arg: r.stack.append(Record(arg)),
    "STACK_GLOBAL": lambda r, _: r.name(),
    "REDUCE": lambda r, _: r.call(),
    "NEWOBJ": lambda r, _: r.call(),
    "BUILD": lambda r, _: r.build(),
    "BINPERSID": lambda r, _: r.stack.append(Record(PERSISTENT, r.pop())),
    "MEMOIZE": lambda r, _: r.remember(None),
    "PUT": lambda r, arg: r.remember(arg),
    "BINPUT": lambda r, arg: r.remember(arg),
    "LONG_BINPUT": lambda r, arg: r.remember(arg),
    "GET": lambda r, arg: r.stack.append(r.memo[arg]),
    "BINGET": lambda r, arg: r.stack.append(r.memo[arg]),
    "LONG_BINGET": lambda r, arg: r.stack.append(r.memo[arg]),
}
