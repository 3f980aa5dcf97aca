"""Choosing the parameters that operators act on."""

from __future__ import annotations

import pytest
import torch
from support.reference import central_difference, columns, dense_ggn, error, problem_of
from support.zoo import ANIMALS, REFUSED
from torch import nn

from curvd.contract.enums import Dtype
from curvd.contract.selection import check_patterns, select
from curvd.contract.specs import DatasetSpec, LossSpec, OperatorSpec
from curvd.errors import InvalidSpec, LimitExceeded
from curvd_server.engine.building import build
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.operators.linearize import MODES, cached_bytes
from curvd_server.engine.tuning.plan import Plan

NAMES = ("blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.1.attn.qkv", "head.weight")


@pytest.mark.parametrize(
    ("patterns", "want"),
    [
        ((), NAMES),
        (("*",), NAMES),
        (("blocks.*.attn.*",), (NAMES[0], NAMES[2])),
        (("head.*", "blocks.1.*"), (NAMES[3], NAMES[2])),
        (("*.qkv", "blocks.*"), (NAMES[0], NAMES[2], NAMES[1])),
        (("blocks.[0]*",), (NAMES[0], NAMES[1])),
        (("tied.name", "blocks.0.*"), (NAMES[3], NAMES[0], NAMES[1])),
    ],
)
def test_the_order_is_that_of_the_globs_and_then_of_the_model(patterns, want):
    assert select(NAMES, patterns, aliases={"tied.name": NAMES[3]}) == want


def test_a_glob_that_matches_nothing_names_what_is_near():
    with pytest.raises(InvalidSpec, match=r"'blocks.1.atn.\*' .* 'blocks.1.attn.qkv'"):
        select(NAMES, ("head.*", "blocks.1.atn.*"), aliases={})
    with pytest.raises(InvalidSpec, match=r"near it are 'blocks.0.attn.qkv'"):
        select(NAMES, ("~",), aliases={})
    with pytest.raises(InvalidSpec, match=r"keeps fixed .* such as 'stem.bias'"):
        select(NAMES, ("stem.*",), aliases={}, frozen=("stem.bias",))


def test_patterns_have_limits():
    with pytest.raises(LimitExceeded, match="1001 patterns; the limit is 1000"):
        check_patterns(["*"] * 1001)
    with pytest.raises(LimitExceeded, match="257 characters; the limit is 256"):
        check_patterns(["x" * 257])
    with pytest.raises(InvalidSpec, match="is empty"):
        check_patterns(["x", ""])


def test_a_hostile_glob_takes_no_time():
    name = "a" * 200
    with pytest.raises(InvalidSpec):
        select([name] * 1, ("*a" * 100 + "b",), aliases={})


def chosen(name: str, params: tuple[str, ...]) -> Problem:
    animal = next(a for a in (*ANIMALS, REFUSED) if a.name == name)
    return Problem.load(
        animal.module(),
        {},
        animal.arrays(),
        DatasetSpec(inputs=("x",), target="y", batch_size=4),
        animal.loss,
        animal.mode,
        Dtype.FLOAT64,
        params=params,
    )


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("gelu", ("2.*",)),
        ("gelu", ("2.bias", "0.weight")),
        ("attention", ("out.*", "qkv.weight")),
        ("padding", ("head.*",)),
        ("padding", ("head.bias", "layer.*")),
        ("batchnorm_statistics", ("1.*",)),
        ("lstm", ("*weight*",)),
    ],
)
def test_products_are_rows_and_columns_of_the_whole_operator(name, params):
    whole = problem_of(next(a for a in ANIMALS if a.name == name))
    part = chosen(name, params)
    place = {p.name: p.offset for p in whole.layout.parameters}
    index = torch.cat([
        place[p.name] + torch.arange(p.size) for p in part.layout.parameters
    ])
    ggn = dense_ggn(whole)[index][:, index]
    V = columns(part, 1)
    want = central_difference(part, V[0])
    full = torch.zeros(whole.layout.size, dtype=torch.float64)
    full[index] = V[0]
    assert error(central_difference(whole, full)[index], want) < 1e-7
    for mode in MODES:
        plan = Plan(mode)
        options = {"budget_bytes": 2**24, "plan": plan, "tuning_s": 0.0}
        hessian = build(part, OperatorSpec(), **options)
        assert hessian.plan == plan
        assert error(hessian.apply(V)[0], want) < 1e-6
        product = build(part, OperatorSpec(kind="ggn"), **options).apply(V)
        assert error(product, V @ ggn) < 1e-6


def test_a_tied_parameter_is_chosen_by_any_of_its_names():
    assert chosen("tied", ("head.weight",)).layout.names == ("tokens.weight",)


def test_what_is_frozen_is_not_differentiated():
    # Its second derivative is wrong in torch, so it would be refused.
    problem = chosen(REFUSED.name, ("head.*",))
    operator = build(problem, OperatorSpec(), budget_bytes=2**20)
    V = columns(problem, 1)
    assert error(operator.apply(V)[0], central_difference(problem, V[0])) < 1e-6


def test_what_is_frozen_needs_no_memory():
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in "1234")
    )
    data = DatasetSpec(inputs=("x",), target="y", batch_size=32)
    arrays = {"x": torch.randn(32, 64), "y": torch.randn(32, 64)}
    few, all_ = (
        Problem.load(model, {}, arrays, data, LossSpec(name="mse"), params=params)
        for params in (("3.*",), ())
    )
    for mode in ("program", "double_backward"):
        small, large = (
            cached_bytes(mode, p, OperatorSpec(), p.data[0]) for p in (few, all_)
        )
        assert 0 < small < large / 2


def test_frozen_values_can_be_replaced():
    problem = chosen("gelu", ("2.*",))
    moved = problem.with_parameters({"0.weight": torch.zeros(4, 4)})
    assert moved.layout == problem.layout
    assert moved.gradient()[0] != problem.gradient()[0]
