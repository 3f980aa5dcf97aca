"""The map on the complement of a basis, such that nothing can hide between the two.

Let Q and N be a band's basis and pending directions, ``A Q' = Q' H + N' C``, and s no
eigenvalue of H. By Sylvester's law of inertia (for Schur complements: Haynsworth, Linear
Algebra Appl. 1, 1968) A has beyond s the eigenvalues of H, and as many more as

    B(s) = A_c + N' C (s - H)^-1 C' N,    A_c: A on the complement of Q,

has there. That is exact whatever Q is, so the whole basis is deflated, not only its pairs
that have converged, and copies of eigenvalues that rounding brought into the basis are
counted once. Farther out than s, but before the next eigenvalue of H, the correction is
smaller: B(s) has an eigenvalue beyond every value there beyond which something is missing.

The upper and the lower end need different corrections. To search both at once, only a
part of the basis is deflated, Z, and A_c itself is searched. The rest, Y, says how small a
part of an eigenvector of B(s) the correction can meet (`_shift`), most surely where Y are
the last steps of Lanczos' method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from curvd_server.linalg.band import Band, Complement
from curvd_server.linalg.evidence import Target
from curvd_server.linalg.ritz import Floats


@dataclass(frozen=True, slots=True)
class Part:
    """What one search does."""

    complement: Complement
    targets: tuple[Target, ...]


def parts(band: Band, targets: Sequence[Target], wanted: Floats) -> list[Part]:
    """Divide a search into runs.

    Args:
        band: Settled. Its rows may turn, but what they span does not.
        targets: The targets of one side or of both.
        wanted: [c, k] Coefficients of the wanted Ritz vectors.

    Returns:
        One run; or one for each side.
    """
    signs = {target.sign for target in targets}
    if len(signs) > 1:
        for turn in _turns(wanted):
            both = _both_sides(band, targets, turn, wanted.shape[1])
            if both is not None:
                return [both]
    return [_one_side(band, [t for t in targets if t.sign == sign]) for sign in signs]


def _one_side(band: Band, targets: Sequence[Target]) -> Part:
    nearest = min(targets, key=lambda target: target.distance)
    values, turn = band.ritz()
    pull = _pull(band.c @ turn, values, nearest.value)
    return Part(Complement(band.basis, band.waiting, pull), tuple(targets))


def _turns(wanted: Floats) -> Iterator[Floats]:
    """Suggest how to turn a basis such that its leading rows can be deflated.

    Rows of Lanczos' method as they are; or the wanted pairs first, which have not always
    been what they are.

    Args:
        wanted: [c, k].

    Yields:
        [c, c] Orthogonal.
    """
    every = np.eye(len(wanted))
    yield every
    yield np.linalg.qr(np.c_[wanted, every])[0]


def _both_sides(
    band: Band, targets: Sequence[Target], turn: Floats, least: int
) -> Part | None:
    """Deflate as many leading rows as leave every target nearly where it is."""
    needed = [target for target in targets if target.slack]
    if {target.sign for target in needed} != {target.sign for target in targets}:
        return None
    h, c = turn.T @ (band.h + band.h.T) / 2 @ turn, band.c @ turn
    for n in _counts(band.count, least):
        shifts = [_shift(h, c, n, target) for target in needed]
        if all(s <= t.slack for s, t in zip(shifts, needed, strict=True)):
            if not np.array_equal(turn, np.eye(len(turn))):
                band.shrink(turn)
            moved = tuple(
                replace(target, distance=target.distance - shift)
                for target, shift in zip(needed, shifts, strict=True)
            )
            return Part(Complement(band.basis[:n]), moved)
    return None


def _counts(most: int, least: int) -> Iterator[int]:
    """Count down, faster and faster."""
    left = 0
    while most - left >= least:
        yield most - left
        left += 1 + left // 8


def _pull(coupling: Floats, values: Floats, at: float) -> Floats:
    """Compute ``C (s - H)^-1 C'`` from Ritz values and C times their vectors."""
    far = at - values
    far[far == 0] = np.finfo(
        np.float64
    ).tiny  # of the zero map, where C is zero as well
    found: Floats = (coupling / far) @ coupling.T
    return found


def _shift(h: Floats, c: Floats, n: int, target: Target) -> float:
    """Bound by how much the map falls short without its correction.

    An eigenvector of B(s) beyond the target has components g along the rows Y and d
    along N. The equations of Y tie them together, ``(H_Y + G_Y - s) g + C' d = 0`` with
    the correction G of the leading rows, and ``g^2 + d^2 <= 1`` bounds the quadratic form
    of G.

    Args:
        h: [c, c] H.
        c: [b, c] C.
        n: Leading rows.
        target: Where s is.

    Returns:
        The bound; infinite if the other rows have changed the count beyond the target.
    """
    rest, at = len(h) - n, target.value
    values, turn = np.linalg.eigh(h[:n, :n])
    pull = _pull(np.r_[h[n:, :n], c[:, :n]] @ turn, values, at)
    inner = h[n:, n:] + pull[:rest, :rest] - at * np.eye(rest)
    if rest and not np.linalg.eigvalsh(-target.sign * inner)[0] > 0:
        return np.inf
    tied = np.linalg.solve(inner, c[:, n:].T + pull[:rest, rest:])
    basis = np.linalg.qr(np.r_[-tied, np.eye(len(c))])[0]
    form = target.sign * basis.T @ pull @ basis
    return max(0.0, float(np.linalg.eigvalsh(form)[-1])) if len(c) else 0.0
