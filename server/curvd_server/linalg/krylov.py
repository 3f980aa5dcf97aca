"""Inner iterations for linear systems: conjugate gradients and MINRES, many at once.

Both solve ``A d = r`` for several right-hand sides from zero. A column that has
reached its limit, or met negative curvature, is not multiplied any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import Stop
from curvd_server.linalg.base import Progress, Query
from curvd_server.linalg.space import Space


@dataclass(frozen=True, slots=True)
class System:
    """What an inner iteration needs."""

    apply: Callable[[Tensor], Tensor]
    """Multiplies the damped map: [k, P] -> [k, P]."""
    refusal: Callable[[int], Stop | None]
    """Says why so many more columns must not be multiplied."""
    progress: Callable[[Tensor], Progress]
    """Makes progress from the residual norms [k]."""
    inverse: Callable[[Tensor], Tensor] | None
    """Applies the inverse of a positive definite preconditioner: [k, P] -> [k, P]."""
    space: Space
    """Where the vectors live."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What an inner iteration found, for each of its k columns."""

    solution: Tensor
    """d: [k, P], the best so far."""
    curvature: Tensor
    """[k] Smallest Rayleigh quotient of a search direction, float64."""
    indefinite: Tensor
    """[k] Whether the map was found not to be positive definite, bool."""
    flat: Tensor
    """[k] Whether no solution was found because it is singular but for rounding, bool."""
    length: Tensor
    """[k] Residual norms of the recurrence, float64."""
    drift: Tensor
    """[k] How far rounding may have taken them from the true ones; infinite: unknown."""
    iterations: int
    stopped: Stop | None


def cg(system: System, R: Tensor, limits: Tensor) -> Query[Steps]:
    """Run preconditioned conjugate gradients (Hestenes & Stiefel, 1952).

    A column stops before a step along which the map is not positive: its solution is
    what Steihaug (SIAM J. Numer. Anal. 20, 1983) calls the truncated Newton step. At
    the first step there is nothing to keep, and it stays zero. A curvature that rounding
    cannot tell from zero is none: along it, where a singular map has no solution, every
    step would lead farther away.

    Args:
        system: The damped map and its preconditioner.
        R: [k, P] Right-hand sides.
        limits: [k] Residual norms to reach, float64.

    Yields:
        Residual norms of the recurrence.

    Returns:
        The solutions.
    """
    dots, norms = system.space.dots, system.space.norms
    eps = torch.finfo(R.dtype).eps
    R = R.clone()
    D = torch.zeros_like(R)
    Z = R if system.inverse is None else system.inverse(R)
    direction = Z.clone()
    rz = dots(R, Z)
    length = norms(R)
    curvature = torch.full_like(length, torch.inf)
    indefinite = torch.zeros(len(R), dtype=torch.bool, device=R.device)
    flat = indefinite.clone()
    # A residual is the sum of real products: only the rounding of the sums is missing,
    # about one of A times the solution in each step.
    largest, reach, square = (torch.zeros_like(length) for _ in range(3))
    active = torch.nonzero(length > limits).flatten()
    iterations, stopped = 0, None
    while len(active):
        stopped = system.refusal(len(active))
        if stopped is not None:
            break
        iterations += 1
        moves = direction[active]
        products = system.apply(moves)
        along = dots(moves, products)
        quotient = along / dots(moves, moves)
        curvature[active] = torch.minimum(curvature[active], quotient)
        lengths = norms(moves)
        stretch = norms(products) / lengths
        largest[active] = torch.maximum(largest[active], stretch)
        least = eps * largest[active]
        good = quotient > least
        indefinite[active[~good]] = True
        flat[active[quotient.abs() <= least]] = True
        active, moves, products = active[good], moves[good], products[good]
        ratio, lengths = rz[active] / along[good], lengths[good]
        reach[active] += ratio * lengths
        square[active] += (largest[active] * reach[active]) ** 2
        step = ratio[:, None].to(R.dtype)
        D[active] += step * moves
        R[active] -= step * products
        length[active] = norms(R[active])
        yield system.progress(length)
        active = active[length[active] > limits[active]]
        rest = R[active]
        Z = rest if system.inverse is None else system.inverse(rest)
        new = dots(rest, Z)
        direction[active] = (
            Z + (new / rz[active])[:, None].to(R.dtype) * direction[active]
        )
        rz[active] = new
    drift = 4 * eps * square.sqrt()
    return Steps(D, curvature, indefinite, flat, length, drift, iterations, stopped)


