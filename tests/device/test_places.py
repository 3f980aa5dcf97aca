"""Off the CPU everything is what it is on it, and nothing mixes devices.

The stand-in (`support.standin`) refuses what CUDA refuses, so these run without one.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from support.places import OTHERS, STANDIN
from support.reference import columns, error, problem_of
from support.zoo import ANIMALS, Animal
from torch import nn

import curvd
from curvd.contract.enums import Dtype, OperatorKind
from curvd.contract.specs import DatasetSpec, OperatorSpec
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.engine.batch_product import BatchProduct
from curvd_server.engine.building import build
from curvd_server.engine.objective.layer_patches import PlainRecurrence
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.operators import LINEARISED
from curvd_server.engine.operators.linearize import MODES
from curvd_server.engine.tuning.plan import Plan
from curvd_server.models.builders import BUILDERS

HUGE = 2**30
WIDTHS = {"activation": "tanh", "widths": [8, 16, 4]}
ZOO = {animal.name: animal for animal in ANIMALS}
MODE_OF = {
    "linear_bce": "program",
    "layernorm_ce": "double_backward",
    "conv": "program",
    "groupnorm": "double_backward",
    "batchnorm_statistics": "program",
    "maxpool": "double_backward",
    "attention": "double_backward",
    "padding": "program",
    "tied_shifted": "program",
    "gru": "program",
    "lstm": "double_backward",
    "weight_norm": "forward_over_reverse",
    "unused": "program",
}
on_others = pytest.mark.parametrize("place", OTHERS, indirect=True)


def problem_on(device: str, animal: Animal, **options) -> Problem:
    data = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    torch.manual_seed(0)
    return Problem.load(
        animal.module(),
        {},
        animal.arrays(),
        data,
        animal.loss,
        animal.mode,
        Dtype.FLOAT64,
        device,
        **options,
    )


def quick(problem: Problem, spec: OperatorSpec, mode: str, width: int = 1):
    plan = Plan(mode, width)
    operator = build(problem, spec, budget_bytes=HUGE, plan=plan, tuning_s=0.0)
    assert operator.plan == plan
    return operator


@on_others
@pytest.mark.parametrize(("name", "mode"), MODE_OF.items())
def test_products_are_those_of_the_cpu(place: str, name: str, mode: str):
    spec = OperatorSpec()
    V = columns(problem_on("cpu", ZOO[name]), 2)
    want = quick(problem_on("cpu", ZOO[name]), spec, "double_backward").apply(V)
    operator = quick(problem_on(place, ZOO[name]), spec, mode)
    got = operator.apply(V)
    assert got.device.type == place
    assert error(got, want) < 1e-9
    assert torch.equal(operator.apply(V), got)


@on_others
@pytest.mark.parametrize("kind", LINEARISED)
@pytest.mark.parametrize("mode", MODES)
def test_every_operator_is_that_of_the_cpu_in_every_mode(place, kind, mode):
    samples = 3 if kind is OperatorKind.FISHER else 0
    spec = OperatorSpec(kind=kind, mc_samples=samples, seed=7, block_sizes=(1, 3))
    V = columns(problem_on("cpu", ZOO["gelu"]), 4)
    want = quick(problem_on("cpu", ZOO["gelu"]), spec, mode, 3).apply(V)
    got = quick(problem_on(place, ZOO["gelu"]), spec, mode, 3).apply(V)
    assert got.device.type == place
    assert error(got, want) < 1e-9


@on_others
def test_a_plan_is_timed_there_and_chosen(place: str):
    problem = problem_on(place, ZOO["gelu"])
    operator = build(problem, OperatorSpec(), budget_bytes=HUGE, tuning_s=0.2)
    V = columns(problem, 3)
    want = quick(problem_on("cpu", ZOO["gelu"]), OperatorSpec(), "program").apply(V)
    assert error(operator.apply(V), want) < 1e-9
    assert operator.apply(V[:0]).device.type == place


@on_others
def test_data_on_the_host_gives_the_same_products(place: str):
    there, here = (
        problem_on(place, ZOO["gelu"], resident_bytes=resident)
        for resident in (0, HUGE)
    )
    for a, b in zip(there.data, here.data, strict=True):
        assert torch.equal(a.inputs[0], b.inputs[0])
    V = columns(here, 3)
    rows = [
        build(p, OperatorSpec(), budget_bytes=0, plan=Plan("program")).apply(V)
        for p in (there, here)
    ]
    assert torch.equal(*rows)


@on_others
def test_a_server_on_the_device_answers_as_one_on_the_cpu(place: str, tmp_path):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    state = BUILDERS["mlp"](WIDTHS).double().state_dict()
    points = {"x": rng.standard_normal((24, 8)), "y": rng.integers(0, 4, 24)}
    answers = []
    for device in ("cpu", f"{place}:0"):
        config = ServerConfig(
            listen="127.0.0.1:0", data_dir=tmp_path / device, device=device
        )
        with serve_in_thread(config) as target, curvd.connect(target) as client:
            (described,) = client.server_info().devices
            assert described.name == device
            model = client.register_model("mlp", WIDTHS, state)
            dataset = client.register_dataset(
                points, inputs=["x"], target="y", batch_size=8
            )
            session = client.create_session(
                model, dataset, loss="cross_entropy", dtype="F64"
            )
            answers.append(answers_of(session))
    for there, here in zip(answers[1], answers[0], strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-6, atol=1e-9)


class Drawn(nn.Module):
    """Constants, a buffer, indices, and BatchNorm: what graphs have beside parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("places", torch.linspace(-1, 1, 5)[:, None])

    def forward(self, x):
        h = self.tokens(x) + self.places + torch.arange(5.0)[None, :, None] / 5
        h = torch.tanh(h).masked_fill((x == 0)[..., None], 0.0)
        return self.head(self.norm(h.sum(1)))


