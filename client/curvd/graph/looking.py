"""Looking at what torch's operators return, one call after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Looking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows each result to `look`, and hands out what that returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def look(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> Any:
        """Say what an operator returns to its caller.

        Args:
            func: The operator.
            args: Its operands.
            kwargs: Its options.
            result: What it returned.
        """
        raise NotImplementedError

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operator, and look at what it returns."""
        given = kwargs or {}
        return self.look(func, args, given, func(*args, **given))


def floating(result: Any) -> Iterator[Tensor]:
    """List the tensors of floating point among what an operator returned."""
    for leaf in result if isinstance(result, tuple | list) else (result,):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf
