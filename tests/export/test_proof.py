"""What is exported is what trains: gradients of graphs against ``.backward()``.

The truth is what a training loop computes, hooks and functions of one's own included;
for products, central differences of it in float64.
"""

import contextlib
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint, checkpoint_sequential  # noqa: E402

import curvd  # noqa: E402

N = 7


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def draw(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X, Y = draw(N, 4), torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Two layers, and whatever a test does between them."""

    def __init__(self, between=None, first=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.between, self.first = between, first

    def forward(self, x):
        if self.first is not None:
            h = self.first(self.a, x)
        else:
            h = torch.tanh(self.a(x))
        return self.b(h if self.between is None else self.between(h))


def own(forward, backward):
    """An autograd.Function of elementwise forward and backward: (x), (x, g)."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, g):
            return backward(ctx.saved_tensors[0], g)

    return Own.apply


def hooked(hook):
    def between(h):
        if h.requires_grad:
            h.register_hook(hook)
        return h

    return between


def with_parameter_hook(hook, kind="register_hook"):
    net = Net()
    getattr(net.a.weight, kind)(hook)
    return net


def with_module_hook(hook, kind="register_full_backward_hook"):
    net = Net()
    getattr(net.b, kind)(hook)
    return net


def look(*_):
    return None


def halve_grad(parameter):
    parameter.grad *= 0.5


class After(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Frozen(Net):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Shy(Net):
    """A head of zeros hides what is wrong below it."""

    def __init__(self):
        super().__init__(own(torch.tanh, lambda x, g: g))
        nn.init.zeros_(self.b.weight)


def calls_after(count):
    """Scales its result from a call on: a function of what happened before."""
    seen = [0]

    def between(h):
        seen[0] += 1
        return h * (2.0 if seen[0] > count else 1.0)

    return between


class Kept(torch.autograd.Function):
    """Right, but for what it keeps of its input: half the digits."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.half())
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.to(g.dtype).cos()


def kept_in_half(layer, x):
    with torch.autograd.graph.saved_tensors_hooks(
        torch.Tensor.half, lambda t: t.double()
    ):
        return torch.tanh(layer(x))


def with_node_hook():
    net = Net()
    weight = net.a.weight
    # Nothing leads from a parameter to the hooks of the node that adds to its gradient.
    net.kept = weight.view_as(weight).grad_fn.next_functions[0][0]
    net.kept.register_prehook(lambda g: (g[0] * 0.5,))
    return net


REFUSED = {
    "kept in half by a function": (Net(Kept.apply), "Kept"),
    "kept in half by hooks": (Net(first=kept_in_half), "saved_tensors_hooks"),
    "node hook": (with_node_hook(), r"a\.weight.*outputs agree.*node of autograd"),
    "another one for large mini-batches": (
        Net(own(lambda x: x * 2, lambda x, g: 2 * g if len(g) < 7 else 3 * g)),
        "with 7 data points.*Own",
    ),
    "straight-through": (Net(own(torch.round, lambda x, g: g)), "Own"),
    "reversal": (
        Net(own(lambda x: x.clone(), lambda x, g: -g)),
        "Own.*a.weight|a.bias",
    ),
    "scaled": (Net(own(torch.tanh, lambda x, g: 1.001 * g / x.cosh() ** 2)), "Own"),
    "clips large gradients": (
        Net(own(lambda x: x * 2, lambda x, g: (2 * g).clamp(-1e3, 1e3))),
        r"Own.*write it with",
    ),
    "clips small ones away": (
        Net(own(lambda x: x * 2, lambda x, g: 2 * g * (g.abs() > 1e-6))),
        "Own",
    ),
    "clamps far away": (
        Net(own(lambda x: x.clamp(-3, 3), lambda x, g: g), lambda a, x: a(x)),
        "Own",
    ),
    "below a head of zeros": (Shy(), "at parameters nearby.*Own"),
    "in a reentrant checkpoint": (
        Net(
            lambda h: checkpoint(
                own(lambda x: x * 2, lambda x, g: (2 * g).clamp(-1e3, 1e3)),
                h,
                use_reentrant=True,
            )
        ),
        "Own",
    ),
    "tensor hook": (
        Net(hooked(lambda g: 0.5 * g)),
        r"a\.weight \(relative difference 0\.5\).*hook on a tensor \(test_proof\.py:\d+ "
        r"in between\).*remove the hooks",
    ),
    "clipping tensor hook": (Net(hooked(lambda g: g.clamp(-9, 9))), "hook on a tensor"),
    "parameter hook": (
        with_parameter_hook(lambda g: g * 0.9),
        r"a\.weight \(relative difference 0\.1\).*hook on the parameter a\.weight",
    ),
    "hook after accumulation": (
        with_parameter_hook(halve_grad, "register_post_accumulate_grad_hook"),
        r"hook on the parameter a\.weight",
    ),
    "module hook": (
        with_module_hook(lambda m, g: (g[0] * 2,), "register_full_backward_pre_hook"),
        "backward hook of b",
    ),
    "no_grad": (Frozen(), r"no parameter.*torch\.no_grad"),
    "checkpoint that trains nothing": (
        Net(first=lambda a, x: checkpoint(a, x, use_reentrant=True)),
        r"a\.weight.*reentrant checkpoint none of whose inputs.*use_reentrant=False",
    ),
    "state of its own": (Net(calls_after(5)), "something beside inputs"),
}


@pytest.mark.parametrize(("module", "match"), REFUSED.values(), ids=REFUSED)
def test_a_gradient_that_is_not_of_the_forward_pass_is_refused(module, match):
    with pytest.raises(curvd.GradientMismatch, match=match) as refusal:
        curvd.export(module, X)
    assert refusal.value.metadata["parameters"]
    assert curvd.export(module, X, check=False).parameters[0] == "a.weight"


def test_a_hook_on_all_modules_is_named():
    from torch.nn.modules import module

    handle = module.register_module_full_backward_hook(
        lambda layer, i, o: (i[0] * 2,) if isinstance(layer, nn.Tanh) else None
    )
    try:
        with pytest.raises(curvd.GradientMismatch, match="hook of all modules"):
            curvd.export(nn.Sequential(Net(), nn.Tanh()), X)
    finally:
        handle.remove()
        module._global_is_full_backward_hook = None


def test_a_session_compares_at_its_own_batch_size(client):
    module = Net(own(lambda x: x * 2, lambda x, g: 2 * g if len(g) != 3 else g))
    data = (X, Y)
    with pytest.raises(curvd.GradientMismatch, match="with 3 data points"):
        client.session_for(module, nn.CrossEntropyLoss(), data, batch_size=3)
    with client.session_for(
        module, nn.CrossEntropyLoss(), data, batch_size=6
    ) as session:
        assert session.layout.size == 43


class Once(torch.autograd.Function):
    """Right, and not to be differentiated again by torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 + x * (1 - s))


def holding(net):
    """A function that holds the net: a copy of it does not run on itself."""
    net.first = lambda a, x: torch.tanh(net.a(x))
    return net


DUMMY = torch.ones((), requires_grad=True)
"""Without an input that requires a gradient, a reentrant checkpoint gives none."""
ACCEPTED = {
    "right backward": lambda: Net(own(torch.tanh, lambda x, g: g / x.cosh() ** 2)),
    "right where it saturates": lambda: nn.Sequential(
        Net(own(torch.tanh, lambda x, g: g / x.cosh() ** 2)),
        After(own(torch.tanh, lambda x, g: g / x.cosh() ** 2)),
    ),
    "once differentiable": lambda: Net(Once.apply),
    "hooks that look": lambda: Net(hooked(look)),
    "module hooks that look": lambda: with_module_hook(look),
    "checkpoint": lambda: Net(
        lambda h: checkpoint(torch.sin, h, use_reentrant=False),
    ),
    "reentrant checkpoint": lambda: Net(
        lambda h: checkpoint(torch.sin, h, use_reentrant=True)
    ),
    "an input that is there for a checkpoint": lambda: Net(
        first=lambda a, x: checkpoint(
            lambda x, _: torch.tanh(a(x)), x, DUMMY, use_reentrant=True
        )
    ),
    "nested checkpoints": lambda: Net(
        lambda h: checkpoint(
            lambda x: checkpoint(torch.sin, x.tanh(), use_reentrant=False),
            h,
            use_reentrant=False,
        )
    ),
    "checkpointed sequence": lambda: Net(
        lambda h: checkpoint_sequential(
            [torch.sin, torch.tanh], 2, h, use_reentrant=True
        )
    ),
    "a largest element, detached": lambda: Net(
        lambda h: (h - h.amax(1, keepdim=True).detach()).softmax(1)
    ),
    "a net that holds itself": lambda: holding(Net()),
}


def backward(module, objective):
    for parameter in module.parameters():
        parameter.grad = None
    objective().backward()
    return nn.utils.parameters_to_vector([
        torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()
    ])


class Counted(nn.Module):
    """Has a frozen parameter that is a whole number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.times = nn.Parameter(torch.tensor([2]), requires_grad=False)

    def forward(self, x):
        return self.layer(x) * self.times


def test_a_frozen_whole_number_is_left_where_it_is(client):
    module = Counted()
    session = client.session_for(module, nn.CrossEntropyLoss(), (X, Y), batch_size=3)
    _, gradient = session.gradient()
    session.delete()
    loss = nn.CrossEntropyLoss()(module(X), Y)
    want = torch.autograd.grad(loss, list(module.layer.parameters()))
    np.testing.assert_allclose(gradient, torch.cat([g.flatten() for g in want]))


@pytest.mark.parametrize("size", [0, -1, 2.5, "4", True])
def test_a_batch_size_is_a_whole_number(client, size):
    with pytest.raises(curvd.InvalidSpec, match="batch_size must be a whole number"):
        client.session_for(
            nn.Linear(4, 3), nn.CrossEntropyLoss(), (X, Y), batch_size=size
        )


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_accepted_is_what_trains(client, make):
    module, loss = make(), nn.CrossEntropyLoss()
    session = client.session_for(module, loss, (X, Y), batch_size=3)
    value, gradient = session.gradient()
    v = draw(session.layout.size, seed=3)
    product = session.hessian() @ v.numpy()
    session.delete()

    def objective():
        return loss(module(X), Y)

    assert value == pytest.approx(objective().item(), rel=1e-12)
    np.testing.assert_allclose(gradient, backward(module, objective), rtol=1e-9)
    parameters, step = list(module.parameters()), 1e-5
    start = nn.utils.parameters_to_vector(parameters).detach()
    ends = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * step * v, parameters)
        ends.append(backward(module, objective))
    want = (ends[0] - ends[1]) / (2 * step)
    assert np.linalg.norm(product - want.numpy()) <= 1e-6 * want.norm()


class Lonely(Net):
    """Cannot be copied: it keeps what it computed."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 0.99])
def test_a_module_that_cannot_be_copied_is_proven_itself(dtype, factor):
    module, x = Lonely(hooked(lambda g: g * factor)).to(dtype), X.to(dtype)
    module(x)
    module.a.weight.grad = torch.ones_like(module.a.weight)
    refused = pytest.raises(curvd.GradientMismatch, match="hook on a tensor")
    with refused if factor < 1 else contextlib.nullcontext():
        curvd.export(module, x)
    assert module.a.weight.grad.eq(1).all() and module.a.bias.grad is None


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_a_session_in_float64_leaves_casts_out_and_is_off_by_their_rounding(
    client, kind
):
    cast = Net(lambda h: h.to(kind).double())
    loss, data = nn.CrossEntropyLoss(), (X, Y)
    with client.session_for(cast, loss, data, batch_size=3, dtype="F64") as session:
        found = session.gradient()[1]
    plain, own = (
        nn.utils.parameters_to_vector(
            torch.autograd.grad(loss(net(X), Y), list(net.parameters()))
        )
        for net in (Net(), cast)
    )
    np.testing.assert_allclose(found, plain, rtol=1e-9, atol=1e-12)
    off = np.linalg.norm(found - own.numpy()) / np.linalg.norm(own)
    assert off <= torch.finfo(kind).eps


def test_a_cast_to_float16_loses_gradients_and_is_refused():
    with pytest.raises(curvd.GradientMismatch, match="of size"):
        curvd.export(Net(lambda h: h.half().double()), X)


def test_what_rounds_to_a_narrower_type_is_compared_with_its_digits():
    module = Net(lambda h: h.float().sin().double())
    assert curvd.export(module, X).inputs == ("x",)
    assert curvd.export(Net().float(), X.float()).inputs == ("x",)
    assert curvd.export(Net().bfloat16(), X.bfloat16()).inputs == ("x",)


def test_a_backward_that_fails_is_a_refusal():
    def fail(gradient):
        raise RuntimeError("no gradient today")

    with pytest.raises(curvd.InvalidGraph, match=r"backward.*no gradient today"):
        curvd.export(Net(hooked(fail)), X)


def test_one_call_compares_with_the_callers_loss(client):
    module = Net(hooked(lambda g: g * 0.5))
    open_with = functools.partial(client.session_for, module, data=(X, Y), batch_size=3)
    for loss in (nn.CrossEntropyLoss(), "cross_entropy", lambda z, y: F.nll_loss(z, y)):
        with pytest.raises(curvd.GradientMismatch, match="hook on a tensor"):
            open_with(loss)
    session = open_with("cross_entropy", check=False)
    assert session.hessian().shape == (43, 43)
    session.delete()


def normalised(**options):
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options), nn.Tanh())


