"""Directions without memory, and projections on them, against their dense selves."""

from __future__ import annotations

import pytest
import torch

from curvd_server.engine.verification import patterns
from curvd_server.engine.verification.patterns import (
    PROJECTIONS,
    Pattern,
    Projections,
    power_of_two,
)

SIZES = [1, 5, patterns.WIDTH, patterns.WIDTH + 7, 5 * patterns.WIDTH + 3]


@pytest.mark.parametrize("count", SIZES)
def test_what_is_added_is_what_is_multiplied(count: int):
    pattern = Pattern(2, (0.25, 4.0))
    row = torch.randn(count, dtype=torch.float64)
    dense = pattern.add(1, torch.zeros(count, dtype=torch.float64))
    assert pattern.dot(1, row) == pytest.approx(float(dense @ row), rel=1e-12)
    moved = pattern.add(1, row.clone(), 0.5)
    torch.testing.assert_close(moved, row + 0.5 * dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_the_same_numbers_in_each_type(dtype):
    pattern = Pattern(2, (0.25,))
    wide = pattern.add(0, torch.zeros(3, 7000, dtype=torch.float64))
    narrow = pattern.add(0, torch.zeros(3, 7000, dtype=dtype))
    assert torch.equal(narrow.double(), wide)


def test_fixed_rows_stay():
    pattern = Pattern(2, (1.0, 1.0), ((1, 2),))
    row = torch.randn(4, 3, dtype=torch.float64)
    moved = pattern.add(1, row.clone())
    assert torch.equal(moved[2], row[2])
    assert not torch.equal(moved[1], row[1])
    dense = pattern.add(1, torch.zeros_like(row))
    assert pattern.dot(1, row) == pytest.approx(float((dense * row).sum()))


@pytest.mark.parametrize("count", SIZES)
def test_projections_are_products_with_patterns(count: int):
    row = torch.randn(count, dtype=torch.float64)
    got = Projections(5).of(3, row.reshape(1, -1))
    want = [Pattern(5 + k, (1.0,) * 4).dot(3, row) for k in range(PROJECTIONS)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_norms_are_estimated():
    """Of dense rows, of single entries, and of entries that would cancel."""
    size = 3 * patterns.WIDTH
    rows = torch.zeros(4, size, dtype=torch.float64)
    rows[0] = torch.randn(size, dtype=torch.float64)
    rows[1, 17] = 1.0
    rows[2, 17], rows[2, 18] = 1.0, -1.0
    rows[3, 17], rows[3, 17 + patterns.WIDTH] = 1.0, -1.0
    for row in rows:
        squares = torch.stack([
            Projections(100 + k).of(k, row).square().mean() for k in range(50)
        ])
        ratios = squares / (1.75 * row.square().sum())
        assert 0.7 < float(ratios.mean()) < 1.4
        assert float(ratios.min()) > 1e-4


def test_directions_are_independent():
    dense = torch.stack([
        Pattern(k, (1.0,)).add(0, torch.zeros(20000, dtype=torch.float64))
        for k in range(4)
    ])
    cosines = torch.corrcoef(dense)[*torch.triu_indices(4, 4, 1)]
    assert cosines.abs().max() < 0.05


def test_a_scale_is_a_power_of_two():
    assert power_of_two(torch.full((3,), 0.26)) == 0.25
    assert power_of_two(torch.zeros(3)) == 2.0**-7
    assert power_of_two(torch.zeros(0)) == 0.0
