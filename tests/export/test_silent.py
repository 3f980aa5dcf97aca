"""What must not pass without a word: losses and modules that mean something else.

Each is refused with what to write instead; what is accepted is compared with torch.
"""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from support.differences import draw, labels, seeded  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd.graph.evaluate import evaluate  # noqa: E402

N = 7
X, Y = draw(N, 4), labels(3, N)


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


class Net(nn.Module):
    """Two layers, and something after them."""

    def __init__(self, after=lambda z: z, **attributes):
        super().__init__()
        self.a, self.b, self.after = nn.Linear(4, 5), nn.Linear(5, 3), after
        vars(self).update(attributes)

    def forward(self, x):
        z = self.b(torch.tanh(self.a(x)))
        return self.after(z)


def net(*args, **attributes):
    return seeded(lambda: Net(*args, **attributes))


def summed(parameters):
    return sum(p.square().sum() for p in parameters)


NET = net()
HELD = {
    "all": (
        lambda z, y: F.cross_entropy(z, y) + 0.1 * summed(NET.parameters()),
        r"say weight_decay=0\.2 instead",
    ),
    "weights": (
        lambda z, y: F.cross_entropy(z, y) + 0.1 * summed([NET.a.weight, NET.b.weight]),
        r"say weight_decay=\{'a\.weight': 0\.2, 'b\.weight': 0\.2\} instead",
    ),
    "of a sum": (
        lambda z, y: z.square().sum() + 0.5 * NET.b.bias.square().sum(),
        r"say weight_decay=\{'b\.bias': 1\.0\} instead",
    ),
    "lengths": (
        lambda z, y: F.cross_entropy(z, y) + NET.a.weight.norm(),
        "out of the loss; weight_decay= adds.*Another penalty is yours to add",
    ),
    "absolute values": (
        lambda z, y: F.cross_entropy(z, y) + NET.a.weight.abs().sum(),
        "Another penalty is yours",
    ),
    "without derivative": (
        lambda z, y: F.cross_entropy(z, y) + NET.a.weight.detach().square().sum(),
        "holds a.weight, which is trained",
    ),
    "data": (
        lambda z, y: F.cross_entropy(z, y) + NET.a.weight.data.square().sum(),
        "holds a.weight, which is trained",
    ),
    "a module": (
        lambda z, y: F.cross_entropy(z, y) + NET(X).square().mean(),
        r"holds a\.bias, a\.weight, b\.bias, b\.weight.*Another penalty",
    ),
}


@pytest.mark.parametrize(("loss", "match"), HELD.values(), ids=HELD)
def test_a_loss_that_holds_parameters_is_refused_with_what_to_say(client, loss, match):
    with pytest.raises(curvd.InvalidSpec, match=match) as refusal:
        client.session_for(NET, loss, (X, Y), batch_size=3)
    assert "weight" in str(refusal.value)


def test_what_a_refusal_says_of_a_penalty_is_the_penalised_objective(client):
    data, loss = (X, Y), HELD["all"][0]
    options = {"batch_size": 3, "weight_decay": 0.2}
    with client.session_for(NET, nn.CrossEntropyLoss(), data, **options) as session:
        value, gradient = session.gradient()
    want = torch.autograd.grad(loss(NET(X), Y), list(NET.parameters()))
    assert value == pytest.approx(loss(NET(X), Y).item(), rel=1e-12)
    flat = nn.utils.parameters_to_vector([row.contiguous() for row in want])
    np.testing.assert_allclose(gradient, flat, rtol=1e-9)


def test_a_loss_that_holds_what_is_trained_is_refused_without_a_model():
    with pytest.raises(curvd.InvalidSpec, match=r"a tensor of shape \[5, 4\]"):
        curvd.export_loss(HELD["all"][0], NET(X), Y)


def own(backward):
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return backward(g)

    return Own.apply


def hooked(hook):
    def transform(z):
        if z.requires_grad:
            z.register_hook(hook)
        return z

    return transform


