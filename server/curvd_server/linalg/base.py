"""What all queries share: counted products, progress, and why they stopped."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from curvd.contract import Distribution, Stop
from curvd.errors import NotFinite
from curvd_server.linalg.scales import Range
from curvd_server.linalg.space import Space

P = ParamSpec("P")
R = TypeVar("R")

Multiply: TypeAlias = Callable[[Tensor], Tensor]
"""Maps V: [K, P] to AV: [K, P], columns first, on the device where V is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a query is."""

    iteration: int
    products: int
    """Columns multiplied so far."""
    estimates: tuple[float, ...] = ()
    """What is known of the result: eigenvalues, or the one number asked for."""
    residuals: tuple[float, ...] = ()
    """Residual norms or standard errors that belong to the estimates."""


Query: TypeAlias = Generator[Progress, None, R]
"""A running query: yields progress between products, returns its result."""


class Runner(Protocol):
    """Runs algorithms elsewhere, where vectors of a map are in parts."""

    def __call__(
        self,
        products: Products,
        algorithm: Callable[..., Query[R]],
        arguments: Mapping[str, Any],
    ) -> Query[R]:
        """Make an algorithm, not begun, that asks for products here.

        Args:
            products: The map.
            algorithm: One of this package's, which takes the map and these arguments.
            arguments: By name; tensors are vectors, [..., P].
        """


class Products:
    """A linear map that counts its columns and knows when to stop.

    Args:
        multiply: The map.
        size: P.
        dtype: Element type of its vectors.
        device: Where its vectors live.
        limit: Most columns that may be multiplied; None: no limit.
        expired: Whether the time is up; asked between products.
        eigenvalues: Gives all of them, [P], without a product; None if they are not
            known, as of most maps.
        inverse: Multiplies V: [K, P] by ``(A + damping * I)^-1`` without a product; None
            if that is not known, or not defined.
        space: Where its vectors live, if some of their elements are elsewhere; `multiply`
            then refuses what is not finite.
        runner: Runs algorithms elsewhere; None: they run where the map is.
    """

    def __init__(
        self,
        multiply: Multiply,
        *,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        limit: int | None = None,
        expired: Callable[[], bool] = lambda: False,
        eigenvalues: Callable[[], Tensor | None] = lambda: None,
        inverse: Callable[[Tensor, float], Tensor | None] = lambda V, damping: None,
        space: Space | None = None,
        runner: Runner | None = None,
    ) -> None:
        self._multiply, self._runner = multiply, runner
        self.eigenvalues, self.inverse = eigenvalues, inverse
        self.expired = expired
        """Whether the time is up; raises if nobody wants the result any more."""
        self.space = space or Space(size, dtype, device)
        """Where its vectors live."""
        self._checks = space is None
        self.size, self.dtype, self.device = size, dtype, torch.device(device)
        self.limit = limit
        self.done = 0
        self.scale_free = False
        """Whether products of any size are given to the algorithm, which scales them."""
        self.range = Range(dtype, size)
        """The sizes of products that algorithms can go on with."""

    def begin(
        self,
        algorithm: Callable[Concatenate[Products, P], Query[R]],
        *args: P.args,
        **keywords: P.kwargs,
    ) -> Query[R]:
        """Make an algorithm, not begun, that runs where the vectors of the map are.

        Args:
            algorithm: One of this package's.
            *args: What it takes beside the map.
            **keywords: Likewise.

        Returns:
            The algorithm.
        """
        if self._runner is None:
            return algorithm(self, *args, **keywords)
        given = inspect.signature(algorithm).bind(self, *args, **keywords).arguments
        _, *names = given
        return self._runner(self, algorithm, {name: given[name] for name in names})

    def congruent(self, weights: Tensor) -> Products:
        """Make ``D A D`` of a map A, with D the diagonal matrix of some weights.

        Args:
            weights: [own].

        Returns:
            The map, which is what has to be in range; what it multiplies counts as
            products of this one.
        """
        return self._made(lambda V: self._counted(V * weights) * weights)

    def shifted(self, damping: float) -> Products:
        """Make ``A + damping * I`` of a map A that may be too small to compute with.

        Args:
            damping: Any number.

        Returns:
            The map, as `congruent` makes one; it knows no closed forms.
        """
        return self._made(lambda V: self._counted(V).add(V, alpha=damping))

    def _counted(self, V: Tensor) -> Tensor:
        self.done += len(V)
        return self._multiply(V)

    def _made(self, multiply: Multiply) -> Products:
        made = Products(
            multiply,
            size=self.size,
            dtype=self.dtype,
            device=self.device,
            limit=None if self.limit is None else max(0, self.limit - self.done),
            expired=self.expired,
            space=self.space,
            runner=self._runner,
        )
        made._checks = self._checks
        return made

    def __call__(self, V: Tensor) -> Tensor:
        """Multiply and count.

        Args:
            V: [K, P].

        Returns:
            AV: [K, P].

        Raises:
            NotFinite: If an element is NaN or infinite.
            ScaleOutOfRange: If products are so large or so small that their squares are
                no numbers of their type, and the algorithm does not scale them.
        """
        return self.damped(V, 0.0)

    def damped(self, V: Tensor, damping: float) -> Tensor:
        """Multiply by ``A + damping * I``, and count.

        Args:
            V: [K, P].
            damping: Any number.

        Returns:
            [K, P].

        Raises:
            NotFinite: If an element is NaN or infinite.
            ScaleOutOfRange: As of a product, of what is damped.
        """
        result = self._counted(V)
        if damping:
            result = torch.add(result, V, alpha=damping)
        if self._checks:
            self._look(V, result)
        return result

    def _look(self, V: Tensor, result: Tensor) -> None:
        """Refuse products that algorithms cannot go on with."""
        least, most = torch.aminmax(result) if result.numel() else (result.sum(),) * 2
        peak = max(-float(least), float(most))
        if not math.isfinite(peak):
            kind = "NaN" if torch.isnan(result).any() else "infinite"
            msg = (
                f"product {self.done} of the query is {kind}: at these parameters the "
                "operator is not defined, or overflows its type; check the parameters "
                "(did training diverge?), or make the session with dtype='F64'"
            )
            raise NotFinite(msg, product=self.done)
        if not self.scale_free:
            self.range.check(V, result, peak, self.done)

    @property
    def rounding(self) -> float:
        """Relative rounding of inner products of vectors, products among them."""
        return 4 * torch.finfo(self.dtype).eps * (2 + math.sqrt(self.size))

    @property
    def vector_bytes(self) -> int:
        """Memory of one vector."""
        return self.size * self.dtype.itemsize

    def normal(self, seed: int, index: int) -> Tensor:
        """Make a random vector like those of the map.

        Args:
            seed: The seed of the probes.
            index: The number of the probe.

        Returns:
            [own], elements of variance one.
        """
        return self.space.probes(Distribution.NORMAL, seed, [index])[0]

    def refusal(self, columns: int = 1) -> Stop | None:
        """Say why so many more columns must not be multiplied.

        Args:
            columns: How many.

        Returns:
            The reason, or None if they may.
        """
        if self.limit is not None and self.done + columns > self.limit:
            return Stop.PRODUCTS
        return Stop.TIME if self.expired() else None

    def allowed(self, wanted: int) -> int:
        """Count how many of the wanted columns the limit leaves.

        Args:
            wanted: How many the algorithm would like.

        Returns:
            At most that many, at least 0.
        """
        if self.limit is None:
            return wanted
        return max(0, min(wanted, self.limit - self.done))


def drain(query: Query[R]) -> R:
    """Run a query to its end.

    Args:
        query: The query, from one of the algorithms.

    Returns:
        Its result.
    """
    while True:
        try:
            next(query)
        except StopIteration as end:
            result: R = end.value
            return result
