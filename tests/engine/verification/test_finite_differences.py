"""Directions that are kept, and points that are copied, are those that are made anew."""

from __future__ import annotations

import pytest
import torch
from support.reference import problem_of
from support.zoo import ANIMALS, Animal

from curvd.contract.specs import OperatorSpec
from curvd_server.engine.verification import finite_differences
from curvd_server.engine.verification.finite_differences import (
    Direction,
    FiniteDifferences,
    scale_of,
)
from curvd_server.engine.verification.verify import Reference

SOME = [a for a in ANIMALS if a.name in ("gelu", "embedding", "groupnorm")]


def directions(animal: Animal) -> list[Direction]:
    problem = problem_of(animal)
    names = problem.layout.names
    scales = tuple(map(scale_of, problem.parameters))
    fixed = ((0, 1), *((names.index(n), row) for n, row in problem.model.fixed))
    return [Direction(seed, scales, fixed) for seed in range(2)]


@pytest.mark.parametrize("animal", SOME, ids=lambda a: a.name)
def test_a_kept_direction_is_the_same_to_the_bit(animal: Animal):
    like = problem_of(animal).parameters
    for anew, kept in zip(directions(animal), directions(animal), strict=True):
        kept.keep(like)
        assert len(kept.entries) == len(like) and not anew.entries
        pairs = zip(kept.tensors(like), anew.tensors(like), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not kept.tensors(like)[0][1].any()  # the fixed row
        assert kept.dot(like) == pytest.approx(anew.dot(like), rel=1e-12)
        kept.tensors(like)[0].zero_()
        assert torch.equal(kept.tensors(like)[0], anew.tensors(like)[0])


def test_a_kept_direction_is_in_float64_whatever_it_is_like():
    anew, kept = (directions(SOME[0])[0] for _ in range(2))
    like = problem_of(SOME[0]).parameters
    kept.keep([p.to(torch.bfloat16) for p in like])
    assert torch.equal(kept.tensors(like)[0], anew.tensors(like)[0])


@pytest.mark.parametrize("animal", SOME, ids=lambda a: a.name)
def test_differences_move_to_the_same_points(
    animal: Animal, monkeypatch: pytest.MonkeyPatch
):
    problem, spec = problem_of(animal), OperatorSpec()

    def found() -> tuple[list[torch.Tensor], tuple[float, float]]:
        reference = Reference(problem, spec)
        differences = reference._differences()
        assert bool(differences._centre) is bool(finite_differences.KEPT_ELEMENTS)
        rows = [
            row.clone()
            for step in (1e-6, 1e-4)
            for row in FiniteDifferences.of_gradient(differences, step)
        ]
        return rows, differences.slopes(1e-5)

    quick, slopes = found()
    monkeypatch.setattr(finite_differences, "KEPT_ELEMENTS", 0)
    slow, others = found()
    assert all(torch.equal(a, b) for a, b in zip(quick, slow, strict=True))
    assert slopes == pytest.approx(others, rel=1e-12)
