"""What users do to gradients: around a layer, on its hooks, to a whole module.

Honest ones leave the gradient that of the forward pass; suspect ones may not.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def function(forward, backward, *, once=False):
    """An autograd.Function of elementwise forward (x) and backward (x, g)."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, g):
            return backward(ctx.saved_tensors[0], g)

    if once:
        Own.backward = staticmethod(
            torch.autograd.function.once_differentiable(Own.backward)
        )
    return Own.apply


class After(nn.Module):
    """Applies a function to what a layer returns."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function(self.inner(x))


class Around(nn.Module):
    """Calls a layer through a function of (layer, input)."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        return self.call(self.inner, x)


def after(function):
    return lambda layer: After(layer, function)


def around(call):
    return lambda layer: Around(layer, call)


def hook(function):
    """Hangs a hook on a tensor that requires a gradient."""

    def hooked(x):
        if x.requires_grad:
            x.register_hook(function)
        return x

    return hooked


def node_hook(function):
    def hooked(x):
        x = x * 1.0
        if x.grad_fn is not None:
            x.grad_fn.register_prehook(function)
        return x

    return hooked


def look(*_):
    return None


scaling_hook = hook(lambda g: g * 0.7)
reversed_gradient = function(torch.clone, lambda x, g: -g)
right_square = function(torch.square, lambda x, g: 2 * x * g)


def swish_slope(x, g):
    s = torch.sigmoid(x)
    return g * s * (1 + x * (1 - s))


class LinearOfOwn(torch.autograd.Function):
    """A linear map that saves no more than it must; it is its own derivative."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return g @ weight, rows


class Mapped(nn.Module):
    """A square map of the last axis, through functions of weight and input."""

    def __init__(self, inner, function, apply):
        super().__init__()
        self.inner, self.function, self.apply_to = inner, function, apply
        self.weight = nn.Parameter(torch.eye(4) + 0.3 * torch.randn(4, 4))

    def forward(self, x):
        x = self.inner(x)
        w = self.function(self.weight)[: x.shape[-1], : x.shape[-1]]
        return self.apply_to(x, w)


def mapped(function, apply=lambda x, w: x @ w.T):
    return lambda layer: Mapped(layer, function, apply)


def nested(layer, x):
    def inner(y):
        return checkpoint(layer, y, use_reentrant=False).sin()

    return checkpoint(inner, x, use_reentrant=False)


def without_gradient(layer, x):
    with torch.no_grad():
        return layer(x)


def partly_without(layer, x):
    with torch.no_grad():
        scale = layer(x).sigmoid()
    return layer(x) * scale


def frozen(layer):
    for p in layer.parameters():
        p.requires_grad_(False)
    return Around(layer, lambda inner, x: inner(x))


def memory_saving(layer, x):
    with torch.autograd.graph.save_on_cpu():
        return layer(x)


HONEST = {
    "own tanh": after(function(torch.tanh, lambda x, g: g / x.cosh() ** 2)),
    "own swish, once": after(
        function(lambda x: x * torch.sigmoid(x), swish_slope, once=True)
    ),
    "own square": after(right_square),
    "own linear": mapped(torch.tanh, LinearOfOwn.apply),
    "weights through own": mapped(function(torch.sin, lambda x, g: g * x.cos())),
    "nested checkpoints": around(nested),
    "looking hook": after(hook(look)),
    "looking node hook": after(node_hook(look)),
    "cloning hook": after(hook(torch.clone)),
    "checkpoint": around(lambda f, x: checkpoint(f, x, use_reentrant=False)),
    "twice": lambda layer: After(layer, lambda x: x + x.tanh()),
    "stable softmax": after(
        lambda x: (x - x.amax(-1, keepdim=True).detach()).softmax(-1)
    ),
    "frozen layer": frozen,
    "saved elsewhere": around(memory_saving),
    "gradients on": around(lambda f, x: torch.enable_grad()(f)(x)),
}


class KeptInHalf(torch.autograd.Function):
    """Keeps half of the digits of its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.half())
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].to(g.dtype).cos()


