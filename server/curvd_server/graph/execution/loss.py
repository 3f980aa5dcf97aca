"""A custom loss: a graph of the model's outputs and the targets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvd.contract import SerializedGraph
from curvd.errors import InvalidGraph, InvalidSpec
from curvd_server.graph.decoder import decode
from curvd_server.graph.execution.dryrun import dry_run
from curvd_server.graph.execution.interpret import Interpreter, bind
from curvd_server.graph.execution.operators import DTYPES
from curvd_server.graph.form import Graph, GraphTensor

_TRY_BYTES = 1 << 40
"""A loss is tried on two data points; whether the data fits is seen with the data."""


@dataclass(frozen=True, slots=True)
class CustomLoss:
    """A loss whose graph was checked and tried."""

    total: Interpreter
    """(outputs, targets) -> the sum of the losses."""
    weight: Interpreter | None
    """The same -> how much was counted; None: the number of data points."""
    constants: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, data: SerializedGraph, dtype: torch.dtype, device: torch.device
    ) -> CustomLoss:
        """Check a graph, and try it without memory.

        Args:
            data: The data that a client gave.
            dtype: The dtype of floating point constants.
            device: Where they go.

        Returns:
            The loss.

        Raises:
            InvalidGraph: If it is no loss.
        """
        if not data:
            msg = "loss 'custom' needs a graph: use curvd.export_loss"
            raise InvalidGraph(msg)
        graph = decode(data)
        if len(graph.inputs) != 2 or not 1 <= len(graph.outputs) <= 2:
            msg = (
                "a loss takes outputs and targets and returns a sum, and a weight if it "
                f"counts; this graph has {len(graph.inputs)} inputs and "
                f"{len(graph.outputs)} outputs"
            )
            raise InvalidGraph(msg)
        total = Interpreter(dataclasses.replace(graph, outputs=graph.outputs[:1]))
        weight = None
        if len(graph.outputs) == 2:
            counting = dataclasses.replace(graph, outputs=graph.outputs[1:])
            if counting.last_use[0] >= 0:
                msg = "the weight of a loss must not depend on the model's outputs"
                raise InvalidGraph(msg)
            weight = Interpreter(counting)
        for part in (total, weight):
            if part is None:
                continue
            run = dry_run(part, batch=2, limit_bytes=_TRY_BYTES)
            for result in run.outputs:
                if result.dim() or not result.is_floating_point():
                    msg = (
                        "a loss and its weight are floating point scalars; this is "
                        f"{result.dtype} of shape {list(result.shape)}"
                    )
                    raise InvalidGraph(msg)
        constants = tuple(_value(t).to(device) for t in graph.tensors)
        floating = tuple(c.to(dtype) if c.is_floating_point() else c for c in constants)
        return cls(total, weight, floating)

    @property
    def graph(self) -> Graph:
        """What it is made of."""
        return self.total.graph

    def sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum the losses of a mini-batch, a scalar."""
        given = bind(self.graph.inputs, (outputs, targets), {})
        return self.total.evaluate(given, self.constants)[0]

    def counts(self, targets: Tensor) -> Tensor:
        """Weigh each data point: [B] in float64."""
        if self.weight is None:
            return torch.ones(len(targets), dtype=torch.float64, device=targets.device)
        weight, outputs = self.weight, self.graph.inputs[0]
        nothing = torch.zeros(
            (1, *outputs.shape), dtype=DTYPES[outputs.dtype], device=targets.device
        )

        def of_one(target: Tensor) -> Tensor:
            return weight.evaluate([nothing, target[None]], self.constants)[0].double()

        found: Tensor = torch.func.vmap(of_one)(targets)
        return found

    def prepared(self, dtype: torch.dtype, targets: Tensor) -> Tensor:
        """Bring targets into the type that was exported, numbers into `dtype`.

        Raises:
            InvalidSpec: If they are numbers where the loss wants integers.
        """
        want = DTYPES[self.graph.inputs[1].dtype]
        if targets.is_floating_point() and not want.is_floating_point:
            msg = f"the loss was exported with {want} targets, got {targets.dtype}"
            raise InvalidSpec(msg, expected=want, given=targets.dtype)
        return targets.to(dtype if want.is_floating_point else want)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs and targets that are not those that were exported.

        Raises:
            InvalidSpec: If shapes or types differ, or a weight is negative.
        """
        rows = min(len(outputs), len(targets))
        bind(self.graph.inputs, (outputs[:rows], targets[:rows]), {})
        if self.weight is not None and not bool((self.counts(targets) >= 0).all()):
            msg = "the loss counts a negative weight"
            raise InvalidSpec(msg)


def _value(tensor: GraphTensor) -> Tensor:
    """Read a constant that travels inside the graph."""
    name, kind = tensor.names[0], DTYPES[tensor.dtype]
    size = int(np.prod(tensor.shape, dtype=np.int64)) * kind.itemsize
    if tensor.role != "buffer" or len(tensor.data) != size:
        msg = (
            f"tensor {name!r} of a loss must be a constant with {size} bytes of data; "
            f"it has role {tensor.role} and {len(tensor.data)} bytes"
        )
        raise InvalidGraph(msg, tensor=name)
    if not size:
        return torch.zeros(tensor.shape, dtype=kind)
    raw = torch.frombuffer(bytearray(tensor.data), dtype=kind)
    return raw.reshape(tensor.shape)