def weighed(outputs, targets):
    """A loss of its user's own, with a constant."""
    weights = torch.tensor([1.0, 2.0, 0.5])
    return (weights * (outputs - targets).square()).sum(1).mean()


@on_others
def test_a_module_that_was_drawn_and_its_own_loss_run_there(place: str, tmp_path):
    torch.manual_seed(0)
    module = Drawn().double().eval()
    data = torch.randint(0, 7, (12, 5)), torch.randn(12, 3, dtype=torch.float64)
    products = []
    for device in ("cpu", f"{place}:0"):
        config = ServerConfig(
            listen="127.0.0.1:0", data_dir=tmp_path / device, device=device
        )
        with serve_in_thread(config) as target, curvd.connect(target) as client:
            session = client.session_for(module, weighed, data, batch_size=6)
            v = np.random.default_rng(0).standard_normal(session.layout.size)
            products.append(session.hessian() @ v)
    np.testing.assert_allclose(products[1], products[0], rtol=1e-6, atol=1e-9)


def answers_of(session: curvd.Session) -> list[np.ndarray]:
    """Products of one and of many columns, and every query, at two versions."""
    G = session.ggn(damping=0.5)
    v = np.random.default_rng(1).standard_normal((G.shape[0], 5))
    stored = session.put("v", v[:, 0])
    found = [G @ v, G @ stored, session.gradient()[1]]
    found += [G.eigsh(k=2).values, G.solve(v[:, 0]).x]
    found += [G.trace(samples=20).value, G.diagonal(samples=20).values]
    found += [G.logdet(damping=1.0, steps=9, probes=3).value]
    found += [G.frobenius_norm(samples=9).value]
    found += [G.spectral_density(probes=2, steps=9).density]
    session.update_parameters({"1.bias": np.full(16, 0.3)})
    return [*found, G @ v]


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("of", [torch, torch.ops.aten], ids=["torch", "aten"])
@on_others
def test_recurrent_layers_are_taken_apart_there(place: str, name: str, of):
    call = getattr(of, name)
    call = call if of is torch else call.input
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(name, nn.RNN)
    torch.manual_seed(0)
    layer = kind(3, 2, num_layers=2, bidirectional=True).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    state = torch.randn(4, 4, 2, dtype=torch.float64)
    rows = []
    for device in ("cpu", place):
        weights = [p.detach().to(device) for p in layer.parameters()]
        h = (state.to(device),) * 2 if name == "lstm" else state.to(device)
        with PlainRecurrence() if device != "cpu" else contextlib.nullcontext():
            # biases, layers, dropout, training, both directions, batch first
            out = call(x.to(device), h, weights, True, 2, 0.0, False, True, False)
        rows.append(torch.stack(out[1:]) if name == "lstm" else out[0])
    assert rows[1].device.type == place
    assert error(rows[1], rows[0]) < 1e-14


