"""Losses against torch's own on the whole dataset in one piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.reference import (
    central_difference,
    columns,
    dense_empirical_fisher,
    dense_ggn,
    error,
)
from torch import Tensor, nn

from curvd.contract.enums import Dtype, LossName
from curvd.contract.specs import DatasetSpec, LossSpec, OperatorSpec
from curvd.errors import InvalidSpec
from curvd_server.engine.building import build
from curvd_server.engine.objective.losses import Loss
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.operators.linearize import MODES
from curvd_server.engine.tuning.plan import Plan

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


@pytest.mark.parametrize("name", ["cross_entropy", "nll"])
@pytest.mark.parametrize("rest", [(4,), (4, 4)], ids=str)
def test_shapes_that_do_not_say_where_the_classes_are_are_refused(name, rest):
    outputs = torch.zeros(2, 4, *rest)
    targets = torch.zeros(2, *rest, dtype=torch.int64)
    loss = Loss.of(LossSpec(name=name), torch.float64, torch.device("cpu"))
    with pytest.raises(InvalidSpec, match=r"second axis or in the last.*session_for"):
        loss.check(outputs, targets)
    loss.check(outputs[:, :3], targets)  # torch's axis alone fits
    loss.check(outputs[..., :3], targets) if len(rest) == 1 else None
    if name == "cross_entropy":
        shifted = LossSpec(name=name, shift=True)
        Loss.of(shifted, torch.float64, torch.device("cpu")).check(outputs, targets)


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


@pytest.mark.parametrize("name", ["mse", "bce_with_logits", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_elementwise_losses_are_torchs(name: str, reduction: str):
    weights = (0.5, 1.0, 2.0) if name == "bce_with_logits" else None
    options = {"beta": 0.7} if name == "smooth_l1" else {}
    spec = LossSpec(name=name, reduction=reduction, class_weights=weights, **options)
    g = torch.Generator().manual_seed(0)
    arrays = {"x": torch.randn(N, 2, generator=g), "y": torch.rand(N, 3, generator=g)}
    data = DatasetSpec(inputs=("x",), target="y", batch_size=3)
    problem = Problem.load(nn.Linear(2, 3), {}, arrays, data, spec, dtype=Dtype.FLOAT64)
    z, y = whole(problem)
    if name == "mse":
        want = F.mse_loss(z, y, reduction=reduction)
    elif name == "smooth_l1":
        want = F.smooth_l1_loss(z, y, beta=0.7, reduction=reduction)
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


class LogTokens(Tokens):
    """Log-probabilities."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).log_softmax(-1 if self.last else 1)