class Later:
    """Scales its result once the loss was captured: a function of what happened before."""

    def __init__(self):
        self.calls, self.before = 0, math.inf

    def begin(self, export):
        """Count the calls of an export that compares nothing."""
        export()
        self.calls, self.before = 0, self.calls + 1

    def __call__(self, z):
        self.calls += 1
        return z * (2.0 if self.calls > self.before else 1.0)


@pytest.mark.parametrize(
    "transform",
    [
        own(lambda g: g * 2),
        own(lambda g: g.clamp(-2, 2)),
        hooked(lambda g: g * 0.9),
        Later(),
    ],
)
def test_a_loss_with_a_gradient_of_its_own_is_refused(transform):
    z, y = draw(N, 3), draw(N, 3, seed=2)

    def loss(outputs, targets):
        return (30 * transform(outputs) - targets).square().mean()

    if isinstance(transform, Later):
        transform.begin(lambda: curvd.export_loss(loss, z, y, check=False))
    with pytest.raises(curvd.GradientMismatch, match="the loss returns"):
        curvd.export_loss(loss, z, y)
    assert curvd.export_loss(loss, z, y, check=False).graph


@pytest.mark.parametrize("cut", [torch.detach, lambda z: z.data])
def test_a_loss_without_a_derivative_is_refused(client, cut):
    with pytest.raises(curvd.GradientMismatch, match="no derivative in the outputs"):
        client.session_for(
            NET, lambda z, y: F.cross_entropy(cut(z), y), (X, Y), batch_size=3
        )


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (
            lambda z, y: (z * float(y[0] >= 0)).square().sum(),
            r"loss \(test_silent\.py:\d+ in <lambda>\).*float",
        ),
        (
            lambda z, y: (z * y.numpy()[0] ** 0).square().sum(),
            "array of numpy.*torch's operators",
        ),
    ],
)
def test_a_loss_that_cannot_be_traced_is_refused_with_its_line(match, loss):
    with pytest.raises(curvd.InvalidGraph, match=match):
        curvd.export_loss(loss, NET(X), Y, normaliser="sum")


def test_a_loss_that_leaves_targets_out_is_no_mean_over_data_points(client):
    y = Y.clone()
    y[5] = -100  # none of the first

    def masked(z, y):
        return F.cross_entropy(z, y, ignore_index=-100)

    with pytest.raises(curvd.InvalidSpec, match=r"neither a mean nor a sum.*\(sum, w"):
        client.session_for(NET, masked, (X, y), batch_size=3)
    named = nn.CrossEntropyLoss(ignore_index=-100)
    with client.session_for(NET, named, (X, y), batch_size=3) as session:
        assert session.gradient()[0] == pytest.approx(masked(NET(X), y).item())


def test_a_loss_that_weighs_a_class_that_is_rare_is_no_mean_over_data_points(client):
    weight = torch.tensor([1.0, 1.0, 5.0]).double()
    y = torch.tensor([0, 1, 0, 1, 0, 2, 0])
    with pytest.raises(curvd.InvalidSpec, match="neither a mean nor a sum"):
        client.session_for(
            NET, lambda z, y: F.cross_entropy(z, y, weight), (X, y), batch_size=3
        )


MIXING = {
    "centred": lambda z: z - z.mean(0),
    "expanded": lambda z: z.mean().expand(z.shape[0], 3),
    "reversed": lambda z: z.flip(0),
    "softmax": lambda z: z.softmax(0),
    "attention": lambda z: (z @ z.T).softmax(1) @ z,
    "sorted": lambda z: z.sort(0).values,
}


@pytest.mark.parametrize("after", MIXING.values(), ids=MIXING)
def test_rows_that_depend_on_other_data_points_must_be_asked_for(client, after):
    module, y = net(after), draw(N, 3, seed=5)
    with pytest.raises(
        curvd.InvalidSpec, match=r"other data points.*mode='batch_statistics'"
    ):
        client.session_for(module, nn.MSELoss(), (X, y), batch_size=4)
    options = {"batch_size": 4, "mode": "batch_statistics"}
    with client.session_for(module, nn.MSELoss(), (X, y), **options) as session:
        value = session.gradient()[0]
    parts = [F.mse_loss(module(X[s]), y[s]).item() for s in (slice(4), slice(4, 7))]
    assert value == pytest.approx((4 * parts[0] + 3 * parts[1]) / 7, rel=1e-12)


