"""Losses of several outputs, outputs by name, and losses that modules compute themselves.

The truth is eager torch in float64: the caller's loss on what the module returns, its
gradient, central differences or a second backward of that, and J^T H J of the outputs
that are laid side by side.
"""

import collections
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from support.differences import library  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402

# With CURVD_TEST_DEVICES workers compute, which time their plans all the same.
pytestmark = pytest.mark.usefixtures("untimed")

N = 6
Named = collections.namedtuple("Named", "mean log_var")


@dataclasses.dataclass
class Fields:
    mean: torch.Tensor
    log_var: torch.Tensor
    note: str = "text"


KINDS = {
    "tuple": lambda m, v: (m, v),
    "list": lambda m, v: [m, v],
    "dict": lambda m, v: {"mean": m, "log_var": v},
    "namedtuple": Named,
    "dataclass": Fields,
    "nested": lambda m, v: {"mean": m, "rest": (None, [v])},
}
PARTS = {
    "tuple": lambda out: (out[0], out[1]),
    "list": lambda out: (out[0], out[1]),
    "dict": lambda out: (out["mean"], out["log_var"]),
    "namedtuple": lambda out: (out.mean, out.log_var),
    "dataclass": lambda out: (out.mean, out.log_var),
    "nested": lambda out: (out["mean"], out["rest"][1][0]),
}


class TwoHeads(nn.Module):
    """A mean [B, 2] and the logarithm of one variance [B]."""

    def __init__(self, kind):
        super().__init__()
        self.kind = KINDS[kind]
        self.body, self.mean = nn.Linear(3, 4), nn.Linear(4, 2)
        self.log_var = nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.kind(self.mean(h), self.log_var(h)[:, 0])


def gaussian(mean, log_var, y):
    away = (mean - y).square().sum(1)
    return (0.5 * away * torch.exp(-log_var) + log_var).mean()


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def net(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (
            TwoHeads(kind).double(),
            torch.randn(N, 3).double(),
            torch.randn(N, 2).double(),
        )


def gradient(module, objective):
    trained = [p for p in module.parameters() if p.requires_grad]
    rows = torch.autograd.grad(objective(), trained, allow_unused=True)
    pairs = zip(rows, trained, strict=True)
    return torch.cat([
        (torch.zeros_like(p) if r is None else r).flatten() for r, p in pairs
    ])


def product(module, objective, v, step=1e-5):
    trained = [p for p in module.parameters() if p.requires_grad]
    at = nn.utils.parameters_to_vector(trained).detach()
    rows = []
    for h in (step, -step):
        nn.utils.vector_to_parameters(at + h * v, trained)
        rows.append(gradient(module, objective))
    nn.utils.vector_to_parameters(at, trained)
    return (rows[0] - rows[1]) / (2 * step)


def check(session, module, objective):
    value, found = session.gradient()
    want = gradient(module, objective)
    v = torch.randn(len(want), generator=torch.Generator().manual_seed(4)).double()
    assert value == pytest.approx(float(objective().detach()), rel=1e-6)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-8)
    got, truth = session.hessian() @ v, product(module, objective, v)
    assert float((got - truth).norm() / truth.norm()) < 1e-6
    return v


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_takes_all_outputs_as_the_module_returns_them(client, kind):
    module, x, y = net(kind)
    loss = lambda out, y: gaussian(*PARTS[kind](out), y)  # noqa: E731
    options = {"batch_size": 4, "output": ...}
    with client.session_for(module, loss, (x, y), **options) as session:
        v = check(session, module, lambda: loss(module(x), y))
        G = session.ggn() @ v
    names = [n for n, _ in module.named_parameters()]
    at = tuple(p.detach() for p in module.parameters())

    def outputs(*parts):
        out = torch.func.functional_call(
            module, dict(zip(names, parts, strict=True)), x
        )
        mean, log_var = PARTS[kind](out)
        return torch.cat([mean, log_var[:, None]], 1)

    rows = torch.autograd.functional.jacobian(outputs, at)
    J = torch.cat([row.reshape(3 * N, -1) for row in rows], 1)
    inner = lambda z: gaussian(z[:, :2], z[:, 2], y)  # noqa: E731
    H = torch.func.hessian(inner)(outputs(*at)).reshape(3 * N, 3 * N)
    np.testing.assert_allclose(G, J.T @ H @ (J @ v), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("tuple", [0, 1]),
        ("dict", ["mean", "log_var"]),
        ("namedtuple", ("mean", "log_var")),
        ("namedtuple", (0, "log_var")),
        ("dataclass", ["mean", "log_var"]),
    ],
)
def test_a_loss_takes_the_outputs_that_are_named(client, kind, output):
    module, x, y = net(kind)
    loss = lambda out, y: gaussian(*out, y)  # noqa: E731
    whole = lambda: gaussian(*PARTS[kind](module(x)), y)  # noqa: E731
    options = {"batch_size": 4, "output": output}
    with client.session_for(module, loss, (x, y), **options) as session:
        check(session, module, whole)


