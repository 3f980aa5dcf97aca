"""What acts on few data points, on some sizes or behind a name, must not pass either.

Nothing here shows on the first data points or the last. It is refused, or it is what eager
torch computes.
"""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from support.differences import draw, labels, seeded  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.modules import module as hooks_of_all  # noqa: E402

import curvd  # noqa: E402
from curvd.exported import prepare  # noqa: E402
from curvd.graph import proof  # noqa: E402
from curvd.graph.examples import scattered, spread, telling  # noqa: E402

N, SIZE = 40, 4
X, Y = draw(N, 4), draw(N, 3)
X[21] = torch.tensor([30.0, -20.0, 25.0, 10.0])
CLASSES = labels(3, N)
TOKENS = torch.arange(N) % 5
TOKENS[22] = 5
OUTLIER = Y.clone()
OUTLIER[21] = 300.0


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def exported(module, loss, data, size=SIZE):
    return prepare(module, loss, data, None, None, batch_size=size, check=True)


class OfLarge(torch.autograd.Function):
    """The identity, whose backward halves the gradient of what is large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return torch.where(ctx.saved_tensors[0].abs() > 8, 0.5 * g, g)


def hooked(h):
    large = h.detach().abs() > 8
    if h.requires_grad:
        h.register_hook(lambda g: torch.where(large, 0.5 * g, g))
    return h


def hooked_node(h):
    large = h.detach().abs() > 8
    if h.requires_grad:
        h.grad_fn.register_prehook(lambda gs: (torch.where(large, 0.5 * gs[0], gs[0]),))
    return h


class Outliers(nn.Module):
    """Does something to the gradients of large activations."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 5), nn.Linear(5, 3), between

    def forward(self, x):
        return self.b(torch.tanh(0.2 * self.between(self.a(x))))


class Rare(nn.Module):
    """Has no gradient at one token."""

    def __init__(self):
        super().__init__()
        self.table, self.b = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        class Cut(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 1

            @staticmethod
            def backward(ctx, g):
                return torch.where((tokens == 5)[:, None], 0 * g, g)

        return self.b(torch.tanh(Cut.apply(self.table(tokens))))


@pytest.mark.parametrize("between", [OfLarge.apply, hooked, hooked_node])
def test_a_gradient_that_is_another_at_an_outlier_only(between):
    with pytest.raises(curvd.GradientMismatch, match="data points"):
        exported(seeded(lambda: Outliers(between)), nn.MSELoss(), (X, Y))


def test_a_gradient_that_is_another_at_a_rare_token_only():
    with pytest.raises(curvd.GradientMismatch, match=r"table\.weight"):
        exported(seeded(Rare), nn.CrossEntropyLoss(), (TOKENS, CLASSES))


def test_an_outlier_in_many_data_points_is_found():
    many = draw(5000, 4)
    many[3123] *= 40
    with pytest.raises(curvd.GradientMismatch):
        exported(
            seeded(lambda: Outliers(hooked)), nn.MSELoss(), (many, draw(5000, 3)), 64
        )


def linear():
    return seeded(lambda: nn.Linear(4, 3))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.mse_loss(z, y) + 0.1 * z.mean(0).square().sum(),
        lambda z, y: F.mse_loss(z, y) + 1e-5 * z.mean(0).square().sum(),
        lambda z, y: F.mse_loss(z, y) + 0.1 * (z.T @ z / len(z)).square().mean(),
        lambda z, y: F.mse_loss(z, y) + 0.1 * z.var(0, unbiased=False).sum(),
        lambda z, y: F.mse_loss(z, y) + 0.1 * (z @ z.T).square().mean(),
    ],
)
@pytest.mark.parametrize("targets", [Y, OUTLIER], ids=["usual", "one is large"])
def test_a_term_that_joins_data_points(loss, targets):
    with pytest.raises(curvd.InvalidSpec, match="neither a mean nor a sum"):
        exported(linear(), loss, (X, targets))


def test_a_factor_that_one_large_target_decides():
    def loss(z, y):
        return F.mse_loss(z, y) / (1 + (y.abs().max() > 100))

    with pytest.raises(curvd.InvalidSpec, match="neither a mean nor a sum"):
        exported(linear(), loss, (X, OUTLIER))


