"""Runs of a graph that follow what becomes of single data points."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvd.graph.looking import Looking, floating

_ATEN = torch.ops.aten
_PRODUCTS: Mapping[Any, Callable[[Tensor, Tensor], Tensor]] = {
    _ATEN.mul.Tensor: torch.mul,
    _ATEN.mm.default: torch.mm,
    _ATEN.bmm.default: torch.bmm,
    _ATEN.mv.default: torch.mv,
    _ATEN.dot.default: torch.dot,
    _ATEN.addmm.default: torch.mm,
    _ATEN.addmv.default: torch.mv,
    _ATEN.baddbmm.default: torch.bmm,
}
"""Operators whose last two operands are multiplied, and how."""


class Absorbing(Looking):  # type: ignore[no-untyped-call]
    """Lets zero times NaN be zero: a mask that multiplies by zero keeps apart what it masks.

    So NaN reaches what depends on the number that was replaced, and nothing else.
    """

    def look(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> Any:
        """Compute a product with NaN in it again."""
        product = _PRODUCTS.get(func)
        if (
            product is None
            or not result.is_floating_point()
            or not result.isnan().any()
        ):
            return result
        *before, a, b = (_tensor(t, result.device) for t in args)
        lost = [t.isnan() for t in (a, b)]
        known = [t.masked_fill(n, 0) for t, n in zip((a, b), lost, strict=True)]
        result = func(*before, *known, **kwargs)
        return result.masked_fill(_reached(product, (a, b), lost), math.nan)


def _tensor(operand: Any, device: torch.device) -> Tensor:
    """Make a tensor of what may be a number, with all of its digits."""
    if isinstance(operand, float):
        return torch.tensor(operand, dtype=torch.float64, device=device)
    return torch.as_tensor(operand, device=device)


def _reached(
    product: Callable[[Tensor, Tensor], Tensor],
    factors: Sequence[Tensor],
    lost: Sequence[Tensor],
) -> Tensor:
    """Find which elements of a product have NaN times anything but zero in them."""
    (a, b), (first, second) = factors, lost
    one = product(first.double(), (b != 0).double())
    other = product((a != 0).double(), second.double())
    return one + other > 0


@contextlib.contextmanager
def embedded(leaves: Sequence[Tensor], factors: Tensor | None) -> Iterator[None]:
    """Multiply what tables hold for the integers of each data point.

    Args:
        leaves: The inputs.
        factors: One for each data point, [B]; None: nothing is multiplied.
    """
    if factors is None:
        yield
        return
    with _Embedded(leaves, factors):
        yield


class _Embedded(Looking):  # type: ignore[no-untyped-call]
    """See `embedded`."""

    def __init__(self, leaves: Sequence[Tensor], factors: Tensor) -> None:
        super().__init__()
        self._leaves, self._factors = leaves, factors

    def look(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> Any:
        """Multiply what was looked up."""
        if func is _ATEN.embedding.default:
            if any(torch.equal(args[1], leaf) for leaf in self._leaves):
                factors = self._factors.to(result.dtype)
                return result * factors.reshape(-1, *[1] * (result.dim() - 1))
        return result


class Unbounded(Looking):  # type: ignore[no-untyped-call]
    """Counts numbers that are not finite among all that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def look(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> Any:
        """Count."""
        for leaf in floating(result):
            self.count += int((~torch.isfinite(leaf)).sum())
        return result
