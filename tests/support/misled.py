"""A function whose vectorised calls are wrong, and do not say so."""

import torch


class Tripled(torch.autograd.Function):
    """Doubles; its rule for vectorised calls triples."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient

    @staticmethod
    def vmap(info, in_dims, x):
        return 3 * x, in_dims[0]
