"""Any module through the real service, against differences of the user's own module."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from support.differences import (  # noqa: E402
    BATCH,
    N,
    assert_same_outputs,
    check,
    draw,
    eager_gradient,
    labels,
    open_session,
    pass_on,
    relative,
    seeded,
)
from torch import nn  # noqa: E402

import curvd  # noqa: E402


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def test_a_multi_layer_perceptron(client):
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    check(client, module, draw(N, 4), labels(3, N))


def convolutional():
    """A net with BatchNorm whose running statistics are not those of its data."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    net[1].running_var.mul_(2.0)
    return net


@pytest.mark.parametrize("mode", [None, "eval", "batch_statistics"])
def test_batch_norm_evaluates_or_uses_the_statistics_of_the_mini_batches(client, mode):
    module = seeded(convolutional).train(mode == "batch_statistics")
    data = draw(N, 2, 4, 4), labels(3, N)
    before = module[1].running_mean.clone()
    check(client, module, *data, step=1e-6, mode=mode)
    if mode != "batch_statistics":
        assert torch.equal(before, module[1].running_mean)


def test_a_graph_that_was_exported_in_training_mode_is_not_evaluated(client):
    module = seeded(convolutional).train()
    exported = curvd.export(module, draw(N, 2, 4, 4), mode="batch_statistics")
    data = {"x": draw(N, 2, 4, 4), "y": labels(3, N)}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=BATCH)
    with pytest.raises(curvd.InvalidSpec, match=r"batch_norm.*mode='batch_statistics'"):
        client.create_session(
            client.register_model(exported), dataset, loss="cross_entropy"
        )


class Block(nn.Module):
    """The basic block of a residual net."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)])
        self.project = nn.Conv2d(inner, outer, 1, stride) if stride > 1 else None

    def forward(self, x):
        y = F.relu(self.norms[0](self.first(x)), inplace=True)
        y = self.norms[1](self.second(y))
        y += x if self.project is None else self.project(x)
        return y.relu_()


def residual():
    """ResNet-18 with narrow layers."""
    layers = [nn.Conv2d(3, 2, 3, 1, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)]
    for stage in range(4):
        outer = 2 * 2**stage
        inner = outer if stage == 0 else outer // 2
        layers += [Block(inner, outer, 1 if stage == 0 else 2), Block(outer, outer, 1)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
    )


@pytest.mark.usefixtures("untimed")
def test_a_residual_net(client):
    # note: many ReLUs; a larger step would cross kinks.
    check(client, seeded(residual).eval(), draw(N, 3, 8, 8), labels(3, N), step=1e-8)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.usefixtures("untimed")
def test_a_recurrent_net(client):
    check(client, seeded(Recurrent), draw(N, 3, 3), labels(3, N))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(
            torch.tanh(self.frozen(torch.tanh(self.mix(self.tokens(tokens)))))
        )


def test_tied_and_frozen_parameters(client):
    module = seeded(Tied)
    tokens = torch.randint(0, 6, (N, 4), generator=torch.Generator().manual_seed(4))
    check(client, module, tokens, tokens.roll(1, 1))


def test_a_full_state_dict_updates_a_session(client):
    module = seeded(Tied)
    tokens = torch.randint(0, 6, (N, 4), generator=torch.Generator().manual_seed(4))
    session = open_session(client, module, tokens, tokens)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    assert session.update_parameters(module.state_dict()) == 2
    _, gradient = session.gradient()
    parameters = [p for p in module.parameters() if p.requires_grad]
    want = eager_gradient(module, tokens, tokens, parameters, lambda z: z)
    assert relative(gradient, want.numpy()) <= 1e-12
    session.delete()


class Awkward(nn.Module):
    """Everything that has to be rewritten, at once."""

    def __init__(self):
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.table = nn.Embedding(5, 4, padding_idx=1)
        self.out = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, tokens):
        y = torch.tanh(self.normed(x)) + self.table(tokens)
        with torch.no_grad():
            scale = x.norm(dim=-1, keepdim=True)
        canvas = torch.zeros(x.shape[0], 2, 4, dtype=x.dtype)
        canvas[:, 0] = y / scale
        canvas[:, 1, 2:].add_(y[:, :2] ** 2)
        canvas += 0.1
        canvas.transpose(1, 2)[:, 0].mul_(canvas[:, 1, :2] + 2.0)
        return self.drop(self.out(torch.tanh(canvas.sum(1)).view(-1, 4)))


def test_what_has_to_be_rewritten_stays_right(client):
    tokens = torch.tensor([0, 1, 2, 1, 4])
    module = seeded(Awkward).eval()
    inputs = (draw(N, 4), tokens)
    exported = curvd.export(module, inputs)
    assert_same_outputs(exported, module, inputs)
    check(
        client, module, inputs, labels(3, N), pick=pass_on, fixed=[("table.weight", 1)]
    )


class Detached(nn.Module):
    """Its gradient is that of no function: what is detached depends on parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = torch.tanh(self.first(x))
        with torch.no_grad():
            length = y.norm(dim=-1, keepdim=True)
        return self.second(y / length)


