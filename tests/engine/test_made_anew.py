"""Tensors without memory: functions see their values, and graphs do not keep them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvd_server.engine.made_anew import Leaves, MadeAnew

CPU = torch.device("cpu")


def made(tensor, count=None):
    def make():
        if count is not None:
            count.append(1)
        return tensor.clone()

    return MadeAnew(make, tensor.shape, tensor.dtype, CPU)


def test_what_it_says_of_itself_needs_no_values():
    count: list[int] = []
    tensor = made(torch.randn(3, 5, dtype=torch.float64), count)
    assert tensor.shape == (3, 5)
    assert tensor.dtype is torch.float64
    assert tensor.device == CPU
    assert tensor.size(1) == 5
    assert len(tensor) == 3
    assert tensor.is_contiguous()
    assert tensor.is_floating_point()
    assert not count


def test_functions_see_its_values_also_in_lists_and_of_the_dispatcher():
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    tensor = made(w)
    torch.testing.assert_close(F.linear(x, tensor), F.linear(x, w))
    torch.testing.assert_close(x @ tensor.T, x @ w.T)
    torch.testing.assert_close(torch.cat([tensor, w]), torch.cat([w, w]))
    aten = torch.ops.aten
    torch.testing.assert_close(aten.mm.default(x, aten.t.default(tensor)), x @ w.T)
    assert isinstance(aten.t.default(tensor), MadeAnew)
    assert aten.t.default(tensor).shape == (4, 3)


def test_each_use_makes_it_once():
    count: list[int] = []
    tensor = made(torch.ones(3, 3), count)
    _ = torch.ones(3, 3) @ tensor @ torch.ones(3, 3)
    assert len(count) == 1


def leaves_of(module):
    parameters = list(module.parameters())
    return Leaves(
        lambda i: parameters[i].detach().clone(),
        parameters,
        torch.float64,
        CPU,
        lambda i, g: g.clone(),
    )


MODULES = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2)),
    "norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    "gru": lambda: nn.GRU(4, 3),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_ordinary_leaves(name):
    torch.manual_seed(0)
    module, x = MODULES[name]().double(), torch.randn(6, 4, dtype=torch.float64)
    names = [n for n, _ in module.named_parameters()]
    leaves = leaves_of(module)

    def loss():
        state = dict(zip(names, leaves.tensors, strict=True))
        out = torch.func.functional_call(module, state, (x,))
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    value, got = leaves.gradients(loss)
    out = module(x)
    want = (out[0] if isinstance(out, tuple) else out).square().sum()
    torch.testing.assert_close(value, want.detach())
    for row, grad in zip(
        got, torch.autograd.grad(want, list(module.parameters())), strict=True
    ):
        torch.testing.assert_close(row, grad)


def test_a_graph_keeps_no_leaf():
    alive: list[weakref.ref] = []
    weight = torch.randn(4, 4, dtype=torch.float64)

    def make(index):
        tensor = weight.clone()
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    leaves = Leaves(make, [weight], torch.float64, CPU, lambda i, g: g.clone())
    (leaf,), x = leaves.tensors, torch.randn(2, 4, dtype=torch.float64)
    with leaves.recording():
        y = F.linear(torch.tanh(F.linear(x, leaf)), leaf).sum()
    gc.collect()
    assert len(alive) == 2
    assert not any(ref() for ref in alive)
    (got,) = leaves.pulled(y, None)
    w = weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(F.linear(torch.tanh(F.linear(x, w)), w).sum(), w)
    torch.testing.assert_close(got, want)
    assert not any(ref() for ref in alive)


def test_memory_that_is_used_again_is_not_taken_for_a_leaf():
    weight = torch.randn(64, 64, dtype=torch.float64)
    leaves = Leaves(
        lambda i: weight.clone(), [weight], torch.float64, CPU, lambda i, g: g.clone()
    )
    (leaf,), x = leaves.tensors, torch.randn(64, 64, dtype=torch.float64)
    with leaves.recording():
        y = x
        for _ in range(20):  # allocators hand freed memory out again
            y = torch.tanh(y @ leaf)
        y = y.sum()
    (got,) = leaves.pulled(y, None)
    w, z = weight.clone().requires_grad_(), x
    for _ in range(20):
        z = torch.tanh(z @ w)
    (want,) = torch.autograd.grad(z.sum(), w)
    torch.testing.assert_close(got, want)
