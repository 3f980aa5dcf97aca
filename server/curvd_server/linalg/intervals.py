"""Intervals that hold the truth 95 % of the time, also for few and skewed samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_SHOWN = 12
"""So many samples show how skewed their distribution is."""
_WIDEST = 4.0
"""No correction for skewness makes an interval wider than so many times."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean of independent samples with its uncertainty."""

    value: float
    standard_error: float
    half_width: float
    """Half the width of a 95 % interval; skewness and few samples widen it."""


def mean_of(samples: list[float], rounding: float = 0.0) -> Mean:
    """Average independent samples.

    Args:
        samples: At least one; errors are infinite below two.
        rounding: The rounding of a sample, relative to the largest: errors are no smaller.

    Returns:
        Mean, standard error, and 95 % half width.
    """
    value = math.fsum(samples) / len(samples)
    error, width = uncertainty(samples)
    mean = Mean(value, float(error), float(width))
    return widened(mean, rounding * max(map(abs, samples)))


def widened(mean: Mean, least: float) -> Mean:
    """Let no error be smaller than rounding.

    Args:
        mean: The mean of samples.
        least: Absolute rounding.

    Returns:
        The same value, with no smaller errors.
    """
    return Mean(
        mean.value, max(mean.standard_error, least), max(mean.half_width, least)
    )


def few(samples: int) -> float:
    """Widen intervals of few quadratic forms of random vectors.

    Where one eigenvalue rules they are chi-squared with one degree of freedom, the most skewed
    that there are, and three to nine of them do not show how skewed. By so much the intervals of
    `uncertainty` must be wider to hold that mean 95 % of the time (from 20000 simulations each).

    Args:
        samples: How many there are.

    Returns:
        The factor: 1 from twelve samples on, which show it.
    """
    return 1 + 11 / samples**2 if 0 < samples < _SHOWN else 1.0


def uncertainty(samples: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Compute the standard error and the 95 % half width of a mean.

    Quadratic forms of random probes are skewed where few eigenvalues rule: ten of them
    leave Student's interval in 15 % of all cases and not 5 %. Hall's transformation of
    the t statistic (J. R. Stat. Soc. B 54, 1992) takes the third moment in; the longer
    side of its interval counts on both.

    Args:
        samples: [n, ...], n at least 1.

    Returns:
        Twice [...]; infinite below two samples.
    """
    samples = np.asarray(samples, np.float64)
    n = len(samples)
    if n < 2:
        infinite = np.full(samples.shape[1:], np.inf)
        return infinite, infinite
    # In units of the largest, so that no square leaves the range of numbers.
    unit = np.abs(samples).max(axis=0)
    unit = np.where((unit > 0) & np.isfinite(unit), unit, 1.0)
    samples = samples / unit
    deviation = samples.std(axis=0, ddof=1)
    error, quantile = deviation / math.sqrt(n), student_975(n - 1)
    if n < 3:
        return unit * error, unit * (quantile * error)
    scaled = (samples - samples.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    skewness = n / (n - 1) / (n - 2) * (scaled**3).sum(axis=0)
    # Of the mean; the transformation is the identity at zero.
    g = skewness / math.sqrt(n)
    g = np.where(np.abs(g) < 1e-6, 1e-6, g)
    sides = [
        np.abs(3 / g * (np.cbrt(1 + g * (t - g / 6)) - 1))
        for t in (quantile, -quantile)
    ]
    reach = np.clip(np.maximum(*sides), quantile, _WIDEST * quantile)
    return unit * error, unit * (reach * error)


def student_975(freedom: int) -> float:
    """Compute the 97.5 % quantile of Student's distribution.

    Exact for one and two degrees of freedom; above, the expansion of Abramowitz &
    Stegun (1964), 26.7.5, which is right to 2 % at three and to 1e-4 from ten on.

    Args:
        freedom: Degrees of freedom, at least 1.

    Returns:
        The quantile.
    """
    if freedom == 1:
        return 12.706204736
    if freedom == 2:
        return 4.302652730
    x, n = 1.959963985, freedom
    terms = (
        x,
        (x**3 + x) / 4 / n,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96 / n**2,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384 / n**3,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160 / n**4,
    )
    return math.fsum(terms)
