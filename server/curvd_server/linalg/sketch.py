"""A growing sketch of a symmetric map, shared by Hutch++, XTrace and XDiag."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvd.contract import Distribution
from curvd_server.linalg.base import Products

_CHECKS = 1 << 32
"""Index of the first probe that checks whether a range is exhausted."""
_SPANNED = 1e-8
"""Leverage below one by more: other probes span a probe's product as well."""


class Sketch:
    """Probes W, Y = AW = QR, Z = AQ, grown by columns; Q orthonormal.

    Growing costs what the new columns cost: the QR decomposition is extended by block
    Gram-Schmidt, so that adaptive stopping wastes no product.

    Args:
        products: The map A.
        seed: The seed of the probes.
        signs: Whether elements of probes are signs, as diagonals need them; else probes are
            random directions.
    """

    def __init__(self, products: Products, seed: int, *, signs: bool = False) -> None:
        self._signs = signs
        self._products, self._space, self._seed = products, products.space, seed
        self.w, self.y, self.q, self.z = (self._space.empty(0) for _ in range(4))
        """[k, P] each, columns first."""
        self.r = torch.empty(0, 0, dtype=torch.float64)
        """[k, k], upper triangular. A row of Q, of Z and of R is zero where a probe's
        product adds nothing to Q."""
        self.missed: Tensor | None = None
        """[own] What Q misses of the product of a normal probe, if probes coincide."""
        self.complete = False
        """Whether Q spans the range of the map, so that ``tr(Q'AQ)`` is the trace."""

    @property
    def count(self) -> int:
        """Number of probes, k."""
        return len(self.w)

    @property
    def rounding(self) -> float:
        """What rounding may do to ``tr(Q'AQ)``."""
        return self._products.rounding * float(self._space.norms(self.z).sum())

    def grow(self, columns: int) -> None:
        """Add probes, at two products each, or one that adds nothing to Q.

        Args:
            columns: How many.
        """
        products, old = self._products, self.count
        indices = range(old, old + columns)
        if self._signs:
            W = self._space.probes(Distribution.RADEMACHER, self._seed, indices)
        else:
            W = self._space.directions(self._seed, indices)
        Y = products(W)
        Q, r = self._orthonormal(Y)
        Z = torch.zeros_like(Q)
        new = r[old:].diagonal() > 0
        if new.any():
            Z[new] = products(Q[new])
        total = old + columns
        grown = torch.zeros(total, total, dtype=torch.float64)
        grown[:old, :old] = self.r
        grown[:, old:] = r
        self.r = grown
        self.w = torch.cat((self.w, W))
        self.y = torch.cat((self.y, Y))
        self.q = torch.cat((self.q, Q))
        self.z = torch.cat((self.z, Z))
        self._settle(all_new=bool(new.all()))

    def _settle(self, *, all_new: bool) -> None:
        """Find out whether Q spans the range.

        A product that adds nothing to Q suggests it. Signs may coincide on the few
        coordinates that a map touches, so one normal probe, which does not, decides.

        Args:
            all_new: Whether all products have added something.
        """
        products = self._products
        if int((self.r.diagonal() > 0).sum()) >= products.size:
            self.complete = True
        elif not all_new and products.refusal() is None:
            g = products.space.probes(
                Distribution.NORMAL, self._seed, [_CHECKS + self.count]
            )
            image = products(g)[0]
            length = self._space.norms(image)
            _, left = self._space.orthogonalise(self.q, image)
            self.complete = bool(left <= self._tiny * length)
            self.missed = None if self.complete else image

    def without(self, V: Tensor) -> Tensor:
        """Project onto the complement of Q.

        Args:
            V: [n, P].

        Returns:
            ``(I - QQ')V``: [n, P].
        """
        return self._space.add(V, self._space.cross(self.q, V), self.q, alpha=-1)

    def projected(self) -> Tensor:
        """Return the symmetric part of ``Q'AQ``: [k, k], float64."""
        h = self._space.cross(self.z, self.q).cpu()
        return (h + h.T) / 2

    def exact_trace(self) -> float:
        """Return ``tr(Q'AQ)``."""
        return float(self._space.dots(self.q, self.z).sum())

    def leave_one_out(self) -> Tensor:
        """Find what each probe alone contributes to the sketch.

        The basis without probe i spans ``Q(I - ss')`` with s the i-th column of
        ``R^-T``, normalised (Epperly et al., section 2.1).

        Returns:
            S: [k, k], float64, one s per column.
        """
        # R' = UT; of R's pseudoinverse, row i is orthogonal to all columns of R but i.
        new = self.r.diagonal() > 0
        u, t = torch.linalg.qr(self.r[new].T)
        found = torch.zeros_like(self.r)
        found[new] = torch.linalg.solve_triangular(t, u.T, upper=True)
        # A probe whose product the others span, too, contributes nothing.
        alone = (u**2).sum(dim=1) > 1 - _SPANNED
        lengths = torch.linalg.vector_norm(found, dim=0)
        return torch.where(alone, found / lengths.clamp_min(1e-300), 0.0)

    def exchanged_traces(self) -> list[float]:
        """Compute the k estimates whose mean is XTrace.

        With ``P = Q(I - ss')Q'`` and ``x = (I - ss')Q'w`` for each probe w:
        ``tr(PAP) + w.(I - P)A(I - P)w = tr(H) - s.Hs + w.Aw - 2 x.Z'w + x.Hx``.

        Returns:
            k estimates of the trace.
        """
        h, s = self.projected(), self.leave_one_out()
        qw = self._space.cross(self.w, self.q).cpu()
        zw = self._space.cross(self.w, self.z).cpu()
        x = qw - s * (s * qw).sum(0)
        values = (
            self.exact_trace()
            - (s * (h @ s)).sum(0)
            + self._space.dots(self.w, self.y).cpu()
            - 2 * (x * zw).sum(0)
            + (x * (h @ x)).sum(0)
        )
        found: list[float] = values.tolist()
        return found

    def jackknife_error(self, mean: float) -> float:
        """Estimate XTrace's standard error, from above, by Tukey's jackknife.

        It compares the XTraces of k - 1 probes, whose bases lack the span of two
        columns of S.

        Args:
            mean: XTrace of all probes.

        Returns:
            The standard error; infinite below three probes.
        """
        k = self.count
        if k < 3:
            return float("inf")
        h, s = self.projected(), self.leave_one_out()
        qw = self._space.cross(self.w, self.q).cpu()
        zw = self._space.cross(self.w, self.z).cpu()
        g, shs = s.T @ s, s.T @ h @ s
        sq, sz, shq = s.T @ qw, s.T @ zw, s.T @ h @ qw  # [j, i]: s_j with probe i
        own, hii = sq.diagonal(), shs.diagonal()
        # Coefficients of the part of Q'w_i in the span of s_i and s_j.
        gap = 1 - g**2
        parallel = gap < 1e-8
        gap[parallel] = 1.0
        cj = torch.where(parallel, 0.0, (sq - g * own) / gap)
        ci = torch.where(parallel, own, (own - g * sq) / gap)
        lost = (hii + hii[:, None] - 2 * g * shs) / gap
        lost = torch.where(parallel, hii, lost)
        cross = ci * sz.diagonal() + cj * sz
        inner = ci * shq.diagonal() + cj * shq
        square = ci**2 * hii + 2 * ci * cj * shs + cj**2 * hii[:, None]
        values = (
            self.exact_trace()
            - lost
            + self._space.dots(self.w, self.y).cpu()
            - 2 * ((qw * zw).sum(0) - cross)
            + (qw * (h @ qw)).sum(0)
            - 2 * inner
            + square
        )  # [j, i]: the estimate of probe i without probe j
        values.fill_diagonal_(0)
        means = values.sum(1) / (k - 1)
        spread = float(((means - mean) ** 2).sum())
        return math.sqrt((k - 1) / k * spread)

    def _orthonormal(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Extend Q by the columns of Y.

        Args:
            Y: [n, P].

        Returns:
            New columns [n, P], and the new columns of R: [k + n, n], float64.
        """
        old = self.count
        r = torch.zeros(old + len(Y), len(Y), dtype=torch.float64)
        basis = torch.cat((self.q, torch.zeros_like(Y)))
        for i, y in enumerate(Y):
            known, row = basis[: old + i], basis[old + i].copy_(y)
            length = self._space.norms(row)
            found, left = self._space.orthogonalise(known, row)
            r[: old + i, i] = found.cpu()
            if left > self._tiny * length:
                row /= left.to(row.dtype)
                r[old + i, i] = float(left)
            else:
                row.zero_()
        return basis[old:], r

    @property
    def _tiny(self) -> float:
        """What rounding leaves of a product, relative to it."""
        return 1e3 * torch.finfo(self.q.dtype).eps