@pytest.mark.parametrize("zero", [False, True])
def test_a_term_that_joins_data_points_where_all_outputs_are_alike(zero):
    module = linear()
    if zero:
        nn.init.zeros_(module.weight)
    loss = lambda z, y: F.mse_loss(z, y) + 0.1 * z.mean(0).square().sum()  # noqa: E731
    with pytest.raises(curvd.InvalidSpec, match="neither a mean nor a sum"):
        exported(module, loss, (X, Y))


def test_a_loss_that_is_another_at_the_size_of_the_session():
    def loss(z, y):
        return F.cross_entropy(z, y) * (2.0 if len(z) == N else 1.0)

    with pytest.raises(
        curvd.GradientMismatch, match=f"the loss .* with {N} data points"
    ):
        exported(linear(), loss, (X, CLASSES), N)


LOSSES = [
    (nn.MSELoss(), Y),
    (nn.CrossEntropyLoss(), CLASSES),
    (nn.BCEWithLogitsLoss(), (Y > 0).double()),
    (nn.SmoothL1Loss(), Y),
    (nn.NLLLoss(), CLASSES),
]


@pytest.mark.parametrize(("loss", "targets"), LOSSES, ids=lambda x: type(x).__name__)
def test_hooks_on_all_modules_that_change_a_loss_of_torch(loss, targets):
    def twice(module, given, result):
        return 2 * result if module is loss else None

    def steeper(module, given, made):
        return tuple(5 * g for g in given if g is not None) if module is loss else None

    assert exported(linear(), loss, (X, targets)).loss.name
    for add, hook in (
        (hooks_of_all.register_module_forward_hook, twice),
        (hooks_of_all.register_module_full_backward_hook, steeper),
    ):
        handle = add(hook)
        try:
            with pytest.raises(curvd.GradientMismatch):
                exported(linear(), loss, (X, targets))
        finally:
            handle.remove()


def test_a_function_of_torch_in_whose_place_is_another(monkeypatch):
    original = F.mse_loss
    monkeypatch.setattr(F, "mse_loss", lambda z, y, **more: 7 * original(z, y, **more))
    with pytest.raises(curvd.GradientMismatch, match="the loss"):
        exported(linear(), nn.MSELoss(), (X, Y))


def frozen():
    net = nn.Sequential(
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    )
    for layer in (net[1], net[3]):
        layer.running_mean.add_(0.3)
        layer.running_var.mul_(2.0)
    net.train()
    net[1].eval()
    return net


def test_layers_that_are_frozen_beside_others_that_train_keep_their_statistics(client):
    module = seeded(frozen)
    session = client.session_for(
        module,
        nn.CrossEntropyLoss(),
        (X, CLASSES),
        batch_size=N,
        dtype="F64",
        mode="batch_statistics",
    )
    loss, gradient = session.gradient()
    total = F.cross_entropy(module(X), CLASSES)
    parameters = list(module.parameters())
    rows = torch.autograd.grad(total, parameters, create_graph=True)
    want = torch.cat([row.reshape(-1) for row in rows])
    assert loss == pytest.approx(total.item(), rel=1e-10)
    np.testing.assert_allclose(gradient, want.detach(), rtol=1e-8, atol=1e-10)
    v = draw(len(want))
    product = torch.autograd.grad(want @ v, parameters)
    product = torch.cat([row.reshape(-1) for row in product])
    np.testing.assert_allclose(
        session.hessian() @ v.numpy(), product, rtol=1e-7, atol=1e-9
    )


def chance(generator):
    def forward(h):
        return h + torch.randn(h.shape[-1], generator=generator, dtype=h.dtype)

    return forward


