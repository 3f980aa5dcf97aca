"""Gradients of any size: what is made of them is right against float64, or refused.

A model whose outputs are multiplied by c, and its targets with them, has losses times c^2.
"""

import math

import pytest
import torch
from support.misled import Tripled
from support.places import everywhere, here
from torch import nn

from curvd.contract import DatasetSpec, Dtype, JacobianOf, LossSpec, OperatorSpec
from curvd.errors import ScaleOutOfRange
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points.gradient_gram import gradient_gram
from curvd_server.engine.data_points.gradient_norms import (
    GradientLengths,
    gradient_norms,
)
from curvd_server.engine.data_points.gradient_squares import gradient_squares
from curvd_server.engine.data_points.influence import Scores
from curvd_server.engine.data_points.jacobian_products import (
    jacobian_product,
    rows_of_points,
)
from curvd_server.engine.data_points.output_rows import OutputRows
from curvd_server.engine.kronecker import build
from curvd_server.engine.objective import Problem
from curvd_server.linalg.base import drain

N = 10
SIZES = [
    *[(Dtype.FLOAT32, k) for k in (-40, -30, 0, 30)],
    *[(Dtype.FLOAT64, k) for k in (-250, 250)],
]
"""Types, and exponents of c; losses have twice as much."""


class Sized(nn.Module):
    """An MLP whose outputs are multiplied by a power of two."""

    def __init__(self, power):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.size = 2.0**power

    def forward(self, x):
        return self.net(x) * self.size


class Misled(Sized):
    """Has vectorised gradients that are wrong."""

    def forward(self, x):
        return Tripled.apply(self.net(x)) * self.size


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return x, y


def problem_of(power, dtype, make=Sized):
    torch.manual_seed(0)
    module = make(power).double().eval()
    x, y = data()
    arrays = {"x": x, "y": y * 2.0**power}
    spec = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    loss = LossSpec(name="mse", reduction="sum")
    return Problem.load(module, {}, arrays, spec, loss, dtype=dtype, device=here())


