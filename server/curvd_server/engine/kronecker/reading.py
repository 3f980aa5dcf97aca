"""Which blocks an operator has, read off the traced model and proved by plain autograd.

On a few data points, in float64, the gradient of each data point is put together from the
inputs and gradients of the sites and compared with what autograd says of it. The same
points tell which rows of a site belong to which data point: a gradient of one data point's
outputs must reach no others. What fails either way, or is consumed by something that is not
linear, has its moments of rows (`rows`), and its block says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import FactorBlock, FactorBlockKind, Mode
from curvd.errors import CurvatureUnverified, InvalidSpec
from curvd_server.engine.finite import check_finite
from curvd_server.engine.kronecker import weights
from curvd_server.engine.kronecker.rows import Rows, pulled
from curvd_server.engine.kronecker.sites import Site, Sites
from curvd_server.engine.kronecker.taps import sites_of, tap
from curvd_server.engine.kronecker.weights import (
    Findings,
    Group,
    grouped,
    parameters_of,
)
from curvd_server.engine.objective import Batch, Problem, tangents_of
from curvd_server.system import is_out_of_memory, yield_point

LARGEST_SIDE = 8192
"""Sides of Kronecker products that are larger have the diagonal of their factor."""
LARGEST_WHOLE = 2048
"""Sides of a tied weight that are larger have the diagonal: both factors are made of every
data point's whole gradient, so that a side of a vocabulary costs more than the model."""
TOLERANCE = 1e-6
"""Largest relative error of a data point's gradient, in float64; wrong ones are off by
1e-2 and more."""
_POINTS = 3


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the diagonal, and what it is made of."""

    said: FactorBlock
    index: Tensor
    """[G, d_in, d_out] Indices into the vector of length P; of other kinds than Kronecker
    products [1, 1, n]."""
    sites: tuple[int, ...] = ()
    """Positions among the sites of the model that it is a sum over."""
    turned: tuple[bool, ...] = ()
    """Of a weight that is used in several layouts: whether each site has it transposed."""

    @property
    def nbytes_each(self) -> tuple[int, int]:
        """Count elements that are kept of numbers, and of indices."""
        groups, inputs, outputs = self.index.shape
        bases = 0
        if self.said.kind is FactorBlockKind.KRONECKER:
            bases += 0 if self.said.diagonal_inputs else inputs**2
            bases += 0 if self.said.diagonal_outputs else outputs**2
        elif self.said.kind is FactorBlockKind.DENSE:
            bases += outputs**2
        return groups * (bases + inputs * outputs), self.index.numel()


@dataclass(frozen=True, slots=True)
class Reading:
    """The blocks of an operator, in the order of their parameters."""

    blocks: tuple[Block, ...]
    count: int
    """Sites of the model, used or not."""
    trailing: frozenset[int]
    """Sites whose rows have the data points as their last axis, not their first."""
    rest: tuple[int, ...]
    """Indices of the parameters that have moments of rows."""
    vectorised: bool
    """Whether torch vectorises rows rightly."""
    gap: float
    """Largest relative error of a data point's gradient."""

    def sites(self, problem: Problem, batch: Batch) -> Sites:
        """Find the same sites for the shapes of a mini-batch.

        Args:
            problem: The objective.
            batch: The mini-batch.

        Raises:
            CurvatureUnverified: If the model does something else for these shapes.
        """
        sites = sites_of(problem, batch)
        if len(sites.linear) != self.count:
            msg = (
                f"the model applies its weights {len(sites.linear)} times to a mini-batch "
                f"of {len(batch.targets)} data points and {self.count} times to "
                f"{_POINTS}: what it does must not depend on the batch size"
            )
            raise CurvatureUnverified(msg)
        return sites