def test_rows_are_independent_on_the_server_too(client):
    exported = curvd.export(net(MIXING["centred"]), X, check=False)
    model = client.register_model(exported)
    data = {"x": X, "y": draw(N, 3, seed=5)}
    for batch_size in (1, 2, 4):
        dataset = client.register_dataset(
            data, inputs="x", target="y", batch_size=batch_size
        )
        with pytest.raises(curvd.InvalidSpec, match="other data points"):
            client.create_session(model, dataset, loss="mse")


class Listed(nn.Module):
    """Its layers are in a list, where no parameter is found."""

    def __init__(self):
        super().__init__()
        self.layers, self.out = [nn.Linear(4, 3).double()], nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.layers[0](x).tanh())


class Scaled(Net):
    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Listed, r"\[3, 4\]"),
        (lambda: Scaled(scale=torch.ones(3).double().requires_grad_()), r"\[3\]"),
    ],
)
def test_what_trains_and_is_no_parameter_is_refused(make, shape):
    module = seeded(make)
    with pytest.raises(curvd.InvalidSpec, match=f"not among its parameters.*{shape}"):
        curvd.export(module, X)
    assert all(p.grad is None for p in module.parameters())


def test_the_gradients_of_others_are_left_alone():
    scale = torch.ones(3).double().requires_grad_()
    scale.grad = torch.full_like(scale, 5.0)
    with pytest.raises(curvd.InvalidSpec, match="not among its parameters"):
        curvd.export(net(lambda z: z * scale), X)
    assert scale.grad.eq(5.0).all()


def alias_in_a_buffer():
    module = net()
    module.register_buffer("copy", module.a.weight.data[1:])
    return module


def alias_in_the_code():
    module = net()
    view = module.b.bias.detach()
    module.after = lambda z: z * view
    return module


def alias_of_another():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    module[2].weight.data = module[0].weight.data
    return module


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (alias_in_a_buffer, r"'a\.weight' and 'copy' share memory"),
        (alias_in_the_code, r"'b\.bias' and '.*' share memory"),
        (alias_of_another, r"'2\.weight' and '0\.weight' share memory.*ties them"),
    ],
)
def test_memory_that_trains_under_one_of_two_names_is_refused(make, match):
    with pytest.raises(curvd.InvalidGraph, match=match):
        curvd.export(make(), X)


def test_parameters_that_are_parts_of_one_vector_are_fine(client):
    module = net()
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(vector, module.parameters())
    options = {"batch_size": 3}
    with client.session_for(
        module, nn.CrossEntropyLoss(), (X, Y), **options
    ) as session:
        assert session.layout.size == len(vector)


@pytest.mark.parametrize("threshold", [1, 6, 100])
def test_code_that_branches_on_the_batch_size_is_refused(threshold):
    for size in (len, lambda z: z.shape[0]):

        def after(z, size=size):
            return z.tanh() if size(z) > threshold else z

        with pytest.raises(
            (curvd.InvalidGraph, curvd.GradientMismatch),
            match=r"different batch|1 data",
        ):
            curvd.export(net(after), X[:1] if threshold == 1 else X)


def test_nothing_is_printed_when_a_forward_looks_at_values(capfd):
    module = net(lambda z: z.tanh() if z.sum() > 0 else z)
    with pytest.raises(curvd.InvalidGraph, match=r"test_silent\.py:.*torch\.where"):
        curvd.export(module, X)
    assert capfd.readouterr() == ("", "")


def cut_off(z):
    return z + (z.round() - z).detach()


def test_a_straight_through_estimator_is_refused_with_its_line(client):
    with pytest.raises(
        curvd.CurvatureUnverified,
        match=r"at: test_silent\.py:\d+ in forward\. .*straight-through",
    ):
        client.session_for(net(cut_off), nn.CrossEntropyLoss(), (X, Y), batch_size=3)


