"""Data that stays on the host gives the same products, and travels one ahead."""

from __future__ import annotations

import torch
from support.places import everywhere, here
from support.reference import columns, problem_of
from support.zoo import ANIMALS

from curvd.contract.enums import Dtype
from curvd.contract.specs import DatasetSpec, OperatorSpec
from curvd_server.engine.building import build
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.objective.prefetch import Streamed, on_host
from curvd_server.engine.tuning.plan import Plan

GELU = next(a for a in ANIMALS if a.name == "gelu")


def streamed(batch_size: int = 2) -> Problem:
    data = DatasetSpec(inputs=("x",), target="y", batch_size=batch_size)
    return Problem.load(
        GELU.module(),
        {},
        GELU.arrays(),
        data,
        GELU.loss,
        GELU.mode,
        Dtype.FLOAT64,
        here(),
        resident_bytes=0,
    )


@everywhere
def test_products_and_gradients_are_those_of_resident_data():
    there, resident = streamed(), problem_of(GELU, batch_size=2)
    assert isinstance(there.data, Streamed)
    V = columns(resident, 3)
    assert there.gradient()[0] == resident.gradient()[0]
    assert torch.equal(there.gradient()[1], resident.gradient()[1])
    for kind in ("hessian", "ggn"):
        for plan in (Plan("program"), Plan("double_backward", 1, 3)):
            spec = OperatorSpec(kind=kind)
            options = {"budget_bytes": 0, "plan": plan}  # nothing kept, all sent again
            want = build(resident, spec, **options).apply(V)
            got = build(there, spec, **options).apply(V)
            assert got.device.type == here()
            assert torch.equal(got, want)


@everywhere
def test_the_next_mini_batch_is_sent_while_one_is_used():
    data = streamed().data
    assert isinstance(data, Streamed)
    sent: list[int] = []
    real = data._sent

    def watched(at: int):
        sent.append(at)
        return real(at)

    data._sent = watched
    for batch, host in zip(data, data.host, strict=True):
        assert batch.start == host.start
        assert batch.inputs[0].device.type == here()
        assert torch.equal(batch.inputs[0].cpu(), host.inputs[0])
    assert sent == [1, 2, 0]  # the first was there: loading ended with it
    assert data[-1].start == data.host[-1].start
    assert data[1:].host == data.host[1:]


@everywhere
def test_looking_at_shapes_moves_nothing():
    problem = streamed()
    assert on_host(problem.data) is problem.data.host
    resident = problem_of(GELU, batch_size=2)
    assert on_host(resident.data) is resident.data
    assert problem.device_bytes < resident.device_bytes
