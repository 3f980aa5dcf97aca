"""Settings of nets, losses and data as data: what suites of other libraries go through.

A net is a list of layers of `torch.nn`, (name, arguments…); the data are drawn. After
the sorts of settings in BackPACK's test suite: each layer it knows, between others that
make it matter, under each loss and reduction.
"""

from dataclasses import dataclass

N = 6
"""Data points; mini-batches of four leave a ragged one."""


@dataclass(frozen=True)
class Setting:
    """One net with one loss."""

    name: str
    layers: tuple[tuple, ...]
    inputs: tuple[int, ...]
    """Shape of one data point; of indices if the first layer is an embedding."""
    loss: str
    reduction: str


ACTIVATIONS = [
    ("ReLU",), ("Sigmoid",), ("Tanh",), ("LeakyReLU", 0.1), ("LogSigmoid",),
    ("ELU",), ("SELU",), ("GELU",), ("SiLU",), ("Softplus",), ("Hardtanh",),
]  # fmt: skip

CONVOLUTIONS = [
    ("Conv1d", (2, 3, 3), (2, 7)),
    ("Conv1d", (2, 4, 2, 2, 1, 1, 2), (2, 8)),
    ("Conv1d", (2, 3, 3, 1, 2, 2), (2, 7)),
    ("Conv2d", (2, 3, 2), (2, 4, 5)),
    ("Conv2d", (2, 2, (3, 2), 2, 1), (2, 5, 4)),
    ("Conv2d", (4, 4, 2, 1, 0, 1, 2), (4, 3, 4)),
    ("Conv2d", (1, 2, 2, 1, 0, 1, 1, False), (1, 4, 4)),
    ("Conv3d", (1, 2, 2), (1, 3, 4, 3)),
    ("Conv3d", (2, 2, 2, 2, 1, 1, 2), (2, 3, 3, 4)),
    ("ConvTranspose1d", (2, 3, 2), (2, 4)),
    ("ConvTranspose1d", (2, 4, 2, 2, 1, 0, 2), (2, 5)),
    ("ConvTranspose2d", (2, 3, 2), (2, 3, 3)),
    ("ConvTranspose2d", (2, 2, 2, 2, 1, 0, 2), (2, 3, 4)),
    ("ConvTranspose3d", (1, 2, 2), (1, 2, 3, 2)),
]

REDUCERS = [
    ("MaxPool1d", (2,), (2, 7)),
    ("MaxPool2d", (2, 1), (2, 4, 4)),
    ("MaxPool3d", (2,), (1, 4, 4, 4)),
    ("AvgPool1d", (3, 2), (2, 8)),
    ("AvgPool2d", (2,), (2, 4, 5)),
    ("AvgPool3d", (2,), (1, 4, 4, 4)),
    ("AdaptiveAvgPool1d", (3,), (2, 6)),
    ("AdaptiveAvgPool2d", ((2, 2),), (2, 4, 6)),
    ("AdaptiveAvgPool3d", (2,), (1, 4, 4, 4)),
    ("BatchNorm1d", (2,), (2, 5)),
    ("BatchNorm2d", (2,), (2, 3, 3)),
    ("BatchNorm3d", (1,), (1, 3, 3, 3)),
    ("ZeroPad2d", (1,), (2, 3, 3)),
    ("GroupNorm", (1, 2), (2, 4)),
    ("Upsample", (None, 2), (2, 3)),
]

LOSSES = [
    (loss, reduction)
    for loss in ("CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss")
    for reduction in ("mean", "sum")
]


def settings():
    """Every setting; each kind of layer goes through losses in turn."""
    found = []

    def add(kind, layers, inputs, losses):
        for loss, reduction in losses:
            name = f"{kind}-{loss}-{reduction}-{len(found)}"
            found.append(Setting(name, tuple(layers), inputs, loss, reduction))

    for k, (name, *arguments) in enumerate(ACTIVATIONS):
        net = [("Linear", 4, 5), (name, *arguments), ("Linear", 5, 3)]
        add(name, net, (4,), [LOSSES[k % 6], LOSSES[(k + 3) % 6]])
    for k, (name, arguments, inputs) in enumerate(CONVOLUTIONS):
        net = [(name, *arguments), ("Tanh",), ("Flatten",), ("LazyLinear", 3)]
        add(name, net, inputs, [LOSSES[k % 6], LOSSES[(k + 2) % 6]])
    for k, (name, arguments, inputs) in enumerate(REDUCERS):
        width = len(inputs) - 1
        first = (f"Conv{width}d", inputs[0], inputs[0], 1)
        net = [first, ("Sigmoid",), (name, *arguments), ("Flatten",), ("LazyLinear", 2)]
        add(name, net, inputs, [LOSSES[k % 6], LOSSES[(k + 5) % 6]])
    for loss in LOSSES:
        add("Linear", [("Linear", 3, 4)], (3,), [loss])
        add("bias-free", [("Linear", 3, 4, False), ("Tanh",), ("Linear", 4, 2)],
            (3,), [loss])  # fmt: skip
    for loss in LOSSES[:4]:
        add("Embedding", [("Embedding", 5, 3), ("Tanh",), ("Flatten",),
            ("LazyLinear", 2)], (4,), [loss])  # fmt: skip
    for loss in LOSSES[:2]:
        add("positions", [("Conv1d", 2, 3, 2)], (2, 5), [loss])
        add("eval-dropout", [("Linear", 3, 4), ("Dropout", 0.5), ("Linear", 4, 2)],
            (3,), [loss])  # fmt: skip
    return found
