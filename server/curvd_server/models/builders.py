"""The architectures that ship, as functions from a config mapping to a module.

An architecture is data: a name from an allow-list and a JSON config that is checked
key by key. Operators of a server add their own in the server's config; a client can
only choose among the names.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvd.errors import InvalidSpec

Builder = Callable[[Mapping[str, Any]], nn.Module]

_LIMITS = {"width": 65_536, "vocabulary": 2**20, "layers": 1_024, "context": 2**20}
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class _Config:
    """Reads a config strictly: unknown keys and wrong types are refused."""

    def __init__(self, builder: str, values: Mapping[str, Any]) -> None:
        self._builder, self._values = builder, dict(values)
        self._known: list[str] = []

    def _refuse(self, key: str, value: object, want: str) -> InvalidSpec:
        msg = f"{self._builder}: {key} must be {want}, got {value!r}"
        return InvalidSpec(msg, builder=self._builder, key=key, value=value)

    def _take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        return self._values.pop(key, default)

    def integer(self, key: str, default: int, limit: int = 65_536) -> int:
        value = self._take(key, default)
        if type(value) is not int or not 1 <= value <= limit:
            raise self._refuse(key, value, f"an integer in [1, {limit}]")
        return value

    def integers(self, key: str, default: list[int], least: int) -> list[int]:
        value = self._take(key, default)
        listed = isinstance(value, list | tuple) and least <= len(value) <= 1_024
        if not listed or any(type(n) is not int or not 1 <= n <= 2**20 for n in value):
            want = f"a list of {least} or more integers in [1, {2**20}], at most 1024"
            raise self._refuse(key, value, want)
        return list(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if type(value) is not bool:
            raise self._refuse(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, known: Mapping[str, Any]) -> Any:
        value = self._take(key, default)
        if not isinstance(value, str) or value not in known:
            raise self._refuse(key, value, f"one of {sorted(known)}")
        return known[value]

    def done(self) -> None:
        """Refuse what nobody asked for."""
        if self._values:
            key, value = next(iter(self._values.items()))
            msg = (
                f"{self._builder}: unknown key {key!r} (value {value!r}); "
                f"known keys: {sorted(self._known)}"
            )
            raise InvalidSpec(msg, builder=self._builder, key=key, value=value)


def mlp(config: Mapping[str, Any]) -> nn.Module:
    """Build a multi-layer perceptron.

    Args:
        config: ``widths`` (inputs, hidden ..., outputs), ``activation`` (relu, gelu,
            silu, tanh), ``bias``.

    Returns:
        A module ``[B, ...] -> [B, outputs]``.
    """
    c = _Config("mlp", config)
    widths = c.integers("widths", [784, 128, 10], 2)
    activation = c.choice("activation", "relu", _ACTIVATIONS)
    bias = c.flag("bias", True)
    c.done()
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(inner, outer, bias=bias))
    return nn.Sequential(*layers)


def cnn(config: Mapping[str, Any]) -> nn.Module:
    """Build a small convolutional net with BatchNorm.

    Args:
        config: ``channels`` (inputs), ``widths`` (one per convolution), ``classes``.

    Returns:
        A module ``[B, channels, H, W] -> [B, classes]``.
    """
    c = _Config("cnn", config)
    inner = c.integer("channels", 1)
    widths = c.integers("widths", [16, 32], 1)
    classes = c.integer("classes", 10, _LIMITS["vocabulary"])
    c.done()
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(inner, width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)]
        inner = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes)]
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    """The basic block of He et al., CVPR 2016."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            project = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


def resnet18(config: Mapping[str, Any]) -> nn.Module:
    """Build the CIFAR variant of ResNet-18: a 3x3 stem and no first pooling.

    Args:
        config: ``channels`` (inputs), ``width`` (of the first stage), ``classes``.

    Returns:
        A module ``[B, channels, H, W] -> [B, classes]``.
    """
    c = _Config("resnet18", config)
    channels, width = c.integer("channels", 3), c.integer("width", 64, 4_096)
    classes = c.integer("classes", 10, _LIMITS["vocabulary"])
    c.done()
    stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    inner = width
    for stage in range(4):
        outer = width * 2**stage
        layers += [_Residual(inner, outer, 1 if stage == 0 else 2)]
        layers += [_Residual(outer, outer, 1)]
        inner = outer
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes)]
    return nn.Sequential(*layers)


class _Layer(nn.Module):
    """A pre-norm transformer layer as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.ln1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        wide = F.gelu(self.up(self.ln2(x)), approximate="tanh")
        result: Tensor = x + self.down(wide)
        return result


class _Gpt(nn.Module):
    def __init__(
        self, vocabulary: int, context: int, layers: int, width: int, heads: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def gpt(config: Mapping[str, Any]) -> nn.Module:
    """Build a GPT-2 style language model with a tied head and learned positions.

    Args:
        config: ``vocabulary``, ``context``, ``layers``, ``width``, ``heads``.

    Returns:
        A module ``[B, T] -> [B, T, vocabulary]`` for ``T <= context``.

    Raises:
        InvalidSpec: If the heads do not divide the width.
    """
    c = _Config("gpt", config)
    vocabulary = c.integer("vocabulary", 256, _LIMITS["vocabulary"])
    context = c.integer("context", 128, _LIMITS["context"])
    layers = c.integer("layers", 4, _LIMITS["layers"])
    width, heads = c.integer("width", 128), c.integer("heads", 4)
    c.done()
    if width % heads:
        msg = f"gpt: width must be a multiple of heads, got {width} and {heads}"
        raise InvalidSpec(msg, width=width, heads=heads)
    return _Gpt(vocabulary, context, layers, width, heads)


BUILDERS: Mapping[str, Builder] = MappingProxyType({
    "mlp": mlp,
    "cnn": cnn,
    "resnet18": resnet18,
    "gpt": gpt,
})
"""The builders that ship."""


def resolve(entries: Mapping[str, str]) -> Mapping[str, Builder]:
    """Add the operator's own builders to those that ship.

    Args:
        entries: Name to ``module:callable``, from the server's config. Importing is
            running code, so this must never see a client's input.

    Returns:
        All builders by name.

    Raises:
        InvalidSpec: If an entry names nothing that can be called, or hides another.
    """
    builders = dict(BUILDERS)
    for name, entry in entries.items():
        module, _, attribute = entry.partition(":")
        try:
            builder = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            msg = f"builder {name!r}: cannot load {entry!r}: {error}"
            raise InvalidSpec(msg, builder=name, entry=entry) from error
        if not callable(builder) or name in builders:
            reason = "is taken" if name in builders else f"{entry!r} is not callable"
            msg = f"builder {name!r} {reason}"
            raise InvalidSpec(msg, builder=name, entry=entry)
        builders[name] = builder
    return MappingProxyType(builders)
