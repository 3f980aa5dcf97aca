"""A cap on a model's size that holds while the model is being put together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn

from curvd.errors import LimitExceeded
from curvd_server.system import yield_point

MOST_MODULES = 10_000
"""Layers of one model, containers included."""


@dataclass(slots=True)
class _Room:
    """What a model that is being put together may still use."""

    limit_bytes: int
    used_bytes: int = 0
    modules: int = 0


_room: ContextVar[_Room | None] = ContextVar("room", default=None)


@contextlib.contextmanager
def bounded(limit_bytes: int) -> Iterator[None]:
    """Stop whoever puts a model together in here when it becomes too large.

    Args:
        limit_bytes: The most bytes of parameters and buffers; tied ones may count twice.

    Yields:
        Nothing.

    Raises:
        LimitExceeded: If they need more, or there are too many layers.
    """
    watch()
    token = _room.set(_Room(limit_bytes))
    try:
        yield
    finally:
        _room.reset(token)


@functools.cache
def watch() -> None:
    """See to it that modules that are put together are counted, and give way to others.

    Each layer and tensor that is added to a module is a yield point of long work.
    """
    # note: these hooks see every module of the process; only bounded builds count.
    hooks = nn.modules.module
    hooks.register_module_parameter_registration_hook(_count_tensor)
    hooks.register_module_buffer_registration_hook(_count_tensor)
    hooks.register_module_module_registration_hook(_count_module)


def _count_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    yield_point()
    room = _room.get()
    if room is None or tensor is None:
        return
    room.used_bytes += tensor.numel() * tensor.element_size()
    if room.used_bytes > room.limit_bytes:
        msg = (
            f"the model needs more than {room.limit_bytes} bytes (upload_bytes): "
            f"{name!r} alone has shape {tuple(tensor.shape)}. Configure a smaller one"
        )
        raise LimitExceeded(msg, limit=room.limit_bytes)


def _count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
    yield_point()
    room = _room.get()
    if room is None:
        return
    room.modules += 1
    if room.modules > MOST_MODULES:
        msg = f"the model has more than {MOST_MODULES} layers; configure fewer"
        raise LimitExceeded(msg, limit=MOST_MODULES)
