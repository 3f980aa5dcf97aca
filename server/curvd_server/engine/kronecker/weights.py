"""Which sites are uses of one weight, and may make one block of Kronecker factors.

Beside the proof (`reading`), which asks whether the gradients of sites are right: here it is
asked which elements they have, and nothing is differentiated. Sites of the same elements belong
to one weight, also where one has its transpose; whatever shares elements in any other way is in
no Kronecker product, nor is what stands beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvd_server.engine.kronecker.movements import distinct
from curvd_server.engine.kronecker.sites import Site, Sites
from curvd_server.engine.objective import Problem

LARGEST_DENSE = 1024
"""Parameters that are larger, and in no Kronecker product, have a diagonal."""


@dataclass(slots=True)
class Findings:
    """Why parameters are in no Kronecker product, by their index."""

    reasons: dict[int, str] = field(default_factory=dict)

    def note(self, parameters: Sequence[int], reason: str) -> None:
        """Give the first reason."""
        for index in parameters:
            self.reasons.setdefault(index, reason)


def parameters_of(problem: Problem, index: Tensor) -> list[int]:
    """Tell to which parameters elements belong."""
    offsets = torch.tensor([p.offset for p in problem.layout.parameters])
    found = torch.searchsorted(offsets, index.flatten(), right=True) - 1
    return [int(i) for i in distinct(found)]


@dataclass(frozen=True, slots=True)
class Group:
    """Sites of one weight."""

    sites: tuple[int, ...]
    turned: tuple[bool, ...] = ()
    """Where there are several layouts: which sites have the transpose of the first."""


def _joined(sites: Sites, groups: Iterable[Sequence[int]]) -> list[Group]:
    """Join groups that have the same elements in several layouts, if these are transposes.

    Small weights are left alone: they have their exact block.
    """
    found: list[Group] = []
    for group in groups:
        site = sites.linear[group[0]]
        for place, other in enumerate(found):
            first = sites.linear[other.sites[0]]
            turned = _is_turned(first, site)
            if turned is not None:
                before = other.turned or (False,) * len(other.sites)
                found[place] = Group(
                    (*other.sites, *group), (*before, *(turned for _ in group))
                )
                break
        else:
            found.append(Group(tuple(group)))
    return found


def _is_turned(first: Site, other: Site) -> bool | None:
    """Tell whether one has the other's weight as it is, or transposed; None: neither."""
    if first.bias is not None or other.bias is not None:
        return None
    mine, theirs = first.weight, other.weight
    if len(mine) != 1 or len(theirs) != 1 or mine.numel() <= LARGEST_DENSE:
        return None
    for turned in (False, True):
        same = theirs.mT if turned else theirs
        if mine.shape == same.shape and bool((mine == same).all()):
            return turned
    return None


def grouped(small: Problem, sites: Sites, findings: Findings) -> list[Group]:
    """Join sites of one weight, and drop what shares a parameter with what is dropped."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for k, site in enumerate(sites.linear):
        index = site.index.contiguous()
        digest = hashlib.sha256(index.numpy().tobytes()).digest()
        key = (digest, tuple(index.shape), site.form.one_hot, site.bias is None)
        groups.setdefault(key, []).append(k)
    kept = _joined(sites, groups.values())
    taken = torch.zeros(small.layout.size, dtype=torch.int64)
    for group in kept:
        taken[distinct(sites.linear[group.sites[0]].index)] += 1
    for group in kept:
        index = sites.linear[group.sites[0]].index
        used = distinct(index)
        shared, repeats = used[taken[used] > 1], len(used) < index.numel()
        if len(shared) or repeats:
            findings.note(
                parameters_of(small, shared if len(shared) else index),
                "its elements are used in more than one layout",
            )
    while True:  # a turn drops a group, or is the last
        dropped = [
            group
            for group in kept
            if any(
                i in findings.reasons
                for i in parameters_of(small, sites.linear[group.sites[0]].index)
            )
        ]
        if not dropped:
            return kept
        kept = [group for group in kept if group not in dropped]
        for group in dropped:
            beside = parameters_of(small, sites.linear[group.sites[0]].index)
            findings.note(beside, "beside one that has no Kronecker product")