def minres(system: System, R: Tensor, limits: Tensor) -> Query[Steps]:
    """Run MINRES (Paige & Saunders, SIAM J. Numer. Anal. 12, 1975), preconditioned.

    The pivots of the tridiagonal matrix's factorisation show whether the map is
    indefinite (Sylvester's law of inertia); that is reported, not an obstacle. With a
    preconditioner the recurrence minimises another norm than the residual's, which is
    followed by a recurrence of its own.

    Args:
        system: The damped map and its preconditioner.
        R: [k, P] Right-hand sides.
        limits: [k] Residual norms to reach, float64.

    Yields:
        Residual norms of the recurrence.

    Returns:
        The solutions.
    """
    k, dtype, inverse = len(R), R.dtype, system.inverse
    dots, norms = system.space.dots, system.space.norms
    D, w, w_old = torch.zeros_like(R), torch.zeros_like(R), torch.zeros_like(R)
    r_old, r_new = torch.zeros_like(R), R.clone()
    y = R.clone() if inverse is None else inverse(R)
    beta = norms(R) if inverse is None else dots(R, y).sqrt()
    residual = None if inverse is None else R.clone()
    length = norms(R)
    zero = torch.zeros_like(beta)
    beta_old, dbar, epsilon = zero.clone(), zero.clone(), zero.clone()
    phibar, cs, sn = beta.clone(), zero - 1, zero.clone()
    pivot, largest, reach = zero.clone(), zero.clone(), zero.clone()
    curvature = torch.full_like(beta, torch.inf)
    indefinite = torch.zeros(k, dtype=torch.bool, device=R.device)
    flat = indefinite.clone()
    active = torch.nonzero(length > limits).flatten()
    iterations, stopped = 0, None
    while len(active):
        stopped = system.refusal(len(active))
        if stopped is not None:
            break
        a = active
        v = y[a] / beta[a][:, None].to(dtype)
        u = system.apply(v)
        if iterations:
            u = u - (beta[a] / beta_old[a])[:, None].to(dtype) * r_old[a]
        alpha = dots(v, u)
        u = u - (alpha / beta[a])[:, None].to(dtype) * r_new[a]
        r_old[a], r_new[a] = r_new[a], u
        y[a] = u if inverse is None else inverse(u)
        quotient = alpha if inverse is None else alpha / dots(v, v)
        curvature[a] = torch.minimum(curvature[a], quotient)
        pivot[a] = alpha - (beta[a] ** 2 / pivot[a] if iterations else 0.0)
        indefinite[a] |= pivot[a] <= 0
        beta_old[a] = beta[a]
        beta[a] = norms(u) if inverse is None else dots(u, y[a]).clamp_min(0).sqrt()
        epsilon_old = epsilon[a]
        delta = cs[a] * dbar[a] + sn[a] * alpha
        gbar = sn[a] * dbar[a] - cs[a] * alpha
        epsilon[a], dbar[a] = sn[a] * beta[a], -cs[a] * beta[a]
        gamma = torch.hypot(gbar, beta[a]).clamp_min(torch.finfo(torch.float64).tiny)
        cs[a], sn[a] = gbar / gamma, beta[a] / gamma
        largest[a] = torch.maximum(largest[a], gamma)
        phi = cs[a] * phibar[a]
        phibar[a] = sn[a] * phibar[a]
        w_next = (
            v
            - epsilon_old[:, None].to(dtype) * w_old[a]
            - delta[:, None].to(dtype) * w[a]
        ) / gamma[:, None].to(dtype)
        w_old[a], w[a] = w[a], w_next
        D[a] += phi[:, None].to(dtype) * w_next
        reach[a] += phi.abs() * norms(w_next)
        iterations += 1
        if residual is None:
            length[a] = phibar[a]
        else:
            # r = sn^2 r - (phi sn / gamma ...) u
            share = torch.where(beta[a] > 0, phibar[a] * cs[a] / beta[a], 0.0)
            residual[a] = (sn[a] ** 2)[:, None].to(dtype) * residual[a] - share[
                :, None
            ].to(dtype) * u
            length[a] = norms(residual[a])
        yield system.progress(length)
        # Where a singular map has no solution, steps grow without an end, and what the
        # recurrence says of the residual is less than the rounding of the products.
        flat[a] |= torch.finfo(dtype).eps * largest[a] * reach[a] > length[a]
        alive = (length[a] > limits[a]) & (beta[a] > 0) & ~flat[a]
        active = a[alive]
    drift = torch.full_like(phibar, torch.inf)
    return Steps(D, curvature, indefinite, flat, length, drift, iterations, stopped)
