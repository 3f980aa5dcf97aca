"""The layer zoo: small models whose second derivatives are known to be hard.

Data only, so that the same animals are used against the engine and through the real
service: `ANIMALS` lists a name, a module factory, a dataset and a loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from curvd.contract.enums import Mode
from curvd.contract.specs import LossSpec

N = 6
"""Data points of every animal."""


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.tokens(tokens))))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(4, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


class _Pooled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.embedding_dim, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(tokens)).sum(1))


def dense(*layers: nn.Module) -> Callable[[], nn.Module]:
    """A net of linear layers around some others."""
    return lambda: nn.Sequential(
        nn.Linear(4, 4), *copy.deepcopy(layers), nn.Linear(4, 3)
    )


def spatial(*layers: nn.Module) -> Callable[[], nn.Module]:
    """A convolutional net around some layers with four channels."""
    return lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        *copy.deepcopy(layers),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
    )


@dataclass(frozen=True)
class Animal:
    """One model with data and loss."""

    name: str
    make: Callable[[], nn.Module]
    inputs: str = "vectors"
    loss: LossSpec = field(default_factory=lambda: LossSpec(name="cross_entropy"))
    mode: Mode = Mode.EVAL
    per_token: bool = False

    def module(self) -> nn.Module:
        """Build it, always with the same parameters, none of them special."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.make().double()
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    noise = 0.1 * torch.randn_like(tensor)
                    tensor.data += noise.abs() if tensor.dim() == 1 else noise
        return module

    def arrays(self) -> dict[str, Tensor]:
        """Make its data: ``x`` and ``y``."""
        g = torch.Generator().manual_seed(1)
        float64 = {"generator": g, "dtype": torch.float64}
        x = {
            "vectors": lambda: torch.randn(N, 4, **float64),
            "images": lambda: torch.randn(N, 2, 3, 3, **float64),
            "sequences": lambda: torch.randn(N, 5, 4, **float64),
            "tokens": lambda: torch.randint(0, 5, (N, 5), generator=g),
        }[self.inputs]()
        if self.loss.name in ("mse", "smooth_l1"):
            y = torch.randn(N, 3, **float64)
        elif self.loss.name == "bce_with_logits":
            y = torch.rand(N, 3, **float64)
        else:
            shape = (N, 5) if self.per_token else (N,)
            y = torch.randint(0, 3, shape, generator=g)
        return {"x": x, "y": y}


def _recurrent(kind: type[nn.RNNBase]) -> Callable[[], nn.Module]:
    return lambda: _Recurrent(kind)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Linear(4, 3))


_MSE, _BCE = LossSpec(name="mse"), LossSpec(name="bce_with_logits")
_SMOOTH_L1 = LossSpec(name="smooth_l1", beta=0.5)
_SHIFTED = LossSpec(name="cross_entropy", shift=True)
_STATISTICS = Mode.BATCH_STATISTICS

ANIMALS: tuple[Animal, ...] = (
    Animal("linear", lambda: nn.Sequential(nn.Linear(4, 3))),
    Animal("linear_mse", dense(nn.Tanh()), loss=_MSE),
    Animal("linear_bce", dense(nn.Sigmoid()), loss=_BCE),
    Animal("linear_smooth_l1", dense(nn.Tanh()), loss=_SMOOTH_L1),
    Animal("relu", dense(nn.ReLU())),
    Animal("silu", dense(nn.SiLU()), loss=_MSE),
    Animal("gelu", dense(nn.GELU())),
    Animal("gelu_tanh", dense(nn.GELU(approximate="tanh"))),
    Animal("layernorm", dense(nn.LayerNorm(4)), loss=_MSE),
    Animal("layernorm_ce", dense(nn.LayerNorm(4), nn.GELU())),
    Animal("rmsnorm", dense(nn.RMSNorm(4))),
    Animal("dropout_eval", dense(nn.Dropout(0.5))),
    Animal("conv", spatial(nn.ReLU()), "images"),
    Animal("groupnorm", spatial(nn.GroupNorm(2, 4)), "images", _MSE),
    Animal("instancenorm", spatial(nn.InstanceNorm2d(4, affine=True)), "images"),
    Animal("batchnorm_eval", spatial(nn.BatchNorm2d(4), nn.ReLU()), "images"),
    Animal(
        "batchnorm_statistics", spatial(nn.BatchNorm2d(4)), "images", _MSE, _STATISTICS
    ),
    Animal("maxpool", spatial(nn.MaxPool2d(3, 1, 1)), "images"),
    Animal("attention", _Attention, "sequences", per_token=True),
    Animal("transformer_layer", _encoder, "sequences", per_token=True),
    Animal("embedding", lambda: _Pooled(nn.Embedding(5, 4)), "tokens"),
    Animal("padding", lambda: _Pooled(nn.Embedding(5, 4, padding_idx=1)), "tokens"),
    Animal("tied", _Tied, "tokens", per_token=True),
    Animal("tied_shifted", _Tied, "tokens", _SHIFTED, per_token=True),
    Animal("gru", _recurrent(nn.GRU), "sequences"),
    Animal("lstm", _recurrent(nn.LSTM), "sequences"),
    Animal(
        "weight_norm",
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)
        ),
        loss=_MSE,
    ),
    Animal("unused", _Unused, loss=_MSE),
)
"""Every one has to match central differences of its gradient."""


def build(config: Mapping[str, object]) -> nn.Module:
    """A server's builder: the animal that the config's ``animal`` names."""
    return next(a for a in (*ANIMALS, REFUSED) if a.name == config["animal"]).module()


class RawWeightNorm(nn.Module):
    """Uses the kernel whose double backward is wrong; has to be refused by name."""

    def __init__(self) -> None:
        super().__init__()
        self.length = nn.Parameter(torch.rand(4, 1) + 0.5)
        self.direction = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch._weight_norm(self.direction, self.length, 0)
        return self.head(torch.tanh(F.linear(x, weight)))


REFUSED = Animal("raw_weight_norm", RawWeightNorm, loss=_MSE)
