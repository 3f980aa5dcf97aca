"""Weight decay: a quadratic penalty on parameters, beside the loss over the data.

It adds ``sum_p c_p / 2 * |p|^2`` to the objective, ``c_p p`` to its gradient, and ``c_p``
to the diagonals of the Hessian and of the GGN, whose outer function it is part of. The
Fishers describe the model's distribution, in which it has no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from curvd.contract import ParameterLayout, select


@dataclass(frozen=True, slots=True)
class WeightDecay:
    """What each parameter of a layout is penalised with."""

    coefficients: tuple[float, ...]
    """One per parameter, in the order of the layout; 0 for none."""

    @classmethod
    def of(
        cls,
        pairs: Sequence[tuple[str, float]],
        names: Sequence[str],
        aliases: Mapping[str, str],
    ) -> WeightDecay:
        """Find each parameter's coefficient.

        Args:
            pairs: Globs and coefficients; the first that matches a parameter counts.
            names: The names of the parameters.
            aliases: Further name of a tied parameter -> the name that it goes by.

        Returns:
            The decay.

        Raises:
            InvalidSpec: If a glob matches no parameter.
        """
        found: dict[str, float] = {}
        for glob, coefficient in pairs:
            matched = select(names, [glob], aliases=aliases, what="weight_decay")
            found = {**dict.fromkeys(matched, coefficient), **found}
        return cls(tuple(found.get(name, 0.0) for name in names))

    def none(self) -> WeightDecay:
        """Make the decay that penalises nothing, for what it is no part of."""
        return WeightDecay((0.0,) * len(self.coefficients))

    def value(self, parameters: Sequence[Tensor]) -> float:
        """Compute the penalty, in float64."""
        return sum(
            c / 2 * float(p.detach().double().square().sum())
            for c, p in zip(self.coefficients, parameters, strict=True)
            if c
        )

    def add_gradient(
        self, out: Tensor, parameters: Sequence[Tensor], layout: ParameterLayout
    ) -> None:
        """Add its gradient.

        Args:
            out: ``[P]``, written to.
            parameters: In the order of the layout.
            layout: Where each parameter lies.
        """
        entries = zip(self.coefficients, parameters, layout.parameters, strict=True)
        for c, value, p in entries:
            if c:
                flat = value.reshape(-1).to(out)
                out[p.offset : p.offset + p.size].add_(flat, alpha=c)

    def add_product(self, out: Tensor, V: Tensor, layout: ParameterLayout) -> None:
        """Add the product of its Hessian, which is diagonal, with columns.

        Args:
            out: ``[K, P]``, written to.
            V: ``[K, P]``, of the same type.
            layout: Where each parameter lies.
        """
        for c, p in zip(self.coefficients, layout.parameters, strict=True):
            if c:
                place = slice(p.offset, p.offset + p.size)
                out[:, place].add_(V[:, place], alpha=c)
