"""The loss's curvature in the outputs, where a loss is differentiated."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from curvd_server.engine.objective.output_metrics import loss_hessian


def test_the_metric_of_a_custom_loss_is_made_while_saved_tensors_are_counted():
    problem = SimpleNamespace(
        loss=SimpleNamespace(custom=object()), batch_loss=lambda z, _: z.pow(4).sum()
    )
    z = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        metric = loss_hessian(problem, z, None)
    u = torch.arange(12, dtype=torch.float64).reshape(2, 2, 3)
    torch.testing.assert_close(metric(u[0]), 12 * z.square() * u[0])
    torch.testing.assert_close(metric(u), 12 * z.square() * u)
