"""Losses against torch's own on the whole dataset in one piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from server.reference import columns, error
from torch import Tensor, nn

from curvd.errors import InvalidSpec
from curvd.types import DatasetSpec, Dtype, LossName, LossSpec, OperatorSpec
from curvd_server.engine import build
from curvd_server.objective import Problem
from curvd_server.plans import Plan

N, T, C = 7, 3, 4
WEIGHTS = (0.5, 2.0, 0.0, 1.5)


class Tokens(nn.Module):
    """``[B, T] -> [B, T, C]``, or ``[B, C, T]`` as torch's cross entropy has it."""

    def __init__(self, classes_last: bool = True) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, C)
        self.last = classes_last

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.table(tokens)))
        return logits if self.last else logits.transpose(1, 2)


def load(loss: LossSpec, batch_size: int = 2, *, classes_last=True, y=None) -> Problem:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 5, (N, T), generator=g)
    if y is None:
        y = torch.randint(0, C, (N, T), generator=g)
        y[0, 0], y[3], y[6, 1:] = -7, -7, -7
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Tokens(classes_last)
    data = DatasetSpec(inputs=("x",), target="y", batch_size=batch_size)
    return Problem.load(module, {}, {"x": x, "y": y}, data, loss, dtype=Dtype.FLOAT64)


CROSS_ENTROPIES = [
    {"reduction": reduction, "class_weights": weights, "label_smoothing": smoothing}
    for reduction in ("mean", "sum")
    for weights in (None, WEIGHTS)
    for smoothing in (0.0, 0.1)
]


def of(options: dict) -> LossSpec:
    return LossSpec(name=LossName.CROSS_ENTROPY, ignore_index=-7, **options)


def whole(problem: Problem) -> tuple[Tensor, Tensor]:
    outputs = [problem.outputs(problem.parameters, b) for b in problem.data]
    return torch.cat(outputs), torch.cat([b.targets for b in problem.data])


@pytest.mark.parametrize("options", CROSS_ENTROPIES)
@pytest.mark.parametrize("classes_last", [True, False])
def test_cross_entropy_is_torchs_on_one_big_batch(options: dict, classes_last: bool):
    problem = load(of(options), classes_last=classes_last)
    z, y = whole(problem)
    weights = options["class_weights"]
    want = F.cross_entropy(
        z.transpose(1, 2) if classes_last else z,
        y,
        weight=None if weights is None else torch.tensor(weights).double(),
        ignore_index=-7,
        reduction=options["reduction"],
        label_smoothing=options["label_smoothing"],
    )
    assert problem.gradient()[0] == pytest.approx(want.item(), rel=1e-13)


@pytest.mark.parametrize("options", CROSS_ENTROPIES)
@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_the_cut_into_batches_changes_rounding_only(options: dict, kind: str):
    spec, plan = OperatorSpec(kind=kind), Plan("double_backward")
    V = columns(load(of(options)), 1)
    products = [
        build(load(of(options), size), spec, budget_bytes=2**20, plan=plan).apply(V)
        for size in (1, 2, N)
    ]
    assert error(products[0], products[2]) < 1e-12
    assert error(products[1], products[2]) < 1e-12


def test_probabilities_are_torchs():
    y = torch.rand(N, C, dtype=torch.float64).softmax(1)
    x = torch.randn(N, 2)
    spec = LossSpec(name="cross_entropy", class_weights=WEIGHTS, label_smoothing=0.2)
    data = DatasetSpec(inputs=("x",), target="y", batch_size=3)
    problem = Problem.load(
        nn.Linear(2, C), {}, {"x": x, "y": y}, data, spec, dtype=Dtype.FLOAT64
    )
    z, _ = whole(problem)
    weight = torch.tensor(WEIGHTS).double()
    want = F.cross_entropy(z, y, weight=weight, label_smoothing=0.2)
    assert problem.gradient()[0] == pytest.approx(want.item(), rel=1e-13)
    hessian, ggn = (
        build(problem, OperatorSpec(kind=kind), budget_bytes=0)
        for kind in ("hessian", "ggn")
    )
    V = columns(problem, 2)
    assert error(ggn.apply(V), hessian.apply(V)) < 1e-12  # the model is linear


@pytest.mark.parametrize("name", ["mse", "bce_with_logits"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_elementwise_losses_are_torchs(name: str, reduction: str):
    weights = (0.5, 1.0, 2.0) if name == "bce_with_logits" else None
    spec = LossSpec(name=name, reduction=reduction, class_weights=weights)
    g = torch.Generator().manual_seed(0)
    arrays = {"x": torch.randn(N, 2, generator=g), "y": torch.rand(N, 3, generator=g)}
    data = DatasetSpec(inputs=("x",), target="y", batch_size=3)
    problem = Problem.load(nn.Linear(2, 3), {}, arrays, data, spec, dtype=Dtype.FLOAT64)
    z, y = whole(problem)
    if name == "mse":
        want = F.mse_loss(z, y, reduction=reduction)
    else:
        pos = torch.tensor(weights).double()
        want = F.binary_cross_entropy_with_logits(
            z, y, pos_weight=pos, reduction=reduction
        )
    assert problem.gradient()[0] == pytest.approx(want.item(), rel=1e-13)


def test_targets_beyond_the_classes_are_refused_with_the_remedy():
    y = torch.full((N, T), -1)
    with pytest.raises(InvalidSpec, match=r"\[-1, -1\].* 4 classes; set ignore_"):
        load(LossSpec(name="cross_entropy"), y=y)


def test_a_dataset_of_padding_alone_is_refused():
    with pytest.raises(InvalidSpec, match="no target counts"):
        load(of({}), y=torch.full((N, T), -7))


def test_shapes_that_do_not_fit_are_refused_with_both_shapes():
    with pytest.raises(InvalidSpec, match=r"\(2, 3, 4\) and targets \(2, 5\)"):
        load(LossSpec(name="cross_entropy"), y=torch.zeros(N, 5, dtype=torch.int64))
    with pytest.raises(InvalidSpec, match=r"\(3, 4\) and \(3,\)"):
        load(LossSpec(name="mse"), y=torch.zeros(N, 3))


def test_class_weights_of_the_wrong_number_are_refused():
    spec = LossSpec(name="cross_entropy", class_weights=(1.0, 2.0))
    with pytest.raises(InvalidSpec, match="2 entries for 4 classes"):
        load(spec, y=torch.zeros(N, T, dtype=torch.int64))