def test_a_gradient_that_is_none_is_refused_by_parameter_name(client):
    with pytest.raises(curvd.CurvatureUnverified, match=r"first\.weight"):
        open_session(client, seeded(Detached), draw(N, 4), labels(3, N))


def test_one_export_serves_every_dtype(client):
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    inputs, targets = draw(N, 4), labels(3, N)
    exported = curvd.export(module.float(), inputs.float())
    model = client.register_model(exported)
    data = {"x": inputs, "y": targets}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=BATCH)
    products = {}
    for dtype in ("F64", "F32", "BF16"):
        session = client.create_session(
            model, dataset, loss="cross_entropy", dtype=dtype
        )
        hessian = session.hessian()
        v = np.linspace(-1, 1, session.layout.size)
        products[dtype] = hessian @ v.astype(hessian.dtype)
        session.delete()
    assert relative(products["F32"], products["F64"]) <= 1e-5
    assert relative(products["BF16"], products["F64"]) <= 5e-2


def test_the_ggn_and_many_columns_agree_with_the_builder(client):
    module = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    inputs, targets = draw(N, 4), labels(3, N)
    data = {"x": inputs, "y": targets}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=BATCH)
    models = (
        client.register_model(curvd.export(module, inputs)),
        client.register_model("mlp", {"widths": [4, 3]}, module.state_dict()),
    )
    assert models[0].graph_digest and not models[1].graph_digest
    got, want = (
        client.create_session(m, dataset, loss="cross_entropy", dtype="F64").ggn()
        @ np.eye(15)
        for m in models
    )
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_graphs_of_the_same_tensors_are_not_mistaken_for_each_other(client):
    for activation in (nn.Tanh, nn.Sigmoid, nn.GELU):
        make = functools.partial(
            lambda a: nn.Sequential(nn.Linear(4, 5), a(), nn.Linear(5, 3)), activation
        )
        check(client, seeded(make), draw(N, 4), labels(3, N))


def test_a_dataset_that_does_not_fit_the_inputs_is_refused(client):
    exported = curvd.export(nn.Linear(4, 3), torch.randn(N, 4))
    model = client.register_model(exported)
    data = {"x": np.ones((N, 5)), "y": np.zeros(N, np.int64)}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=2)
    with pytest.raises(curvd.InvalidSpec, match=r"\[4\] per data point.*of \[5\]"):
        client.create_session(model, dataset, loss="cross_entropy")


def test_a_state_of_another_module_is_refused(client):
    exported = curvd.export(nn.Linear(4, 3), torch.randn(N, 4))
    with pytest.raises(curvd.StateMismatch, match="missing: bias"):
        client.register_model(exported, state={"weight": np.ones((3, 4))})
