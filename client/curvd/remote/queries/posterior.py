"""What queries about a Gaussian posterior find, and how that is told and drawn.

Beside the queries (`laplace`), which know how priors travel and what the server is asked: a
result knows its own numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import LossName, StoredVector
from curvd.errors import InvalidSpec
from curvd.remote.queries.base import NOTHING, Floats, Result, drawn_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MarginalLikelihood", "PosteriorSamples", "Predictive"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Predictive(Result):
    """Moments of linearised outputs under the posterior, input by input."""

    mean: Floats
    """[T, *outputs] The outputs themselves; NaN of inputs that were not begun."""
    variance: Floats
    """[T, *outputs] Of each output, without the noise of targets; too small where its
    system was cut short (`relative_residuals`), NaN where it was not begun."""
    covariance: Floats | None
    """[T, C, C] Of the outputs of an input, if asked for."""
    relative_residuals: Floats
    """[T] The largest of each input's systems; NaN of inputs that were not begun."""
    scale: float
    """What the operator was multiplied by: the precision is this plus the prior."""

    class_axis: int
    """The axis of `mean` that has the classes, counted from the last; 0: none has."""
    loss: LossName
    """Of the session, which says what outputs mean."""

    def probabilities(self) -> Floats:
        """Average softmax over the posterior, by MacKay's probit approximation.

        ``softmax(mean / sqrt(1 + π/8 variance))`` (MacKay, Neural Computation 4, 1992),
        over the axis of the classes.

        Returns:
            [T, *outputs]

        Raises:
            InvalidSpec: If outputs are no logits of classes, or an older server does not
                say where the classes are.
        """
        if not self.loss.has_classes:
            msg = (
                f"outputs of a session with loss {self.loss} are no logits of classes, so "
                "their softmax means nothing: read mean and variance"
            )
            raise InvalidSpec(msg, loss=self.loss)
        if not self.class_axis:
            msg = (
                "the server does not say which axis of the outputs has the classes: read "
                "mean and variance, or update the server"
            )
            raise InvalidSpec(msg)
        z = self.mean / np.sqrt(1 + np.pi / 8 * self.variance)
        return _softmax(z, self.class_axis)

    @property
    def _begun(self) -> NDArray[np.bool_]:
        """[T] Whether anything was computed of an input."""
        return ~np.isnan(self.relative_residuals)

    def lines(self) -> Iterator[str]:
        """Say how large the deviations are."""
        if not self._begun.any():
            yield NOTHING
            return
        low, middle, high = np.nanquantile(np.sqrt(self.variance), [0, 0.5, 1])
        yield f"{len(self.mean)} inputs, deviations {low:.3e} to {high:.3e}, median {middle:.3e}"
        worst = np.nanmax(self.relative_residuals)
        yield f"relative residual at most {worst:.1e}"
        if not self._begun.all():
            yield f"{(~self._begun).sum()} of them not begun: their values are NaN"

    def plot(self, axes: Axes | None = None, *, targets: Any = None) -> Axes:
        """Draw how well calibrated probabilities are, or the deviations.

        Args:
            axes: Where to; None makes a figure.
            targets: [T, ...] Classes: then shares of right predictions are drawn over their
                confidence, with and without the posterior; None: deviations, sorted.

        Returns:
            The axes.

        Raises:
            InvalidSpec: If outputs are no logits of classes, or targets of another shape.
        """
        axes = drawn_on(axes)
        if targets is None:
            deviations = np.sort(np.sqrt(self.variance[self._begun]).reshape(-1))
            axes.plot(deviations, label="standard deviation")
            axes.set(xlabel="output, by rank", ylabel="standard deviation")
        else:
            posterior = self.probabilities()
            plain = _softmax(self.mean, self.class_axis)
            begun, y = self._begun, np.asarray(targets)
            wanted = np.moveaxis(plain, self.class_axis, -1).shape[:-1]
            if y.shape != wanted:
                msg = (
                    f"targets are class indices {list(wanted)}, one for each prediction, "
                    f"got {list(y.shape)}"
                )
                raise InvalidSpec(msg, targets=y.shape)
            for name, p in (("plain", plain), ("posterior", posterior)):
                p = np.moveaxis(p, self.class_axis, -1)
                axes.plot(*calibration(p[begun], y[begun]), "o-", label=name)
            axes.plot([0, 1], [0, 1], "--", color="0.6", label="calibrated")
            axes.set(xlabel="confidence", ylabel="share of right predictions")
        axes.set(
            title=f"predictions for {len(self.mean)} inputs, version {self.version}"
        )
        axes.legend()
        return axes


