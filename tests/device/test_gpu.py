"""On a CUDA device everything is what it is on the CPU, and memory comes back.

Run with ``make gpu-test`` on a machine that has one.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from support.reference import columns, error
from support.zoo import ANIMALS, Animal

import curvd
from curvd.contract.enums import Dtype
from curvd.contract.specs import DatasetSpec, OperatorSpec
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.operator import build
from curvd_server.engine.operators.linearize import MODES
from curvd_server.engine.tuning.plan import Plan
from curvd_server.models.builders import BUILDERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HUGE = 2**30
WIDTHS = {"activation": "tanh", "widths": [64, 256, 10]}


def problem_on(device: str, animal: Animal, dtype: Dtype = Dtype.FLOAT64) -> Problem:
    data = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    torch.manual_seed(0)
    return Problem.load(
        animal.module(),
        {},
        animal.arrays(),
        data,
        animal.loss,
        animal.mode,
        dtype,
        device,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)
def test_products_are_those_of_the_cpu(animal: Animal, mode: str):
    for kind in ("hessian", "ggn"):
        spec, plan = OperatorSpec(kind=kind), Plan(mode)
        here, there = problem_on("cpu", animal), problem_on("cuda", animal)
        V = columns(here, 3)
        want = build(here, spec, budget_bytes=HUGE).apply(V)
        operator = build(there, spec, budget_bytes=HUGE, plan=plan)
        got = operator.apply(V)
        assert got.is_cuda
        assert error(got.cpu(), want) < 1e-9
        assert torch.equal(operator.apply(V), got)


def test_sampled_targets_are_those_of_the_cpu():
    gelu = next(a for a in ANIMALS if a.name == "gelu")
    spec = OperatorSpec(kind="fisher", mc_samples=3, seed=7)
    rows = [
        build(problem_on(device, gelu), spec, budget_bytes=HUGE)
        .apply(columns(problem_on("cpu", gelu), 1))
        .cpu()
        for device in ("cpu", "cuda")
    ]
    assert error(*rows) < 1e-9


def test_no_column_is_no_work():
    gelu = next(a for a in ANIMALS if a.name == "gelu")
    problem = problem_on("cuda", gelu)
    operator = build(problem, OperatorSpec(), budget_bytes=HUGE)
    assert operator.apply(torch.empty(0, problem.layout.size)).is_cuda


def test_data_on_the_host_gives_the_same_products():
    gelu = next(a for a in ANIMALS if a.name == "gelu")
    data = DatasetSpec(inputs=("x",), target="y", batch_size=2)
    arrays = gelu.arrays()
    loaded = [
        Problem.load(
            gelu.module(),
            {},
            arrays,
            data,
            gelu.loss,
            gelu.mode,
            Dtype.FLOAT64,
            "cuda",
            resident_bytes=resident,
        )
        for resident in (0, HUGE)
    ]
    for there, here in zip(loaded[0].data, loaded[1].data, strict=True):
        assert torch.equal(there.inputs[0], here.inputs[0])
    V = columns(loaded[1], 3)
    there, here = (
        build(p, OperatorSpec(), budget_bytes=0, plan=Plan("program")).apply(V)
        for p in loaded
    )
    assert torch.equal(there, here)


def test_memory_comes_back():
    gelu = next(a for a in ANIMALS if a.name == "gelu")
    gc.collect()
    before = torch.cuda.memory_allocated()
    problem = problem_on("cuda", gelu)
    operator = build(problem, OperatorSpec(), budget_bytes=HUGE)
    operator.apply(columns(problem, 40))
    assert torch.cuda.memory_allocated() > before
    operator.close()
    del operator, problem
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_server_on_the_device_answers_as_one_on_the_cpu(tmp_path):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    state = BUILDERS["mlp"](WIDTHS).double().state_dict()
    points = {"x": rng.standard_normal((96, 64)), "y": rng.integers(0, 10, 96)}
    answers = []
    for device in ("cpu", "cuda:0"):
        config = ServerConfig(
            listen="127.0.0.1:0", data_dir=tmp_path / device, device=device
        )
        with serve_in_thread(config) as target, curvd.connect(target) as client:
            (described,) = client.server_info().devices
            assert described.name == device
            model = client.register_model("mlp", WIDTHS, state)
            dataset = client.register_dataset(
                points, inputs=["x"], target="y", batch_size=32
            )
            session = client.create_session(
                model, dataset, loss="cross_entropy", dtype="F64"
            )
            H = session.hessian()
            V = np.random.default_rng(1).standard_normal((H.shape[0], 5))
            answers.append((H @ V, H.eigsh(k=2).values))
    (rows, values), (rows_there, values_there) = answers
    np.testing.assert_allclose(rows_there, rows, atol=1e-10)
    np.testing.assert_allclose(values_there, values, rtol=1e-6)
