"""What a vector of length ``P`` means: the ordered parameters of a session."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from curvd.contract.specs import OperatorSpec
from curvd.errors import InvalidSpec


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter tensor and its place in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """Index of its first element in a vector of length ``P``."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterLayout:
    """The ordered parameters of a session: what a vector of length ``P`` means.

    Examples:
        >>> layout = curvd.ParameterLayout.of({"weight": (3, 8), "bias": (3,)})
        >>> layout.size, layout.names
        (27, ('weight', 'bias'))
        >>> [parameter.offset for parameter in layout.parameters]
        [0, 24]
    """

    parameters: tuple[ParameterSpec, ...]

    def __repr__(self) -> str:
        shown = ", ".join(f"{p.name} {list(p.shape)}" for p in self.parameters[:3])
        more = len(self.parameters) - 3
        rest = f", … {more} more" if more > 0 else ""
        return f"<ParameterLayout P={self.size}: {shown}{rest}>"

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> ParameterLayout:
        """Lay out parameters in the mapping's order.

        Args:
            shapes: Parameter name to shape.

        Returns:
            The layout with offsets filled in.
        """
        offset, parameters = 0, []
        for name, shape in shapes.items():
            spec = ParameterSpec(name, tuple(shape), offset)
            parameters.append(spec)
            offset += spec.size
        return cls(tuple(parameters))

    @cached_property
    def size(self) -> int:
        """``P``: total number of parameters."""
        return sum(p.size for p in self.parameters)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Parameter names in order."""
        return tuple(p.name for p in self.parameters)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Parameter shapes in order."""
        return tuple(p.shape for p in self.parameters)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements per parameter, in order."""
        return tuple(p.size for p in self.parameters)

    def of_operator(self, spec: OperatorSpec) -> ParameterLayout:
        """Lay out the parameters that an operator acts on.

        Args:
            spec: Which; of the session that has this layout.

        Returns:
            What a vector means that it multiplies.

        Raises:
            InvalidSpec: If the session has no such parameter, or the blocks do not
                cover the operator's.
        """
        chosen = self
        if spec.parameters is not None:
            shapes = {p.name: p.shape for p in self.parameters}
            unknown = [name for name in spec.parameters if name not in shapes]
            if unknown:
                msg = (
                    f"the session has no parameter {unknown[0]!r}; it has "
                    f"{len(shapes)}, from {self.names[0]!r} to {self.names[-1]!r}"
                )
                raise InvalidSpec(msg, parameter=unknown[0])
            chosen = ParameterLayout.of({
                name: shapes[name] for name in spec.parameters
            })
        chosen._check_blocks(spec.block_sizes)
        return chosen

    def _check_blocks(self, block_sizes: tuple[int, ...] | None) -> None:
        """Refuse block sizes that do not cover the parameters.

        Args:
            block_sizes: Parameters per block, or None.

        Raises:
            InvalidSpec: If they do not sum to the number of parameters.
        """
        if block_sizes is not None and sum(block_sizes) != len(self.parameters):
            msg = (
                f"block_sizes sum to {sum(block_sizes)}, but the operator acts on "
                f"{len(self.parameters)} parameters (tensors), and they say how many of "
                f"these each block has, in order; {self._meant(block_sizes)}"
            )
            raise InvalidSpec(
                msg, block_sizes=block_sizes, parameters=len(self.parameters)
            )

    def _meant(self, sizes: tuple[int, ...]) -> str:
        """Say what block sizes that do not sum up should perhaps have been."""
        ends = {p.offset + p.size: n for n, p in enumerate(self.parameters, 1)}
        cuts = [ends.get(cut) for cut in itertools.accumulate(sizes)]
        if sum(sizes) == self.size and None not in cuts:
            found = [n for n in cuts if n is not None]
            counts = [n - before for before, n in zip([0, *found], found, strict=False)]
            return f"these are counts of elements: pass block_sizes={counts}"
        return f"for a block per tensor pass block_sizes=[1] * {len(self.parameters)}"
