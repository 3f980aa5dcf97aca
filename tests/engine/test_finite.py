"""A product that is NaN or infinite is refused, with the data points that make it so."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from curvd.contract import DatasetSpec, Dtype, LossSpec, OperatorSpec  # noqa: E402
from curvd.errors import NotFinite  # noqa: E402
from curvd_server.engine.building import build  # noqa: E402
from curvd_server.engine.finite import is_finite  # noqa: E402
from curvd_server.engine.objective import Problem  # noqa: E402
from curvd_server.engine.tuning import Plan  # noqa: E402


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