def rows():
    """[N, P] Gradients at c = 1, by autograd in float64."""
    torch.manual_seed(0)
    module = Sized(0).double()
    found = []
    for x, y in zip(*data(), strict=True):
        loss = (module(x[None]) - y).square().sum()
        grads = torch.autograd.grad(loss, list(module.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def points_of(problem):
    return Points(problem, compute=lambda job: job(lambda: False))


def near(found, true, power, dtype):
    """Whether numbers are some others times 2^power, which float64 need not have."""
    half = power // 2
    found = found.double().cpu() * 2.0**-half * 2.0 ** (half - power)
    tolerance = 1e-5 if dtype is Dtype.FLOAT32 else 1e-10
    error = (found - true).norm() / true.norm()
    assert float(error) < tolerance


def refused(dtype, power):
    """Whether numbers of this size have no type."""
    limit = 120 if dtype is Dtype.FLOAT32 else 1000
    return abs(power) > limit


@everywhere
@pytest.mark.parametrize(("dtype", "power"), SIZES)
def test_norms_of_gradients_of_any_size(dtype, power):
    found = drain(
        gradient_norms(points_of(problem_of(power, dtype)), rows=3, by_parameter=True)
    )
    near(found.norms, rows().norm(dim=1), 2 * power, dtype)
    parts = [p.norm(dim=1) for p in rows().split((20, 5, 10, 2), 1)]
    near(found.parameter_norms, torch.stack(parts, 1), 2 * power, dtype)


@pytest.mark.parametrize(("dtype", "power"), SIZES)
def test_their_squares_and_inner_products(dtype, power):
    problem = problem_of(power, dtype)
    squares = gradient_squares(points_of(problem), rows=3)
    if refused(dtype, 4 * power):
        with pytest.raises(ScaleOutOfRange, match="sum of squares"):
            drain(squares)
    else:
        near(drain(squares).squares, rows().square().sum(0), 4 * power, dtype)
    gram = gradient_gram(points_of(problem), rows=3, held=6)
    if refused(Dtype.FLOAT64, 4 * power):
        with pytest.raises(ScaleOutOfRange, match="inner product"):
            drain(gram)
    else:
        near(drain(gram).gram, rows() @ rows().T, 4 * power, dtype)


@pytest.mark.parametrize("column", [-60, 60])
@pytest.mark.parametrize(("dtype", "power"), SIZES)
def test_products_with_their_jacobian(dtype, power, column):
    problem = problem_of(power, dtype)
    generator = torch.Generator().manual_seed(2)
    J = rows()
    V = torch.randn(3, J.shape[1], generator=generator, dtype=torch.float64)
    W = torch.randn(3, N, generator=generator, dtype=torch.float64)
    points = points_of(problem)
    which = drain(rows_of_points(points, JacobianOf.LOSSES, None))
    for operand, true, transposed in ((V, V @ J.T, False), (W, W @ J, True)):
        typed = (operand * 2.0**column).to(problem.result_dtype).to(problem.device)
        query = jacobian_product(points, which, typed, transposed=transposed, rows=3)
        if refused(dtype, 2 * power + column):
            with pytest.raises(ScaleOutOfRange, match="with the Jacobian"):
                drain(query)
        else:
            near(drain(query).result, true, 2 * power + column, dtype)
    if not refused(dtype, 2 * power + column):
        typed = (V * 2.0**column).to(problem.result_dtype).to(problem.device)
        scores = drain(Scores(points, problem, 3).along(typed))
        near(scores, V @ J.T, 2 * power + column, dtype)


@pytest.mark.parametrize(("dtype", "power"), SIZES)
def test_vectorised_gradients_that_are_wrong_are_found_at_any_size(
    dtype, power, monkeypatch
):
    together = OutputRows._together
    misled = problem_of(power, dtype, Misled)
    lengths = GradientLengths(misled)
    lengths(misled.data[0])
    assert lengths.vectorised is False
    monkeypatch.setattr(OutputRows, "_together", lambda *args: 1.5 * together(*args))
    outputs = OutputRows(misled)
    outputs(misled.data[0])
    assert outputs.vectorised is False
    monkeypatch.undo()
    right = problem_of(power, dtype)
    lengths, outputs = GradientLengths(right), OutputRows(right)
    lengths(right.data[0])
    outputs(right.data[0])
    assert lengths.vectorised is True and outputs.vectorised is True


@pytest.mark.parametrize(("dtype", "power"), SIZES)
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
def test_kronecker_factors_are_right_or_refused(fisher, kind, dtype, power):
    """Those of the type-2 Fisher are of c^2, empirical ones of c^4."""
    spec = OperatorSpec(kind=kind, fisher=fisher)

    def made(power, dtype):
        return build(problem_of(power, dtype), spec, budget_bytes=1 << 24)

    unit = torch.eye(37, dtype=torch.float64)
    true = made(0, Dtype.FLOAT64).apply(unit)
    scale = (4 if fisher == "empirical" else 2) * power
    least = -100 if dtype is Dtype.FLOAT32 else -960
    most = 120 if dtype is Dtype.FLOAT32 else 1010
    if not least <= scale <= most:
        with pytest.raises(ScaleOutOfRange, match="second moments"):
            made(power, dtype)
        return
    operator = made(power, dtype)
    near(operator.apply(unit), true, scale, dtype)
    values = torch.linalg.eigvalsh(true)
    near(operator.eigenvalues().sort().values, values, scale, dtype)
    shift = float(values[-1]) * 2.0**scale
    inverse = operator.inverse(unit, shift)
    damped = torch.linalg.inv(true + values[-1] * unit)
    near(inverse, damped, -scale, dtype)


def test_factors_whose_products_hide_that_one_is_lost_are_refused():
    """Inputs of 2^50 and gradients of 2^-70: their product has squares, gradients have none."""

    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.layer(x * 2.0**50) * 2.0**-35

    torch.manual_seed(0)
    x, y = data()
    spec = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    for size, lost in ((1.0, False), (2.0**-35, True)):
        module = nn.Sequential(Uneven()).double()
        arrays = {"x": x, "y": y * size}

        class Scaled(nn.Module):
            def __init__(self, inner, by):
                super().__init__()
                self.inner, self.by = inner, by

            def forward(self, x):
                return self.inner(x) * self.by

        problem = Problem.load(
            Scaled(module, size),
            {},
            arrays,
            spec,
            LossSpec(name="mse", reduction="sum"),
            dtype=Dtype.FLOAT32,
        )
        which = OperatorSpec(kind="kfac", fisher="type-2")
        if lost:
            with pytest.raises(ScaleOutOfRange, match=r"gradients of about 2\*\*-"):
                build(problem, which, budget_bytes=1 << 24)
        else:
            values = build(problem, which, budget_bytes=1 << 24).eigenvalues()
            assert math.isfinite(float(values.max())) and values.max() > 0
