"""An operator on some of the parameters is the principal submatrix of their rows."""

import numpy as np
import pytest
import torch
from support.reference import error, problem_of
from support.zoo import ANIMALS

from curvd.contract.specs import OperatorSpec
from curvd.errors import InvalidSpec, InvalidVector
from curvd_server.engine.building import build
from curvd_server.engine.operators.linearize import MODES
from curvd_server.engine.tuning.plan import Plan

HUGE = 2**30
ZOO = {a.name: a for a in ANIMALS}
CHOSEN = ("3.bias", "1.weight")


def rows_of(layout, names):
    """Indices in a vector of all parameters, in the order of `names`."""
    places = {p.name: np.arange(p.offset, p.offset + p.size) for p in layout.parameters}
    return np.concatenate([places[name] for name in names])


def matrix(problem, spec, mode):
    operator = build(problem, spec, budget_bytes=HUGE, plan=Plan(mode))
    size = problem.restricted(spec).layout.size
    assert operator.plan.mode == mode
    return operator.apply(torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("animal", ["gelu", "attention", "padding", "tied"])
def test_it_is_the_submatrix(animal, kind, mode):
    problem = problem_of(ZOO[animal])
    names = problem.layout.names
    chosen = (names[-1], names[0])
    rows = rows_of(problem.layout, chosen)
    whole = matrix(problem, OperatorSpec(kind=kind), mode)
    part = matrix(problem, OperatorSpec(kind=kind, parameters=chosen), mode)
    assert error(part, whole[rows][:, rows]) < 1e-9


def test_blocks_count_the_chosen_parameters():
    problem = problem_of(ZOO["gelu"])
    names = problem.layout.names[:3]
    spec = OperatorSpec(parameters=names, block_sizes=(1, 2))
    with pytest.raises(InvalidSpec, match="sum to 2, but the operator acts on 3"):
        build(problem, OperatorSpec(parameters=names, block_sizes=(2,)), budget_bytes=1)
    first = problem.layout.parameters[0].size
    part = matrix(problem, OperatorSpec(parameters=names), "program")
    part[:first, first:] = part[first:, :first] = 0.0
    assert error(matrix(problem, spec, "program"), part) < 1e-9


def test_a_new_version_moves_the_fixed_ones_too():
    problem = problem_of(ZOO["gelu"])
    spec = OperatorSpec(parameters=problem.layout.names[:1])
    operator = build(problem, spec, budget_bytes=HUGE)
    other = problem.layout.names[-2]
    value = problem.parameters[-2] * 2.0
    moved = problem.with_parameters({other: value})
    eye = torch.eye(problem.layout.parameters[0].size, dtype=torch.float64)
    fresh = build(moved, spec, budget_bytes=HUGE, plan=operator.plan)
    before, after = operator.apply(eye), operator.at(moved).apply(eye)
    assert torch.equal(after, fresh.apply(eye))
    assert error(after, before) > 0.1


def test_only_the_chosen_ones_travel(tanh_session):
    whole = tanh_session.hessian() @ np.eye(tanh_session.layout.size)
    H = tanh_session.hessian(params=["3.b*", "1.weight"])
    rows = rows_of(tanh_session.layout, CHOSEN)
    assert H.layout.names == CHOSEN
    assert H.shape == (len(rows), len(rows))
    dense = H @ np.eye(len(rows))
    np.testing.assert_allclose(dense, whole[np.ix_(rows, rows)], atol=1e-12)
    found = H.eigsh(k=1)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(dense)[-1:], rtol=1e-6)
    assert found.vectors.shape == (len(rows), 1)
    with pytest.raises(InvalidVector):
        H @ np.ones(tanh_session.layout.size)


def test_unknown_names_are_refused_before_anything_is_sent(tanh_session):
    with pytest.raises(InvalidSpec, match="no parameter 'head'; it has 4, from"):
        tanh_session.operator(OperatorSpec(parameters=("head",)))
    with pytest.raises(InvalidSpec, match=r"near it are '1\.weight'"):
        tanh_session.ggn(params="1.weihgt")
    with pytest.raises(InvalidSpec, match="params names nothing; None stands for all"):
        tanh_session.hessian(params=[])
    for names in ((), ("1.bias", "1.bias")):
        with pytest.raises(InvalidSpec, match="each once and at least one"):
            OperatorSpec(parameters=names)
