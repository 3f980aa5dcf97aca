"""Reentrant checkpoints are the plain computation: what they save is memory, not a value."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

_local = threading.local()
_reentrant: Any = torch_checkpoint.CheckpointFunction


class _Checkpoint:
    """Stands for torch's own function, and steps aside where this thread says so."""

    @staticmethod
    def apply(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run a checkpointed function.

        Args:
            run: The function.
            preserve: Whether random numbers are the same in both runs.
            *args: What it is called with.

        Returns:
            What it returns.
        """
        if getattr(_local, "plain", False):
            return run(*args)
        if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
            _local.cut = True
        return _reentrant.apply(run, preserve, *args)


@contextlib.contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Let reentrant checkpoints call their function, and nothing else, in this thread.

    Traced as it is, such a checkpoint runs without gradients and takes care of them in
    a backward of its own, which a graph does not have.
    """
    _local.plain = True
    try:
        with _in_place():
            yield
    finally:
        _local.plain = False


@contextlib.contextmanager
def watched_checkpoints() -> Iterator[Callable[[], bool]]:
    """Note whether a reentrant checkpoint cuts gradients off.

    Yields:
        Tells whether one was called whose inputs require no gradient: then it gives
        none to the parameters that it uses.
    """
    _local.cut = False
    with _in_place():
        yield lambda: bool(_local.cut)


@contextlib.contextmanager
def _in_place() -> Iterator[None]:
    before = torch_checkpoint.CheckpointFunction
    torch_checkpoint.CheckpointFunction = _Checkpoint  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch_checkpoint.CheckpointFunction = before  # type: ignore[misc]