def log_likelihood(batch_size: int = 2, **options) -> Problem:
    like = load(of({}), batch_size)
    y = torch.cat([b.targets for b in like.data])
    x = torch.cat([b.inputs[0] for b in like.data])
    state = dict(zip(like.layout.names, like.parameters, strict=True))
    return Problem.load(
        LogTokens(options.pop("classes_last", True)),
        state,
        {"x": x, "y": y},
        DatasetSpec(inputs=("x",), target="y", batch_size=batch_size),
        LossSpec(name="nll", ignore_index=-7, **options),
        dtype=Dtype.FLOAT64,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("classes_last", [True, False])
def test_nll_is_torchs_on_one_big_batch(reduction, weights, classes_last):
    problem = log_likelihood(
        reduction=reduction, class_weights=weights, classes_last=classes_last
    )
    z, y = whole(problem)
    want = F.nll_loss(
        z.transpose(1, 2) if classes_last else z,
        y,
        weight=None if weights is None else torch.tensor(weights).double(),
        ignore_index=-7,
        reduction=reduction,
    )
    assert problem.gradient()[0] == pytest.approx(want.item(), rel=1e-13)


def test_nll_of_log_probabilities_has_the_hessian_of_cross_entropy():
    V = columns(log_likelihood(), 2)
    want = quick(load(of({})), "hessian").apply(V)
    for mode in MODES:
        assert error(quick(log_likelihood(), "hessian", mode).apply(V), want) < 1e-12
    assert error(want[0], central_difference(log_likelihood(), V[0])) < 1e-6


def test_nll_has_both_fishers_and_says_why_it_has_no_gauss_newton_matrix():
    problem = log_likelihood(class_weights=WEIGHTS)
    V = columns(problem, 2)
    empirical = quick(problem, "empirical_fisher").apply(V)
    assert error(empirical, V @ dense_empirical_fisher(problem)) < 1e-12
    # Log-probabilities are cross-entropy's logits too, and the samples are the same.
    ggn = dense_ggn(load(of({"class_weights": WEIGHTS})))
    errors = [
        error(quick(problem, "fisher", mc_samples=s).apply(V), V @ ggn)
        for s in (20, 20_000)
    ]
    assert errors[1] < min(0.03, errors[0])
    for samples in (0, 3):
        with pytest.raises(InvalidSpec, match=r"zero: use cross_entropy .* Fisher"):
            quick(problem, "ggn", mc_samples=samples)


def quick(problem: Problem, kind: str, mode: str = "double_backward", **options):
    spec = OperatorSpec(kind=kind, **options)
    return build(problem, spec, budget_bytes=2**24, plan=Plan(mode), tuning_s=0.0)


def errors_of(beta: float) -> Problem:
    g = torch.Generator().manual_seed(2)
    arrays = {"x": torch.randn(N, 2, generator=g), "y": torch.randn(N, 3, generator=g)}
    data = DatasetSpec(inputs=("x",), target="y", batch_size=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    spec = LossSpec(name="smooth_l1", beta=beta)
    return Problem.load(module, {}, arrays, data, spec, dtype=Dtype.FLOAT64)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_smooth_l1_matches_differences_and_definitions(beta: float):
    problem = errors_of(beta)
    z, y = whole(problem)
    assert 0 < ((z - y).abs() < beta).double().mean() < 1  # both of its branches
    V = columns(problem, 1)
    for kind, want in (
        ("hessian", central_difference(problem, V[0])),
        ("ggn", (V @ dense_ggn(problem))[0]),
        ("empirical_fisher", (V @ dense_empirical_fisher(problem))[0]),
    ):
        for mode in MODES:
            operator = quick(problem, kind, mode)
            assert operator.plan.mode == mode
            assert error(operator.apply(V)[0], want) < 1e-6


@pytest.mark.parametrize("kind", ["fisher", "ggn"])
def test_no_targets_are_sampled_from_smooth_l1(kind: str):
    with pytest.raises(InvalidSpec, match=r"mc_samples=2 .* smooth_l1 stands for none"):
        quick(errors_of(1.0), kind, mc_samples=2)


@pytest.mark.parametrize("classes_last", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_causal_shift_is_what_language_models_are_trained_with(
    classes_last: bool, reduction: str
):
    spec = {"shift": True, "reduction": reduction, "class_weights": WEIGHTS}
    problem = load(of(spec), classes_last=classes_last)
    y = torch.cat([b.targets for b in load(of({})).data])
    z = whole(problem)[0]
    z = z if classes_last else z.transpose(1, 2)
    want = F.cross_entropy(
        z[:, :-1].reshape(-1, C),
        y[:, 1:].reshape(-1),
        weight=torch.tensor(WEIGHTS).double(),
        ignore_index=-7,
        reduction=reduction,
    )
    assert problem.gradient()[0] == pytest.approx(want.item(), rel=1e-13)


def test_the_causal_shift_in_every_operator():
    problem = load(of({"shift": True}))
    V = columns(problem, 1)
    ggn = dense_ggn(problem)
    for kind, want in (
        ("hessian", central_difference(problem, V[0])),
        ("ggn", (V @ ggn)[0]),
        ("empirical_fisher", (V @ dense_empirical_fisher(problem))[0]),
    ):
        for mode in MODES:
            assert error(quick(problem, kind, mode).apply(V)[0], want) < 1e-6
    sampled = quick(problem, "fisher", mc_samples=20_000).apply(V)
    assert error(sampled, V @ ggn) < 0.05


def test_a_shift_needs_a_second_axis_of_class_indices():
    data = DatasetSpec(inputs=("x",), target="y", batch_size=2)
    spec = LossSpec(name="cross_entropy", shift=True)
    x = torch.randn(N, 2)
    for y, message in (
        (torch.zeros(N, dtype=torch.int64), r"shift needs targets \[N, T, ...\], got"),
        (torch.rand(N, C), "shift needs targets that are class indices"),
    ):
        with pytest.raises(InvalidSpec, match=message):
            Problem.load(nn.Linear(2, C), {}, {"x": x, "y": y}, data, spec)
    with pytest.raises(InvalidSpec, match="nll needs targets that are class indices"):
        Problem.load(nn.Linear(2, C), {}, {"x": x, "y": y}, data, LossSpec(name="nll"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nll", "label_smoothing": 0.1}, "belongs to cross_entropy, not nll"),
        ({"name": "nll", "shift": True}, "shift belongs to cross_entropy, not nll"),
        ({"name": "mse", "ignore_index": 1}, "belongs to cross_entropy and nll"),
        ({"name": "mse", "class_weights": (1.0,)}, "nll and bce_with_logits, not mse"),
        ({"name": "mse", "beta": 2.0}, "beta belongs to smooth_l1, not mse"),
        ({"name": "smooth_l1", "beta": 0.0}, "beta must be finite and above 0, got 0"),
        ({"name": "smooth_l1", "beta": float("inf")}, "beta must be finite"),
    ],
)
def test_an_option_of_another_loss_is_refused(options: dict, message: str):
    with pytest.raises(InvalidSpec, match=message):
        LossSpec(**options)
