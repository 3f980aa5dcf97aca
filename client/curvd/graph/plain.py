"""Operators in elementary terms, where torch's own have no right second derivative.

Each function takes what the operator of that name takes. Differences to torch's own
ways: they exist for sizes that are not known yet, and can be differentiated twice in
both modes (``cholesky_inverse`` and ``triangular_solve`` are wrong in forward mode,
``_cdist_backward``, ``_embedding_bag_backward`` and the margin losses have none).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table

aten = torch.ops.aten
_SIXTH = float(torch.tensor(1 / 6, dtype=torch.float32))


def cdist(
    x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None
) -> Tensor:
    """Compute distances between rows; where one is zero it has no derivative."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p != 2:
        norm: Tensor = torch.linalg.vector_norm(difference, p, dim=-1)
        return norm
    square = difference.square().sum(-1)
    same = square == 0
    return torch.where(same, 0.0, torch.where(same, 1.0, square).sqrt())


def cholesky(a: Tensor, upper: bool = False) -> Tensor:
    """Factor a positive definite matrix."""
    factor: Tensor = torch.linalg.cholesky_ex(a, upper=upper)[0]
    return factor


def cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    """Invert the matrix of a Cholesky factor."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    half: Tensor = torch.linalg.solve_triangular(factor, eye, upper=upper)
    return half @ half.mH if upper else half.mH @ half


def triangular_solve(
    b: Tensor,
    a: Tensor,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> tuple[Tensor, Tensor]:
    """Solve ``a x = b`` by substitution."""
    matrix = a.mT if transpose else a
    x = torch.linalg.solve_triangular(
        matrix, b, upper=upper is not transpose, unitriangular=unitriangular
    )
    return x, a


def matrix_power(a: Tensor, n: int) -> Tensor:
    """Multiply a matrix with itself."""
    if n < 0:
        return matrix_power(torch.linalg.inv_ex(a)[0], -n)
    if n == 0:
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return eye.expand_as(a).clone()
    half = matrix_power(a, n // 2) if n > 1 else None
    if half is None:
        return a.clone()
    return half @ half @ a if n % 2 else half @ half


def tensordot(
    a: Tensor, b: Tensor, dims_self: Sequence[int], dims_other: Sequence[int]
) -> Tensor:
    """Contract some axes."""
    ours = [d % a.dim() for d in dims_self]
    theirs = [d % b.dim() for d in dims_other]
    left = [d for d in range(a.dim()) if d not in ours]
    right = [d for d in range(b.dim()) if d not in theirs]
    whole, size = [a.shape[d] for d in left], 1
    for d in ours:
        size = size * a.shape[d]
    rows = a.permute(left + ours).reshape(-1, size)
    columns = b.permute(theirs + right).reshape(size, -1)
    return (rows @ columns).reshape(whole + [b.shape[d] for d in right])


def hardsigmoid(x: Tensor) -> Tensor:
    """Clamp ``x / 6 + 1 / 2`` to [0, 1]; the slope is a sixth in float32, as torch's is."""
    clamped = (x + 3).clamp(0, 6)
    sloped = clamped * _SIXTH
    return sloped + (clamped / 6 - sloped).detach()