class Functional(Net):
    def forward(self, x):
        return F.batch_norm(super().forward(x), None, None, training=True)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (normalised(), r"BatchNorm1d '1' is in training mode.*module\.eval\(\)"),
        (normalised(track_running_stats=False).eval(), "BatchNorm1d '1'.*every mode"),
        (Functional().eval(), r"test_proof\.py:\d+ in forward calls batch_norm"),
    ],
)
def test_statistics_of_mini_batches_must_be_asked_for(module, match):
    inputs = X if isinstance(module, Net) else X.float()
    with pytest.raises(curvd.InvalidSpec, match=f"{match}.*mode='batch_statistics'"):
        curvd.export(module, inputs)
    exported = curvd.export(module, inputs, mode="batch_statistics")
    assert exported.mode == "batch_statistics"


def test_an_instance_norm_that_tracks_statistics_must_evaluate():
    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    with pytest.raises(curvd.InvalidSpec, match=r"InstanceNorm1d is in training mode"):
        curvd.export(norm, draw(N, 2, 3).float())
    assert curvd.export(norm, draw(N, 2, 3).float(), mode="eval").mode == "eval"
    assert norm.training


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (lambda z: z.mean(), r"\[\]"),
        (lambda z: z.sum(0), r"\[3\]"),
        (lambda z: z.T, r"\[3, B\]"),
        (lambda z: z.reshape(-1), r"\[3\*B\]"),
        (lambda z: torch.cat([z, z]), r"\[2\*B, 3\]"),
        (lambda z: z[:1], r"\[1, 3\]"),
    ],
)
def test_an_output_without_the_batch_axis_is_refused(transform, shape):
    class Whole(Net):
        def forward(self, x):
            return transform(super().forward(x))

    with pytest.raises(curvd.InvalidSpec, match=f"{shape} for B data points"):
        curvd.export(Whole(), X)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.BCEWithLogitsLoss])
