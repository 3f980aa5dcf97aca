"""A builder of a server's operator, for bench/neighbours.py: large, and made with values."""

from torch import nn

from curvd_server.models.builders import mlp


def build(config):
    """Build it as our own builder does, but look at a value."""
    module = mlp({**config, "activation": "tanh"})
    assert module[1].weight.sum().item() < 1e9
    return nn.Sequential(*module)