@pytest.mark.parametrize("kind", ["dict", "namedtuple", "dataclass"])
def test_one_output_is_found_by_name(client, kind):
    module, x, y = net(kind)
    options = {"batch_size": 4, "output": "mean"}
    with client.session_for(module, nn.MSELoss(), (x, y), **options) as session:
        assert session.info.loss.name == "mse"
        check(session, module, lambda: F.mse_loss(PARTS[kind](module(x))[0], y))


def test_a_sum_and_its_weight_of_several_outputs(client):
    module, x, y = net("tuple")

    def loss(out, y):
        weight = (y[:, 0] > 0).to(y.dtype)
        each = (out[0] - y).square().sum(1) * torch.exp(-out[1]) + out[1]
        return (each * weight).sum(), weight.sum()

    def whole():
        total, weight = loss(module(x), y)
        return total / weight

    with client.session_for(module, loss, (x, y), batch_size=4, output=...) as session:
        check(session, module, whole)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        z = self.out(x)
        return z, z.argmax(1)


def test_outputs_that_are_no_real_numbers_are_refused(client):
    x, y = torch.randn(N, 3), torch.randn(N, 2)
    match = r"output\[1\] is torch\.int64 of shape .* name those that it takes"
    with pytest.raises(curvd.InvalidSpec, match=match):
        client.session_for(
            Counts(), lambda o, y: (o[0] - y).square().mean(), (x, y),
            batch_size=4, output=...,
        )  # fmt: skip
    with pytest.raises(curvd.InvalidSpec, match="has no output 'nothing'"):
        client.session_for(
            Counts(), nn.MSELoss(), (x, y), batch_size=4, output=["nothing"]
        )


def gpt2():
    transformers = library("transformers")
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=6,
        n_embd=4,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = torch.randint(1, 11, (N, 5), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:2, -1] = -100
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids}, labels


def bert(heads, labels, **more):
    transformers = library("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=5, max_position_embeddings=6, **more,
    )  # fmt: skip
    ids = torch.randint(1, 11, (N, 5), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return getattr(transformers, heads)(config), inputs, labels


def whole(*shape):
    return torch.randint(0, 3, (N, *shape), generator=torch.Generator().manual_seed(2))


OWN = {
    "causal": gpt2,
    "classes": lambda: bert("BertForSequenceClassification", whole(), num_labels=3),
    "tokens": lambda: bert("BertForTokenClassification", whole(5), num_labels=3),
    "one number": lambda: bert(
        "BertForSequenceClassification", whole() / 2.0, num_labels=1
    ),
    "several labels": lambda: bert(
        "BertForSequenceClassification",
        (whole(3) > 1).float(),
        num_labels=3,
        problem_type="multi_label_classification",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_module_brings_its_own_loss(client, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, inputs, labels = OWN[name]()
    module = module.double().eval()
    labels = labels.double() if labels.is_floating_point() else labels
    batch = {**inputs, "labels": labels}
    with client.session_for(module, None, batch, batch_size=4) as session:
        value, found = session.gradient()
        v = torch.randn(len(found), generator=torch.Generator().manual_seed(4)).double()
        got = session.hessian() @ v
    # Their losses compute in float32 what differences would divide by a step.
    trained = list(module.parameters())
    total = module(**batch).loss
    rows = torch.autograd.grad(total, trained, create_graph=True)
    want = torch.cat([row.flatten() for row in rows])
    rows, want = torch.autograd.grad(want @ v, trained), want.detach()
    truth = torch.cat([row.flatten() for row in rows])
    assert value == pytest.approx(float(total.detach()), rel=1e-6)
    assert float((torch.as_tensor(found) - want).norm() / want.norm()) < 1e-6
    assert float((got - truth).norm() / truth.norm()) < 1e-6


class Own(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.out, self.own = nn.Linear(3, 3), loss

    def forward(self, x, labels=None):
        z = self.out(x)
        return {
            "logits": z,
            "loss": self.own(z, labels) if labels is not None else None,
        }


def test_an_own_loss_that_is_not_known_is_refused(client):
    x = torch.randn(N, 3)
    strange = Own(lambda z, y: F.cross_entropy(z, y) + z.square().mean())
    with pytest.raises(curvd.InvalidSpec, match="own loss is that of none of these"):
        client.session_for(strange, None, (x, whole()), batch_size=4)
    with pytest.raises(curvd.InvalidSpec, match="no scalar `loss` when it is called"):
        client.session_for(Own(lambda z, y: None), None, (x, whole()), batch_size=4)
    with pytest.raises(curvd.InvalidSpec, match="has the targets as 'labels'"):
        client.session_for(strange, None, {"x": x}, batch_size=4)