def _softmax(z: Floats, axis: int) -> Floats:
    z = np.exp(z - z.max(axis, keepdims=True))
    found: Floats = z / z.sum(axis, keepdims=True)
    return found


def calibration(p: Floats, y: Any, bins: int = 10) -> tuple[Floats, Floats]:
    """Compare confidence with the share of right predictions.

    Args:
        p: [T, ..., C] Probabilities.
        y: [T, ...] Classes.
        bins: Of equal width, between 0 and 1.

    Returns:
        Mean confidence and share of right predictions, of the bins that are not empty.
    """
    confidence, right = p.max(-1), p.argmax(-1) == y
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    used = [b for b in range(bins) if np.any(place == b)]
    return (
        np.array([confidence[place == b].mean() for b in used]),
        np.array([right[place == b].mean() for b in used]),
    )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PosteriorSamples(Result):
    """Draws from the posterior, less the parameters."""

    samples: Floats | None
    """[k, P] To be added to the parameters, NaN of one that was not begun; None if they
    stay in the session."""
    stored: StoredVector | None
    """The draws, if they stay in the session."""
    relative_residuals: Floats
    """[k] Of their systems; NaN of one that was not begun."""
    scale: float
    """What the GGN was multiplied by: the precision is this plus the prior."""

    def lines(self) -> Iterator[str]:
        """Say how many, and how exact."""
        if np.isnan(self.relative_residuals).all():
            yield NOTHING
            return
        worst = np.nanmax(self.relative_residuals)
        yield f"{len(self.relative_residuals)} draws, relative residual at most {worst:.1e}"
        missing = int(np.isnan(self.relative_residuals).sum())
        if missing:
            yield f"{missing} of them not begun: they are NaN"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the norms of the draws.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        if self.samples is None:
            msg = "the draws stay in the session: fetch them by session.get, then draw"
            raise InvalidSpec(msg)
        norms = np.linalg.norm(self.samples, axis=1)
        axes.bar(range(len(norms)), norms, label="draws")
        axes.set(
            xlabel="draw",
            ylabel="norm",
            title=f"{len(norms)} draws, version {self.version}",
        )
        axes.legend()
        return axes


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MarginalLikelihood(Result):
    """Laplace's approximation of log marginal likelihoods, prior by prior."""

    priors: Floats | tuple[Any, ...]
    """[D] Precisions; as they were given, where they differ between parameters. With
    `search` those that were found, by the names of parameters."""
    values: Floats
    """[D] ``log_likelihood - (log_determinants - P log prior + prior |θ|^2) / 2``, or the
    sums over parameters."""
    standard_errors: Floats
    """[D] Of the estimate of the determinants; 0 where all eigenvalues are known."""
    log_determinants: Floats
    """[D] Of the posterior's precision."""
    log_likelihood: float
    squared_norm: float
    """``|θ|^2`` of the operator's parameters."""
    scale: float
    """What the operator was multiplied by."""
    exact: bool
    """Whether all eigenvalues are known."""

    @property
    def best(self) -> Any:
        """The prior with the largest value, a number unless it was given otherwise.

        Raises:
            InvalidSpec: If products or time ran out before any value was computed.
        """
        if np.isnan(self.values).all():
            msg = f"there is no best prior: {NOTHING}"
            raise InvalidSpec(msg)
        found = self.priors[int(np.nanargmax(self.values))]
        return found if isinstance(self.priors, tuple) else float(found)

    def lines(self) -> Iterator[str]:
        """Say the value of each prior."""
        for prior, value, error in zip(
            self.priors, self.values, self.standard_errors, strict=True
        ):
            said = prior if isinstance(self.priors, tuple) else f"{prior:g}"
            yield f"{value:.6e} ± {error:.1e} at a prior precision of {said}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the values over the priors.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        count = len(self.priors)
        along = np.arange(count) if isinstance(self.priors, tuple) else self.priors
        order = np.argsort(along)
        axes.errorbar(
            along[order],
            self.values[order],
            self.standard_errors[order],
            fmt="o-",
            label="log marginal likelihood",
        )
        axes.set(
            ylabel="log marginal likelihood",
            title=f"{count} priors, version {self.version}",
        )
        if along is self.priors:
            axes.set(xlabel="prior precision", xscale="log")
        else:
            axes.set(xlabel="prior, as they were given")
        axes.legend()
        return axes
