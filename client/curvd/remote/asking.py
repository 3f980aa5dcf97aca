"""From a query's options to the method that asks it: signature, documentation, the call.

The keyword arguments of a method are the fields of its options, so type checkers and
editors read them off the dataclass; its docstring is completed by what the fields say.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from curvd._calls import Observe, QueryCall
from curvd.contract import QueryOptions, own_first, settings_of

T = TypeVar("T")
P = ParamSpec("P")
O = TypeVar("O", bound=QueryOptions)  # noqa: E741 - options
_WIDTH = 88


class Asks(Protocol):
    """What can ask: an operator or a session of either client."""

    def _ask(self, call: QueryCall[T], progress: Observe | bool) -> T:
        """Make the call; of the asyncio client, to be awaited."""


def asks(
    options: Callable[P, O],
) -> Callable[[Callable[[Any, O], QueryCall[T]]], Callable[Concatenate[Any, P], T]]:
    """Make a method that takes a query's options as keyword arguments.

    Args:
        options: The class of the options.

    Returns:
        The decorator of a function that takes the options and makes the call.
    """

    def decorate(
        make: Callable[[Any, O], QueryCall[T]],
    ) -> Callable[Concatenate[Any, P], T]:
        @functools.wraps(make)
        def method(self: Asks, /, *args: P.args, **given: P.kwargs) -> T:
            asked = options(*args, **given)
            return self._ask(make(self, asked), asked.progress)

        _describe(method, options)
        return method

    return decorate


def asks_about(
    options: Callable[P, O],
) -> Callable[
    [Callable[[Any, Any, O], QueryCall[T]]], Callable[Concatenate[Any, Any, P], T]
]:
    """Make a method that takes one operand, by position, and options.

    Args:
        options: The class of the options.

    Returns:
        The decorator of a function that takes the operand and the options.
    """

    def decorate(
        make: Callable[[Any, Any, O], QueryCall[T]],
    ) -> Callable[Concatenate[Any, Any, P], T]:
        @functools.wraps(make)
        def method(self: Asks, operand: Any, /, *args: P.args, **given: P.kwargs) -> T:
            asked = options(*args, **given)
            return self._ask(make(self, operand, asked), asked.progress)

        _describe(method, options)
        return method

    return decorate


def awaited(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Make the asyncio twin of a method: the same, but that `_ask` is to be awaited.

    Args:
        method: The method of the blocking client.

    Returns:
        The twin.
    """

    @functools.wraps(method)
    async def twin(self: Any, /, *args: P.args, **given: P.kwargs) -> T:
        asking: Any = method(self, *args, **given)
        result: T = await asking
        return result

    return twin


def _describe(method: Callable[..., Any], options: Any) -> None:
    """Give a method the signature and the documentation of its options."""
    made = inspect.signature(method.__wrapped__)  # type: ignore[attr-defined]
    *before, _ = made.parameters.values()
    parameters = inspect.signature(options).parameters
    own = [parameters[name] for name in own_first(options)]
    before = [p.replace(kind=p.POSITIONAL_ONLY) for p in before]
    if len(before) == 1:  # a method as it is written
        before = [before[0].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    returned = str(made.return_annotation).removeprefix("QueryCall[").removesuffix("]")
    method.__signature__ = made.replace(  # type: ignore[attr-defined]
        parameters=[*before, *own], return_annotation=returned
    )
    method.__doc__ = documented(method.__doc__ or "", [p.name for p in own], options)


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
