"""Options of queries about single data points: influence, gradients, Jacobians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curvd.contract.enums import JacobianOf, OperatorKind
from curvd.contract.infos import StoredVector
from curvd.contract.query_options.shared import seed_setting
from curvd.contract.query_spec import QueryOptions, QuerySpec
from curvd.contract.settings import setting


def _data_points() -> Any:
    return setting(
        None, "Stop after so many data points; None: all.", least=1, most=2**62
    )


def _expected_version() -> Any:
    return setting(
        None,
        "Refuse to compute at another parameter version.",
        least=0,
        most=2**63 - 1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluenceOptions(QueryOptions):
    """How influence is computed, and how much of it travels."""

    damping: float = setting(
        1e-3, "Added to every eigenvalue, beside the operator's own."
    )
    tolerance: float = setting(
        1e-3,
        "Residual relative to the norm of a query's gradient; 1e-3 does for rankings.",
        positive=True,
    )
    top: int = setting(
        0,
        "So many data points of either end of each query in place of all scores; 0: all "
        "scores.",
        least=0,
    )
    groups: Any = setting(
        None,
        "Group of each data point, whole numbers [N] from 0: scores are their sums, [M, G].",
        wire="",
    )
    self_only: bool = setting(
        False, "Fetch no scores: only each query's influence on itself."
    )
    preconditioner: StoredVector | str | None = setting(
        None,
        "What `sketch` or ``eigsh(store=…)`` stored, at any version: it pays at small "
        "dampings, below 16 queries or for several calls.",
    )
    block: int = setting(
        0,
        "Queries that are solved together, at most; 0: as many as fit.",
        least=0,
    )
    part: int = setting(
        0,
        "Data points that the operator is made of, drawn at random: less work, and less "
        "exact; 0: all.",
        least=0,
        most=2**62,
    )
    part_seed: int = seed_setting("Of the draw.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientNormsOptions(QueryOptions):
    """Which gradients of single data points have their norms computed."""

    max_products: int | None = _data_points()
    time_limit_s: float | None = setting(
        None,
        "Differentiate no more after so long; the result has the first data points.",
        positive=True,
    )
    by_parameter: bool = setting(
        False,
        "Whether each parameter's part of the gradients has its norm, too; the norm of a "
        "block is the root of its parts' sum of squares.",
    )
    expected_version: int | None = _expected_version()


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientGramOptions(QueryOptions):
    """Which gradients of single data points are multiplied with each other."""

    max_products: int | None = _data_points()
    expected_version: int | None = _expected_version()


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSquaresOptions(QueryOptions):
    """Which gradients of single data points are squared and summed."""

    max_products: int | None = _data_points()
    expected_version: int | None = _expected_version()


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianProductOptions(QueryOptions):
    """Which Jacobian is multiplied with, and in which direction."""

    of: JacobianOf | str = setting(
        JacobianOf.LOSSES,
        "``losses``: each data point's own, C = 1; or ``outputs``: all C numbers of each.",
    )
    transposed: bool = setting(
        False, "Whether to multiply with the transpose, from [N C] to [P]."
    )
    params: Any = setting(
        None,
        "Globs over names that choose the parameters that it is in, in this order; None: "
        "all.",
        wire="",
    )
    store: str | None = setting(
        None,
        "Keep the product in the session under this name, and fetch none: of transposed "
        "ones in all parameters.",
        wire="store_as",
    )
    max_products: int | None = setting(
        None,
        "Stop after so many data points, with their rows' product; None: all.",
        least=1,
        most=2**62,
    )
    expected_version: int | None = _expected_version()


QUERIES: Mapping[str, QuerySpec] = {
    "Influence": QuerySpec(
        method="influence",
        options=InfluenceOptions,
        command="influence",
        terminal={"self_only": True},
        operands=(None,),  # all data points of the session
        operator=OperatorKind.GGN,
    ),
    "GradientNorms": QuerySpec(
        method="gradient_norms",
        options=GradientNormsOptions,
        of_session=True,
        command="gradient-norms",
    ),
    "GradientGram": QuerySpec(
        method="gradient_gram", options=GradientGramOptions, of_session=True
    ),
    "GradientSquares": QuerySpec(
        method="gradient_squares", options=GradientSquaresOptions, of_session=True
    ),
    "JacobianProduct": QuerySpec(
        method="jacobian_product", options=JacobianProductOptions, of_session=True
    ),
}
"""By the name of the RPC."""