SUSPECT = {
    "kept in half": after(KeptInHalf.apply),
    "by size": after(function(torch.clone, lambda x, g: g if len(g) < 4 else 2 * g)),
    # Right if mini-batches are meant.
    "centred": after(lambda x: x - x.mean(0)),
    # Right if one of its inputs requires a gradient.
    "reentrant": around(lambda f, x: checkpoint(f, x, use_reentrant=True)),
    "straight-through": after(function(lambda x: (4 * x).round() / 4, lambda x, g: g)),
    "sign": after(function(torch.sign, lambda x, g: g * (x.abs() <= 1))),
    "rounded weights": mapped(function(lambda w: (8 * w).round() / 8, lambda w, g: g)),
    "weights without": mapped(lambda w: w.detach() * w),
    "weights' data": mapped(lambda w: w.data),
    "reversal": after(reversed_gradient),
    "scaled": after(function(torch.clone, lambda x, g: 0.5 * g)),
    "clipped": after(function(torch.clone, lambda x, g: g.clamp(-1e-2, 1e-2))),
    "clipped far": after(function(torch.clone, lambda x, g: g.clamp(-1e4, 1e4))),
    "clamped": after(function(lambda x: x.clamp(-5, 5), lambda x, g: g)),
    "normalised": after(function(torch.clone, lambda x, g: g / (1e-9 + g.norm()))),
    "wrong": after(function(torch.tanh, lambda x, g: g * (1 - x.tanh()))),
    "slightly wrong": after(
        function(torch.tanh, lambda x, g: 1.0001 * g / x.cosh() ** 2)
    ),
    "scaling hook": after(scaling_hook),
    "clipping hook": after(hook(lambda g: g.clamp(-10, 10))),
    "dropping hook": after(hook(lambda g: g * (g.abs() > 1e-5))),
    "clipping node hook": after(node_hook(lambda g: (g[0].clamp(-10, 10),))),
    "no grad": around(without_gradient),
    "partly without": around(partly_without),
    "detached": after(lambda x: x.detach()),
    "data": after(lambda x: x.data * 1.0),
    "half detached": after(lambda x: x * x.detach()),
    "detached straight-through": after(lambda x: x + (x.round() - x).detach()),
    "detached sometimes": after(lambda x: torch.where(x > 0, x, x.detach())),
    "reentrant with its own": around(
        lambda f, x: checkpoint(
            lambda y: reversed_gradient(f(y)), x, use_reentrant=True
        )
    ),
    "forward without": after(
        function(
            lambda x: torch.no_grad()(torch.tanh)(x), lambda x, g: g / x.cosh() ** 2
        )
    ),
}


def on_parameter(method, hook):
    def hang(module, chance):
        free = [p for p in module.parameters() if p.requires_grad]
        if free:
            getattr(chance.choice(free), method)(hook)

    return hang


def on_layer(method, hook):
    def hang(module, chance):
        getattr(chance.choice(list(module.children())), method)(hook)

    return hang


def scale_grad(parameter):
    parameter.grad *= 0.5


def drop_grad(parameter):
    parameter.grad = None


HONEST_HOOKS = {
    "looks at a parameter": on_parameter("register_hook", look),
    "looks after accumulation": on_parameter(
        "register_post_accumulate_grad_hook", look
    ),
    "looks at a layer": on_layer("register_full_backward_hook", look),
    "scales forward": on_layer("register_forward_hook", lambda m, i, o: o * 1.5),
    "scales before": on_layer("register_forward_pre_hook", lambda m, i: (i[0] * 1,)),
}
SUSPECT_HOOKS = {
    "scales a parameter's": on_parameter("register_hook", lambda g: g * 0.5),
    "clips a parameter's": on_parameter("register_hook", lambda g: g.clamp(-10, 10)),
    "scales after accumulation": on_parameter(
        "register_post_accumulate_grad_hook", scale_grad
    ),
    "drops after accumulation": on_parameter(
        "register_post_accumulate_grad_hook", drop_grad
    ),
    "scales a layer's": on_layer(
        "register_full_backward_hook",
        lambda m, i, o: tuple(None if g is None else g * 2 for g in i),
    ),
    "scales before a layer": on_layer(
        "register_full_backward_pre_hook", lambda m, g: tuple(2 * x for x in g)
    ),
    "detaches": on_layer("register_forward_hook", lambda m, i, o: o.detach()),
}
WHOLE = {
    "mean": lambda call, x: call(x).mean(),
    "columns": lambda call, x: call(x).sum(0),
    "flat": lambda call, x: call(x).reshape(-1),
    "transposed": lambda call, x: call(x).T,
    "no grad": lambda call, x: torch.no_grad()(call)(x),
    "detached": lambda call, x: call(x).detach(),
    "inference": lambda call, x: torch.inference_mode()(call)(x),
}


class Whole(nn.Module):
    """Does something to a whole module's output."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        return self.call(self.inner, x)