def read(problem: Problem, *, reduce: bool) -> Reading:
    """Find the blocks, and prove them.

    Args:
        problem: The objective.
        reduce: Whether inputs are averaged over positions, so that those of an embedding
            have a factor that is no diagonal.

    Returns:
        The blocks.

    Raises:
        InvalidSpec: If a data point's loss depends on others.
        CurvatureUnverified: If the traced model is not the model.
        NotFinite: If a gradient is NaN or infinite.
    """
    if problem.mode is Mode.BATCH_STATISTICS:
        msg = (
            "mode is batch_statistics: the loss of a data point depends on the others of "
            "its mini-batch, so it has no gradient of its own, which Kronecker factors are "
            "made of; make a session with mode='eval'"
        )
        raise InvalidSpec(msg, mode=problem.mode)
    small = _moved(problem.excerpt(_POINTS))
    batch = small.data[0]
    sites = sites_of(small, batch)
    findings = Findings()
    for name, index in sites.other:
        findings.note(parameters_of(small, index), f"consumed by {name}")
    cotangent, truth = _truth(small, batch)
    check_finite(problem, batch, "the gradient of a data point", [truth])
    trailing, ours = _from_sites(small, batch, sites, cotangent, findings)
    gaps = _gaps(small, ours, truth)
    own = {i for site in sites.linear for i in parameters_of(small, site.index)}
    for i in own:
        if not gaps[i] <= TOLERANCE:
            findings.note([i], "its gradient is not that of its products")
    groups = grouped(small, sites, findings)
    rest = tuple(i for i in range(len(gaps)) if i in findings.reasons)
    vectorised, gap = _prove_rows(small, batch, rest, cotangent, truth)
    good = [gaps[i] for i in own if i not in findings.reasons]
    blocks = [
        _whole(small, sites, group)
        if group.turned
        else _kronecker(small, sites, group.sites, reduce=reduce)
        for group in groups
    ]
    blocks += [_of_rows(small, i, findings.reasons[i]) for i in rest]
    zero = [i for i in range(len(gaps)) if i not in own and i not in findings.reasons]
    blocks += [_zero(small, i) for i in zero]
    blocks = [block for block in blocks if block.index.numel()]  # some hold nothing
    blocks.sort(key=lambda block: int(block.index.min()))
    return Reading(
        blocks=tuple(blocks),
        count=len(sites.linear),
        trailing=trailing,
        rest=rest,
        vectorised=vectorised,
        gap=max([gap, *good]),
    )


def _moved(small: Problem) -> Problem:
    """Move parameters a little, so that none hides what comes before it."""
    generator = torch.Generator().manual_seed(5)
    for p in small.parameters:
        width = 0.1 * (float(p.std()) if p.numel() > 1 else 1.0) + 1e-3
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=width)
    return small


def _truth(small: Problem, batch: Batch) -> tuple[Tensor, Tensor]:
    """Differentiate every data point's outputs along a random gradient: [n, P]."""
    generator = torch.Generator().manual_seed(6)
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in small.parameters]
        z = small.outputs(leaves, batch)
    cotangent = torch.randn(z.shape, generator=generator, dtype=z.dtype)
    return cotangent, torch.stack([
        pulled(z, leaves, c) for c in _one_by_one(cotangent)
    ])


def _one_by_one(cotangent: Tensor) -> Iterator[Tensor]:
    """Keep one data point's gradient at a time."""
    for n in range(len(cotangent)):
        yield_point()
        one = torch.zeros_like(cotangent)
        one[n] = cotangent[n]
        yield one


def _from_sites(
    small: Problem,
    batch: Batch,
    sites: Sites,
    cotangent: Tensor,
    findings: Findings,
) -> tuple[frozenset[int], Tensor]:
    """Put the gradients of data points together from those of sites: [n, P]."""
    points = len(cotangent)
    ours = torch.zeros(points, small.layout.size, dtype=torch.float64)
    taps = tap(small, batch, sites)
    pulled_back = [taps.gradients(c) for c in _one_by_one(cotangent)]
    trailing = set[int]()
    for k, site in enumerate(sites.linear):
        a = site.form.inputs(taps.operands[k])
        gs = [site.form.gradients(g[k]) for g in pulled_back]
        order = _order(gs, points)
        if order is None or a.shape[-1 if site.form.one_hot else 1] != gs[0].shape[1]:
            what = "its rows belong to several data points"
            findings.note(parameters_of(small, site.index), what)
            continue
        if order:
            trailing.add(k)
        for n, g in enumerate(gs):
            ours[n].index_add_(0, site.index.flatten(), gradient_of(site, a, g))
    return frozenset(trailing), ours


def gradient_of(site: Site, a: Tensor, g: Tensor) -> Tensor:
    """Sum ``a g^T`` over all rows: the gradient of weight and bias, in one vector.

    Args:
        site: The site.
        a: [G, R, d_in] Rows of inputs, or [R] indices.
        g: [G, R, d_out] Rows of gradients.
    """
    if site.form.one_hot:
        used = a >= 0
        weight = torch.zeros(site.weight.shape, dtype=g.dtype)
        weight[0].index_add_(0, a[used], g[0, used])
    else:
        weight = a.mT @ g
    if site.bias is not None:
        weight = torch.cat((weight, g.sum(1, keepdim=True)), 1)
    return weight.flatten()


