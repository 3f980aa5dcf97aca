"""Options of queries: a frozen dataclass for each, which says all that is known of them.

A field is a `setting` with its default, its bounds and its help. Made of that are the keyword
arguments of both clients' methods and their documentation (`curvd.remote.queries`), the
request (`curvd.contract.query_messages`), the flags of the command line
(`curvd.cli.query_commands`), what the server refuses (`curvd_server.storage.ranges`) and fills
in, and the table of docs/client.md. A field of a message has the name of the option, unless
`wire` says another; it lies in the request or in one of its parts (`Query`, `Accuracy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from curvd.contract.enums import Estimator, JacobianOf, OperatorKind, Solver, Which
from curvd.contract.infos import StoredVector
from curvd.contract.query_spec import QueryOptions, QuerySpec
from curvd.contract.settings import setting

_SEED = 2**63 - 1
_SMALLEST, _LARGEST = 1e-290, 1e290
"""Of what is divided by, and what densities are the inverse of."""
_LEAST_SCALE = 1e-100
"""Of what is squared and divided by; the largest is its inverse."""


@dataclass(frozen=True, slots=True)
class EigshOptions(QueryOptions):
    """Which eigenpairs, and how they are found."""

    k: int = setting(6, "How many.", least=1, unset=0)
    _: KW_ONLY
    which: Which | str = setting(
        Which.LARGEST, "``largest``, ``smallest``, ``both`` or ``largest_magnitude``."
    )
    tolerance: float = setting(
        1e-6, "Residual relative to each eigenvalue's magnitude.", positive=True
    )
    basis_size: int = setting(
        0,
        "Vectors in the server's memory before a restart; 0: 2 k + 20, or as many small "
        "ones (256 at most) as fit 64 MiB.",
        least=0,
    )
    seed: int = setting(0, "Of the start vector.", least=0, most=_SEED)
    warm_start: bool = setting(
        False,
        "Begin with what the last call of this kind found, at whatever version: it "
        "tracks the eigenpairs of changing parameters. What the start lacks is searched "
        "for, so this pays at tolerances of about 1e-3, or where the operator has moved "
        "by little more than the tolerance.",
    )
    vectors: bool = setting(
        True,
        "Whether to fetch the eigenvectors; for values alone, False spares k vectors on "
        "the wire.",
        wire="",
    )
    start: StoredVector | str | None = setting(
        None,
        "Begin with vectors that the session stores, [P] or [s, P], instead; it pays "
        "where `warm_start` does.",
    )
    store: str | None = setting(
        None,
        "Keep the eigenvectors in the session under this name, and fetch none: for "
        "`start`, for products, or for ``session.get``.",
        wire="store_as",
    )


def _relative_error(help: str = "Standard error at which to stop, relative") -> Any:
    return setting(0.0, f"{help}; 0: never.", least=0)


def _absolute_error(help: str = "Standard error at which to stop") -> Any:
    return setting(0.0, f"{help}; 0: never.", least=0)


def _samples() -> Any:
    return setting(100, "Products at most.", least=1, most=100_000)


def _seed(help: str = "Of the probes, see `curvd.tensors.random_probes`.") -> Any:
    return setting(0, help, least=0, most=_SEED)


def _steps(default: int, more: str = "") -> Any:
    text = f"Lanczos steps per probe, each one product{more}."
    return setting(default, text, least=1, most=1000)


def _damping() -> Any:
    return setting(0.0, "Added to every eigenvalue, beside the operator's own.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions(QueryOptions):
    """How the trace is estimated."""

    estimator: Estimator | str = setting(
        Estimator.EXCHANGEABLE,
        "``exchangeable`` (XTrace), ``hutch++`` or ``hutchinson``. The first two gain "
        "where eigenvalues decay, Hutch++ with a given number of samples and no error "
        "to stop at, as it divides them in advance.",
    )
    relative_error: float = _relative_error()
    absolute_error: float = _absolute_error()
    samples: int = _samples()
    seed: int = _seed()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalOptions(QueryOptions):
    """How the diagonal is estimated."""

    estimator: Estimator | str = setting(
        Estimator.EXCHANGEABLE, "``exchangeable`` (XDiag) or ``hutchinson``."
    )
    relative_error: float = _relative_error(
        "Stop when the norm of the errors is so small, relative to the diagonal's"
    )
    absolute_error: float = _absolute_error("The same, absolute")
    samples: int = _samples()
    seed: int = _seed()


@dataclass(frozen=True, slots=True, kw_only=True)
class FrobeniusNormOptions(QueryOptions):
    """How the norm is estimated."""

    relative_error: float = _relative_error()
    absolute_error: float = _absolute_error()
    samples: int = _samples()
    seed: int = _seed()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralDensityOptions(QueryOptions):
    """How the density is estimated, and on which axis."""

    probes: int = setting(
        8, "Random vectors that are averaged over.", least=1, most=1000
    )
    steps: int = _steps(
        64,
        ": what they do not resolve is not in the error, so take many of them rather "
        "than many probes",
    )
    points: int = setting(512, "Of the grid.", least=2, most=100_000)
    width: float | None = setting(
        None,
        "Of the smoothing Gaussian; None: 1 % of the axis.",
        least=_SMALLEST,
        most=_LARGEST,
    )
    logarithmic: bool = setting(
        False,
        "Whether the axis is the logarithm of the magnitude.",
        option="log",
    )
    floor: float | None = setting(
        None,
        "Smallest magnitude on that axis; None: 1e-7 of the largest.",
        least=_SMALLEST,
        most=_LARGEST,
    )
    seed: int = _seed("Of the probes.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveOptions(QueryOptions):
    """How systems are solved."""

    solver: Solver | str = setting(
        Solver.CG, "``cg``, or ``minres`` for indefinite operators."
    )
    damping: float = _damping()
    tolerance: float = setting(1e-6, "Residual relative to ``|b|``.", positive=True)
    x0: Any = setting(
        None, "First guess, like b: values, or what the session stores.", wire=""
    )
    preconditioner: Any = setting(
        None,
        "What `sketch` or ``eigsh(store=…)`` stored, at any version: it pays at small "
        "dampings, below 16 columns or for several calls. Or, for CG, the diagonal of "
        "the damped operator, positive [P]: it pays where parameters have scales of "
        "their own, as with features in different units, and only if it is accurate; "
        "elsewhere it costs iterations.",
        wire="",
    )
    dampings: Any = setting(
        None,
        "Several in place of `damping`, 64 at most, in one run for about the products of "
        "the smallest; x is a list then, a solution for each. CG, without `x0` and "
        "`preconditioner`.",
        wire="",
    )
    block: int = setting(
        0,
        "Columns that CG minimises over the Krylov space of all of them, at most; 0: as "
        "many as fit; 1: each alone, which takes several times the products.",
        least=0,
    )
    store: str | None = setting(
        None,
        "Keep x in the session under this name, and fetch none.",
        wire="store_as",
    )


@dataclass(frozen=True, slots=True)
class SketchOptions(QueryOptions):
    """How much of the largest eigenvalues is to be known, and for what."""

    name: str = setting("sketch", "Under which the session keeps it.", wire="store_as")
    _: KW_ONLY
    rank: int = setting(
        100, "Vectors at most, each one product.", least=1, most=10_000, unset=100
    )
    damping: float = setting(
        0.0,
        "Of the systems to come, beside the operator's own: the rank grows until the "
        "smallest value is below ten times it, or until more would not pay; 0 together: "
        "all of the rank.",
        least=0,
    )
    columns: int = setting(
        0,
        "Right-hand sides to come at that damping, for what pays; 0: many.",
        least=0,
    )
    tolerance: float = setting(1e-6, "Of the systems to come.", positive=True)
    seed: int = _seed("Of the probes.")


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
    part_seed: int = _seed("Of the draw.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDetOptions(QueryOptions):
    """How the determinant is estimated."""

    damping: float = _damping()
    preconditioner: StoredVector | str | None = setting(
        None,
        "What `sketch` or ``eigsh(store=…)`` stored, at any version: its part is exact, "
        "and only the rest is estimated.",
    )
    steps: int = _steps(32)
    relative_error: float = _relative_error()
    absolute_error: float = _absolute_error()
    probes: int = setting(
        30,
        "Random vectors at most.",
        least=1,
        most=100_000,
        wire="samples",
        unset=100,
    )
    seed: int = _seed("Of the probes.")


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


def _prior() -> Any:
    return setting(
        1.0,
        "Precision of the parameters before any data.",
        least=_LEAST_SCALE,
        most=1 / _LEAST_SCALE,
    )


def _noise() -> Any:
    return setting(
        1.0,
        "Standard deviation of the targets of mse, which other losses do not have.",
        least=_LEAST_SCALE,
        most=1 / _LEAST_SCALE,
    )


def _tolerance() -> Any:
    return setting(
        1e-6, "Residual of each system, relative to its right-hand side.", positive=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictiveOptions(QueryOptions):
    """Which posterior predictions have, and how exactly."""

    prior: float = _prior()
    noise: float = _noise()
    covariance: bool = setting(
        False, "Whether to fetch the covariance of each input's outputs, [T, C, C]."
    )
    tolerance: float = _tolerance()
    preconditioner: StoredVector | str | None = setting(
        None,
        "What `sketch` or ``eigsh(store=…)`` stored, at any version: it pays at small "
        "priors and for several calls.",
    )
    block: int = setting(
        0, "Systems that are solved together, at most; 0: as many as fit.", least=0
    )


@dataclass(frozen=True, slots=True)
class PosteriorSamplesOptions(QueryOptions):
    """Which posterior is drawn from."""

    k: int = setting(1, "How many.", least=1, most=10_000, unset=1)
    _: KW_ONLY
    prior: float = _prior()
    noise: float = _noise()
    seed: int = _seed("Of the draws.")
    tolerance: float = _tolerance()
    preconditioner: StoredVector | str | None = setting(
        None,
        "What `sketch` or ``eigsh(store=…)`` stored, at any version: it pays at small "
        "priors and for several calls.",
    )
    store: str | None = setting(
        None,
        "Keep the draws in the session under this name, and fetch none.",
        wire="store_as",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginalLikelihoodOptions(QueryOptions):
    """How marginal likelihoods are computed."""

    noise: float = _noise()
    steps: int = _steps(32)
    probes: int = setting(
        30,
        "Random vectors, where P is more than probes times steps or 4096; up to there all "
        "eigenvalues are computed.",
        least=1,
        most=100_000,
    )
    seed: int = _seed("Of the probes.")


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
    "Eigsh": QuerySpec(
        method="eigsh",
        options=EigshOptions,
        command="eigs",
        terminal={"k": 10, "vectors": False},
    ),
    "Trace": QuerySpec(
        method="trace",
        options=TraceOptions,
        command="trace",
        terminal={"relative_error": 0.01, "samples": 300},
    ),
    "Diagonal": QuerySpec(method="diagonal", options=DiagonalOptions),
    "FrobeniusNorm": QuerySpec(
        method="frobenius_norm",
        options=FrobeniusNormOptions,
        command="norm",
        terminal={"relative_error": 0.01, "samples": 300},
    ),
    "SpectralDensity": QuerySpec(
        method="spectral_density", options=SpectralDensityOptions, command="density"
    ),
    "Solve": QuerySpec(method="solve", options=SolveOptions),
    "Sketch": QuerySpec(method="sketch", options=SketchOptions, command="sketch"),
    "Influence": QuerySpec(
        method="influence",
        options=InfluenceOptions,
        command="influence",
        terminal={"self_only": True},
        operands=(None,),  # all data points of the session
        operator=OperatorKind.GGN,
    ),
    "LogDet": QuerySpec(
        method="logdet",
        options=LogDetOptions,
        command="logdet",
        terminal={"relative_error": 0.01},
    ),
    "Predictive": QuerySpec(method="predictive", options=PredictiveOptions),
    "PosteriorSamples": QuerySpec(
        method="posterior_samples", options=PosteriorSamplesOptions
    ),
    "MarginalLikelihood": QuerySpec(
        method="marginal_likelihood",
        options=MarginalLikelihoodOptions,
        command="evidence",
        operands=(tuple(10.0**power for power in range(-4, 5)),),
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


def most_products(rpc: str, options: QueryOptions, data_points: int) -> int | None:
    """Tell how many products a query makes at most, if its options say so.

    Args:
        rpc: The name of its method.
        options: What is asked for.
        data_points: N; queries about data points count these.

    Returns:
        The number; None if it ends when it is good enough.
    """
    known = [options.max_products]
    if QUERIES[rpc].of_session:
        known.append(data_points)
    else:
        known += [getattr(options, name, None) for name in ("samples", "rank")]
        probes, steps = getattr(options, "probes", 0), getattr(options, "steps", 0)
        if probes and steps:
            known.append(probes * steps)
    return min((n for n in known if n is not None), default=None)
