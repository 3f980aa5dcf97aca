"""Copying between two steps: torch's optimisers wait for a copy, and a copy for them.

An optimiser in another thread writes to the memory that is being copied, so that a copy
could hold old values and new ones, even within one tensor. Every `torch.optim.Optimizer`
calls hooks around its step. The first copy installs two, which make a step wait while a
copy is under way; a copy begins when no step is. Whoever writes to parameters otherwise
needs a lock of their own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

_LOOK_AGAIN_S = 0.01
"""How often a copy looks whether a step has ended whose end nobody tells: it failed, or
it had begun before there were hooks."""


class _Turns:
    """Whose turn it is: that of one copy, or of all steps."""

    def __init__(self) -> None:
        self._step: CodeType | None = None  # what runs a step, hooks included
        self._start()

    def _start(self) -> None:
        """Begin with nobody copying or stepping, as it is in a forked child."""
        self._changed = threading.Condition()
        self._copying = False
        self._waiting = 0  # steps
        self._met: set[int] = set()  # threads with a step that had hooks
        self._let_in: set[int] = set()  # those of them whose step may write

    @contextlib.contextmanager
    def between_steps(self, asking: int | None = None) -> Iterator[None]:
        """Keep the optimisers of other threads from writing.

        Args:
            asking: The thread for which this one copies, and which waits for it, perhaps
                within a step; None: this one.

        Yields:
            Nothing, once no step is under way.
        """
        if "torch" not in sys.modules:
            yield
            return
        self._install()
        with self._changed:
            # Steps that wait go first, so that copies in a row do not hold them up.
            while self._copying or self._waiting:
                self._changed.wait(_LOOK_AGAIN_S)
            self._copying = True
        try:
            with self._changed:
                while self._is_stepping({threading.get_ident(), asking}):
                    self._changed.wait(_LOOK_AGAIN_S)
            yield
        finally:
            with self._changed:
                self._copying = False
                self._changed.notify_all()

    def _install(self) -> None:
        from torch.optim import optimizer

        with self._changed:
            if self._step is not None:
                return
            self._step = optimizer.Optimizer.profile_hook_step(_nothing).__code__
        os.register_at_fork(after_in_child=self._start)
        optimizer.register_optimizer_step_pre_hook(self._begin)
        optimizer.register_optimizer_step_post_hook(self._end)

    def _begin(self, *step: Any) -> None:
        """Wait for a copy that is under way; a step within a step goes on."""
        if _is_compiling() or self._steps_in(sys._getframe()) > 1:
            return
        thread = threading.get_ident()
        with self._changed:
            self._met.add(thread)
            self._waiting += 1
            try:
                while self._copying:
                    self._changed.wait()
                self._let_in.add(thread)
            finally:
                self._waiting -= 1
                self._changed.notify_all()

    def _end(self, *step: Any) -> None:
        if _is_compiling() or self._steps_in(sys._getframe()) > 1:
            return
        with self._changed:
            self._let_in.discard(threading.get_ident())
            self._changed.notify_all()

    def _is_stepping(self, mine: set[int | None]) -> bool:
        """Tell whether a thread that is not among these is in a step and may write.

        A step that fails does not say that it has ended, so stacks are looked at.
        """
        frames = sys._current_frames()
        try:
            inside = {t for t, frame in frames.items() if self._steps_in(frame)}
            self._let_in &= inside
            may_write = self._let_in | (inside - self._met)
            return any(t not in mine and not _copies(frames[t]) for t in may_write)
        finally:
            frames.clear()  # this one is among them

    def _steps_in(self, frame: FrameType | None) -> int:
        return sum(code is self._step for code in _codes(frame))


def _copies(frame: FrameType) -> bool:
    """Tell whether a step has come to a copy of its own, and waits for its turn."""
    copy = _Turns.between_steps.__wrapped__.__code__  # type: ignore[attr-defined]
    return any(code is copy for code in _codes(frame))


def _codes(frame: FrameType | None) -> Iterator[CodeType]:
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _is_compiling() -> bool:
    """Tell whether a compiler reads this: it is told that there is nothing to wait for."""
    import torch

    return torch.compiler.is_compiling()


def _nothing() -> None:
    """Stand for a step."""


_turns = _Turns()
between_steps = _turns.between_steps
