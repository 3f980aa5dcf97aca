"""Threads are part of a plan: measured, remembered, and used by every product."""

import pytest
import torch
from support.reference import columns, problem_of
from support.zoo import ANIMALS

from curvd.contract.enums import Tier
from curvd.contract.specs import OperatorSpec
from curvd_server.engine import threads
from curvd_server.engine.batch_product import BatchProduct
from curvd_server.engine.building import build
from curvd_server.engine.tuning import thread_count
from curvd_server.engine.tuning.autotune import Plan

GELU = next(a for a in ANIMALS if a.name == "gelu")
PLAN = Plan("double_backward")


@pytest.fixture
def four(monkeypatch):
    """A process that would compute with four threads; nothing computes with them."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "most_threads", lambda: 4)
    monkeypatch.setattr(thread_count, "most_threads", lambda: 4)
    yield
    torch.set_num_threads(before)


def measured(monkeypatch, alone_s, all_s):
    """What is chosen if one thread and all take so long."""
    times = {1: alone_s, 0: all_s}
    monkeypatch.setattr(thread_count, "_seconds", lambda product, count: times[count])
    return thread_count.measured_threads(problem_of(GELU), OperatorSpec(), PLAN)


@pytest.mark.parametrize(
    ("alone_s", "all_s", "threads"),
    [
        (1e-3, 1e-4, 1),  # too short for others to help
        (0.1, 0.03, 0),
        (0.1, 0.09, 1),  # hardly faster
        (0.1, 2.0, 1),  # a busy machine
    ],
)
def test_all_threads_are_used_where_they_really_help(
    four, monkeypatch, alone_s, all_s, threads
):
    assert measured(monkeypatch, alone_s, all_s) == threads


def test_nothing_is_measured_where_there_is_one_thread(monkeypatch):
    monkeypatch.setattr(thread_count, "most_threads", lambda: 1)
    monkeypatch.setattr(thread_count, "_seconds", None)
    assert thread_count.measured_threads(problem_of(GELU), OperatorSpec(), PLAN) == 0


@pytest.mark.parametrize("tier", Tier)
def test_products_are_computed_by_the_threads_of_their_plan(four, monkeypatch, tier):
    seen = set()
    add = BatchProduct.add

    def noted(self, *args):
        seen.add(torch.get_num_threads())
        return add(self, *args)

    monkeypatch.setattr(BatchProduct, "add", noted)
    operator = build(
        problem_of(GELU), OperatorSpec(), budget_bytes=2**30, tier=tier, tuning_s=0.0
    )
    assert operator.plan.threads == 1
    torch.set_num_threads(2)
    operator.apply(columns(operator.problem, 2))
    assert seen == {1}
    assert torch.get_num_threads() == 2


def test_a_remembered_plan_keeps_its_threads(four, monkeypatch):
    plans = {}
    first = build(
        problem_of(GELU), OperatorSpec(), budget_bytes=2**30, memory=plans, tuning_s=0.0
    )
    monkeypatch.setattr(thread_count, "_seconds", None)
    again = build(problem_of(GELU), OperatorSpec(), budget_bytes=2**30, memory=plans)
    assert again.plan == first.plan
    assert again.plan.threads == 1
