"""Models are tried on a few data points before anything is built on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvd
from curvd.contract.specs import DatasetSpec, LossSpec, ModelSpec, SerializedGraph
from curvd.errors import InvalidSpec
from curvd_server.device.torch_device import TorchDevice
from curvd_server.engine.objective.objective import Problem
from curvd_server.graph.decoder import canonical, decode
from curvd_server.graph.execution.interpret import Interpreter
from curvd_server.graph.execution.module import GraphModule


def normalised(*tail: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), *tail)


def as_graph(module: nn.Module, inputs: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    exported = curvd.export(module.eval(), inputs, check=False)
    message = decode(canonical(exported.graph))
    return GraphModule(Interpreter(message)), dict(exported.state)


def load(
    module: nn.Module, points: int, batch_size: int, mode: str, *, graph: bool
) -> Problem:
    x = torch.randn(points, 4)
    state = dict(module.state_dict())
    if graph:
        module, state = as_graph(module, x)
    return Problem.load(
        module,
        state,
        {"x": x, "y": torch.randn(points, 3)},
        DatasetSpec(inputs=("x",), target="y", batch_size=batch_size),
        LossSpec(name="mse"),
        mode=mode,
    )


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("points", "batch_size", "remedy"),
    [
        (7, 3, "take batch_size=4"),
        (7, 2, "take batch_size=4"),
        (5, 1, "take batch_size=3"),
        (9, 8, "take batch_size=9"),
        (1, 1, "add data points"),
    ],
)
def test_statistics_of_a_last_mini_batch_of_one_are_refused(
    points, batch_size, remedy, graph
):
    match = rf"{points} data points in mini-batches of {batch_size} leave one.*{remedy}"
    with pytest.raises(InvalidSpec, match=match):
        load(normalised(), points, batch_size, "batch_statistics", graph=graph)
    problem = load(normalised(), points, batch_size, "eval", graph=graph)
    assert problem.batches == -(-points // batch_size)


@pytest.mark.parametrize("graph", [False, True])
def test_statistics_of_one_image_are_fine(graph):
    module = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 3)
    state = dict(module.state_dict())
    if graph:
        module, state = as_graph(module, x)
    data = DatasetSpec(inputs=("x",), target="y", batch_size=2)
    loss = LossSpec(name="mse")
    arrays = {"x": x, "y": y}
    problem = Problem.load(module, state, arrays, data, loss, "batch_statistics")
    assert problem.batches == 2


def test_a_norm_without_running_statistics_needs_two_data_points_in_any_mode():
    module = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)
    )
    with pytest.raises(InvalidSpec, match="5 data points in mini-batches of 2"):
        load(module, 5, 2, "eval", graph=False)


class Tail(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


OUTPUTS = {
    "mean": (lambda z: z.mean(), r"\[\] for 3 data points"),
    "columns": (lambda z: z.sum(0), r"\[3\] for 2 data points"),
    "twice": (lambda z: torch.cat([z, z]), r"\[6, 3\] for 3 data points"),
    "first two": (lambda z: z[:2], r"\[2, 3\] for 3 data points"),
    "transposed": (lambda z: z.T, r"\[3, 2\] for 2 data points"),
}


@pytest.mark.parametrize(("function", "shape"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_of_a_builder_without_the_batch_axis_are_refused(function, shape):
    with pytest.raises(InvalidSpec, match=rf"{shape}.*return one row per data point"):
        load(Tail(function), 6, 4, "eval", graph=False)


@pytest.mark.parametrize(("function", "shape"), OUTPUTS.values(), ids=OUTPUTS)
def test_a_graph_whose_output_lacks_the_batch_axis_is_not_registered(
    function, shape, monkeypatch
):
    from curvd.graph import capture

    monkeypatch.setattr(capture, "_check_outputs", lambda program: None)
    exported = curvd.export(Tail(function), torch.randn(5, 4), check=False)
    data = exported.graph.SerializeToString(deterministic=True)
    spec = ModelSpec(builder="", graph=SerializedGraph(data))
    with pytest.raises(InvalidSpec, match=shape):
        TorchDevice({}, "cpu").architecture(spec)


@pytest.mark.parametrize("function", [torch.detach, torch.ones_like])
def test_outputs_without_a_derivative_are_refused(function):
    with pytest.raises(InvalidSpec, match="no derivative in any of the parameters"):
        load(Tail(function), 6, 4, "eval", graph=False)
