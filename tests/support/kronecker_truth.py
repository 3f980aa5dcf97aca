"""Kronecker factors by their definition: hooks, plain autograd, and dense matrices.

Nothing of the server is used: layers are found by their class, the root of the loss's Hessian
is that of an eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rows = list[tuple[Tensor, Tensor]]
"""Inputs [G, S, d_in] and gradients [G, S, d_out] of one data point and column."""


def roots(z: Tensor, y: Tensor) -> Tensor:
    """Columns of a root of the cross-entropy's Hessian in the outputs: [C, C]."""
    H = torch.func.hessian(lambda z: F.cross_entropy(z[None], y[None]))(z)
    values, vectors = torch.linalg.eigh(H)
    return vectors * values.clamp_min(0).sqrt()


def inputs_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows that a layer's weight is applied to, of one data point: [G, S, d_in]."""
    if isinstance(layer, nn.Embedding):
        hot = F.one_hot(x.reshape(-1), layer.num_embeddings).to(layer.weight)
        return hot[None]
    if isinstance(layer, nn.ConvTranspose2d):
        rows = _transposed_rows(layer, x)
    elif isinstance(layer, nn.Conv2d):
        groups = x.split(x.shape[1] // layer.groups, 1)
        cut = [
            F.unfold(g, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            for g in groups
        ]
        rows = torch.cat(cut).mT
    else:
        rows = x.reshape(1, -1, x.shape[-1])
    bias = getattr(layer, "bias", None)
    return rows if bias is None else F.pad(rows, (0, 1), value=1.0)


def _transposed_rows(layer: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """What an output is the sum of, by transposing each element of the kernel alone."""
    size = layer.weight[0, 0].numel()
    each = torch.eye(size, dtype=x.dtype).reshape(1, size, *layer.kernel_size)
    seen = [
        F.conv_transpose2d(
            x[:, c : c + 1],
            each,
            None,
            layer.stride,
            layer.padding,
            layer.output_padding,
            1,
            layer.dilation,
        ).flatten(2)
        for c in range(x.shape[1])
    ]
    channels = torch.cat(seen, 1)[0]  # [C * kernel, positions]
    return channels.reshape(layer.groups, -1, channels.shape[1]).mT


def gradients_of(layer: nn.Module, g: Tensor) -> Tensor:
    """The rows of a layer's output, likewise: [G, S, d_out]."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return g.reshape(layer.groups, -1, g[0, 0].numel()).mT
    return g.reshape(1, -1, g.shape[-1])


def observed(
    net: nn.Module, layer: nn.Module, x: Tensor, y: Tensor
) -> list[list[Rows]]:
    """Run data points alone: by data point and column, the rows of each call."""
    found = []
    for n in range(len(x)):
        calls: list[tuple[Tensor, Tensor]] = []
        hook = layer.register_forward_hook(
            lambda _, args, out, calls=calls: calls.append((args[0], out))
        )
        z = net(x[n : n + 1])
        hook.remove()
        columns = []
        for column in roots(z[0].detach(), y[n]).T:
            outs = [out for _, out in calls]
            gs = torch.autograd.grad(z, outs, column[None], retain_graph=True)
            columns.append([
                (inputs_of(layer, a.detach()), gradients_of(layer, g))
                for (a, _), g in zip(calls, gs, strict=True)
            ])
        found.append(columns)
    return found


def factors(
    net: nn.Module, layer: nn.Module, x: Tensor, y: Tensor, *, reduce: bool = False
) -> tuple[Tensor, Tensor]:
    """``A`` [G, d_in, d_in] and ``G`` [G, d_out, d_out] of a mean over data points."""
    A = G = torch.zeros(())
    rows = 0
    for columns in observed(net, layer, x, y):
        a = torch.cat([a for a, _ in columns[0]], 1)
        a = a.mean(1, keepdim=True) if reduce else a
        A, rows = A + a.mT @ a, rows + a.shape[1]
        for column in columns:
            g = torch.cat([g for _, g in column], 1)
            g = g.sum(1, keepdim=True) if reduce else g
            G = G + g.mT @ g
    return A / rows, G / len(x)


def corrected(
    net: nn.Module, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, G: Tensor
) -> Tensor:
    """Dense EKFAC of a layer with one group: ``Q diag(Q^T F Q) Q^T``, inputs slowest."""
    F_ = torch.zeros(())
    for columns in observed(net, layer, x, y):
        for column in columns:
            D = sum(a[0].mT @ g[0] for a, g in column).flatten()
            F_ = F_ + torch.outer(D, D)
    left, right = (torch.linalg.eigh(M[0])[1].contiguous() for M in (A, G))
    Q = torch.kron(left, right)
    return Q @ torch.diag(torch.diag(Q.T @ F_ @ Q) / len(x)) @ Q.T


def flat_indices(net: nn.Module, layer: nn.Module) -> Tensor:
    """Where the elements of a layer are in a vector of P: [G, d_in (+ 1), d_out]."""
    places = dict[int, Tensor]()
    start = 0
    for p in net.parameters():
        flat = torch.arange(start, start + p.numel())
        places[id(p)] = flat.reshape(p.shape)
        start += p.numel()
    weight = places[id(layer.weight)]
    if isinstance(layer, nn.Embedding):
        return weight[None]
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.ConvTranspose2d):
        index = weight.flatten(2).reshape(groups, -1, *weight[0].flatten(1).shape)
        index = index.permute(0, 1, 3, 2).flatten(1, 2)
    else:
        index = weight.reshape(groups, len(weight) // groups, -1).mT
    if layer.bias is None:
        return index
    return torch.cat((index, places[id(layer.bias)].reshape(groups, 1, -1)), 1)


def dense(size: int, index: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """Put ``A kron G`` of each group where its elements are: [P, P]."""
    K = torch.zeros(size, size, dtype=torch.float64)
    for group, a, g in zip(index, A, G, strict=True):
        at = group.flatten()
        K[at[:, None], at[None]] = torch.kron(a, g)
    return K


def ggn_block(net: nn.Module, names: Sequence[str], x: Tensor, y: Tensor) -> Tensor:
    """The Gauss-Newton matrix of some parameters by torch.func, of a mean."""
    inner = {n: p.detach() for n, p in net.named_parameters() if n in names}
    total = torch.zeros(())
    for n in range(len(x)):

        def outputs(p: dict[str, Tensor], n: int = n) -> Tensor:
            others = {n: q.detach() for n, q in net.named_parameters()}
            return torch.func.functional_call(net, others | p, (x[n : n + 1],))[0]

        J = torch.func.jacrev(outputs)(inner)
        J = torch.cat([J[name].flatten(1) for name in inner], 1)
        R = roots(outputs(inner), y[n])
        total = total + J.T @ R @ R.T @ J
    return total / len(x)
