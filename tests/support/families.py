"""Operators of the field by family: small modules that use each, as data.

Every case is a function between two linear layers, or a module; all of them are to be
exported, and their second derivatives are to be those of the eager module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn

N = 5
"""Data points of every case; with mini-batches of three the last one is ragged."""


class Between(nn.Module):
    """A function between two linear layers.

    Args:
        function: What is tested; it maps ``[B, *shape]`` to ``[B, ...]``.
        shape: The shape of one data point.
        layers: Submodules of the function, which gets them as further arguments.
    """

    def __init__(
        self, function: Callable[..., Tensor], shape: tuple[int, ...], *layers: Any
    ) -> None:
        super().__init__()
        self.function, self.shape = function, shape
        self.layers = nn.ModuleList(layers)
        size = torch.Size(shape).numel()
        self.first = nn.Linear(4, size)
        with torch.no_grad():
            made = function(torch.rand(2, *shape) + 0.1, *self.layers)
        self.head = nn.Linear(made.flatten(1).shape[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run all three."""
        y = torch.tanh(self.first(x)).unflatten(1, self.shape)
        return self.head(self.function(y, *self.layers).flatten(1))


@dataclass(frozen=True)
class Case:
    """One module with the kind of its data."""

    name: str
    make: Callable[[], nn.Module]
    inputs: str = "vectors"

    def module(self) -> nn.Module:
        """Build it in float64, always with the same parameters, none of them special."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.make().double().eval()
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.dim() < 2:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            return module

    def arrays(self) -> tuple[Tensor, Tensor]:
        """Make inputs and labels."""
        generator = torch.Generator().manual_seed(1)
        shape = {"vectors": (4,), "images": (2, 4, 4), "sequences": (5, 4)}
        if self.inputs == "tokens":
            x = torch.randint(0, 5, (N, 5), generator=generator)
        else:
            x = torch.randn(
                N, *shape[self.inputs], generator=generator, dtype=torch.float64
            )
        return x, torch.randint(0, 3, (N,), generator=generator)


def between(
    name: str,
    function: Callable[..., Tensor],
    shape: tuple[int, ...] = (4,),
    *layers: Callable[[], nn.Module],
) -> Case:
    """Make a case of a function."""
    return Case(name, lambda: Between(function, shape, *(make() for make in layers)))


def _spd(a: Tensor) -> Tensor:
    """Make matrices symmetric and positive definite."""
    return a @ a.mT + torch.eye(a.shape[-1], dtype=a.dtype)


def _like(x: Tensor) -> torch.dtype:
    """Choose the complex type that has the digits of a real one."""
    return torch.complex128 if x.dtype is torch.float64 else torch.complex64


def _regular(a: Tensor) -> Tensor:
    return a + 2 * torch.eye(a.shape[-1], dtype=a.dtype)


def _number(*shape: int) -> Tensor:
    return (
        torch.linspace(-1, 1, torch.Size(shape).numel()).double().reshape(shape).sin()
    )


LINEAR_ALGEBRA = (
    between(
        "einsum_of_three",
        lambda x: torch.einsum(
            "bi,ir,ro->bo", x, _number(4, 8).to(x), _number(8, 3).to(x)
        ),
    ),
    between(
        "einsum_of_four",
        lambda x: torch.einsum(
            "bi,ir,jr,bj->br", x, _number(4, 2).to(x), _number(4, 2).to(x), x
        ),
    ),
    between(
        "multi_dot",
        lambda x: torch.linalg.multi_dot([
            x,
            _number(4, 30).to(x),
            _number(30, 2).to(x),
        ]),
    ),
    between("cdist_to_few", lambda x: torch.exp(-torch.cdist(x, _number(5, 4).to(x)))),
    between("mT", lambda a: a @ a.mT, (3, 2)),
    between("mH", lambda a: a @ a.mH, (3, 2)),
    between("H", lambda a: a.flatten(1).H.H, (3, 2)),
    between("T", lambda a: (a.flatten(1).T * 2).T, (3, 2)),
    between("adjoint", lambda a: a.adjoint() @ a, (3, 2)),
    between("norm", lambda a: torch.linalg.norm(a, dim=-1), (3, 2)),
    between(
        "norm_fro", lambda a: torch.linalg.norm(a, dim=(1, 2), keepdim=True), (3, 2)
    ),
    between("vector_norm", lambda a: torch.linalg.vector_norm(a, 3, dim=-1), (3, 2)),
    between("matrix_norm", lambda a: torch.linalg.matrix_norm(a).unsqueeze(1), (3, 2)),
    between(
        "matrix_norm_nuc",
        lambda a: torch.linalg.matrix_norm(a, "nuc").unsqueeze(1),
        (3, 2),
    ),
    between(
        "matrix_norm_2", lambda a: torch.linalg.matrix_norm(a, 2).unsqueeze(1), (3, 2)
    ),
    between("tensor_norm", lambda a: a.norm(dim=-1), (3, 2)),
    between("tensor_norm_p", lambda a: a.norm(p=3, dim=-1), (3, 2)),
    between("inv", lambda a: torch.linalg.inv(_regular(a)), (3, 3)),
    between("inverse", lambda a: _regular(a).inverse(), (3, 3)),
    between("solve", lambda a: torch.linalg.solve(_regular(a), a.sin()), (3, 3)),
    between(
        "solve_vector",
        lambda a: torch.linalg.solve(_regular(a), a[:, 0].sin().unsqueeze(-1)),
        (3, 3),
    ),
    between(
        "slogdet", lambda a: torch.linalg.slogdet(_regular(a))[1].unsqueeze(1), (3, 3)
    ),
    between("logdet", lambda a: torch.logdet(_spd(a)).unsqueeze(1), (3, 3)),
    between("det", lambda a: torch.linalg.det(_regular(a)).unsqueeze(1), (3, 3)),
    between("torch_det", lambda a: torch.det(_regular(a)).unsqueeze(1), (3, 3)),
    between("cholesky", lambda a: torch.linalg.cholesky(_spd(a)), (3, 3)),
    between("cholesky_old", lambda a: torch.cholesky(_spd(a)), (3, 3)),
    between(
        "cholesky_solve",
        lambda a: torch.cholesky_solve(a.sin(), torch.linalg.cholesky(_spd(a))),
        (3, 3),
    ),
    between(
        "cholesky_inverse",
        lambda a: torch.cholesky_inverse(torch.linalg.cholesky(_spd(a))),
        (3, 3),
    ),
    between("qr", lambda a: torch.cat(torch.linalg.qr(_regular(a)), -1), (3, 3)),
    between("eigh", lambda a: torch.linalg.eigh(_spd(a))[0], (3, 3)),
    between(
        "eigh_vectors",
        lambda a: torch.linalg.eigh(_spd(a))[1].square(),
        (3, 3),
    ),
    between("eigvalsh", lambda a: torch.linalg.eigvalsh(_spd(a)), (3, 3)),
    between("svdvals", lambda a: torch.linalg.svdvals(_regular(a)), (3, 3)),
    between("svd", lambda a: torch.linalg.svd(_regular(a))[0].square(), (3, 3)),
    between(
        "lstsq", lambda a: torch.linalg.lstsq(_regular(a), a.sin()).solution, (3, 3)
    ),
    between("pinv", lambda a: torch.linalg.pinv(_regular(a)), (3, 3)),
    between(
        "solve_triangular",
        lambda a: torch.linalg.solve_triangular(_regular(a).triu(), a, upper=True),
        (3, 3),
    ),
    between(
        "triangular_solve",
        lambda a: torch.triangular_solve(a, _regular(a).triu())[0],
        (3, 3),
    ),
    between("matrix_exp", lambda a: torch.linalg.matrix_exp(a), (3, 3)),
    between("matrix_power", lambda a: torch.linalg.matrix_power(a, 3), (3, 3)),
    between("vecdot", lambda a: torch.linalg.vecdot(a, a.cos()), (3, 3)),
    between("lu", lambda a: torch.cat(torch.linalg.lu(_regular(a))[1:], -1), (3, 3)),
    between(
        "householder",
        lambda a: torch.linalg.householder_product(
            a.tril(-1) + torch.eye(3, dtype=a.dtype), a[:, 0]
        ),
        (3, 3),
    ),
    between("cross", lambda a: torch.linalg.cross(a, a.sin()), (3,)),
    between("vander", lambda a: torch.linalg.vander(a, N=3), (3,)),
    between(
        "trace_by_einsum", lambda a: torch.einsum("bii->b", a).unsqueeze(1), (3, 3)
    ),
    between("diagonal", lambda a: torch.linalg.diagonal(a @ a), (3, 3)),
    between("baddbmm", lambda a: torch.baddbmm(a, a, a), (3, 3)),
    between(
        "tensordot",
        lambda a: torch.tensordot(
            a, torch.arange(6, dtype=a.dtype).reshape(3, 2), dims=1
        ),
        (3, 3),
    ),
)


def _heads(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def _rotary(x: Tensor) -> Tensor:
    """Rotate pairs by angles that grow with the position, by complex numbers."""
    angles = torch.outer(
        torch.arange(x.shape[1], dtype=x.dtype), torch.tensor([1.0, 0.1], dtype=x.dtype)
    )
    turned = _heads(x) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(2)


class Spectral(nn.Module):
    """The layer of a Fourier neural operator in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the lowest frequencies."""
        modes = torch.fft.rfft(x)
        kept = torch.zeros(
            x.shape[0], 3, modes.shape[-1], dtype=modes.dtype, device=x.device
        )
        weight = torch.view_as_complex(self.weight)
        kept[:, :, :2] = torch.einsum("bix,iox->box", modes[:, :, :2], weight)
        return torch.fft.irfft(kept, n=x.shape[-1])


class Spectral2d(nn.Module):
    """The layer of a Fourier neural operator in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.randn(2, 2, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft2(x)
        weight = torch.view_as_complex(self.low)
        out = torch.zeros_like(modes)
        out[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", modes[:, :, :2, :2], weight)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class ComplexBuffer(nn.Module):
    """Rotary embeddings whose table is a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * self.table[: x.shape[1]]).flatten(2)


COMPLEX = (
    between(
        "complex_constant",
        lambda x: (
            (
                torch.complex(x, x.sin())
                * torch.tensor([1, 1j, -2, 3j, 0.5], dtype=_like(x))
            ).real
        ),
        (5,),
    ),
    between("rotary_polar", _rotary, (3, 4)),
    between("rotary_buffer", lambda x, layer: layer(x), (3, 4), ComplexBuffer),
    between("rfft", lambda x: torch.view_as_real(torch.fft.rfft(x)), (6,)),
    between("rfft_abs", lambda x: torch.fft.rfft(x).abs(), (6,)),
    between(
        "rfft_power", lambda x: torch.fft.rfft(x, norm="ortho").abs().square(), (6,)
    ),
    between(
        "rfft_real_imag",
        lambda x: torch.fft.rfft(x).real + torch.fft.rfft(x).imag,
        (6,),
    ),
    between("irfft", lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, n=6), (6,)),
    between(
        "fft_mixing",
        lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real,
        (3, 4),
    ),
    between(
        "fft2_shift",
        lambda x: torch.fft.fftshift(torch.fft.fft2(x), dim=(1, 2)).abs(),
        (3, 4),
    ),
    between(
        "fftn",
        lambda x: (
            torch.fft.ifftn(torch.fft.fftn(x, dim=(1, 2)) * (1 + 1j), dim=(1, 2)).real
        ),
        (3, 4),
    ),
    between(
        "fftfreq",
        lambda x: torch.fft.irfft(
            torch.fft.rfft(x) * torch.fft.rfftfreq(6, dtype=x.dtype), n=6
        ),
        (6,),
    ),
    between(
        "convolution_by_fft",
        lambda x: torch.fft.irfft(
            torch.fft.rfft(x) * torch.fft.rfft(x.sin()).conj(), n=6
        ),
        (6,),
    ),
    between("fourier_layer", lambda x, layer: layer(x), (2, 6), Spectral),
    between("fourier_layer_2d", lambda x, layer: layer(x), (2, 4, 4), Spectral2d),
    between("torch_complex", lambda x: torch.complex(x, x.sin()).exp().abs(), (4,)),
    between("angle", lambda x: torch.complex(x + 2, x).angle(), (4,)),
    between(
        "complex_matmul", lambda x: torch.view_as_real(_heads(x) @ _heads(x).mH), (2, 4)
    ),
    between("complex_literal", lambda x: torch.exp(1j * x).real, (4,)),
    between(
        "stft",
        lambda x: torch.stft(
            x,
            4,
            2,
            window=torch.ones(4, dtype=x.dtype),
            return_complex=True,
            center=False,
        ).abs(),
        (8,),
    ),
    between("hfft", lambda x: torch.fft.ihfft(x).real, (6,)),
)


def _masked(x: Tensor, value: float | Tensor) -> Tensor:
    y = x.clone()
    y[y < 0] = value
    return y


def _masked_from(x: Tensor) -> Tensor:
    y = x.clone()
    mask = x < 0
    y[mask] = x.sin()[mask]
    return y


def _scaled_where(x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0] *= 0.1
    return y


def _logarithm_where(x: Tensor) -> Tensor:
    y, mask = x.clone(), x > 0
    y[mask] = (0.5 * y[mask].log()).exp()
    return y


def _rows_scaled(x: Tensor) -> Tensor:
    y, mask = x.clone(), x[:, 0] > 0
    y[mask] = torch.tanh(x[mask] * x.new_tensor([1.0, 2.0, 3.0, 4.0])) + 1
    return y


def _mask_of_another(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = x[x.sin() > 0]
    return y


def _unpacked(x: Tensor) -> Tensor:
    """Scale by numbers of four bits, two in a byte."""
    packed = torch.tensor([[0x4A, 0x1F], [0x83, 0x77]], dtype=torch.uint8)
    low, high = packed & 15, packed >> 4
    more = (packed << torch.tensor([1, 2], dtype=torch.uint8)) >> 1
    return x * torch.cat((low, high, more), 1).to(x.dtype).sum(0)[:4] / 8


INDEXING = (
    between("packed_bits", _unpacked),
    between("mask_assignment", lambda x: _masked(x, 0.0)),
    between(
        "mask_assignment_inf", lambda x: torch.softmax(_masked(x, float("-inf")), -1)
    ),
    between("mask_assignment_tensor", lambda x: _masked(x, x.sum() * 0 + 1.5)),
    between("mask_from_another", _masked_from),
    between("mask_scaled", _scaled_where),
    between("mask_logarithm", _logarithm_where),
    between("mask_rows_scaled", _rows_scaled),
    between("mask_rows_of_rows", lambda x: x + x[x[:, 0] > 5].sum() + x[x > 9].sum()),
    between("mask_of_another", _mask_of_another),
    between("mask_sorted", lambda x: x * x[x > 0].sort().values.sum()),
    between("mask_counted", lambda x: x * x[x > 0].shape[0]),
    between(
        "mask_rows",
        lambda x: (lambda y: (y.__setitem__(x[:, 0] > 0, 0.5), y)[1])(x.clone()),
    ),
    between("len_of_batch", lambda x: x.view(len(x), -1) * 2),
    between(
        "len_and_weight_norm",
        lambda x, layer: layer(x.view(len(x), -1)),
        (4,),
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    ),
    between("len_divided", lambda x: x.reshape(len(x), 2, -1).sum(1) / 2),
    between("gather", lambda x: x.gather(1, x.argsort(1))),
    between(
        "scatter_add",
        lambda x: torch.zeros_like(x).scatter_add(1, x.argsort(1) // 2, x),
    ),
    between(
        "scatter_add_inplace",
        lambda x: torch.zeros_like(x).scatter_add_(1, x.argsort(1) // 2, x),
    ),
    between(
        "scatter_reduce_sum",
        lambda x: torch.zeros_like(x).scatter_reduce(1, x.argsort(1) // 2, x, "sum"),
    ),
    between(
        "scatter_reduce_mean",
        lambda x: torch.zeros_like(x).scatter_reduce(
            1, x.argsort(1) // 2, x, "mean", include_self=False
        ),
    ),
    between(
        "scatter_reduce_amax",
        lambda x: torch.zeros_like(x).scatter_reduce(1, x.argsort(1) // 2, x, "amax"),
    ),
    between(
        "index_add",
        lambda x: torch.zeros_like(x).index_add(1, torch.tensor([0, 0, 1, 3]), x),
    ),
    between(
        "index_add_inplace",
        lambda x: torch.zeros_like(x).index_add_(1, torch.tensor([0, 0, 1, 3]), x),
    ),
    between(
        "index_reduce",
        lambda x: torch.ones_like(x).index_reduce(
            1, torch.tensor([0, 0, 1, 3]), x, "mean"
        ),
    ),
    between(
        "index_copy",
        lambda x: torch.zeros_like(x).index_copy(1, torch.tensor([2, 0, 1, 3]), x),
    ),
    between("index_select", lambda x: x.index_select(1, torch.tensor([2, 0, 1, 3]))),
    between("topk", lambda x: x.topk(2, 1).values),
    between(
        "topk_gating",
        lambda x: torch.zeros_like(x).scatter(
            1, x.topk(2, 1).indices, x.topk(2, 1).values.softmax(1)
        ),
    ),
    between("sort", lambda x: x.sort(1, descending=True).values),
    between("msort", lambda x: torch.msort(x.T).T),
    between("kthvalue", lambda x: x.kthvalue(2, 1).values.unsqueeze(1)),
    between("median", lambda x: x.median(1).values.unsqueeze(1)),
    between("nanmedian", lambda x: x.nanmedian(1).values.unsqueeze(1)),
    between("quantile", lambda x: torch.quantile(x, 0.3, dim=1).unsqueeze(1)),
    between("mode", lambda x: x.mode(1).values.unsqueeze(1)),
    between("aminmax", lambda x: torch.stack(torch.aminmax(x, dim=1), 1)),
    between(
        "searchsorted",
        lambda x: (
            x
            * torch.searchsorted(
                torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype), x.detach()
            )
        ),
    ),
    between(
        "bucketize",
        lambda x: (
            x
            * torch.bucketize(x.detach(), torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype))
        ),
    ),
    between("cumsum", lambda x: x.cumsum(1)),
    between("cumprod", lambda x: x.cumprod(1)),
    between("logcumsumexp", lambda x: x.logcumsumexp(1)),
    between("cummax", lambda x: x.cummax(1).values),
    between("trapezoid", lambda x: torch.trapezoid(x.square(), dx=0.1).unsqueeze(1)),
    between("cumulative_trapezoid", lambda x: torch.cumulative_trapezoid(x.square())),
    between("diff", lambda x: x.diff(dim=1)),
    between("roll_flip", lambda x: x.roll(1, 1) * x.flip(1)),
    between("rot90", lambda x: x.rot90(1, (1, 2)), (2, 3)),
    between(
        "tril_indices",
        lambda x: x[:, torch.tril_indices(2, 2)[0], torch.tril_indices(2, 2)[1]],
        (2, 2),
    ),
    between("unfold", lambda x: x.unfold(1, 2, 1).prod(-1)),
    between("select_scatter", lambda x: x.select_scatter(x[:, 1] * 2, 1, 0)),
    between(
        "slice_assignment",
        lambda x: (
            lambda y: (y.__setitem__((slice(None), slice(None, 2)), x[:, 2:]), y)[1]
        )(x.clone()),
    ),
    between("one_hot", lambda x: x @ F.one_hot(torch.arange(4) % 3, 3).to(x.dtype)),
    between("einsum", lambda x: torch.einsum("bij,bkj->bik", x, x), (3, 2)),
    between("cdist", lambda x: torch.cdist(x, x.sin() + 1), (3, 2)),
    between("cdist_1", lambda x: torch.cdist(x, x.sin() + 1, p=1.0), (3, 2)),
    between("pairwise_distance", lambda x: F.pairwise_distance(x, x.sin() + 1), (3, 2)),
    between(
        "cosine_similarity",
        lambda x: F.cosine_similarity(x.unsqueeze(1), x.unsqueeze(2), -1),
        (3, 2),
    ),
    between("repeat_interleave", lambda x: x.repeat_interleave(2, 1)),
    between(
        "repeat_interleave_tensor",
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1]), 1),
    ),
    between("tile", lambda x: x.tile(1, 2)),
    between(
        "combinations", lambda x: x[:, torch.combinations(torch.arange(4))].prod(-1)
    ),
    between(
        "cartesian_prod",
        lambda x: x[:, torch.cartesian_prod(torch.arange(2), torch.arange(2, 4))].prod(
            -1
        ),
    ),
    between("triu_mask", lambda x: x.triu(1).softmax(-1), (3, 3)),
    between(
        "histc_free_bincount",
        lambda x: x * torch.bincount(torch.tensor([0, 1, 1, 2]), minlength=4),
    ),
    between(
        "segment_reduce",
        lambda x: (
            torch.segment_reduce(x.T, "sum", lengths=torch.tensor([1, 3]), axis=0).T
        ),
    ),
    between(
        "is_in",
        lambda x: x * torch.isin(torch.arange(4), torch.tensor([1, 3])).to(x.dtype),
    ),
    between(
        "bool_index_constant", lambda x: x[:, torch.tensor([True, False, True, True])]
    ),
    between("list_index", lambda x: x[:, [0, 2]]),
    between("negative_step_free", lambda x: x[..., ::2]),
)

SPECIAL = tuple(
    between(name, function)
    for name, function in {
        "erf": torch.erf,
        "erfc": torch.erfc,
        "erfinv": lambda x: torch.erfinv(0.5 * x),
        "erfcx": torch.special.erfcx,
        "ndtr": torch.special.ndtr,
        "log_ndtr": torch.special.log_ndtr,
        "ndtri": lambda x: torch.special.ndtri(0.5 + 0.3 * x),
        "lgamma": lambda x: torch.lgamma(x + 2),
        "digamma": lambda x: torch.digamma(x + 2),
        "polygamma": lambda x: torch.polygamma(1, x + 2),
        "multigammaln": lambda x: torch.special.multigammaln(x + 3, 2),
        "gammainc": lambda x: torch.special.gammainc(torch.full_like(x, 2.0), x + 2),
        "i0": torch.i0,
        "i0e": torch.special.i0e,
        "i1": torch.special.i1,
        "i1e": torch.special.i1e,
        "bessel_j0": torch.special.bessel_j0,
        "entr": lambda x: torch.special.entr(x + 2),
        "xlogy": lambda x: torch.xlogy(x + 2, x + 3),
        "xlog1py": lambda x: torch.special.xlog1py(x, x + 3),
        "zeta": lambda x: torch.special.zeta(torch.full_like(x, 3.0), x + 2),
        "sinc": torch.sinc,
        "logit": lambda x: torch.logit(0.5 + 0.3 * x),
        "expit": torch.special.expit,
        "logaddexp": lambda x: torch.logaddexp(x, x.sin()),
        "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
        "log_softmax": lambda x: torch.special.log_softmax(x, 1),
        "hypot": lambda x: torch.hypot(x + 2, x.sin()),
        "atan2": lambda x: torch.atan2(x, x + 2),
        "pow_tensor": lambda x: (x + 2) ** x,
        "float_power": lambda x: torch.float_power(x + 2, 1.5),
        "exp2": torch.exp2,
        "frac_trunc": lambda x: x.frac() + x.trunc(),
        "fmod": lambda x: torch.fmod(x, 0.3) + torch.remainder(x, 0.3),
        "copysign": lambda x: torch.copysign(x.square() + 1, x),
        "heaviside_free_sgn": lambda x: x.sgn() * x.square(),
        "nan_to_num": torch.nan_to_num,
        "nansum": lambda x: x.nansum(1, keepdim=True),
        "nanmean": lambda x: x.nanmean(1, keepdim=True),
        "std": lambda x: x.std(1, keepdim=True),
        "var_mean": lambda x: torch.stack(torch.var_mean(x, 1), 1),
        "clip": lambda x: x.clip(-0.2, 0.5),
        "clamp_tensor": lambda x: x.clamp(min=x.sin() - 0.1),
        "logical": lambda x: torch.where((x > 0) & ~(x > 0.5) | (x < -0.5), x, x.sin()),
        "prod": lambda x: x.prod(1, keepdim=True),
        "sigmoid_chain": lambda x: torch.rsqrt(x.sigmoid()) + x.log1p().nan_to_num(),
        "lerp": lambda x: torch.lerp(x, x.sin(), x.cos()),
        "addcdiv": lambda x: torch.addcdiv(x, x, x + 3, value=0.5),
        "deg2rad": torch.deg2rad,
        "positive": lambda x: +x,
        "true_divide": lambda x: torch.true_divide(x, x + 3),
        "swapaxes": lambda x: x.unsqueeze(1).swapaxes(1, 2),
        "ravel_unflatten": lambda x: x.ravel().unflatten(0, (-1, 4)),
        "hsplit": lambda x: torch.hstack(x.hsplit(2)[::-1]),
        "dstack": lambda x: torch.dstack([x, x.sin()]),
        "column_stack": lambda x: torch.column_stack([x, x.sin()]),
        "chunk": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
        "tensor_split": lambda x: torch.cat(x.tensor_split((1, 3), 1)[::-1], 1),
        "moveaxis": lambda x: x.unsqueeze(1).moveaxis(1, 2),
        "atleast_3d": torch.atleast_3d,
        "broadcast_to": lambda x: torch.broadcast_to(
            x.unsqueeze(1), (x.shape[0], 2, 4)
        ),
        "new_tensor": lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0]),
        "linspace": lambda x: x * torch.linspace(0, 1, 4, dtype=x.dtype),
        "logspace": lambda x: x * torch.logspace(0, 1, 4, dtype=x.dtype),
        "hann_window": lambda x: x * torch.hann_window(4, dtype=x.dtype),
        "empty_filled": lambda x: torch.empty_like(x).fill_(2.0) * x,
        "empty_assigned": lambda x: (
            lambda y: (y.__setitem__(slice(None), x.sin()), y)[1]
        )(torch.empty_like(x)),
        "new_empty_copied": lambda x: x.new_empty(x.shape).copy_(x.sin()),
        "out_variant_free_iadd": lambda x: (
            x.clone().add_(x.sin()).mul_(2).sub_(1).div_(3)
        ),
        "complex_free_conj": lambda x: x.conj() * x,
        "float_item_free": lambda x: x / x.abs().amax(1, keepdim=True),
    }.items()
)


class Cells(nn.Module):
    """A cell, unrolled over five steps."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Packed(nn.Module):
    """A recurrent net over packed sequences."""

    def __init__(self, lengths: str) -> None:
        super().__init__()
        self.lengths = lengths
        self.net, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.lengths == "fixed":
            lengths = torch.full((x.shape[0],), 4)
        else:
            lengths = (x[:, :, 0] > -1).sum(1).clamp(min=1)
        packed = rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.net(packed)[1][0][-1])


class Recurrent(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        sides = 2 if layer.bidirectional else 1
        self.head = nn.Linear((layer.proj_size or layer.hidden_size) * sides, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention in one of the ways that the layer has."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        options = {"separate": {"kdim": 4, "vdim": 4}, "bias_kv": {"add_bias_kv": True}}
        self.layer = nn.MultiheadAttention(
            4, 2, batch_first=True, **options.get(way, {})
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = {"need_weights": self.way == "weights"}
        if self.way == "causal":
            options["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(
                5, dtype=x.dtype
            )
        if self.way == "is_causal":
            options["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
            options["is_causal"] = True
        if self.way == "padding":
            options["key_padding_mask"] = x[:, :, 0] > 1.5
        y, weights = self.layer(x, x, x, **options)
        if weights is not None:
            y = weights @ y
        return self.head(y.sum(1))


class WholeTransformer(nn.Module):
    """Encoder and decoder."""

    def __init__(self, *, norm_first: bool = False) -> None:
        super().__init__()
        self.net = nn.Transformer(
            4, 2, 1, 1, 8, 0.1, batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.net.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.net(x, x.flip(1), tgt_mask=mask).mean(1))


class Encoder(nn.Module):
    """An encoder with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        padded = x[:, :, 0] > 1.5
        return self.head(self.net(x, src_key_padding_mask=padded).mean(1))


class Experts(nn.Module):
    """A mixture of experts that is gated by its two best."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(self.gate(x), 2, dim=-1)
        weights = weights.softmax(-1)
        out = torch.zeros(x.shape[0], 3, dtype=x.dtype, device=x.device)
        for k, expert in enumerate(self.experts):
            share = torch.where(chosen == k, weights, 0.0).sum(-1, keepdim=True)
            out += share * torch.tanh(expert(x))
        return out


class RoutedExperts(Experts):
    """The same with rows selected by masks."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(self.gate(x), 2, dim=-1)
        weights = weights.softmax(-1)
        out = torch.zeros(x.shape[0], 3, dtype=x.dtype, device=x.device)
        for k, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == k)
            out[rows] += weights[rows, slot, None] * torch.tanh(expert(x[rows]))
        return out


def normed_by(make: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """A net whose first layer is parametrised."""
    return lambda: nn.Sequential(make(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))


def spatial(*layers: Any, width: int) -> Callable[[], nn.Module]:
    """A convolutional net around some layers."""
    return lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        *layers,
        nn.Flatten(),
        nn.Linear(width, 3),
    )


class Bag(nn.Module):
    """An EmbeddingBag and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 4, **options), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(tokens)))


class WeightedBag(Bag):
    """With weights per sample."""

    def forward(self, tokens: Tensor) -> Tensor:
        weights = (tokens + 1).to(self.head.weight.dtype)
        bag = self.bag(tokens, per_sample_weights=weights)
        return self.head(torch.tanh(bag))


class Warped(nn.Module):
    """A spatial transformer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.find, self.conv = nn.Linear(32, 6), nn.Conv2d(2, 2, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.find(x.flatten(1)).view(-1, 2, 3) * 0.3
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        seen = F.grid_sample(x, grid, align_corners=False, **self.options)
        return self.head(self.conv(seen).flatten(1))


class Resized(nn.Module):
    """Interpolation."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.conv, self.head = nn.Conv2d(2, 2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(torch.tanh(self.conv(x)), **self.options)
        return self.head(y.square().mean((2, 3)))


class Patches(nn.Module):
    """Unfolds and folds an image."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).mT
        mixed = torch.tanh(self.mix(patches)).mT
        return self.head(F.fold(mixed, (4, 4), 2, stride=2).flatten(1))


LAYERS = (
    Case("lstm_cell", lambda: Cells(nn.LSTMCell), "sequences"),
    Case("gru_cell", lambda: Cells(nn.GRUCell), "sequences"),
    Case("rnn_cell", lambda: Cells(nn.RNNCell), "sequences"),
    Case("lstm", lambda: Recurrent(nn.LSTM(4, 3, 2, batch_first=True)), "sequences"),
    Case(
        "lstm_projected",
        lambda: Recurrent(nn.LSTM(4, 3, proj_size=2, batch_first=True)),
        "sequences",
    ),
    Case(
        "gru",
        lambda: Recurrent(nn.GRU(4, 3, 2, batch_first=True, bidirectional=True)),
        "sequences",
    ),
    Case("packed_fixed", lambda: Packed("fixed"), "sequences"),
    Case("attention", lambda: Attention("plain"), "sequences"),
    Case("attention_weights", lambda: Attention("weights"), "sequences"),
    Case("attention_causal", lambda: Attention("causal"), "sequences"),
    Case("attention_is_causal", lambda: Attention("is_causal"), "sequences"),
    Case("attention_padding", lambda: Attention("padding"), "sequences"),
    Case("attention_separate", lambda: Attention("separate"), "sequences"),
    Case("attention_bias_kv", lambda: Attention("bias_kv"), "sequences"),
    Case("transformer", WholeTransformer, "sequences"),
    Case(
        "transformer_norm_first", lambda: WholeTransformer(norm_first=True), "sequences"
    ),
    Case("encoder_padding", Encoder, "sequences"),
    Case("experts", Experts),
    Case("spectral_norm", normed_by(parametrizations.spectral_norm)),
    Case("spectral_norm_old", normed_by(nn.utils.spectral_norm)),
    Case("weight_norm", normed_by(parametrizations.weight_norm)),
    Case(
        "weight_norm_whole",
        normed_by(lambda inner: parametrizations.weight_norm(inner, dim=None)),
    ),
    Case("weight_norm_old", normed_by(nn.utils.weight_norm)),
    Case("orthogonal", normed_by(parametrizations.orthogonal)),
    Case(
        "orthogonal_cayley",
        normed_by(
            lambda inner: parametrizations.orthogonal(inner, orthogonal_map="cayley")
        ),
    ),
    Case("rrelu", normed_by(lambda inner: nn.Sequential(inner, nn.RReLU()))),
    Case("prelu", normed_by(lambda inner: nn.Sequential(inner, nn.PReLU(4)))),
    Case("glu", lambda: nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 3))),
    Case("bag_mean", Bag, "tokens"),
    Case("bag_sum", lambda: Bag(mode="sum"), "tokens"),
    Case("bag_max", lambda: Bag(mode="max"), "tokens"),
    Case("bag_padding", lambda: Bag(mode="sum", padding_idx=1), "tokens"),
    Case("bag_padding_mean", lambda: Bag(padding_idx=1), "tokens"),
    Case("bag_weighted", lambda: WeightedBag(mode="sum"), "tokens"),
    Case("grid_sample", Warped, "images"),
    Case("grid_sample_border", lambda: Warped(padding_mode="border"), "images"),
    Case("grid_sample_nearest", lambda: Warped(mode="nearest"), "images"),
    Case("grid_sample_bicubic", lambda: Warped(mode="bicubic"), "images"),
    Case(
        "interpolate_bilinear",
        lambda: Resized(scale_factor=2, mode="bilinear"),
        "images",
    ),
    Case("interpolate_bicubic", lambda: Resized(size=(3, 5), mode="bicubic"), "images"),
    Case("interpolate_nearest", lambda: Resized(scale_factor=2), "images"),
    Case(
        "interpolate_nearest_exact",
        lambda: Resized(size=3, mode="nearest-exact"),
        "images",
    ),
    Case("interpolate_area", lambda: Resized(size=1, mode="area"), "images"),
    Case(
        "interpolate_antialias",
        lambda: Resized(size=1, mode="bilinear", antialias=True),
        "images",
    ),
    Case("fold", Patches, "images"),
    Case("adaptive_avg", spatial(nn.AdaptiveAvgPool2d((2, 3)), width=24), "images"),
    Case("adaptive_max", spatial(nn.AdaptiveMaxPool2d(2), width=16), "images"),
    Case("lp_pool", spatial(nn.LPPool2d(2, 2), width=16), "images"),
    Case(
        "fractional_pool",
        spatial(nn.FractionalMaxPool2d(2, output_size=2), width=16),
        "images",
    ),
    Case("max_unpool", lambda: Unpooled(), "images"),
    Case("pixel_shuffle", spatial(nn.PixelShuffle(2), width=64), "images"),
    Case("pixel_unshuffle", spatial(nn.PixelUnshuffle(2), width=64), "images"),
    Case("channel_shuffle", spatial(nn.ChannelShuffle(2), width=64), "images"),
    Case("local_response_norm", spatial(nn.LocalResponseNorm(2), width=64), "images"),
    Case("conv_same", spatial(nn.Conv2d(4, 2, 3, padding="same"), width=32), "images"),
    Case(
        "conv_same_even",
        spatial(nn.Conv2d(4, 2, (2, 4), dilation=(1, 2), padding="same"), width=32),
        "images",
    ),
    Case("transposed", spatial(nn.ConvTranspose2d(4, 2, 2, 2), width=128), "images"),
    Case(
        "circular",
        spatial(nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), width=32),
        "images",
    ),
    Case("reflect", spatial(nn.ReflectionPad2d(1), width=144), "images"),
    Case("replicate", spatial(nn.ReplicationPad2d(1), width=144), "images"),
    Case("softmax2d", spatial(nn.Softmax2d(), width=64), "images"),
    Case("batch_norm", spatial(nn.BatchNorm2d(4), width=64), "images"),
    Case("group_norm", spatial(nn.GroupNorm(2, 4), width=64), "images"),
    Case(
        "instance_norm_running",
        spatial(nn.InstanceNorm2d(4, track_running_stats=True), width=64),
        "images",
    ),
    Case("dropout2d", spatial(nn.Dropout2d(), width=64), "images"),
    Case(
        "alpha_dropout",
        normed_by(lambda inner: nn.Sequential(inner, nn.AlphaDropout())),
    ),
    Case(
        "bilinear",
        lambda: between(
            "", lambda x, layer: layer(x, x.sin()), (4,), lambda: nn.Bilinear(4, 4, 2)
        ).make(),
    ),
    *(
        Case(
            kind.__name__.lower(),
            normed_by(lambda inner, kind=kind: nn.Sequential(inner, kind())),
        )
        for kind in (
            nn.CELU,
            nn.SELU,
            nn.ELU,
            nn.Mish,
            nn.SiLU,
            nn.GELU,
            nn.Hardswish,
            nn.Hardtanh,
            nn.Hardsigmoid,
            nn.LogSigmoid,
            nn.Softplus,
            nn.Softsign,
            nn.Softshrink,
            nn.Hardshrink,
            nn.Tanhshrink,
            nn.ReLU6,
            nn.Softmin,
        )
    ),
)


class Unpooled(nn.Module):
    """Pools and puts back where the maxima were."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, where = F.max_pool2d(torch.tanh(self.conv(x)), 2, return_indices=True)
        return self.head(F.max_unpool2d(y, where, 2).flatten(1))


class Field(nn.Module):
    """A physics-informed net: its outputs are derivatives of what it learns."""

    def __init__(self, way: str, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.way = way
        self.net = nn.Sequential(
            nn.Linear(4, 6),
            activation or nn.Tanh(),
            nn.Linear(6, 6),
            nn.Tanh(),
            nn.Linear(6, 1),
        )

    def value(self, point: Tensor) -> Tensor:
        return self.net(point)[..., 0]

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.way)(x)

    def gradient(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        u = self.net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat([u, du[:, :2]], 1)

    def heat(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.net(x)
        du = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]
        second = torch.autograd.grad(
            du[:, 0], x, torch.ones_like(du[:, 0]), create_graph=True
        )[0]
        return torch.stack([du[:, 1] - second[:, 0], u[:, 0], second[:, 1]], 1)

    def in_place(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x.requires_grad_(True)
            u = self.net(x)
            du = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        return torch.cat([u, du[:, :2]], 1)

    def split(self, x: Tensor) -> Tensor:
        t, rest = x[:, :1].requires_grad_(), x[:, 1:]
        u = self.net(torch.cat([t, rest], 1))
        du = torch.autograd.grad(u, t, torch.ones_like(u), create_graph=True)[0]
        return torch.cat([u, du, u * du], 1)

    def func_grad(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(self.value))(x)[:, :3]

    def func_hessian(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.hessian(self.value))(x)[:, 0, :3]

    def func_jacrev(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(self.net))(x)[:, 0, :3]

    def func_jacfwd(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacfwd(self.net))(x)[:, 0, :3]

    def func_jvp(self, x: Tensor) -> Tensor:
        u, du = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))
        return torch.cat([u, du, u * du], 1)

    def func_vjp(self, x: Tensor) -> Tensor:
        u, pull = torch.func.vjp(self.net, x)
        return torch.cat([u, pull(torch.ones_like(u))[0][:, :2]], 1)

    def laplacian(self, x: Tensor) -> Tensor:
        trace = torch.func.vmap(lambda p: torch.func.hessian(self.value)(p).trace())
        return torch.stack([trace(x), self.value(x), x[:, 0]], 1)

    def vmap_only(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda p: self.net(p).expand(3) * p[:3])(x)

    def functional_jacobian(self, x: Tensor) -> Tensor:
        rows = torch.autograd.functional.jacobian(
            lambda p: self.net(p).sum(0), x, create_graph=True
        )
        return rows[0, :, :3]

    def energy(self, x: Tensor) -> Tensor:
        """The acceleration of a Lagrangian system."""

        def force(q: Tensor) -> Tensor:
            hessian = torch.func.hessian(self.value)(q)[2:, 2:]
            gradient = torch.func.grad(self.value)(q)[:2]
            return torch.linalg.solve(hessian + torch.eye(2, dtype=q.dtype), gradient)

        return torch.func.vmap(force)(x) @ torch.arange(6, dtype=x.dtype).view(2, 3)


class SpatialField(nn.Module):
    """The input gradient of a convolutional net."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*spatial(*layers, width=64)())

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = self.net(x)
        (dx,) = torch.autograd.grad(y[:, 0].sum(), x, create_graph=True)
        return y + dx.square().mean((1, 2, 3)).unsqueeze(1)


class SequenceField(nn.Module):
    """The input gradient of a transformer's encoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True)
        self.net, self.head = layer, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = self.head(self.net(x).mean(1))
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + dx.square().mean((1, 2)).unsqueeze(1)


class Inner(nn.Module):
    """One step of gradient descent on its own weight inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        inner = (x @ self.weight).tanh().square().mean()
        (step,) = torch.autograd.grad(inner, self.weight, create_graph=True)
        return x @ (self.weight - 0.1 * step)


WAYS = (
    "gradient heat in_place split func_grad func_hessian func_jacrev func_jacfwd "
    "func_jvp func_vjp laplacian vmap_only functional_jacobian energy"
).split()
DERIVATIVES = (
    *(Case(f"field_{way}", lambda way=way: Field(way)) for way in WAYS),
    *(
        Case(
            f"field_of_{kind.__name__.lower()}", lambda kind=kind: Field("heat", kind())
        )
        for kind in (
            nn.GELU,
            nn.SiLU,
            nn.Softplus,
            nn.Sigmoid,
            nn.ELU,
            nn.Mish,
            nn.Softmax,
            nn.LogSigmoid,
            nn.CELU,
            nn.SELU,
            nn.Tanhshrink,
            nn.Softsign,
        )
        if kind is not nn.Softmax
    ),
    Case(
        "field_of_weight_norm",
        lambda: Field("gradient", parametrizations.weight_norm(nn.Linear(6, 6))),
    ),
    Case("field_of_layernorm", lambda: Field("gradient", nn.LayerNorm(6))),
    Case("spatial_field", SpatialField, "images"),
    Case(
        "spatial_field_norm",
        lambda: SpatialField(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)),
        "images",
    ),
    Case("sequence_field", SequenceField, "sequences"),
)


def _log_prob(
    make: Callable[[Tensor], torch.distributions.Distribution],
    value: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    return lambda x: make(x).log_prob(value(x)).reshape(x.shape[0], -1)


D = torch.distributions
_DENSITIES = tuple(
    between(name, _log_prob(make, value), shape)
    for name, make, value, shape in (
        ("normal", lambda x: D.Normal(x, x.exp()), torch.sin, (4,)),
        ("log_normal", lambda x: D.LogNormal(x, x.exp()), torch.exp, (4,)),
        ("laplace", lambda x: D.Laplace(x, x.exp()), lambda x: x + 1, (4,)),
        ("student", lambda x: D.StudentT(x + 4, x, x.exp()), torch.sin, (4,)),
        ("cauchy", lambda x: D.Cauchy(x, x.exp()), torch.sin, (4,)),
        ("gamma", lambda x: D.Gamma(x + 2, x + 3), torch.exp, (4,)),
        ("beta", lambda x: D.Beta(x + 2, x + 3), torch.sigmoid, (4,)),
        (
            "poisson",
            lambda x: D.Poisson(x.exp()),
            lambda x: torch.ones_like(x) * 2,
            (4,),
        ),
        (
            "bernoulli",
            lambda x: D.Bernoulli(logits=x),
            lambda x: (x > 0).to(x.dtype),
            (4,),
        ),
        ("categorical", lambda x: D.Categorical(logits=x), lambda x: x.argmax(1), (4,)),
        ("dirichlet", lambda x: D.Dirichlet(x + 2), lambda x: x.softmax(1), (4,)),
        ("independent", lambda x: D.Independent(D.Normal(x, 1.0), 1), torch.sin, (4,)),
        (
            "mvn",
            lambda x: D.MultivariateNormal(x[:, 0], covariance_matrix=_spd(x)),
            lambda x: x[:, 1],
            (3, 3),
        ),
        (
            "mvn_tril",
            lambda x: D.MultivariateNormal(
                x[:, 0], scale_tril=torch.linalg.cholesky(_spd(x))
            ),
            lambda x: x[:, 1],
            (3, 3),
        ),
        (
            "mixture",
            lambda x: D.MixtureSameFamily(
                D.Categorical(logits=x), D.Normal(x, x.exp())
            ),
            lambda x: x.sum(1),
            (4,),
        ),
        (
            "transformed",
            lambda x: D.TransformedDistribution(D.Normal(x, 1.0), [D.TanhTransform()]),
            lambda x: x.tanh() * 0.9,
            (4,),
        ),
        ("von_mises", lambda x: D.VonMises(x, x.exp()), torch.sin, (4,)),
        (
            "negative_binomial",
            lambda x: D.NegativeBinomial(x + 3, logits=x),
            lambda x: torch.ones_like(x) * 2,
            (4,),
        ),
        ("half_normal", lambda x: D.HalfNormal(x.exp()), torch.exp, (4,)),
        ("gumbel", lambda x: D.Gumbel(x, x.exp()), torch.sin, (4,)),
        ("weibull", lambda x: D.Weibull(x + 2, x + 3), torch.exp, (4,)),
    )
)
DISTRIBUTIONS = (
    *_DENSITIES,
    between("kl", lambda x: D.kl_divergence(D.Normal(x, x.exp()), D.Normal(0.0, 1.0))),
    between("entropy", lambda x: D.Categorical(logits=x).entropy().unsqueeze(1)),
    between("normal_cdf", lambda x: D.Normal(x, 1.0).cdf(x.sin())),
)

FAMILIES = {
    "linear algebra": LINEAR_ALGEBRA,
    "complex": COMPLEX,
    "indexing": INDEXING,
    "special": SPECIAL,
    "layers": LAYERS,
    "derivatives": DERIVATIVES,
    "distributions": DISTRIBUTIONS,
}

REFUSED = {
    "index_reduce": "not one that servers run",
    "repeat_interleave_tensor": "repeat_interleave",
    "combinations": "torch.where",
    "histc_free_bincount": "not one that servers run",
    "segment_reduce": "not one that servers run",
    "bool_index_constant": "a mask",
    "mask_of_another": "a mask",
    "mask_sorted": "a mask",
    "mask_counted": "a mask",
    "lstsq": "torch.where|solve",
    "packed_fixed": "pad",
    "fractional_pool": "random",
    "gammainc": "not one that servers run",
    "bessel_j0": "not one that servers run",
}
"""What has no derivative, or shapes that depend on values: name -> what is said."""
