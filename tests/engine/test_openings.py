"""An opening in turns: what is verified and chosen is the same, and steps are short."""

from collections import Counter
from itertools import cycle

import pytest
import torch
from support.reference import columns, problem_of
from support.zoo import ANIMALS
from torch import nn

from curvd.contract.specs import OperatorSpec
from curvd.errors import Cancelled
from curvd_server.engine.building import build
from curvd_server.engine.objective.model import Model
from curvd_server.engine.operators import hessian, jacobian_form
from curvd_server.engine.program import HessianProgram, JacobianProgram
from curvd_server.engine.program import trace as tracing
from curvd_server.engine.tuning.plan import Plan
from curvd_server.engine.verification.verify import HELD
from curvd_server.sessions.operator_cache import _VERIFIED_BYTES
from curvd_server.system.cooperative import LongWork, Threads

ZOO = {animal.name: animal for animal in ANIMALS}
KINDS = ["hessian", "ggn"]
THREADS = Threads()


def long(work, stopped=lambda: False):
    """Work that gives way at each yield point."""
    return LongWork(work, stopped=stopped, gives_way=lambda: True, threads=THREADS)


def opened(problem, kind, mode="program", cancelled=lambda: False):
    spec = OperatorSpec(kind=kind)
    return build(
        problem, spec, budget_bytes=1 << 30, plan=Plan(mode), cancelled=cancelled
    )


def in_turns(work, between=lambda step: None):
    """Run long work to its end; count its steps."""
    steps = 0
    while not work.resume():
        between(steps)
        steps += 1
    return work.result(), steps


@pytest.mark.parametrize(("name", "kind"), [("gelu", "ggn"), ("layernorm", "hessian")])
def test_products_on_the_same_model_change_nothing_of_an_opening(name, kind):
    problem = problem_of(ZOO[name], batch_size=2)
    others = [opened(problem, k, "forward_over_reverse") for k in KINDS]
    V, turn = columns(problem, 1), cycle(others)
    want = opened(problem, kind)
    products = [operator.apply(V) for operator in others]
    problem.model.programs.clear()

    def multiply(step):
        if step % 40 == 0:
            operator = next(turn)
            assert torch.equal(operator.apply(V), products[others.index(operator)])

    work = long(lambda poll: opened(problem, kind, cancelled=poll))
    got, steps = in_turns(work, multiply)
    assert steps > 100
    assert got._choice == want._choice
    assert torch.equal(got.apply(V), want.apply(V))


def test_openings_at_once_do_not_disturb_each_other():
    problems = [problem_of(ZOO[n], batch_size=2) for n in ("gelu", "relu")]
    want = [opened(p, "hessian") for p in problems]
    for problem in problems:
        problem.model.programs.clear()
    untouched = nn.Module.__call__, nn.Module.__getattr__
    works = [
        long(lambda poll, p=p: opened(p, "hessian", cancelled=poll)) for p in problems
    ]
    going = set(works)
    while going:
        going -= {work for work in list(going) if work.resume()}
    assert (nn.Module.__call__, nn.Module.__getattr__) == untouched
    for work, problem, operator in zip(works, problems, want, strict=True):
        V = columns(problem, 1)
        assert work.result()._choice == operator._choice
        assert torch.equal(work.result().apply(V), operator.apply(V))


def test_a_trace_gives_way_between_operations_and_is_the_same():
    problem = problem_of(ZOO["gelu"], batch_size=2)

    def trace(poll=None):
        return tracing.trace(problem, problem.data[0], hessian=True).graph

    got, steps = in_turns(long(trace))
    assert str(got) == str(trace())
    assert steps > len(got.nodes)


def test_a_step_is_one_mini_batch_at_most(monkeypatch):
    problem = problem_of(ZOO["gelu"], batch_size=2)
    seen, busiest = Counter(), Counter()

    def counted(cls, name, what):
        original = getattr(cls, name)

        def method(*args, **kwargs):
            seen[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, name, method)

    counted(Model, "__call__", "models")
    for cls in (HessianProgram, JacobianProgram):
        counted(cls, "product", "products")
    for cls in (hessian._HessianGraph, jacobian_form._JacobianGraph):
        counted(cls, "product", "products")

    def note(step):
        for what, count in seen.items():
            busiest[what] = max(busiest[what], count)
        seen.clear()

    for kind in KINDS:
        spec = OperatorSpec(kind=kind, block_sizes=(1,) * len(problem.parameters))
        in_turns(
            long(
                lambda poll, s=spec: build(problem, s, budget_bytes=0, cancelled=poll)
            ),
            note,
        )
    # The GGN's plainest mode runs the model forwards twice, once in each AD mode.
    assert busiest == {"models": 2, "products": 1}


def test_an_opening_that_nobody_wants_ends_at_its_next_step():
    problem = problem_of(ZOO["gelu"], batch_size=2)
    for after in (1, 30, 300):
        left = iter(range(after))
        work = long(
            lambda poll: opened(problem, "hessian", cancelled=poll),
            stopped=lambda left=left: next(left, None) is None,
        )
        steps = 0
        while not work.resume():
            steps += 1
        assert steps == after + 1
        with pytest.raises(Cancelled, match="gave up"):
            work.result()
        problem.model.programs.clear()
    assert opened(problem, "hessian").report.difference_gap < 1e-4


def test_the_memory_of_a_verification_is_what_is_reserved_for_it():
    assert _VERIFIED_BYTES == 8 * HELD
