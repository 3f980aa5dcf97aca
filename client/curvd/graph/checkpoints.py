"""Checkpoints are the plain computation: what they save is memory, not a value."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

_local = threading.local()
_reentrant: Any = torch_checkpoint.CheckpointFunction
_other: Any = torch_checkpoint._checkpoint_without_reentrant_generator


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


def _around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands for what surrounds a function in a checkpoint that is not reentrant."""
    if getattr(_local, "plain", False):
        yield
    else:
        yield from _other(*args, **kwargs)


@contextlib.contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Let checkpoints call their function, and nothing else, in this thread.

    Traced as it is, a reentrant one runs without gradients and takes care of them in a
    backward of its own, which a graph does not have; of others that are nested, torch
    makes a region without gradients.
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
    here: Any = torch_checkpoint
    before = here.CheckpointFunction, here._checkpoint_without_reentrant_generator
    here.CheckpointFunction = _Checkpoint
    here._checkpoint_without_reentrant_generator = _around
    try:
        yield
    finally:
        here.CheckpointFunction, here._checkpoint_without_reentrant_generator = before
