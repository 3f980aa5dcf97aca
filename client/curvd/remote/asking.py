"""From a query's options to the method that asks it: signature, documentation, the call.

The keyword arguments of a method are the fields of its options, so type checkers and
editors read them off the dataclass; its docstring is completed by what the fields say.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from curvd._calls import Observe, QueryCall
from curvd._transport import AsyncConnection, Connection
from curvd.contract import QueryOptions, own_first, settings_of
from curvd.remote.progress import watched

T = TypeVar("T")
P = ParamSpec("P")
O = TypeVar("O", bound=QueryOptions)  # noqa: E741 - options
_WIDTH = 88


class Asks:
    """What asks and waits: a base of the blocking client's operators and sessions."""

    _connection: Connection

    def _ask(self, call: QueryCall[T], progress: Observe | bool) -> T:
        with call.explained(), watched(progress, call.rpc.name) as observe:
            call.observe = observe
            return self._connection.run(call)


class AsyncAsks:
    """What asks and is awaited: a base of the asyncio client's."""

    _connection: AsyncConnection

    async def _ask(self, call: QueryCall[T], progress: Observe | bool) -> T:
        with call.explained(), watched(progress, call.rpc.name) as observe:
            call.observe = observe
            return await self._connection.run(call)


class QueryMethod(Generic[P, T]):
    """A method that asks a query: it answers one client, and is awaited by the other.

    Args:
        blocking: The method of an `Asks`.
        awaited: The method of an `AsyncAsks`.
    """

    def __init__(
        self,
        blocking: Callable[Concatenate[Any, P], T],
        awaited: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
    ) -> None:
        self._blocking, self._awaited = blocking, awaited
        self.__wrapped__, self.__module__ = blocking, blocking.__module__
        self.__doc__ = blocking.__doc__

    @overload
    def __get__(
        self, owner: AsyncAsks, kind: Any = None
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...

    @overload
    def __get__(self, owner: Asks, kind: Any = None) -> Callable[P, T]: ...

    @overload
    def __get__(
        self, owner: None, kind: Any = None
    ) -> Callable[Concatenate[Any, P], T]: ...

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        waits = not issubclass(kind or type(owner), AsyncAsks)
        function: Any = self._blocking if waits else self._awaited
        return function if owner is None else function.__get__(owner, kind)


def for_both(method: Callable[Concatenate[Any, P], T]) -> QueryMethod[P, T]:
    """Make a method that passes a call on to an object of its own client.

    Args:
        method: Returns what that object answers, to be awaited where the client's are.
    """

    @functools.wraps(method)
    async def awaited(self: AsyncAsks, /, *args: P.args, **given: P.kwargs) -> T:
        answer: Any = method(self, *args, **given)
        found: T = await answer
        return found

    return QueryMethod(method, awaited)


def asks(
    options: Callable[P, O],
) -> Callable[[Callable[[Any, O], QueryCall[T]]], QueryMethod[P, T]]:
    """Make a method that takes a query's options as keyword arguments.

    Args:
        options: The class of the options.

    Returns:
        The decorator of a function that takes the options and makes the call.
    """

    def decorate(make: Callable[[Any, O], QueryCall[T]]) -> QueryMethod[P, T]:
        @functools.wraps(make)
        def blocking(self: Asks, /, *args: P.args, **given: P.kwargs) -> T:
            asked = options(*args, **given)
            return self._ask(make(self, asked), asked.progress)

        @functools.wraps(make)
        async def awaited(self: AsyncAsks, /, *args: P.args, **given: P.kwargs) -> T:
            asked = options(*args, **given)
            return await self._ask(make(self, asked), asked.progress)

        describe(make, options, QueryOptions, blocking, awaited)
        return QueryMethod(blocking, awaited)

    return decorate


def asks_about(
    options: Callable[P, O],
) -> Callable[
    [Callable[[Any, Any, O], QueryCall[T]]], QueryMethod[Concatenate[Any, P], T]
]:
    """Make a method that takes one operand, by position, and options.

    Args:
        options: The class of the options.

    Returns:
        The decorator of a function that takes the operand and the options.
    """

    def decorate(
        make: Callable[[Any, Any, O], QueryCall[T]],
    ) -> QueryMethod[Concatenate[Any, P], T]:
        @functools.wraps(make)
        def blocking(
            self: Asks, operand: Any, /, *args: P.args, **given: P.kwargs
        ) -> T:
            asked = options(*args, **given)
            return self._ask(make(self, operand, asked), asked.progress)

        @functools.wraps(make)
        async def awaited(
            self: AsyncAsks, operand: Any, /, *args: P.args, **given: P.kwargs
        ) -> T:
            asked = options(*args, **given)
            return await self._ask(make(self, operand, asked), asked.progress)

        describe(make, options, QueryOptions, blocking, awaited)
        return QueryMethod(blocking, awaited)

    return decorate


def describe(
    make: Callable[..., Any],
    options: Any,
    common: type[Any],
    *methods: Callable[..., Any],
) -> None:
    """Give methods the signature and the documentation of options.

    Args:
        make: The function that takes the options, after the owner and operands.
        options: Their class.
        common: Its base, whose options stand last.
        *methods: They take the options by keyword.
    """
    made = inspect.signature(make)
    (owner, *operands, _), given = made.parameters.values(), inspect.signature(options)
    own = [given.parameters[name] for name in own_first(options, common)]
    if operands:  # they go by position, and so must what stands before them
        owner, *operands = (
            p.replace(kind=p.POSITIONAL_ONLY) for p in (owner, *operands)
        )
    answer = re.fullmatch(r"QueryCall\[(.*)\]", made.return_annotation)
    signature = made.replace(
        parameters=[owner, *operands, *own],
        return_annotation=answer[1] if answer else made.return_annotation,
    )
    doc = documented(make.__doc__ or "", [p.name for p in own], options)
    for method in methods:
        method.__signature__ = signature  # type: ignore[attr-defined]
        method.__doc__ = doc


def documented(doc: str, names: list[str], options: Any) -> str:
    """Complete a docstring by what the options say of themselves.

    Args:
        doc: The docstring, with a section *Returns*, and *Args* if there are operands.
        names: The names of the options, in order.
        options: Their class.

    Returns:
        The docstring with all arguments.
    """
    settings = settings_of(options)
    entries = "\n".join(
        textwrap.fill(
            f"{name}: {settings[name][1].help}",
            _WIDTH,
            initial_indent=" " * 12,
            subsequent_indent=" " * 16,
            break_on_hyphens=False,
            break_long_words=False,
        )
        for name in names
    )
    before, returns, after = doc.partition("\n        Returns:\n")
    if "        Args:\n" in before:
        return f"{before.rstrip()}\n{entries}\n{returns}{after}"
    return f"{before}\n        Args:\n{entries}\n{returns}{after}"
