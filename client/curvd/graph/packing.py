"""Several outputs of a module as one, [B, S], for losses that take them all.

A server's loss takes one tensor. So the outputs are laid side by side, and the loss that
is exported takes them apart again before it calls the caller's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvd.contract import Output
from curvd.errors import InvalidSpec


def is_several(output: Output) -> bool:
    """Tell whether a loss takes several outputs, in a tuple or as they are returned."""
    return output is ... or isinstance(output, list | tuple)


def packed(result: Any) -> Tensor:
    """Lay all tensors of a result side by side.

    Args:
        result: Tensors [B, ...] in tuples, mappings or dataclasses, nested as you like.

    Returns:
        [B, S].

    Raises:
        InvalidSpec: If there is no tensor, or one that cannot be an output.
    """
    found = list(_leaves(result, "output"))
    if not found:
        msg = f"the module's result of type {type(result).__name__} has no tensor"
        raise InvalidSpec(msg)
    for path, leaf in found:
        if not leaf.is_floating_point() or not leaf.dim():
            msg = (
                f"a loss takes outputs of real numbers, [B, ...]; {path} is "
                f"{leaf.dtype} of shape {list(leaf.shape)}: name those that it takes, "
                "output=[…]"
            )
            raise InvalidSpec(msg, output=path)
    return torch.cat([leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None]
                      for _, leaf in found], 1)  # fmt: skip


def detached(result: Any) -> Any:
    """Cut a result off from what it was computed from.

    Args:
        result: The result, as for `packed`, or one tensor.

    Returns:
        The same with other tensors.
    """
    return _rebuilt(result, (leaf.detach() for _, leaf in _leaves(result, "output")))


class OfSeveral(nn.Module):
    """A loss of several outputs as a loss of one.

    Args:
        loss: Takes a result like `example`, and targets.
        example: What the module returns for a few data points.
    """

    def __init__(self, loss: Callable[[Any, Tensor], Any], example: Any) -> None:
        super().__init__()
        self.loss, self._example = loss, _Held(example)
        self._shapes = [leaf.shape[1:] for _, leaf in _leaves(example, "output")]

    def forward(self, outputs: Tensor, targets: Tensor) -> Any:
        """Take the outputs apart, and call the loss.

        Args:
            outputs: [B, S].
            targets: [B, ...].

        Returns:
            What the loss returns.
        """
        pieces = torch.split(outputs, [shape.numel() for shape in self._shapes], 1)
        leaves = (
            torch.unflatten(piece, 1, shape) if shape else piece[:, 0]
            for piece, shape in zip(pieces, self._shapes, strict=True)
        )
        return self.loss(_rebuilt(self._example.value, leaves), targets)


@dataclasses.dataclass(frozen=True)
class _Held:
    """Keeps a result from being looked into as a part of a module."""

    value: Any


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    for name, item in _items(value):
        yield from _leaves(item, f"{path}[{name!r}]")


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return [(name, getattr(value, name)) for name in names]
    return []


def _rebuilt(value: Any, leaves: Iterator[Tensor]) -> Any:
    """Make a result like another with other tensors."""
    if isinstance(value, Tensor):
        return next(leaves)
    items = _items(value)
    if not items:
        return value
    made = {name: _rebuilt(item, leaves) for name, item in items}
    kind: Any = type(value)
    if hasattr(value, "_fields"):  # a named tuple
        return kind(*made.values())
    if dataclasses.is_dataclass(value):
        return kind(**made)
    return kind(made if isinstance(value, Mapping) else made.values())