@pytest.mark.parametrize("place", [STANDIN], indirect=True)
class TestTheStandIn:
    """What a line that mixes devices does there: what it does on CUDA."""

    def test_a_line_of_the_engine_that_mixes_devices_is_caught(
        self, place, monkeypatch
    ):
        def planted(self, at, row, out, *, first):
            p = self._problem.layout.parameters[at]
            out[:, p.offset : p.offset + p.size] += torch.ones(p.size)

        operator = quick(problem_of(ZOO["gelu"]), OperatorSpec(), "program")
        V = columns(operator.problem, 1)
        monkeypatch.setattr(BatchProduct, "_add", planted)
        with pytest.raises(RuntimeError, match=r"two devices, standin:0 and cpu"):
            operator.apply(V)

    def test_a_line_of_a_backward_pass_that_mixes_devices_is_caught(self, place):
        class Planted(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, g):
                return g * torch.ones(3)

        x = torch.ones(3, device=place, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"two devices, standin:0 and cpu"):
            Planted.apply(x).sum().backward()

    @pytest.mark.parametrize(
        "line",
        [
            lambda x, c: x + c,
            lambda x, c: c @ x,
            lambda x, c: torch.cat([x, c]),
            lambda x, c: torch.equal(x, c),
            lambda x, c: torch.where(c > 0, x, 0.0),
            lambda x, c: c[0, 0].add_(x[0, 0]),
            lambda x, c: x.masked_fill(c > 0, 1.0),
            lambda x, c: torch.randn(3, device=x.device, generator=torch.Generator()),
            lambda x, c: x.normal_(generator=torch.Generator()),
            lambda x, c: torch.stack([x[0, 0], c[0, 0]]),
        ],
    )
    def test_what_cuda_refuses_is_refused(self, place, line):
        with pytest.raises(RuntimeError, match=r"same device|generator"):
            line(torch.ones(3, 3, device=place), torch.ones(3, 3))

    def test_numpy_sees_it_only_on_the_cpu(self, place):
        with pytest.raises(TypeError, match="can't convert standin"):
            torch.ones(3, device=place).numpy()

    @pytest.mark.parametrize(
        "line",
        [
            lambda x, c: x + c[0, 0],
            lambda x, c: x[c[0].long()],
            lambda x, c: x.copy_(c),
            lambda x, c: torch.where(x > 0, x, c[0, 0]),
            lambda x, c: x.to("cpu").to(x),
            lambda x, c: torch.tensor(c.tolist(), device=x.device) + x,
            lambda x, c: x.index_put_((c[0].long(),), c[0, 0]),
        ],
    )
    def test_what_cuda_takes_is_taken(self, place, line):
        x, c = torch.rand(3, 3), torch.ones(3, 3)
        want = line(x.clone(), c)
        got = line(x.to(place), c)
        assert got.device.type == place
        assert torch.equal(got.cpu(), want)
