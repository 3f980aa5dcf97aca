"""A product that is NaN or infinite is refused, with the data points that make it so."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from curvd.contract import (  # noqa: E402
    DatasetSpec,
    Dtype,
    JacobianOf,
    LossSpec,
    OperatorSpec,
)
from curvd.errors import NotFinite  # noqa: E402
from curvd_server.engine import kronecker  # noqa: E402
from curvd_server.engine.building import build  # noqa: E402
from curvd_server.engine.data_points.gradients import Gradients  # noqa: E402
from curvd_server.engine.data_points.jacobian import Jacobian  # noqa: E402
from curvd_server.engine.data_points.output_rows import OutputRows  # noqa: E402
from curvd_server.engine.finite import finite_gradient, is_finite  # noqa: E402
from curvd_server.engine.objective import Problem  # noqa: E402
from curvd_server.engine.tuning import Plan  # noqa: E402
from curvd_server.engine.verification import check_gradient  # noqa: E402


class Lengths(nn.Module):
    """Scales its outputs by a norm, which has no derivative at zero."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        length = (x @ self.into.weight.T).norm(dim=1, keepdim=True)
        return self.out(torch.tanh(self.into(x)) * length)


def operator(x, dtype=Dtype.FLOAT64, kind="hessian", module=Lengths):
    torch.manual_seed(0)
    arrays = {"x": x.to(torch.float32), "y": torch.randint(0, 3, (len(x),))}
    data = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    loss = LossSpec(name="cross_entropy")
    problem = Problem.load(module(), {}, arrays, data, loss, dtype=dtype)
    plan = Plan("double_backward", 1)
    spec = OperatorSpec(kind=kind)
    return build(problem, spec, budget_bytes=2**30, plan=plan, tuning_s=0.0)


@pytest.mark.parametrize("columns", [1, 3])
def test_the_data_points_are_named(columns):
    x = torch.randn(12, 4)
    x[6] = 0
    hessian = operator(x)
    V = torch.randn(columns, hessian.problem.layout.size).double()
    with pytest.raises(NotFinite, match=r"NaN at into.weight.*rows 4 to 7: .*eps"):
        hessian.apply(V)
    with pytest.raises(NotFinite, match="rows 4 to 7"):
        list(hessian.stream(V))


def test_what_overflows_its_type_is_refused():
    ggn = operator(torch.randn(8, 4), Dtype.FLOAT32, "ggn", lambda: nn.Linear(4, 3))
    with pytest.raises(NotFinite, match=r"(NaN|infinite) at weight.*dtype='F64'"):
        ggn.apply(torch.full((1, ggn.problem.layout.size), 3e38))


def test_numbers_whose_sum_overflows_are_none_of_these():
    assert is_finite(torch.full((2, 9), 3e38))
    assert not is_finite(torch.tensor([[1.0, float("inf"), -float("inf")]]))


class Scaled(nn.Module):
    """Multiplies outputs by a buffer, and adds another one to logits, as masks are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("mask", torch.zeros(3))

    def forward(self, x):
        return (self.layer(x) + self.mask).softmax(1) * self.scale


def scaled(**buffers):
    """A problem, and what it would be with other buffers."""
    torch.manual_seed(0)
    arrays = {"x": torch.randn(12, 4), "y": torch.randn(12, 3)}
    data = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    problem = Problem.load(
        Scaled(), {}, arrays, data, LossSpec(name="mse"), dtype=Dtype.FLOAT64
    )
    values = {name: torch.tensor(value) for name, value in buffers.items()}
    return arrays, problem.with_parameters(values)


def kfac(problem):
    return kronecker.build(problem, OperatorSpec(kind="kfac"), budget_bytes=2**30)


ASKED = {
    "gradient": finite_gradient,
    "session": lambda problem: check_gradient(problem, lambda: False),
    "product": lambda problem: build(problem, OperatorSpec(), budget_bytes=2**30),
    "kfac": kfac,
    "norms": lambda problem: Gradients(problem)(problem.data[0]),
    "outputs": lambda problem: OutputRows(problem)(problem.data[0]),
    "jacobian": lambda problem: Jacobian(problem, JacobianOf.LOSSES).push(
        problem.data[0], torch.ones(1, problem.layout.size).double()
    ),
}


@pytest.mark.parametrize("asked", ASKED)
def test_an_infinite_buffer_is_named_whatever_is_asked(asked):
    _, problem = scaled(scale=[1.0, float("inf"), 1.0])
    with pytest.raises(NotFinite, match=r"in rows 0 to \d.*buffer scale: update"):
        ASKED[asked](problem)


@pytest.mark.parametrize("asked", ASKED)
def test_an_infinite_mask_is_as_good_as_another(asked):
    arrays, problem = scaled(mask=[0.0, float("-inf"), 0.0])
    ASKED[asked](problem)
    module = Scaled().double()
    with torch.no_grad():
        module.mask[1] = float("-inf")
        named = dict(zip(problem.layout.names, problem.parameters, strict=True))
        for name, own in module.named_parameters():
            own.copy_(named[name])
    loss = nn.MSELoss()(module(arrays["x"].double()), arrays["y"].double())
    wanted = torch.autograd.grad(loss, [module.layer.weight, module.layer.bias])
    want = torch.cat([g.flatten() for g in wanted])
    found, got = finite_gradient(problem)
    assert found == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(got, want)


def test_without_such_a_buffer_another_remedy_is_said():
    _, problem = scaled()
    wrong = {"layer.bias": torch.tensor([0.0, 0.0, float("nan")], dtype=torch.float64)}
    with pytest.raises(NotFinite, match="is NaN or infinite in rows 0 to 3: a value"):
        finite_gradient(problem.with_parameters(wrong))
