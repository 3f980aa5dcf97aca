"""The function that is differentiated: a model, mini-batches and a loss as one sum.

Imports graphs and torch; knows no operator on it.
"""

from __future__ import annotations

from curvd_server.engine.objective.cancellation import check_cancelled, never
from curvd_server.engine.objective.chunked import chunks, distance, dot, norm
from curvd_server.engine.objective.company import ALONE, Company
from curvd_server.engine.objective.data import Array, Batch, rows_of, tensor_of
from curvd_server.engine.objective.layer_patches import (
    Cut,
    use_differentiable_attention,
)
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.objective.other_data import on_inputs, part_of, with_data
from curvd_server.engine.objective.output_metrics import (
    OutputMetric,
    class_axis,
    loss_hessian,
)
from curvd_server.engine.objective.parameter_slices import add_rows, tangents_of
from curvd_server.engine.objective.prefetch import on_host, streamed_as
from curvd_server.engine.objective.sampled_metrics import (
    check_samples,
    sampled_loss_hessian,
)
from curvd_server.engine.objective.trial import check_batch_axis

__all__ = [
    "ALONE",
    "Array",
    "Batch",
    "Company",
    "Cut",
    "OutputMetric",
    "Problem",
    "add_rows",
    "check_batch_axis",
    "check_cancelled",
    "check_samples",
    "chunks",
    "class_axis",
    "distance",
    "dot",
    "loss_hessian",
    "never",
    "norm",
    "on_host",
    "on_inputs",
    "part_of",
    "rows_of",
    "sampled_loss_hessian",
    "streamed_as",
    "tangents_of",
    "tensor_of",
    "use_differentiable_attention",
    "with_data",
]
