"""What may be asked about a snapshot: metrics by name, and functions of a session."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from curvd.errors import InvalidSpec, VersionMismatch
from curvd.remote import Session
from curvd.remote.queries import Eigenpairs, Estimate

Value = tuple[float, float | None]
"""A number, and its error if it is an estimate."""
Metric = str | Callable[[Session], Any]
Metrics = Metric | Sequence[Metric] | Mapping[str, Metric]
"""One or several, or by names of the caller's."""

_TOLERANCE = 1e-3
"""Of eigenvalues, relative: three digits, which a curve does not show to be missing."""
_SAMPLES = 30
"""Products for a trace; with one seed throughout, steps differ by what changed alone."""


class Moment:
    """A session at the version of one snapshot.

    Args:
        session: The session.
        version: The version; what is asked at another one fails.
    """

    def __init__(self, session: Session, version: int) -> None:
        self.session, self.version = session, version

    @functools.cached_property
    def gradient(self) -> tuple[float, Any]:
        """The loss and its gradient [P], asked for once."""
        return self.session.gradient(expected_version=self.version)

    def sharpness(self) -> Value:
        """Largest eigenvalue of the Hessian."""
        return _largest(self.session.hessian(expected_version=self.version))

    def ggn_sharpness(self) -> Value:
        """Largest eigenvalue of the Gauss-Newton matrix."""
        return _largest(self.session.ggn(expected_version=self.version))

    def trace(self) -> Value:
        """Trace of the Hessian."""
        H = self.session.hessian(expected_version=self.version)
        return value_of(H.trace(samples=min(_SAMPLES, self.session.layout.size)))

    def gradient_norm(self) -> Value:
        """Euclidean norm of the gradient of the objective."""
        return float(np.linalg.norm(np.asarray(self.gradient[1], np.float64))), None

    def loss(self) -> Value:
        """The objective over all data of the session."""
        return self.gradient[0], None


NAMED: Mapping[str, Callable[[Moment], Value]] = MappingProxyType({
    "sharpness": Moment.sharpness,
    "ggn_sharpness": Moment.ggn_sharpness,
    "trace": Moment.trace,
    "gradient_norm": Moment.gradient_norm,
    "loss": Moment.loss,
})
"""The metrics that have names."""


@dataclass(frozen=True, slots=True)
class _Of:
    """A function of the caller's as a metric."""

    function: Callable[[Session], Any]

    def __call__(self, moment: Moment) -> Value:
        found = self.function(moment.session)
        if getattr(found, "version", moment.version) != moment.version:
            msg = (
                f"a metric was computed at version {found.version}, and the snapshot is "
                f"version {moment.version}: let nobody else update the session"
            )
            raise VersionMismatch(msg)
        return value_of(found)


def chosen(metrics: Metrics) -> Mapping[str, Callable[[Moment], Value]]:
    """Read what is to be asked.

    Args:
        metrics: Names of `NAMED`, functions of a session, or either by another name.

    Returns:
        By name, in the order given.

    Raises:
        InvalidSpec: If there is none, or one that is unknown, nameless or there twice.
    """
    if isinstance(metrics, str) or callable(metrics):
        metrics = [metrics]
    if not isinstance(metrics, Mapping):
        names = [_name(metric) for metric in metrics]
        if len(set(names)) < len(names):
            msg = f"metrics need different names, got {', '.join(names)}"
            raise InvalidSpec(msg)
        metrics = dict(zip(names, metrics, strict=True))
    if not metrics:
        msg = f"a watch needs a metric: one of {', '.join(NAMED)}, or a function"
        raise InvalidSpec(msg)
    return {name: _read(metric) for name, metric in metrics.items()}


def _name(metric: Metric) -> str:
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", None)
    if name is None or name == "<lambda>":
        msg = (
            f"the metric {metric!r} has no name: write metrics={{'name': function}}, a "
            "mapping"
        )
        raise InvalidSpec(msg)
    return str(name)


def _read(metric: Metric) -> Callable[[Moment], Value]:
    if isinstance(metric, str) and metric in NAMED:
        return NAMED[metric]
    if callable(metric):
        return _Of(metric)
    msg = f"unknown metric {metric!r}; known: {', '.join(NAMED)}, or a function of a session"
    raise InvalidSpec(msg, metric=metric)


def value_of(found: Any) -> Value:
    """Read a number off what a query or a function returned.

    Args:
        found: A result, of which the largest eigenvalue or the estimate counts; a
            number; or a pair of a number and its error.

    Returns:
        The number with its error.
    """
    if isinstance(found, Estimate):
        return found.value, found.half_width
    if isinstance(found, Eigenpairs):
        return float(found.values[0]), float(found.residuals[0])
    if isinstance(found, tuple):
        value, error = found
        return float(value), float(error)
    return float(found), None


def _largest(operator: Any) -> Value:
    # What the last snapshot had is nearly it: a few products are left.
    return value_of(
        operator.eigsh(1, tolerance=_TOLERANCE, warm_start=True, vectors=False)
    )
