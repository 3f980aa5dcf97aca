"""Random modules and losses, with all that users do to gradients.

A `Case` says whether its gradient is that of its forward pass (`honest`); what a server
must then compute, or may refuse.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from support import twists
from torch import Tensor, nn

N = 7
T = 3
"""Steps of a sequence."""

ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "sin": torch.sin,
    "relu": F.relu,
    "leaky": F.leaky_relu,
    "elu": F.elu,
    "hardtanh": F.hardtanh,
    "softmax": lambda x: x.softmax(-1),
    "norm": lambda x: x / (1 + x.square().sum(-1, keepdim=True)).sqrt(),
    "in place": lambda x: x.clone().mul_(2.0).tanh_(),
}


CLASSES = {
    "cross entropy": nn.CrossEntropyLoss(),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "likelihood": lambda z, y: F.nll_loss(z.log_softmax(1), y),
    "focal": lambda z, y: (
        ((1 - z.softmax(1)).square() * -z.log_softmax(1)).gather(1, y[:, None]).mean()
    ),
    "weighed": lambda z, y: (
        (F.cross_entropy(z, y, reduction="none") * (1.0 + y)).sum(),
        (1.0 + y).sum(),
    ),
}
LOSSES = {
    "mse": nn.MSELoss(),
    "smooth l1": F.smooth_l1_loss,
    "huber": nn.HuberLoss(delta=0.7),
    "bce": nn.BCEWithLogitsLoss(),
    "log cosh": lambda z, y: (z - y).cosh().log().mean(),
    "total": lambda z, y: (z - y).pow(4).sum(),
    "counted": lambda z, y: (
        ((y > 0).to(z) * (z - y).square()).sum(),
        (y > 0).sum(),
    ),
    "rows": lambda z, y: (0.1 + (z - y).square().sum(1)).sqrt().mean(),
    "own, right": lambda z, y: twists.right_square(z - y).mean(),
}


def masked(z, y):
    """A mean over the targets that count, not over data points."""
    return F.cross_entropy(z, y, ignore_index=1)


@dataclass
class Case:
    """A module, its data and its loss."""

    seed: int
    module: nn.Module
    inputs: Any
    targets: Tensor
    loss: Callable[..., Any]
    kind: str
    """``mean``, ``sum`` or ``counted``: what the loss returns."""
    batch_size: int
    mode: str | None
    single: bool
    """Whether it is given in float32, and computed in float64."""
    said: list[str] = field(default_factory=list)
    """What it is made of."""
    honest: bool = True
    """Whether its gradient is that of its forward pass, and its loss a loss."""


class Lambda(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Gated(nn.Module):
    """Multiplies its input by a function of it; or adds that."""

    def __init__(self, inner, product):
        super().__init__()
        self.inner, self.product = inner, product

    def forward(self, x):
        return x * self.inner(x) if self.product else x + self.inner(x)


class First(nn.Module):
    """The first result of a recurrent or attention layer."""

    def __init__(self, inner, repeats):
        super().__init__()
        self.inner, self.repeats = inner, repeats

    def forward(self, x):
        return self.inner(*[x] * self.repeats)[0]


class Grammar:
    """Derives one case.

    Args:
        seed: Which.
    """

    def __init__(self, seed):
        self.chance = random.Random(seed)
        self.said: list[str] = []
        self.honest = True
        self.statistics = False
        self.classes = 0

    def pick(self, *options):
        chosen = self.chance.choice(options)
        self.said.append(chosen)
        return chosen

    def some(self, probability):
        return self.chance.random() < probability

    def case(self, seed):
        """Derive it."""
        kind = self.pick("vectors", "vectors", "sequences", "images", "words")
        layers = getattr(self, kind)()
        width = self.chance.choice((1, 2, 3))
        layers.append(nn.Linear(self.width, width))
        layers = [self.twisted(layer) for layer in layers]
        module = nn.Sequential(*layers).double()
        self.tied(module)
        with torch.no_grad():
            for p in module.parameters():  # biases of zero put ReLUs on their kink
                p.add_(0.1 * torch.randn_like(p))
        module.eval()
        mode = self.mode(module)
        self.honest &= any(p.requires_grad for p in module.parameters())
        self.hooked(module)
        module = self.whole(module)
        batch = self.chance.choice((2, 3, 4, 7))
        single = self.pick("single", "", "") == "single"
        if single:
            module.float()
            if self.inputs.is_floating_point():
                self.inputs = self.inputs.float()
        # Statistics of one data point are refused, unless it is an image.
        self.honest &= mode != "batch_statistics" or N % batch != 1
        loss, kind, targets = self.loss(module, width)
        return Case(
            seed,
            module,
            self.inputs,
            targets,
            loss,
            kind,
            batch,
            mode,
            single,
            self.said,
            self.honest,
        )

    # Bodies: lists of layers that lead to [B, width].

    def vectors(self):
        self.width = self.chance.choice((3, 4))
        self.inputs = torch.randn(N, self.width, dtype=torch.float64)
        return [self.of_vectors() for _ in range(self.chance.choice((1, 2, 3)))]

    def of_vectors(self):
        w = self.width
        kind = self.pick(
            "linear",
            "linear",
            "activation",
            "gated",
            "norm",
            "batch norm",
            "prelu",
            "weight norm",
        )
        if kind == "linear":
            self.width = self.chance.choice((3, 4))
            return nn.Linear(w, self.width, bias=self.some(0.8))
        if kind == "gated":
            return Gated(nn.Linear(w, w), self.some(0.5))
        if kind == "norm":
            return nn.LayerNorm(w) if self.some(0.5) else nn.RMSNorm(w)
        if kind == "batch norm":
            self.statistics = True
            norm = nn.BatchNorm1d(w, affine=self.some(0.8))
            norm.running_mean.normal_()
            return norm
        if kind == "prelu":
            return nn.PReLU(w)
        if kind == "weight norm":
            return nn.utils.parametrizations.weight_norm(nn.Linear(w, w))
        return self.activation()

    def activation(self):
        return Lambda(ACTIVATIONS[self.pick(*ACTIVATIONS)])

    def sequences(self):
        self.width = 4
        self.inputs = torch.randn(N, T, self.width, dtype=torch.float64)
        layers = [self.of_sequences() for _ in range(self.chance.choice((1, 2)))]
        return [*layers, Lambda(lambda x: x.mean(1))]

    def words(self):
        self.width = 4
        self.inputs = torch.randint(0, 6, (N, T))
        table = nn.Embedding(
            6,
            4,
            padding_idx=0 if self.pick("padded", "", "") else None,
            sparse=self.some(0.2),
        )
        layers = [self.of_sequences() for _ in range(self.chance.choice((0, 1)))]
        return [table, *layers, Lambda(lambda x: x.tanh().mean(1))]

    def of_sequences(self):
        kind = self.pick(
            "linear",
            "attention",
            "encoder",
            "lstm",
            "gru",
            "rnn",
            "activation",
            "norm",
            "softmax attention",
        )
        if kind == "attention":
            return First(nn.MultiheadAttention(4, 2, batch_first=True), 3)
        if kind == "encoder":
            return nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True)
        if kind in ("lstm", "gru", "rnn"):
            layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
            return First(layer(4, 4, batch_first=True), 1)
        if kind == "norm":
            return nn.LayerNorm(4)
        if kind == "softmax attention":
            return Lambda(lambda x: F.scaled_dot_product_attention(x, x, x))
        if kind == "linear":
            return nn.Linear(4, 4)
        return self.activation()

    def images(self):
        self.inputs = torch.randn(N, 2, 4, 4, dtype=torch.float64)
        layers = [self.of_images() for _ in range(self.chance.choice((1, 2)))]
        self.width = 2
        return [*layers, Lambda(lambda x: x.mean((2, 3)))]

    def of_images(self):
        kind = self.pick(
            "conv",
            "conv",
            "batch norm",
            "group norm",
            "instance norm",
            "pool",
            "max pool",
            "activation",
            "depthwise",
        )
        if kind == "conv":
            return nn.Conv2d(
                2,
                2,
                3,
                padding=1,
                padding_mode=self.chance.choice(("zeros", "circular")),
            )
        if kind == "depthwise":
            return nn.Conv2d(2, 2, 3, padding=1, groups=2)
        if kind == "batch norm":
            self.statistics = True
            return nn.BatchNorm2d(2)
        if kind == "group norm":
            return nn.GroupNorm(1, 2)
        if kind == "instance norm":
            return nn.InstanceNorm2d(2, affine=True)
        if kind == "pool":
            return nn.AvgPool2d(3, 1, 1)
        if kind == "max pool":
            return nn.MaxPool2d(3, 1, 1)
        return self.activation()

    # What is done to them.

    def twisted(self, layer):
        """Do something to the gradients that go through a layer, or nothing."""
        if not self.some(0.25):
            return layer
        table = twists.HONEST if self.some(0.5) else twists.SUSPECT
        self.honest &= table is twists.HONEST
        return table[self.pick(*table)](layer)

    def tied(self, module):
        """Use one weight twice, or train some parameters only."""
        free = list(module.named_parameters())
        if self.some(0.15) and len(free) > 1:
            self.said.append("frozen")
            self.chance.choice(free)[1].requires_grad_(False)
        linears = [m for m in module.modules() if type(m) is nn.Linear]
        pairs = [
            (a, b)
            for a in linears
            for b in linears
            if a is not b and a.weight.shape == b.weight.shape
        ]
        if pairs and self.some(0.3):
            self.said.append("tied")
            a, b = self.chance.choice(pairs)
            b.weight = a.weight

    def hooked(self, module):
        """Hang a hook on a parameter or a layer."""
        if not self.some(0.15):
            return
        table = twists.HONEST_HOOKS if self.some(0.5) else twists.SUSPECT_HOOKS
        self.honest &= table is twists.HONEST_HOOKS
        table[self.pick(*table)](module, self.chance)

    def mode(self, module):
        """Say which statistics are meant, or leave layers in training mode."""
        if not self.statistics:
            return None
        mode = self.pick("evaluated", "forgotten", "batch_statistics", "eval")
        if mode != "evaluated":
            module.train()
        self.honest &= mode != "forgotten"
        return mode if mode in ("batch_statistics", "eval") else None

    def whole(self, module):
        """Lose the batch axis, or cut everything off."""
        if not self.some(0.08):
            return module
        name = self.pick(*twists.WHOLE)
        self.honest = False
        return twists.Whole(module, twists.WHOLE[name])

    # Losses.

    def loss(self, module, width):
        """Choose a loss, what it returns, and targets for it."""
        numbers = torch.randn(N, width)
        classes = CLASSES if width > 1 else ()  # of one class the loss is zero
        suspect = ["hooked", "own", "penalty", "not additive", "broadcast", "doubled"]
        suspect += ["masked"] * bool(classes)
        name = self.pick(*(suspect if self.some(0.15) else (*LOSSES, *classes)))
        self.honest &= name not in suspect
        self.honest &= name != "counted" or bool((numbers > 0).any())
        if name == "masked":
            return masked, "mean", torch.randint(0, width, (N,))
        if name in CLASSES:
            kind = "counted" if name == "weighed" else "mean"
            return CLASSES[name], kind, torch.randint(0, width, (N,))
        if name == "bce":
            return nn.BCEWithLogitsLoss(), "mean", numbers.sigmoid()
        if name == "broadcast":
            if width == 1:
                return nn.MSELoss(), "mean", numbers[:, 0]
            return nn.MSELoss(), "mean", torch.randn(N, 1)
        if name == "doubled":
            loss = nn.MSELoss()
            loss.register_forward_hook(lambda m, i, o: 2 * o)
            return loss, "mean", numbers
        losses = {
            **LOSSES,
            "hooked": lambda z, y: (twists.scaling_hook(z) - y).square().mean(),
            "own": lambda z, y: (twists.reversed_gradient(z * 1.0) - y).square().mean(),
            "penalty": lambda z, y: (
                (z - y).square().mean()
                + 0.1 * sum(p.square().sum() for p in module.parameters())
            ),
            "not additive": lambda z, y: (z - y).square().mean().sqrt(),
        }
        kind = {"total": "sum", "counted": "counted"}.get(name, "mean")
        return losses[name], kind, numbers


def cases(seed, count):
    """Number the cases of a run; runs of different seeds have none in common."""
    return range(seed << 32, (seed << 32) + count)


def derive(seed):
    """Make a case by its number; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Grammar(seed).case(seed)
