"""What a Lanczos run from a random vector shows of what it has not found.

Let v be the start and u an eigenvector with eigenvalue t that no Ritz pair stands for.
Along the direction that the next step would take, u has a component ``p(t) v'u``, and p
is a polynomial whose roots are the Ritz values. No component of u is larger than one, so
``|v'u| <= 1 / |p(t)|``; and a component of a random vector of length one is below c with
a probability of less than ``c sqrt(2 P / pi)``.

At a Ritz value with residual r, whose Ritz vector has a component w along v, the slope of
p is ``1 / (r w)``. Between two neighbours the logarithm of ``p(t) / ((t - a) (b - t))`` is
concave, because p has real roots only, and beyond the outermost root p is steeper than at
it. So the pairs that have converged bound p wherever an eigenvalue could be missing. After
restarts, too: p then has roots also at the values that were given up, all of them further
inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from curvd.contract import Which
from curvd_server.linalg.ritz import Floats

MISSED = 1e-4
"""Probability that an eigenvalue, if one is missing, is overlooked."""
NEAR = 0.01
"""The same two tolerances beyond the last wanted value; x tolerances beyond: 0.02 / x."""
ALONE = 0.125
"""The same where only one value of a side is wanted, so that no search follows."""
_COPY = 0.9
"""So far from the last wanted value to the next are copies of that searched for."""
_BETWEEN = (0.1, 0.5)
"""There, others are."""
_SLACK = 0.5
"""How much nearer a search may look, of a target's distance from the last value."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All Ritz pairs of a run from one random vector."""

    nodes: Floats
    """[c] Ritz values, ascending."""
    slopes: Floats
    """[c] Residual times component along the start."""
    size: int
    """P."""

    def missed(self, value: float) -> float:
        """Bound the probability to have missed an eigenvalue.

        Args:
            value: The value of the eigenvalue.

        Returns:
            The bound, at most 1.
        """
        after = int(np.searchsorted(self.nodes, value))
        slopes, nodes = self.slopes, self.nodes
        if after in {0, len(nodes)}:
            end = min(after, len(nodes) - 1)
            slope, distance = float(slopes[end]), abs(value - float(nodes[end]))
        else:
            below, above = value - nodes[after - 1], nodes[after] - value
            share = below / (below + above)
            slope = slopes[after - 1] ** (1 - share) * slopes[after] ** share
            distance = below * above / (below + above)
        likely = math.sqrt(2 * self.size / math.pi) * float(slope)
        if not likely > 0:
            return 0.0
        return likely / distance if likely < distance else 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A value beyond which nothing may be missing."""

    sign: int
    """1: above it, -1: below it."""
    distance: float
    """The value times the sign."""
    missed: float
    """Probability with which what is there may be overlooked; 1: whatever comes out."""
    slack: float = 0.0
    """How much nearer one may look."""

    @property
    def value(self) -> float:
        """The value."""
        return self.sign * self.distance


@dataclass(frozen=True, slots=True)
class Side:
    """One end of the spectrum; values here are times the sign."""

    sign: int
    """1: the upper end, -1: the lower one."""
    last: float
    """The wanted value that is nearest to the others."""
    wanted: float
    """What its residual was asked to reach."""
    next: float | None
    """The next wanted value beyond, unless it is as good as equal."""

    @property
    def near(self) -> float:
        """Where a value that was lost would be an error."""
        return self.last + 2 * self.wanted

    @property
    def allowed(self) -> float:
        """Probability to have lost a value there."""
        return ALONE if self.next is None else NEAR

    def missed(self, evidence: Evidence) -> float:
        """Bound the probability that a run has lost a value there."""
        return evidence.missed(self.sign * self.near)

    def targets(self, evidence: Evidence | None) -> list[Target]:
        """Choose beyond which values to look for what is missing.

        A generic start vector has a component in every eigenspace. What it leads to
        lacks copies of what it found, of those beyond the last; or what had a very
        small component, which another random vector lacks as rarely.

        Args:
            evidence: The evidence of the first run; None: anything may be missing.

        Returns:
            The targets.
        """
        missed, slack = (1.0, 0.0) if evidence else (self.allowed, self.wanted)
        found = [Target(self.sign, self.near, missed, slack)]
        if self.next is None:
            return found
        limit = self.last + self.wanted
        room = self.next - limit
        for share in (*_BETWEEN, _COPY):
            distance = limit + share * room
            missed = MISSED
            if evidence and share != _COPY:
                before = evidence.missed(self.sign * distance)
                missed = MISSED / before if before > MISSED else 1.0
            slack = _SLACK * (distance - self.last)
            found.append(Target(self.sign, distance, missed, slack))
        return found


def sides(values: Floats, wanted: Floats, which: Which) -> list[Side]:
    """Say what of which ends of a spectrum is known.

    Args:
        values: [k] Wanted eigenvalues, largest first, all converged.
        wanted: [k] What their residuals were asked to reach.
        which: Which end is wanted.

    Returns:
        One or two.
    """
    k, top = len(values), np.ones(len(values), dtype=bool)
    bottom = top.copy()
    if which is Which.LARGEST:
        bottom[:] = False
    elif which is Which.SMALLEST:
        top[:] = False
    elif which is Which.BOTH:
        top[k - k // 2 :] = False
        bottom = ~top
    magnitude = which is Which.LARGEST_MAGNITUDE
    found = []
    for sign, part in ((1, top), (-1, bottom)):
        if not part.any():
            continue
        signed = sign * values
        sizes = np.where(part, np.abs(values) if magnitude else signed, np.inf)
        least = int(sizes.argmin())
        last, accuracy = float(sizes[least]), float(wanted[least])
        beyond = signed[part & (signed > last + 2 * accuracy)]
        following = float(beyond.min()) if len(beyond) else None
        found.append(Side(sign, last, accuracy, following))
    return found
