"""Requests that a device computes in one run, on real operators."""

import threading

import numpy as np
import pytest
from support.places import everywhere, here

pytest.importorskip("torch")
from curvd.contract.enums import Dtype, LossName, Mode
from curvd.contract.specs import DatasetSpec, LossSpec, ModelSpec, OperatorSpec
from curvd_server.device.batcher import Batcher
from curvd_server.device.torch_device import TorchDevice
from curvd_server.engine import batch_product
from curvd_server.engine.tuning import plan as plans
from curvd_server.engine.tuning.autotune import Plan
from curvd_server.system.cooperative import LongWork, Threads


@pytest.fixture
def operator(place, monkeypatch):
    """The Hessian of a small net, whose plan takes eight columns at once."""
    monkeypatch.setattr(plans, "ranked", lambda *_: iter([Plan("program", 8)]))
    rng = np.random.default_rng(0)
    problem = TorchDevice({}, here()).load(
        ModelSpec(builder="mlp", config={"widths": [8, 16, 3], "activation": "tanh"}),
        {
            "1.weight": rng.standard_normal((16, 8)),
            "1.bias": rng.standard_normal(16),
            "3.weight": rng.standard_normal((3, 16)),
            "3.bias": rng.standard_normal(3),
        },
        {"x": rng.standard_normal((96, 8)), "y": rng.integers(0, 3, 96)},
        DatasetSpec(inputs=("x",), target="y", batch_size=96),
        LossSpec(name=LossName.CROSS_ENTROPY),
        Mode.EVAL,
        Dtype.FLOAT64,
    )
    return problem.build(OperatorSpec(), budget_bytes=1 << 30, cancelled=lambda: False)


@everywhere
def test_who_asks_for_the_same_gets_the_same_bits_whoever_else_asks(operator):
    rng = np.random.default_rng(1)
    requests = [rng.standard_normal((count, 195)) for count in (1, 3, 1, 1, 9, 1)]
    alone = [operator.apply(v, cancelled=lambda: False).copy() for v in requests]
    batcher = Batcher(
        run_columns=32, run_bytes=1 << 20, pending_columns=64, pending_bytes=1 << 20
    )
    occupied, gate = threading.Event(), threading.Event()
    batcher.run(lambda cancelled: (occupied.set(), gate.wait(300)))
    assert occupied.wait(300)
    tickets = [batcher.multiply(operator, v) for v in requests]
    gate.set()
    done = [ticket.result(timeout=300) for ticket in tickets]
    batcher.close()
    assert [d.run_columns for d in done] == [16] * len(requests)
    for d, want in zip(done, alone, strict=True):
        np.testing.assert_array_equal(d.value, want)


def pauses_of(operator, V, *, is_shared):
    """Multiply in turns that end at each chance: how many turns, and the result."""
    work = LongWork(
        lambda poll: operator.apply(V, cancelled=poll),
        stopped=lambda: False,
        gives_way=lambda: True,
        threads=Threads(),
        is_shared=lambda: is_shared,
    )
    turns = 1
    while not work.resume():
        turns += 1
        assert turns < 10_000
    return turns, work.result()


@everywhere
def test_a_long_chunk_gives_way_between_its_operations_and_has_the_same_bits(
    operator, monkeypatch
):
    monkeypatch.setattr(batch_product, "LONG_CHUNK_S", -1.0)
    V = np.random.default_rng(1).standard_normal((8, 195))
    alone = operator.apply(V, cancelled=lambda: False).copy()
    few, rows = pauses_of(operator, V, is_shared=False)
    np.testing.assert_array_equal(rows, alone)
    many, rows = pauses_of(operator, V, is_shared=True)
    np.testing.assert_array_equal(rows, alone)
    assert many > few + 20
