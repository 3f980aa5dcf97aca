"""How many steps a training has made, as its optimisers tell."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from curvd.errors import InvalidSpec

if TYPE_CHECKING:
    from torch.optim import Optimizer

Optimizers = Any
"""An optimiser, or several."""


class StepCounter:
    """Counts the steps of optimisers; of several that take turns, each its own.

    A training of two optimisers makes one step when both have made one, so the number of
    steps is the largest of their counts.

    Args:
        given: Whose steps count. None: of all optimisers of this process that train one
            of `parameters`.
        parameters: Ids of parameters.
        reached: Called with the number of steps, on the thread that makes them.

    Raises:
        InvalidSpec: If something given is no optimiser of torch.
    """

    def __init__(
        self,
        given: Optimizers | None,
        parameters: frozenset[int],
        reached: Callable[[int], None],
    ) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        # Where a step is compiled, the compiler is not to read this.
        disable: Any = torch.compiler.disable
        hook = disable(self._stepped)
        self._parameters, self._reached = parameters, reached
        self._counts: weakref.WeakKeyDictionary[Optimizer, int | None] = (
            weakref.WeakKeyDictionary()
        )
        self._steps = 0
        if given is None:
            self._handles = [register_optimizer_step_post_hook(hook)]
            return
        self._handles = []
        for optimizer in _several(given):
            self._counts[optimizer] = 0
            self._handles.append(optimizer.register_step_post_hook(hook))

    def stop(self) -> bool:
        """Count no more.

        Returns:
            Whether it counted until now.
        """
        counted, self._handles = self._handles, []
        for handle in counted:
            handle.remove()
        return bool(counted)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self._counts:
            self._counts[optimizer] = 0 if self._trains(optimizer) else None
        count = self._counts[optimizer]
        if count is None:
            return
        self._counts[optimizer] = count + 1
        if count + 1 > self._steps:
            self._steps = count + 1
            self._reached(self._steps)

    def _trains(self, optimizer: Optimizer) -> bool:
        return any(
            id(parameter) in self._parameters
            for group in optimizer.param_groups
            for parameter in group["params"]
        )


def _several(given: Optimizers) -> Iterable[Optimizer]:
    several = list(given) if isinstance(given, Iterable) else [given]
    for optimizer in several:
        if not hasattr(optimizer, "register_step_post_hook"):
            msg = (
                f"optimizer= takes optimisers of torch, got a {type(optimizer).__name__}: "
                "leave it out, or call step() of the watch after each step"
            )
            raise InvalidSpec(msg)
    return several
