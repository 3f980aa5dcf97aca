"""Parameters of several types: computed in one that is named, else refused as such."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import curvd

X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Headed(nn.Module):
    """A body and a head, each in a type of its own."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5).to(body), nn.Linear(5, 2).to(head)

    def forward(self, x):
        h = torch.tanh(self.body(x.to(torch.bfloat16)))
        return self.head(h.float())


@pytest.mark.parametrize("prepared", [True, False])
def test_a_body_in_half_precision_and_a_whole_head_are_refused_as_such(prepared):
    module = Headed(torch.bfloat16, torch.float32).eval()
    with pytest.raises(
        curvd.CurvdError,
        match=r"several types \(bfloat16 as body\.w.*dtype='float32'",
    ):
        if prepared:
            data = X, X[:, :2]
            curvd.exported.prepare(
                module, nn.MSELoss(), data, None, None, batch_size=4, check=True
            )
        else:
            curvd.export(module, X)


def test_other_refusals_of_modules_of_one_type_stay_what_they_are():
    module = nn.Linear(5, 2)
    with pytest.raises(curvd.CurvdError) as refusal:
        curvd.export(module, X)
    assert "several types" not in str(refusal.value)


class Adapted(nn.Module):
    """A layer that is frozen in a narrow type, with an adapter of low rank beside it."""

    def __init__(self, inputs, outputs, body):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).to(body).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, inputs) / 2)
        self.up = nn.Parameter(torch.randn(outputs, 2) / 2)

    def forward(self, x):
        own = self.base(x.to(self.base.weight.dtype))
        beside = x.to(self.down.dtype) @ self.down.T @ self.up.T
        return own + beside.to(own.dtype)


class Tuned(nn.Module):
    """Two such layers, and a head that trains as a whole."""

    def __init__(self, body):
        super().__init__()
        self.first, self.second = Adapted(4, 5, body), Adapted(5, 3, body)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        h = self.second(torch.tanh(self.first(x)))
        return self.head(h.to(self.head.weight.dtype))


TARGETS = torch.tensor([0, 1] * 4)


def hessian(module, names, rounded=False):
    """By torch's own double backward, on a copy in float64.

    Arrays take the type of the first parameter.
    """
    wide = copy.deepcopy(module).double()
    parameters = dict(wide.named_parameters())

    def loss(flat):
        parts = flat.split([parameters[n].numel() for n in names])
        values = {
            n: p.view_as(parameters[n]) for n, p in zip(names, parts, strict=True)
        }
        given = X.to(next(module.parameters()).dtype) if rounded else X
        outputs = torch.func.functional_call(wide, values, (given.double(),))
        return nn.functional.cross_entropy(outputs, TARGETS)

    flat = torch.cat([parameters[n].detach().flatten() for n in names])
    return torch.autograd.functional.hessian(loss, flat).numpy()


@pytest.mark.parametrize(
    ("module", "arrays"),
    [
        (lambda: Tuned(torch.bfloat16), False),
        (lambda: Tuned(torch.float16), False),
        (lambda: Tuned(torch.bfloat16).to(torch.float16), True),
        (lambda: Tuned(torch.bfloat16), True),
    ],
    ids=["bfloat16", "float16", "all float16", "arrays"],
)
def test_a_named_type_that_holds_all_of_them_computes_the_same_function(
    live_target, module, arrays
):
    torch.manual_seed(3)
    net = module().eval()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    inputs = X.numpy() if arrays else X
    with curvd.connect(live_target) as client:
        session = client.session_for(
            net,
            nn.CrossEntropyLoss(),
            (inputs, TARGETS),
            batch_size=4,
            dtype=torch.float64,
        )
        names = session.layout.names
        assert not any("base" in name for name in names)
        for _ in range(2):
            found = session.hessian() @ np.eye(session.layout.size)
            want = hessian(net, names, arrays)
            assert np.linalg.norm(found - want) < 1e-12 * np.linalg.norm(want)
            assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
            assert {p.dtype for p in net.parameters()} == {
                p.dtype for p in before.values()
            }
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(0.1 * torch.ones_like(parameter))
            before = {n: p.detach().clone() for n, p in net.named_parameters()}
            session.update_parameters(net)


def named(module, dtype, inputs=X):
    curvd.exported.prepare(
        module,
        nn.CrossEntropyLoss(),
        (inputs, TARGETS),
        None,
        None,
        batch_size=4,
        dtype=dtype,
        check=True,
    )


def test_a_type_that_would_round_is_refused():
    with pytest.raises(
        curvd.InvalidSpec, match=r"BF16 would round .* float32 as first\.down"
    ):
        named(Tuned(torch.bfloat16).eval(), curvd.Dtype.BFLOAT16)
    with pytest.raises(curvd.InvalidSpec, match="a type that no session has"):
        named(Tuned(torch.float16).half().eval(), None)


