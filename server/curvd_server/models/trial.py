"""What happens to the graphs of a client before the server itself touches them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from curvd.contract import ModelSpec, SerializedGraph
from curvd_server.graph import decode
from curvd_server.graph.execution import CustomLoss, GraphModule, Interpreter, dry_run
from curvd_server.models.resolve import Models
from curvd_server.models.state import architecture_of
from curvd_server.storage import Architecture


def try_builder(builder: str, config: Mapping[str, Any]) -> Architecture:
    """Find out what a builder of ours makes of a configuration.

    Args:
        builder: One of `builders.BUILDERS`.
        config: The config that a client gave.

    Returns:
        The tensors of its state.

    Raises:
        InvalidSpec: If the builder refuses the configuration.
    """
    models = Models({}, (), model_bytes=0, memory_bytes=lambda: 0)
    return models.architecture(ModelSpec(builder=builder, config=config))


def try_graphs(
    model: SerializedGraph, loss: SerializedGraph, *, rows: int, limit_bytes: int
) -> Architecture | None:
    """Check graphs and run them without memory.

    Args:
        model: A model; empty if a builder makes it.
        loss: A loss; empty if it is one of ours, or none yet.
        rows: Data points of a mini-batch.
        limit_bytes: Memory that values which are needed at the same time may have.

    Returns:
        The tensors of the model's state, if there is a model.

    Raises:
        InvalidGraph: If a graph is not sound.
        LimitExceeded: If it needs too much memory or time.
    """
    if loss:
        CustomLoss.of(loss, torch.float32, torch.device("cpu"))
    if not model:
        return None
    interpreter = Interpreter(decode(model))
    dry_run(interpreter, batch=rows, limit_bytes=limit_bytes)
    return architecture_of(GraphModule(interpreter))