def test_a_sparse_gradient_is_a_gradient(client):
    def table(sparse):
        layers = nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
        return nn.Sequential(nn.Embedding(5, 4, sparse=sparse), *layers)

    x, loss, found = labels(5, N, 3), nn.CrossEntropyLoss(), []
    for sparse in (True, False):
        module = seeded(lambda sparse=sparse: table(sparse))
        with client.session_for(module, loss, (x, Y), batch_size=3) as session:
            v = np.linspace(-1, 1, session.layout.size)
            found.append(session.hessian() @ v)
    # note: not bit by bit; which plan answers depends on how busy the machine is.
    np.testing.assert_allclose(*found, rtol=1e-12, atol=1e-15)


def test_an_index_out_of_range_is_a_refusal(client):
    module = seeded(lambda: nn.Sequential(nn.Embedding(5, 4), nn.Flatten()))
    x = labels(5, N, 1)
    for row in (0, 4):
        x[row] = 9
        with pytest.raises(curvd.CurvdError, match=r"index out of range") as refusal:
            client.session_for(module, nn.MSELoss(), (x, X), batch_size=3)
        assert not isinstance(refusal.value, curvd.Internal)
        x[row] = 0


class Cached(nn.Module):
    """Computes something from a parameter at its first call only."""

    def __init__(self):
        super().__init__()
        self.root, self.layer = nn.Parameter(torch.rand(4, 4)), nn.Linear(4, 2)
        self.kept = {}

    def forward(self, x):
        if "exp" not in self.kept:
            self.kept["exp"] = self.root.exp()
        return self.layer(x @ self.kept["exp"])


def test_what_was_computed_from_a_parameter_before_is_said_to_be_so():
    with pytest.raises(
        curvd.errors.GradientMismatch, match="a cache that an earlier call filled"
    ):
        curvd.export(Cached().double().eval(), torch.rand(6, 4).double())


@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_torchs_own_backward_is_no_other_gradient(seed):
    """That of matrix_exp puts the gradient into one matrix with the parameter."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.w = nn.Linear(4, 3), nn.Parameter(0.1 * torch.randn(3, 3))

        def forward(self, x):
            return self.layer(x) @ torch.matrix_exp(self.w)

    torch.manual_seed(seed)
    module, x = Turned().double().eval(), torch.randn(12, 4).double()
    curvd.export(module, x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class TrainsOtherwise(nn.Module):
    """Does something only while it trains."""

    def __init__(self, act):
        super().__init__()
        self.first, self.last, self.act = nn.Linear(4, 5), nn.Linear(5, 2), act

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.training:
            h = self.act(h)
        return self.last(h)


def halved(h):
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient / 2)
    return h


@pytest.mark.parametrize("act", [halved, Reversed.apply], ids=["hook", "function"])
def test_gradients_of_its_own_while_it_trains_are_refused(act):
    module, x = TrainsOtherwise(act).double().train(), torch.rand(8, 4).double()
    with pytest.raises(curvd.errors.GradientMismatch, match=r"first\.weight"):
        curvd.export(module, x)
    with pytest.raises(curvd.errors.GradientMismatch, match=r"first\.weight"):
        data = x, x[:, :2]
        curvd.exported.prepare(
            module, nn.MSELoss(), data, None, None, batch_size=4, check=True
        )
    curvd.export(module.eval(), x)
    curvd.export(module.train(), x, mode="eval")
    assert module.training


def test_a_module_that_computes_something_else_while_it_trains_is_taken_as_it_is():
    module, x = (
        TrainsOtherwise(lambda h: 2 * h).double().train(),
        torch.rand(8, 4).double(),
    )
    for training, mode in ((True, None), (False, None), (True, "eval")):
        module.train(training)
        exported = curvd.export(module, x, mode=mode)
        tensors = [exported.state[t.names[0]] for t in exported.graph.tensors]
        module.train(training and mode is None)
        want = module(x)
        assert torch.allclose(evaluate(exported.graph, [x], tensors)[0], want)