def _order(gradients: Sequence[Tensor], points: int) -> bool | None:
    """Find where the data points are among the rows.

    Args:
        gradients: [G, R, d] For the gradient of each data point alone.
        points: How many there are.

    Returns:
        False: they come first; True: last; None: neither.
    """
    rows = gradients[0].shape[1]
    if rows % points:
        return None
    norms = torch.stack([g.norm(dim=(0, 2)) for g in gradients])
    for trailing in (False, True):
        shape = (rows // points, points) if trailing else (points, rows // points)
        by_point = norms.reshape(points, *shape).sum(1 if trailing else 2)
        if not (by_point - by_point.diag().diag()).any():
            return trailing
    return None


def _gaps(small: Problem, ours: Tensor, truth: Tensor) -> list[float]:
    """Give the largest relative error of a data point's gradient, by parameter."""
    least = 1e-9 * float(truth.norm()) + 1e-300
    pairs = zip(
        tangents_of(ours, small.layout), tangents_of(truth, small.layout), strict=True
    )
    return [float((a - b).norm() / (b.norm() + least)) for a, b in pairs]


def _prove_rows(
    small: Problem,
    batch: Batch,
    rest: Sequence[int],
    cotangent: Tensor,
    truth: Tensor,
) -> tuple[bool, float]:
    """Find out whether rows may be vectorised, and how wrong they are."""
    if not rest:
        return True, 0.0
    known = tangents_of(truth, small.layout)
    want = torch.cat([known[i].reshape(len(truth), -1) for i in rest], 1)
    for vectorised in (True, False):
        try:
            found = Rows(small, rest, vectorised=vectorised)(batch, cotangent)
        except Exception as error:
            if is_out_of_memory(error) or not vectorised:
                raise
            continue  # not every operator can be vectorised
        gap = float((found - want).norm() / (want.norm() + 1e-300))
        if gap <= TOLERANCE:
            return vectorised, gap
    names = [small.layout.names[i] for i in rest]
    msg = (
        f"the gradients of single data points differ from that of all of them by {gap:.1e} "
        f"in {', '.join(names[:3])}: a data point's outputs depend on others of its "
        "mini-batch"
    )
    raise CurvatureUnverified(msg, parameters=", ".join(names))


def _kronecker(
    small: Problem, sites: Sites, group: tuple[int, ...], *, reduce: bool
) -> Block:
    site = sites.linear[group[0]]
    groups, inputs, outputs = site.index.shape
    said = FactorBlock(
        parameters=tuple(
            small.layout.names[i] for i in parameters_of(small, site.index)
        ),
        kind=FactorBlockKind.KRONECKER,
        groups=groups,
        inputs=inputs,
        outputs=outputs,
        diagonal_inputs=inputs > LARGEST_SIDE or (site.form.one_hot and not reduce),
        diagonal_outputs=outputs > LARGEST_SIDE,
    )
    return Block(said, site.index, group)


def _whole(small: Problem, sites: Sites, group: Group) -> Block:
    site = sites.linear[group.sites[0]]
    _, inputs, outputs = site.index.shape
    said = FactorBlock(
        parameters=tuple(
            small.layout.names[i] for i in parameters_of(small, site.index)
        ),
        kind=FactorBlockKind.KRONECKER,
        inputs=inputs,
        outputs=outputs,
        diagonal_inputs=inputs > LARGEST_WHOLE,
        diagonal_outputs=outputs > LARGEST_WHOLE,
        whole_gradients=True,
    )
    return Block(said, site.index, group.sites, group.turned)


def _of_rows(small: Problem, parameter: int, reason: str) -> Block:
    size = small.layout.parameters[parameter].size
    dense = size <= weights.LARGEST_DENSE
    kind = FactorBlockKind.DENSE if dense else FactorBlockKind.DIAGONAL
    return _own_block(small, parameter, kind, reason)


def _zero(small: Problem, parameter: int) -> Block:
    return _own_block(small, parameter, FactorBlockKind.ZERO, "it is not used")


def _own_block(
    small: Problem, parameter: int, kind: FactorBlockKind, reason: str
) -> Block:
    own = small.layout.parameters[parameter]
    said = FactorBlock(
        parameters=(own.name,), kind=kind, reason=reason, outputs=own.size
    )
    index = torch.arange(own.offset, own.offset + own.size)
    return Block(said, index.reshape(1, 1, -1))