def test_weights_of_classes_keep_their_digits(client, loss):
    """A tenth is no float32: rounded, it would move the gradient by 1e-8."""
    torch.manual_seed(0)
    weights = torch.tensor([0.1, 0.7, 0.2], dtype=torch.float64)
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    named = {"weight": weights}
    if loss is nn.BCEWithLogitsLoss:
        named, y = {"pos_weight": weights}, nn.functional.one_hot(y).double()
    net = nn.Linear(4, 3).double()
    with client.session_for(net, loss(**named), (x, y), batch_size=4) as session:
        value, gradient = session.gradient(layout="dict")
    want = loss(**named)(net(x), y)
    want.backward()
    np.testing.assert_allclose(value, want.item(), rtol=1e-13)
    np.testing.assert_allclose(
        gradient["weight"], net.weight.grad, rtol=1e-11, atol=1e-14
    )


@pytest.mark.parametrize("loss", [nn.MSELoss(), F.smooth_l1_loss, nn.HuberLoss()])
def test_targets_that_would_broadcast_are_refused(client, loss):
    module, y = nn.Sequential(nn.Linear(4, 1)).double(), draw(N)
    with pytest.raises(
        curvd.InvalidSpec, match=r"\[B, 1\] and \[B\].*targets\[:, None\]"
    ):
        client.session_for(module, loss, (X, y), batch_size=3)
    client.session_for(module, loss, (X, y[:, None]), batch_size=3).delete()
