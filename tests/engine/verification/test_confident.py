"""Where differences of gradients are rounding alone, modes are compared nearer to zero."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from curvd.contract import DatasetSpec, Dtype, LossSpec, OperatorSpec  # noqa: E402
from curvd.errors import CurvatureUnverified  # noqa: E402
from curvd_server.engine.building import build  # noqa: E402
from curvd_server.engine.objective import Problem  # noqa: E402
from curvd_server.engine.operators import linearize  # noqa: E402
from curvd_server.engine.verification.verify import Reference  # noqa: E402


def problem(size):
    """A classifier whose every data point is right, by a margin of about `size`."""
    torch.manual_seed(0)
    x = torch.randn(12, 2)
    y = (x[:, 0] > 0).long()
    x[:, 0] += 0.7 * torch.sign(x[:, 0])
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-size, 0.1], [size, 0.0]]))
        module.bias.zero_()
    data = DatasetSpec(inputs=("x",), target="y", batch_size=6)
    loss = LossSpec(name="cross_entropy")
    arrays = {"x": x, "y": y}
    return Problem.load(module, {}, arrays, data, loss, dtype=Dtype.FLOAT64)


class Off:
    """A linearisation that is wrong by three per cent, whatever the parameters."""

    def __init__(self, *arguments):
        self.right = linearize.MODES["double_backward"](*arguments)

    def product(self, tangents, block, *, batched):
        rows = self.right.product(tangents, block, batched=batched)
        return [1.03 * row for row in rows]


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("size", [5.0, 12.0, 20.0, 60.0])
def test_a_confident_classifier_is_verified(size, kind):
    reference = Reference(problem(size), OperatorSpec(kind=kind))
    for mode in ("double_backward", "program"):
        evidence = reference.examine(mode, batched=False)
        assert evidence.ok
        assert evidence.difference_gap < 1e-6


@pytest.mark.parametrize("size", [1.0, 12.0, 60.0])
def test_a_wrong_mode_is_refused_all_the_same(size, monkeypatch):
    monkeypatch.setitem(linearize.MODES, "program", Off)
    evidence = Reference(problem(size), OperatorSpec()).examine(
        "program", batched=False
    )
    assert set(evidence.wrong) == {"weight", "bias"}


class Alike(nn.Module):
    """Three logits that are equal whatever its parameters: the loss is a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.last(self.first(x).tanh()).expand(-1, 3)


def test_what_is_zero_to_rounding_is_refused_for_that_reason():
    torch.manual_seed(0)
    data = DatasetSpec(inputs=("x",), target="y", batch_size=6)
    arrays = {"x": torch.randn(12, 2), "y": torch.arange(12) % 3}
    loss = LossSpec(name="cross_entropy")
    flat = Problem.load(Alike(), {}, arrays, data, loss, dtype=Dtype.FLOAT64)
    with pytest.raises(CurvatureUnverified, match="the loss is constant in these"):
        build(flat, OperatorSpec(), budget_bytes=1 << 20)
