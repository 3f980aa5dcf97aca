"""A growing sketch of a symmetric map, shared by Hutch++, XTrace and XDiag."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvd.choices import Distribution
from curvd_server.queries.base import Products
from curvd_server.queries.probes import probes
from curvd_server.queries.vectors import dots


class Sketch:
    """Probes W, Y = AW = QR, Z = AQ, grown by columns; Q orthonormal.

    Growing costs what the new columns cost: the QR decomposition is extended by block
    Gram-Schmidt, so that adaptive stopping wastes no product.

    Args:
        products: The map A.
        seed: Of the probes.
    """

    def __init__(self, products: Products, seed: int) -> None:
        self._products, self._seed = products, seed
        self.w, self.y, self.q, self.z = (products.empty(0) for _ in range(4))
        """[k, P] each, columns first."""
        self.r = torch.empty(0, 0, dtype=torch.float64)
        """[k, k], upper triangular."""

    @property
    def count(self) -> int:
        """Number of probes, k."""
        return len(self.w)

    @property
    def complete(self) -> bool:
        """Whether Q spans everything, so that ``tr(Q'AQ)`` is the trace."""
        return self.count >= self._products.size

    def grow(self, columns: int) -> None:
        """Add probes, at two products each.

        Args:
            columns: How many; cut to what is left of the space.
        """
        products, old = self._products, self.count
        columns = min(columns, products.size - old)
        indices = range(old, old + columns)
        W = probes(
            Distribution.RADEMACHER,
            self._seed,
            indices,
            products.size,
            dtype=products.dtype,
            device=products.device,
        )
        Y = products(W)
        Q, r = self._orthonormal(Y)
        Z = products(Q)
        total = old + columns
        grown = torch.zeros(total, total, dtype=torch.float64)
        grown[:old, :old] = self.r
        grown[:, old:] = r
        self.r = grown
        self.w = torch.cat((self.w, W))
        self.y = torch.cat((self.y, Y))
        self.q = torch.cat((self.q, Q))
        self.z = torch.cat((self.z, Z))

    def without(self, V: Tensor) -> Tensor:
        """Project onto the complement of Q.

        Args:
            V: [n, P].

        Returns:
            ``(I - QQ')V``: [n, P].
        """
        return V - (V @ self.q.T) @ self.q

    def projected(self) -> Tensor:
        """Return the symmetric part of ``Q'AQ``: [k, k], float64."""
        h = (self.q @ self.z.T).double().cpu()
        return (h + h.T) / 2

    def exact_trace(self) -> float:
        """Return ``tr(Q'AQ)``."""
        return float(dots(self.q, self.z).sum())

    def leave_one_out(self) -> Tensor:
        """Find what each probe alone contributes to the sketch.

        The basis without probe i spans ``Q(I - ss')`` with s the i-th column of
        ``R^-T``, normalised (Epperly et al., section 2.1).

        Returns:
            S: [k, k], float64, one s per column.
        """
        r = self.r.clone()
        diagonal = r.diagonal()
        # A probe that adds nothing has a zero here; any tiny number will do.
        tiny = torch.finfo(torch.float64).eps * diagonal.abs().max().clamp_min(1e-300)
        diagonal[diagonal.abs() < tiny] = tiny
        identity = torch.eye(len(r), dtype=torch.float64)
        s: Tensor = torch.linalg.solve_triangular(r.T, identity, upper=False)
        lengths: Tensor = torch.linalg.vector_norm(s, dim=0)
        return s / lengths

    def exchanged_traces(self) -> list[float]:
        """Compute the k estimates whose mean is XTrace.

        With ``P = Q(I - ss')Q'`` and ``x = (I - ss')Q'w`` for each probe w:
        ``tr(PAP) + w.(I - P)A(I - P)w = tr(H) - s.Hs + w.Aw - 2 x.Z'w + x.Hx``.

        Returns:
            k estimates of the trace.
        """
        h, s = self.projected(), self.leave_one_out()
        qw = (self.q @ self.w.T).double().cpu()
        zw = (self.z @ self.w.T).double().cpu()
        x = qw - s * (s * qw).sum(0)
        values = (
            self.exact_trace()
            - (s * (h @ s)).sum(0)
            + dots(self.w, self.y).cpu()
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
        qw = (self.q @ self.w.T).double().cpu()
        zw = (self.z @ self.w.T).double().cpu()
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
            + dots(self.w, self.y).cpu()
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
        old, new = self.count, len(Y)
        r = torch.zeros(old + new, new, dtype=torch.float64)
        rest = Y
        for _ in range(2):  # twice, because once is not orthogonal to rounding
            part = rest @ self.q.T
            rest = rest - part @ self.q
            r[:old] += part.T.double().cpu()
        basis, corner = torch.linalg.qr(rest.T)
        # A rank-deficient block has arbitrary columns here; keep them out of Q's span.
        columns = basis.T - (basis.T @ self.q.T) @ self.q
        columns = torch.linalg.qr(columns.T)[0].T.contiguous()
        signs = torch.sign(dots(columns, basis.T.contiguous()).cpu())
        signs[signs == 0] = 1.0
        r[old:] = signs[:, None] * corner.double().cpu()
        return columns, r
