"""Yield points inside what torch does in one call: between its operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from curvd_server.system import yield_point


class Interruptible(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets others go between two operations; costs microseconds for each of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operation."""
        yield_point()
        return func(*args, **(kwargs or {}))
