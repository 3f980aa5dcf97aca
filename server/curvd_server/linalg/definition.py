"""What a query says about itself, so that a server answers it as it answers all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import QueryOptions
from curvd_server.linalg.base import Query
from curvd_server.linalg.low_rank import LowRank

S = TypeVar("S")
O = TypeVar("O", bound=QueryOptions)  # noqa: E741 - options
R = TypeVar("R")

Tensors = Mapping[str, Tensor | NDArray[Any]]


class Room(Protocol):
    """How much may be in memory together."""

    @property
    def size(self) -> int:
        """P, the length of a vector."""

    @property
    def data_points(self) -> int:
        """N, how many the session has."""

    @property
    def parameters(self) -> int:
        """T, how many tensors a vector consists of."""

    @property
    def block(self) -> int:
        """Probes that are multiplied together."""

    def fitting(self, each: int, most: int) -> int:
        """Count what may be under way together.

        Args:
            each: Vectors that one of them takes.
            most: How many there are.

        Returns:
            At least 1.
        """

    def known(self, name: Any) -> LowRank:
        """Bring what the session stores of the operator's largest eigenvalues."""

    def krylov_block(self, steps: int, samples: int) -> int:
        """Count the Krylov spaces of so many steps that may be in memory together."""


def _none(result: Any) -> Tensors:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition(Generic[S, O, R]):
    """A query: what it takes, how it runs, and what it answers.

    The summary of the answer is made of the result's attributes, by the names of its
    fields in the contract; `query` in it is the cost.
    """

    options: type[O]
    vectors: Callable[[O, Room], int]
    """Counts the vectors that it holds in memory."""
    begin: Callable[[S, O, Room], Query[R]]
    """Makes the algorithm, not begun, on products or on data points."""
    tensors: Callable[[R], Tensors] = _none
    """Names the tensors of the answer."""