def multi_margin_loss(
    x: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """Sum ``max(0, margin - x[y] + x[i])^p / C`` over all classes i but y."""
    rows, index = x.reshape(-1, x.shape[-1]), target.reshape(-1, 1)
    short = (margin - rows.gather(1, index) + rows).clamp(min=0)
    loss = short if p == 1 else short.square()
    if weight is not None:
        loss = loss * weight[index]
    loss = loss.scatter(1, index, 0.0).sum(1) / x.shape[-1]
    return _reduced(loss.reshape(target.shape), reduction)


def multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """Sum ``max(0, 1 - x[y] + x[i]) / C`` over labels y, up to the first -1, and others i."""
    rows, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1, x.shape[-1])
    kept = (labels >= 0).to(labels.dtype).cumprod(1) > 0
    index = torch.where(kept, labels, 0)
    classes = torch.arange(x.shape[-1], device=x.device)
    is_label = ((index.unsqueeze(2) == classes) & kept.unsqueeze(2)).any(1)
    short = (1 - rows.gather(1, index).unsqueeze(2) + rows.unsqueeze(1)).clamp(min=0)
    counts = kept.unsqueeze(2) & ~is_label.unsqueeze(1)
    loss = torch.where(counts, short, 0.0).sum((1, 2)) / x.shape[-1]
    return _reduced(loss.reshape(target.shape[:-1]), reduction)


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, average or maximise rows of a table over bags of indices."""
    if include_last_offset:
        offsets = offsets[:-1]
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    rows = F.embedding(indices, weight)
    position = torch.arange(indices.shape[0], device=indices.device)
    bag = torch.searchsorted(offsets, position, right=True) - 1
    counts = (indices != padding).to(rows.dtype)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    empty = rows.new_zeros((offsets.shape[0], weight.shape[1]))
    if mode == 2:
        kept = torch.where((indices == padding).unsqueeze(-1), -torch.inf, rows)
        where = bag.unsqueeze(-1).expand_as(rows)
        found = empty.fill_(-torch.inf).scatter_reduce(0, where, kept, "amax")
        found = torch.where(found == -torch.inf, 0.0, found)
    else:
        found = empty.index_add(0, bag, rows * counts.unsqueeze(-1))
        if mode == 1:
            number = counts.new_zeros(offsets.shape[0]).index_add(0, bag, counts)
            found = found / number.clamp(min=1).unsqueeze(-1)
    return found, bag, bag, bag


def efficientzerotensor(size: Sequence[int], **options: Any) -> Tensor:
    """Make zeros, which forward mode stands for without memory."""
    return torch.zeros(size, dtype=options.get("dtype"), device=options.get("device"))


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    hxw: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise groups of channels; mean and 1/deviation depend on the input."""
    rows = x.reshape(n, groups, -1)
    variance, mean = torch.var_mean(rows, -1, correction=0)
    rstd = torch.rsqrt(variance + eps)
    out = ((rows - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).reshape(x.shape)
    shape = [1, c] + [1] * (x.dim() - 2)
    if weight is not None:
        out = out * weight.reshape(shape)
    if bias is not None:
        out = out + bias.reshape(shape)
    return out, mean, rstd


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute ``g * v / |v|``; the double backward of the kernel is wrong in v's rows."""
    return weight_norm_interface(v, g, dim)[0]


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Compute the same, and the lengths."""
    lengths = _lengths(v, dim)
    return v * (g / lengths), lengths


def weight_norm_backward(
    slope: Tensor, v: Tensor, g: Tensor, lengths: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Pull a gradient back to v and g; the lengths depend on v."""
    lengths = _lengths(v, dim)
    along = (slope * v).sum(_other_axes(v, dim), keepdim=True) / lengths
    return g / lengths * (slope - v * (along / lengths)), along


def _lengths(v: Tensor, dim: int) -> Tensor:
    return v.square().sum(_other_axes(v, dim), keepdim=True).sqrt()


def _other_axes(v: Tensor, dim: int) -> list[int]:
    return [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]


PLAIN: Mapping[Any, Callable[..., Any]] = {
    aten._efficientzerotensor.default: efficientzerotensor,
    aten.cdist.default: cdist,
    aten._cdist_forward.default: cdist,
    aten.cholesky.default: cholesky,
    aten.cholesky_inverse.default: cholesky_inverse,
    aten.triangular_solve.default: triangular_solve,
    aten.linalg_matrix_power.default: matrix_power,
    aten.matrix_power.default: matrix_power,
    aten.tensordot.default: tensordot,
    aten.hardsigmoid.default: hardsigmoid,
    aten.multi_margin_loss.default: multi_margin_loss,
    aten.multilabel_margin_loss.default: multilabel_margin_loss,
    aten.embedding_bag.default: embedding_bag,
    aten.embedding_bag.padding_idx: embedding_bag,
    aten._embedding_bag.default: embedding_bag,
    aten._embedding_bag_forward_only.default: embedding_bag,
    aten._weight_norm.default: weight_norm,
    aten._weight_norm_interface.default: weight_norm_interface,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
}
"""Taken whether or not servers have the operator."""

NORMS: Mapping[Any, Callable[..., Any]] = {
    aten.native_group_norm.default: group_norm,
    **{
        target: decomposition_table[target]
        for target in (
            aten.native_layer_norm.default,
            aten.native_batch_norm.default,
            aten._native_batch_norm_legit.default,
            aten._native_batch_norm_legit_no_training.default,
            aten._batch_norm_with_update.default,
            aten._fused_rms_norm.default,
        )
        if target in decomposition_table
    },
}
"""Taken where code is recorded below autograd: the backward pass uses statistics which
the operators return, and which have no derivative as such, so that what is recorded
would lose a part of the second derivative."""
