"""Memory of linearisations: measured once for each architecture that is a graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvd
from curvd.contract.specs import DatasetSpec, LossSpec, OperatorSpec
from curvd_server.engine import linearization_cache
from curvd_server.engine.linearization_cache import Counters, LinearizationCache
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.operators import cached_bytes
from curvd_server.graph.decoder import canonical, decode
from curvd_server.graph.execution import GraphModule, Interpreter


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modes that were measured."""
    modes: list[str] = []

    def counted(mode, *rest):
        modes.append(mode)
        return cached_bytes(mode, *rest)

    monkeypatch.setattr(linearization_cache, "cached_bytes", counted)
    return modes


def problem(programs: dict, *, graph: bool, batch_size: int = 4, loss="mse") -> Problem:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).eval()
    x, state, module = torch.randn(10, 3), dict(net.state_dict()), net
    if graph:
        exported = curvd.export(net, x, check=False)
        module = GraphModule(Interpreter(decode(canonical(exported.graph))))
    return Problem.load(
        module,
        state,
        {"x": x, "y": torch.randn(10, 2)},
        DatasetSpec(inputs=("x",), target="y", batch_size=batch_size),
        LossSpec(name=loss),
        programs=programs,
    )


def sizes(problem: Problem, mode: str = "double_backward", **spec) -> list[int]:
    cache = LinearizationCache(problem, OperatorSpec(**spec), mode, 1 << 30, Counters())
    return cache.sizes()


def test_a_graphs_is_measured_for_its_first_session_alone(measured: list[str]):
    programs: dict = {}
    first = sizes(problem(programs, graph=True))
    assert first == sizes(problem(programs, graph=True))
    assert len(measured) == 1
    # The last mini-batch has two data points, the others four.
    assert first[0] == first[1] and first[2] == first[0] // 2 > 0


def test_all_that_it_depends_on_is_told_apart(measured: list[str]):
    programs: dict = {}
    found = [
        sizes(problem(programs, graph=True)),
        sizes(problem(programs, graph=True, batch_size=5)),
        sizes(problem(programs, graph=True, loss="smooth_l1")),
        sizes(problem(programs, graph=True), mode="program"),
        sizes(problem(programs, graph=True), mode="forward_over_reverse"),
        sizes(problem(programs, graph=True), kind="ggn"),
    ]
    assert len(measured) == len(found)
    anew = sizes(problem({}, graph=True, batch_size=5))
    assert anew == found[1] != found[0]


def test_that_of_a_builders_module_is_measured_each_time(measured: list[str]):
    programs: dict = {}
    for _ in range(2):
        sizes(problem(programs, graph=False))
    assert len(measured) == 2
