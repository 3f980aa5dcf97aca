"""Norms of single data points' gradients are those of torch.func, and of differences."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.misled import Tripled
from torch import nn
from torch.nn import functional as F

from curvd.contract import DatasetSpec, Dtype, LossSpec, Stop
from curvd.contract.query_options.data_points import GradientNormsOptions
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points.gradient_norms import (
    DEFINITION,
    GradientLengths,
    gradient_norms,
)
from curvd_server.engine.objective import Problem
from curvd_server.linalg.base import drain


class Tokens(nn.Module):
    """Embeds, mixes positions by attention, and predicts each."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6, padding_idx=0)
        self.mix = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.mix(self.embed(x)))


class Branches(nn.Module):
    """Looks at its values, which no vectorised derivative can follow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) if float(x.detach().square().sum()) > 0 else x


class Misled(Branches):
    """Uses what is wrong when it is vectorised, and says nothing."""

    def forward(self, x):
        return Tripled.apply(self.layer(x))


def batch_norm():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    net[1].running_mean.normal_()
    return net.append(nn.Linear(12, 2))


CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0, 1])
NUMBERS = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(10, 2)
X = torch.randn(10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES = torch.randn(
    10, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64
)
TEXT = torch.randint(0, 7, (10, 3), generator=torch.Generator().manual_seed(3))
LABELS = torch.where(TEXT == 0, -100, TEXT % 5)
WEIGHTS = (0.5, 1.0, 2.0)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def weighted(z, y):
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    return F.cross_entropy(z, y, weight=weight, reduction="sum", label_smoothing=0.1)


def summed(z, y):
    return F.cross_entropy(z, y, reduction="sum")


CASES = {
    "mlp": (mlp, X, CLASSES, {"name": "cross_entropy"}, summed),
    "weights": (
        mlp,
        X,
        CLASSES,
        {"name": "cross_entropy", "class_weights": WEIGHTS, "label_smoothing": 0.1},
        weighted,
    ),
    "sum": (mlp, X, CLASSES, {"name": "cross_entropy", "reduction": "sum"}, summed),
    "decay": (mlp, X, CLASSES, {"name": "cross_entropy", "weight_decay": 0.3}, summed),
    "images": (
        batch_norm,
        IMAGES,
        NUMBERS,
        {"name": "mse"},
        lambda z, y: (z - y).square().sum(),
    ),
    "tokens": (
        Tokens,
        TEXT,
        LABELS,
        {"name": "cross_entropy"},
        lambda z, y: summed(z.flatten(0, 1), y.flatten()),
    ),
    "branches": (Branches, X, CLASSES, {"name": "cross_entropy"}, summed),
    "misled": (Misled, X, CLASSES, {"name": "cross_entropy"}, summed),
}


def loaded(case, dtype=Dtype.FLOAT64):
    make, x, y, loss, _ = CASES[case]
    torch.manual_seed(0)
    module = make().double().eval()
    spec = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    arrays = {"x": x.numpy(), "y": y.numpy()}
    problem = Problem.load(module, {}, arrays, spec, LossSpec(**loss), dtype=dtype)
    return module, problem


def asked(problem, *, rows=3, by_parameter=True, **options):
    points = Points(problem, compute=lambda job: job(lambda: False), **options)
    return drain(gradient_norms(points, rows=rows, by_parameter=by_parameter)), points


@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_single_gradients(case):
    module, problem = loaded(case)
    found, _ = asked(problem)
    _, x, y, _, loss = CASES[case]
    rows = []
    for n in range(len(x)):
        total = loss(module(x[n : n + 1]), y[n : n + 1])
        grads = torch.autograd.grad(total, list(module.parameters()), allow_unused=True)
        rows.append([0.0 if g is None else float(g.norm()) for g in grads])
    parts = np.array(rows)
    np.testing.assert_allclose(found.parameter_norms, parts, rtol=1e-10, atol=1e-12)
    norms = np.linalg.norm(parts, axis=1)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-10, atol=1e-12)
    assert found.stopped is Stop.CONVERGED


@pytest.mark.parametrize("case", ["mlp", "weights", "images", "tokens"])
def test_norms_are_those_of_torch_func(case):
    module, problem = loaded(case)
    _, x, y, _, loss = CASES[case]
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def one(parameters, a, b):
        out = torch.func.functional_call(module, parameters, (a[None],))
        return loss(out, b[None])

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(parameters, x, y)
    flat = torch.cat([g.flatten(1) for g in each.values()], 1)
    found, _ = asked(problem)
    np.testing.assert_allclose(found.norms, flat.norm(dim=1), rtol=1e-10)


def test_norms_are_those_of_central_differences():
    module, problem = loaded("mlp")
    start = nn.utils.parameters_to_vector(module.parameters()).detach()
    losses = []
    step = 1e-5
    for sign in (1, -1):
        rows = []
        for e in torch.eye(len(start), dtype=torch.float64):
            moved = start + sign * step * e
            nn.utils.vector_to_parameters(moved, module.parameters())
            rows.append(F.cross_entropy(module(X), CLASSES, reduction="none").detach())
        losses.append(torch.stack(rows))
    differences = (losses[0] - losses[1]) / (2 * step)
    found, _ = asked(problem)
    np.testing.assert_allclose(found.norms, differences.norm(dim=0), rtol=1e-8)


@pytest.mark.parametrize(
    ("case", "right"),
    [("mlp", True), ("tokens", True), ("branches", False), ("misled", False)],
)
def test_what_cannot_be_vectorised_or_is_wrong_then_is_differentiated_alone(
    case, right
):
    _, problem = loaded(case)
    lengths = GradientLengths(problem)
    lengths(problem.data[0])
    assert lengths.vectorised is right


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_norms_do_not_depend_on_how_many_go_together(rows):
    _, problem = loaded("tokens")
    found, points = asked(problem, rows=rows)
    expected, _ = asked(problem)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-12)
    assert points.done == len(found.norms) == 10


@pytest.mark.parametrize(
    ("dtype", "digits"), [(Dtype.FLOAT32, 1e-5), (Dtype.BFLOAT16, 0.05)]
)
def test_norms_of_lower_precision_are_near(dtype, digits):
    _, problem = loaded("mlp", dtype)
    exact, _ = asked(loaded("mlp")[1])
    found, _ = asked(problem)
    assert found.norms.dtype == torch.float32
    np.testing.assert_allclose(found.norms, exact.norms, rtol=digits)


@pytest.mark.parametrize("limit", [1, 4, 6])
def test_a_limit_leaves_the_first_data_points(limit):
    _, problem = loaded("mlp")
    whole, _ = asked(problem)
    found, points = asked(problem, limit=limit)
    assert points.done == len(found.norms) == limit
    assert found.stopped is Stop.PRODUCTS
    np.testing.assert_allclose(found.norms, whole.norms[:limit], rtol=1e-12)


def test_norms_alone_are_the_same():
    _, problem = loaded("tokens")
    both, _ = asked(problem)
    found, _ = asked(problem, by_parameter=False)
    assert found.parameter_norms is None
    np.testing.assert_allclose(found.norms, both.norms, rtol=1e-14)


@pytest.mark.parametrize(("by_parameter", "numbers"), [(False, 1), (True, 10)])
def test_memory_is_counted_of_the_gradients_and_of_the_answer(by_parameter, numbers):
    room = SimpleNamespace(
        fitting=lambda each, most: 4, data_points=1000, parameters=10, size=100
    )
    options = GradientNormsOptions(by_parameter=by_parameter)
    assert DEFINITION.vectors(options, room) == 2 * 4 + 4 * 1000 * numbers / 100


def test_time_that_is_up_leaves_one_part():
    _, problem = loaded("mlp")
    found, _ = asked(problem, expired=lambda: True)
    assert (len(found.norms), found.stopped) == (3, Stop.TIME)
