"""Options of queries about the Gaussian posterior that an operator stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from curvd.contract.enums import OperatorKind
from curvd.contract.infos import StoredVector
from curvd.contract.query_options.shared import seed_setting, steps_setting
from curvd.contract.query_spec import QueryOptions, QuerySpec
from curvd.contract.settings import setting
from curvd.errors import InvalidSpec

_LEAST_SCALE = 1e-100
"""Of what is squared and divided by; the largest is its inverse."""


_PRIORS = (
    "Precisions that are not all the same, in place of `prior`: by globs over names, of "
    'which the first that matches counts (``{"*.bias": 1.0, "*": 10.0}``), or what the '
    "session stores, [P]. Residuals are then in units of the priors."
)


PRIOR = 1.0
"""Precision of a prior that nobody has given."""


def _prior() -> Any:
    return setting(
        None,
        "Precision of the parameters before any data, the same for all of them; None: 1, if "
        "there are no `priors`.",
        least=_LEAST_SCALE,
        most=1 / _LEAST_SCALE,
    )


def check_one_prior(prior: float | None, priors: Any) -> None:
    """Refuse a prior that is given twice, of which one would not count.

    Args:
        prior: Precision of all parameters; None: not given.
        priors: What stands for precisions that differ; None: not given.

    Raises:
        InvalidSpec: If both are given.
    """
    if prior is not None and priors is not None:
        msg = (
            f"prior={prior:g} and priors= exclude each other: give prior for all parameters, "
            f'or write it into priors, as {{"*": {prior:g}}} for those that have no other'
        )
        raise InvalidSpec(msg, prior=prior)


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

    prior: float | None = _prior()
    priors: Any = setting(None, _PRIORS, wire="")
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
    prior: float | None = _prior()
    priors: Any = setting(None, _PRIORS, wire="")
    noise: float = _noise()
    seed: int = seed_setting("Of the draws.")
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
    search: int = setting(
        0,
        "Steps at most by which each prior is made more likely first: one number, or one for "
        "each parameter, as it was given. 0: none. Up to P of 4096, with P products.",
        least=0,
        most=10_000,
    )
    steps: int = steps_setting(32, ": what they leave open is in the error")
    probes: int = setting(
        30,
        "Random vectors, where P is more than probes times steps or 4096; up to there all "
        "eigenvalues are computed.",
        least=1,
        most=100_000,
    )
    seed: int = seed_setting("Of the probes.")


QUERIES: Mapping[str, QuerySpec] = {
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
}
"""By the name of the RPC."""
