"""What a loss returned when a session was made of it, for updates of the session.

A training may move a loss as well as a module: a weight that is annealed, a margin, what a
function closes over. A session has it as it was, and no update moves that. So when a module is
given for an update, the loss is asked again for what it returned for a few outputs.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvd.errors import InvalidSpec
from curvd.graph.compared import differing, shown_size
from curvd.graph.packing import OfSeveral, packed

_POINTS = 16
"""Targets that are kept, from all over the data, with as many outputs."""
_ELEMENTS = 1 << 18
"""Of these outputs; of data points that have more each, nothing is kept."""
_VALUES = (type(None), bool, int, float, str, Tensor, list, tuple, dict)
"""What a function may close over and is held all the same."""


class LossOrigin:
    """A loss as it was.

    It keeps outputs and targets of a few data points; the loss, if that may hold a module, only
    as long as others do.

    Args:
        loss: Takes outputs and targets.
        outputs: Example outputs, [B, ...], or several in a structure.
        targets: [N, ...]
        is_several: Whether the loss takes a structure.
    """

    def __init__(
        self,
        loss: Callable[[Any, Tensor], Any],
        outputs: Any,
        targets: Tensor,
        *,
        is_several: bool,
    ) -> None:
        self._loss = _held(loss)
        self._example = outputs if is_several else None
        z, y = packed(outputs) if is_several else outputs, targets.detach()
        most = min(len(y), _POINTS, _ELEMENTS // max(z[:1].numel(), 1))
        rows = [k * len(y) // most for k in range(most)]
        self._points = z.detach()[[k % len(z) for k in range(most)]], y[rows]
        self._returned = self._asked()

    def check(self) -> None:
        """Ask again.

        Raises:
            InvalidSpec: If the loss returns something else, or has another derivative.
        """
        if self._returned is None:
            return
        now = self._asked()
        if now is None:
            return
        names = ("its value", "its derivative by the outputs")
        pairs = dict(zip(names, zip(now, self._returned, strict=True), strict=True))
        wrong = differing(pairs, self._points[0].dtype)
        if wrong:
            name, size = next(iter(wrong.items()))
            msg = (
                f"the loss has changed since the session was made: {name} on the same "
                f"outputs is another {shown_size(size)}, and the session has the loss as "
                "it was, which no update moves. Make a new session (session_for), or set "
                "the loss back"
            )
            raise InvalidSpec(msg, loss=type(self._loss()).__name__)

    def _asked(self) -> tuple[Tensor, Tensor] | None:
        """Compute value and derivative; None if it is gone, or fails, which is no change."""
        loss = self._loss()
        if loss is None or not len(self._points[0]):
            return None
        applied = loss if self._example is None else OfSeveral(loss, self._example)
        leaf = self._points[0].clone().requires_grad_()
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                result = applied(leaf, self._points[1])
                total = result[0] if isinstance(result, tuple | list) else result
                (row,) = torch.autograd.grad(total, leaf)
        except Exception:  # of the caller's own code
            return None
        return total.detach(), row


def _held(loss: Any) -> Callable[[], Any]:
    """Refer to a loss without keeping a module alive; of some there is nothing to refer to."""
    if isinstance(loss, types.FunctionType) and not _reaches_a_module(loss):
        return lambda: loss  # nobody else may hold a lambda
    try:
        if isinstance(loss, types.MethodType):
            return weakref.WeakMethod(loss)
        return weakref.ref(loss)
    except TypeError:
        return lambda: None


def _reaches_a_module(function: types.FunctionType) -> bool:
    """Tell whether a function closes over one, or over an object that may have one."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # of a variable that has no value yet
            if not isinstance(cell.cell_contents, _VALUES):
                return True
    return False
