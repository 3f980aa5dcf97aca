"""Whoever asks for the same gets the same bits, whoever else asks."""

from __future__ import annotations

import pytest
import torch
from support.reference import columns, problem_of
from support.zoo import ANIMALS

from curvd.contract.specs import OperatorSpec
from curvd_server.engine import batch_product
from curvd_server.engine import operator as engines
from curvd_server.engine.building import build
from curvd_server.engine.operators.linearize import MODES
from curvd_server.engine.tuning.bit_invariance import is_alike, steps
from curvd_server.engine.tuning.plan import Plan

GELU = next(a for a in ANIMALS if a.name == "gelu")
REQUESTS = (1, 3, 1, 4, 1, 1)


def make(mode: str, *, budget: int = 2**30):
    return build(
        problem_of(GELU, batch_size=2),
        OperatorSpec(),
        budget_bytes=budget,
        plan=Plan(mode, 3),
        tuning_s=0.0,
    )


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_request_has_the_same_bits_alone_and_beside_others(mode: str, budget: int):
    operator = make(mode, budget=budget)
    V = columns(operator.problem, sum(REQUESTS))
    together = operator.apply(V, counts=REQUESTS)
    alone = [operator.apply(part) for part in torch.split(V, REQUESTS)]
    assert torch.equal(together, torch.cat(alone))


def test_requests_share_what_is_linearised_for_them():
    operator = make("double_backward", budget=0)
    operator.mixes = False
    before = operator.counters.linearisations
    operator.apply(columns(operator.problem, sum(REQUESTS)), counts=REQUESTS)
    assert operator.counters.linearisations - before == operator.problem.batches


def test_columns_are_mixed_only_where_company_changes_nothing(monkeypatch):
    seen = []

    class Watched(batch_product.BatchProduct):
        def _rows(self, linear, V):
            seen.append(len(V))
            return super()._rows(linear, V)

    monkeypatch.setattr(engines, "BatchProduct", Watched)
    for alike, sizes in ((True, [3, 3]), (False, [1, 1, 3, 1])):
        monkeypatch.setattr(engines, "is_alike", lambda product, V, a=alike: a)
        operator = make("program")
        seen.clear()
        operator.apply(columns(operator.problem, 6), counts=(1, 1, 4))
        assert sorted(seen) == sorted(sizes * operator.problem.batches)


def test_a_new_version_mixes_as_the_old_one_does(monkeypatch):
    monkeypatch.setattr(engines, "is_alike", lambda product, V: True)
    old = make("program")
    assert old.mixes and old.at(old.problem).mixes


@pytest.mark.parametrize(
    "depends_on",
    [
        lambda V: float(len(V) > 1),
        lambda V: float(len(V) == 8),
        lambda V: V[0, 0],
        lambda V: torch.arange(float(len(V)))[:, None],
    ],
    ids=["alone", "width", "neighbours", "place"],
)
def test_what_depends_on_company_is_found(depends_on):
    V = torch.randn(8, 5)
    assert is_alike(lambda columns: 2 * columns, V)
    assert not is_alike(lambda columns: 2 * columns + depends_on(columns), V)


def test_requests_are_cut_as_if_they_were_alone():
    assert list(steps((7, 1, 5), width=3, most=6)) == [[3, 3], [1, 1, 3], [2]]
    assert list(steps((2, 2), width=1, most=1)) == [[1]] * 4
    assert list(steps((0,), width=3, most=3)) == []