def test_code_that_asks_for_its_types_is_refused():
    """The server's types are others."""

    class Asking(Tuned):
        def forward(self, x):
            sign = -1 if self.first.base.weight.dtype == torch.bfloat16 else 1
            return sign * super().forward(x)

    with pytest.raises(curvd.GradientMismatch, match="other batch sizes or types"):
        named(Asking(torch.bfloat16).eval(), curvd.Dtype.FLOAT32)


@pytest.mark.parametrize("kind", ["gradient", "accumulated"])
def test_hooks_on_gradients_are_refused_as_in_one_type(kind):
    def doubled(parameter):
        parameter.grad.mul_(2)

    net = Tuned(torch.bfloat16).eval()
    net.head.bfloat16()
    if kind == "gradient":
        net.head.weight.register_hook(lambda gradient: 2 * gradient)
    else:
        net.head.weight.register_post_accumulate_grad_hook(doubled)
    with pytest.raises(curvd.GradientMismatch, match=r"head\.weight"):
        named(net, curvd.Dtype.FLOAT32)


class Scaled(nn.Module):
    """A hook that closes over a buffer, in the type of the body."""

    def __init__(self, cast):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5).bfloat16(), nn.Linear(5, 2)
        self.register_buffer("scale", torch.full((5,), 0.5, dtype=torch.bfloat16))
        scale = self.scale
        self.body.register_forward_hook(lambda layer, given, made: made * scale)
        self.cast = cast

    def forward(self, x):
        h = torch.tanh(self.body(x.to(torch.bfloat16)))
        return self.head(h.float() if self.cast else h.to(self.head.weight.dtype))


def gradient(module, x, loss):
    """Of the module's own function, without its casts."""
    wide = copy.deepcopy(module).double()
    h = nn.functional.linear(x.double(), wide.body.weight, wide.body.bias)
    h = torch.tanh(h * module.scale.double())
    outputs = nn.functional.linear(h, wide.head.weight, wide.head.bias)
    total = loss(outputs)
    rows = torch.autograd.grad(total, list(wide.parameters()))
    return total.item(), torch.cat([row.flatten() for row in rows]).numpy()


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_casts_hooks_and_closures_are_those_of_the_module(live_target, cast, dtype):
    torch.manual_seed(5)
    net, weight = Scaled(cast).eval(), torch.tensor([0.3, 1.7])
    loss = nn.CrossEntropyLoss(weight)
    near = 1e-12 if dtype == "float64" else 1e-6
    wide = lambda outputs: nn.functional.cross_entropy(  # noqa: E731
        outputs, TARGETS, weight.double()
    )
    x = X.bfloat16()
    with curvd.connect(live_target) as client:
        session = client.session_for(net, loss, (x, TARGETS), batch_size=4, dtype=dtype)
        for _ in range(2):
            value, found = session.gradient()
            want, expected = gradient(net, x, wide)
            assert abs(value - want) < near * abs(want)
            assert np.linalg.norm(found - expected) < near * np.linalg.norm(expected)
            net.scale.mul_(1.5)
            session.update_parameters(net)


def test_an_attribute_of_a_parameter_is_not_lost_in_silence():
    class Gained(nn.Linear):
        def forward(self, x):
            return super().forward(x) * getattr(self.weight, "gain", 1.0)

    net = Gained(4, 2).eval()
    net.weight.no_decay = True  # nothing depends on it
    named(net, None)
    net.weight.gain = 1.5
    with pytest.raises(curvd.GradientMismatch, match="attribute of a parameter"):
        named(net, None)

    class Plain(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.gain

    net = Plain(4, 2).eval()
    net.weight.gain = 1.5
    with pytest.raises(curvd.InvalidGraph, match="attribute 'gain' of a parameter"):
        named(net, None)


class Normed(nn.Linear):
    def forward(self, x):
        h = super().forward(x)
        return h / (h.norm(dim=-1, keepdim=True) + torch.finfo(h.dtype).eps)


def test_code_that_asks_for_the_precision_of_its_type_is_compared_in_that(live_target):
    torch.manual_seed(7)
    net = Normed(4, 2).eval()
    total = nn.functional.cross_entropy(net(X), TARGETS)
    rows = torch.autograd.grad(total, list(net.parameters()))
    want = torch.cat([row.flatten() for row in rows]).numpy()
    with curvd.connect(live_target) as client:
        data = X, TARGETS
        session = client.session_for(net, nn.CrossEntropyLoss(), data, batch_size=4)
        value, found = session.gradient()
    assert abs(value - total.item()) < 1e-6
    assert np.linalg.norm(found - want) < 1e-6 * np.linalg.norm(want)


def test_a_small_difference_is_one_in_the_type_of_the_module():
    """It is none of rounding: float64 has both, and so has the module itself."""

    class Nearly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (1 + 8e-6)

    class Net(nn.Linear):
        def forward(self, x):
            return Nearly.apply(super().forward(x))

    with pytest.raises(curvd.GradientMismatch, match="Nearly"):
        named(Net(4, 2).double().eval(), None, X.double())


class Two(nn.Module):
    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5).to(body), nn.Linear(5, 2).to(head)

    def forward(self, x):
        h = torch.tanh(self.body(x.to(self.body.weight.dtype)))
        return self.head(h.to(self.head.weight.dtype))


TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("body", TYPES)
@pytest.mark.parametrize("head", TYPES)
def test_a_loss_whose_backward_mixes_no_types(live_target, body, head):
    """``huber_loss`` takes two types forward, and fails on the way back."""
    torch.manual_seed(2)
    module, targets = Two(body, head).eval(), torch.randn(8, 2)

    def loss(outputs, targets):
        return nn.functional.huber_loss(outputs.float(), targets, delta=0.3)

    wide = copy.deepcopy(module).double()
    total = nn.functional.huber_loss(wide(X.double()), targets.double(), delta=0.3)
    rows = torch.autograd.grad(total, list(wide.parameters()))
    want = torch.cat([row.flatten() for row in rows]).numpy()
    with curvd.connect(live_target) as client:
        data = X, targets
        session = client.session_for(module, loss, data, batch_size=4, dtype="float64")
        value, found = session.gradient()
    assert abs(value - total.item()) < 1e-7
    assert np.linalg.norm(found - want) < 1e-7 * np.linalg.norm(want)


class Reached(nn.Module):
    """A hook or a patched ``forward`` reaches parameters by the names of a function."""

    def __init__(self, kind, *, trains):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5).to(kind), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.rand(5).add(0.5).to(kind), requires_grad=trains)
        self.down = nn.Parameter(torch.randn(2, 4), requires_grad=trains)
        self.up = nn.Parameter(torch.randn(5, 2), requires_grad=trains)
        scale, down, up, forward = self.scale, self.down, self.up, self.body.forward
        self.body.register_forward_hook(lambda layer, given, made: made * scale)
        self.body.forward = lambda x: (
            forward(x) + (x.float() @ down.T @ up.T).to(x.dtype)
        )

    def forward(self, x):
        h = self.body(x.to(self.body.weight.dtype))
        return self.head(torch.tanh(h).float())

    def whole(self, x):
        """The same, with its parameters as they are, in float64."""
        own = {n: p.detach().double() for n, p in self.named_parameters()}
        for name, parameter in self.named_parameters():
            own[name].requires_grad_(parameter.requires_grad)
        h = nn.functional.linear(x, own["body.weight"], own["body.bias"])
        h = torch.tanh((h + x @ own["down"].T @ own["up"].T) * own["scale"])
        return nn.functional.linear(h, own["head.weight"], own["head.bias"]), own


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_parameters_that_closures_reach_follow_updates(live_target, kind, trains):
    torch.manual_seed(11)
    net, x = Reached(kind, trains=trains).eval(), X.to(kind)
    with curvd.connect(live_target) as client:
        data, loss = (x, TARGETS), nn.CrossEntropyLoss()
        session = client.session_for(net, loss, data, batch_size=4, dtype="float64")
        for _ in range(2):
            outputs, own = net.whole(x.double())
            total = nn.functional.cross_entropy(outputs, TARGETS)
            trained = [own[name] for name in session.layout.names]
            rows = torch.autograd.grad(total, trained)
            want = torch.cat([row.flatten() for row in rows]).numpy()
            value, found = session.gradient()
            assert abs(value - total.item()) < 1e-12
            assert np.linalg.norm(found - want) < 1e-12 * np.linalg.norm(want)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1.25)
            session.update_parameters(net)


def test_a_closure_over_a_parameter_that_is_not_compared_is_refused():
    """It may be over `detach()` of it, and only gradients tell."""
    net = Reached(torch.float32, trains=True).eval()
    curvd.export(net, X)
    with pytest.raises(curvd.InvalidGraph, match=r"'scale' and '.*' share memory"):
        curvd.export(net, X, check=False)


def test_what_is_wrong_elsewhere_is_not_laid_to_a_closure():
    net = Reached(torch.float32, trains=True).eval()
    net.head.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(curvd.GradientMismatch, match=r"head\.weight"):
        curvd.export(net, X)
