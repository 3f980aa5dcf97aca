"""Options of queries about an operator: spectra, estimates, systems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from curvd.contract.enums import Estimator, Solver, Which
from curvd.contract.infos import StoredVector
from curvd.contract.query_options.shared import seed_setting, steps_setting
from curvd.contract.query_spec import QueryOptions, QuerySpec
from curvd.contract.settings import setting

_SMALLEST, _LARGEST = 1e-290, 1e290
"""Of what is divided by, and what densities are the inverse of."""


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
    seed: int = seed_setting("Of the start vector.")
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


def _samples(more: str = "") -> Any:
    return setting(100, f"Products at most{more}.", least=1, most=100_000)


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
    samples: int = _samples(
        ", but 4 of ``exchangeable`` and 2 of ``hutch++`` in any case"
    )
    seed: int = seed_setting()


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
    samples: int = _samples(", but 4 of ``exchangeable`` in any case")
    seed: int = seed_setting()


@dataclass(frozen=True, slots=True, kw_only=True)
class FrobeniusNormOptions(QueryOptions):
    """How the norm is estimated."""

    relative_error: float = _relative_error()
    absolute_error: float = _absolute_error()
    samples: int = _samples()
    seed: int = seed_setting()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralDensityOptions(QueryOptions):
    """How the density is estimated, and on which axis."""

    probes: int = setting(
        8, "Random vectors that are averaged over.", least=1, most=1000
    )
    steps: int = steps_setting(
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
    seed: int = seed_setting("Of the probes.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDetOptions(QueryOptions):
    """How the determinant is estimated."""

    damping: float = _damping()
    preconditioner: StoredVector | str | None = setting(
        None,
        "What `sketch` or ``eigsh(store=…)`` stored, at any version: its part is exact, "
        "and only the rest is estimated.",
    )
    steps: int = steps_setting(32, ": what they leave open is in the error")
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
    seed: int = seed_setting("Of the probes.")


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
    seed: int = seed_setting("Of the probes.")


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
    "LogDet": QuerySpec(
        method="logdet",
        options=LogDetOptions,
        command="logdet",
        terminal={"relative_error": 0.01},
    ),
}
"""By the name of the RPC."""