def test_what_torch_cannot_trace_is_refused_in_our_words():
    with pytest.raises(curvd.CurvdError):
        exported(
            seeded(lambda: Outliers(chance(torch.Generator()))), nn.MSELoss(), (X, Y)
        )
    with pytest.raises(curvd.CurvdError, match="ignore_index"):
        probabilities = torch.softmax(Y, 1)
        loss = nn.CrossEntropyLoss(ignore_index=1)
        exported(linear(), loss, (X, probabilities))
    with pytest.raises(curvd.CurvdError):
        exported(linear(), nn.MSELoss(), (X.to_sparse(), Y))

    def mute(x):
        with torch.inference_mode():
            return x * 2

    with pytest.raises(curvd.CurvdError):
        exported(seeded(lambda: Outliers(mute)), nn.MSELoss(), (X, Y))


def test_telling_data_points_are_the_extremes_and_the_rarest():
    assert 21 in telling([X, Y], 8)
    assert 22 in telling([TOKENS], 4)
    assert telling([X], N) == list(range(N))
    assert len(telling([TOKENS, X], 16)) == 16
    words = torch.zeros(1000, 12, dtype=torch.int64)
    words[517, 3], words[801, 7] = 40_000, 17
    assert {517, 801} <= set(telling([words], 8))
    many = torch.rand(300, 20)
    many[77, 13] = 1.5
    assert 77 in telling([many], 64)


def test_the_first_of_what_is_scattered_are_all_over_it():
    for count in (1, 2, 3, 7, 64, 1000, 4181):  # a Fibonacci number among them
        order = list(scattered(count))
        assert sorted(order) == list(range(count))
        for few in (5, 20, 50):
            seen = sorted(order[:few])
            gaps = [b - a for a, b in itertools.pairwise([0, *seen, count])]
            assert max(gaps) <= 1 + 3 * count / min(few, count)


def halved(x, rows):
    """The identity, whose gradient is halved in some rows."""

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h * 1

        @staticmethod
        def backward(ctx, g):
            return torch.where(rows[:, None], 0.5 * g, g)

    return Halved.apply(x)


class OfTheMiddle(nn.Module):
    """Has another gradient where a number of the data is in a band, at no end of it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        band = (x[:, 1] - 0.41).abs() < 0.01
        return self.last(halved(self.first(x).tanh(), band))


@pytest.mark.parametrize("size", [100, 1000])
def test_ordinary_data_points_in_the_middle_of_many_are_compared(size, monkeypatch):
    """At the cost of those from the beginning, which are as many as before."""
    monkeypatch.setattr(proof, "_SPARE_S", 0.0)
    count = 4000
    x, y = draw(count, 4), draw(count, 3)
    for t in (x, y):
        t /= 2 * t.abs().max()
        t[0], t[1], t[2] = 0.0, 1.0, -1.0  # all extremes are here
    x[:, 1] = torch.where((x[:, 1] - 0.41).abs() < 0.02, -0.41, x[:, 1])
    exported(seeded(OfTheMiddle), nn.MSELoss(), (x, y), size)
    x[1300:2700, 1] = 0.41
    with pytest.raises(curvd.GradientMismatch):
        exported(seeded(OfTheMiddle), nn.MSELoss(), (x, y), size)


class Encoding(nn.Module):
    """What transformers with an encoder and a decoder take."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, input_ids=None, decoder_input_ids=None, labels=None):
        if decoder_input_ids is None and labels is None:
            raise ValueError("You must specify exactly one of two things")
        read = labels if decoder_input_ids is None else decoder_input_ids
        return self.table(input_ids) + self.table(read)


def test_a_decoder_that_is_given_nothing_is_told_what_it_takes():
    ids = labels(5, N, 3)
    for inputs in (ids, (ids,), {"input_ids": ids}):
        with pytest.raises(curvd.InvalidSpec, match=r'"decoder_input_ids": \.\.\.'):
            exported(seeded(Encoding), None, (inputs, ids))


def test_outputs_that_a_loss_is_tried_on_are_no_repetitions():
    z = torch.softmax(draw(3, 4), 1)
    outputs, targets = spread(z, CLASSES)
    assert len(outputs) == len(targets) > 10
    assert len(outputs.unique(dim=0)) == len(outputs)
    torch.testing.assert_close(outputs.sum(1), torch.ones(len(outputs)).to(outputs))
    assert torch.equal(outputs[:3], z)
