"""What a session of a module needs beside the module: example outputs, proof, data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvd.contract import LossSpec, Mode, Output
from curvd.errors import CurvdError, GradientMismatch
from curvd.graph.capture import Chosen
from curvd.graph.checkpoints import plain_checkpoints
from curvd.graph.eager import failure
from curvd.graph.evaluate import types_in
from curvd.graph.examples import PROOF_ROWS, few, sampled, scattered, telling
from curvd.graph.losses import evaluated
from curvd.graph.manifest import Inputs, check_closures, inputs_of
from curvd.graph.mixed import Types
from curvd.graph.packing import detached
from curvd.graph.proof import Batch, Objective, prove
from curvd.graph.statistics import in_mode
from curvd.v1 import graph_pb2 as graph_pb

_ELEMENTS = 1 << 22
"""Of the inputs of a mini-batch that is compared; larger ones are cut."""
_TELLING_ELEMENTS = 1 << 16
"""Of the inputs of the data points that differ most, whose gradients are compared."""
_TELLING = (8, 64)
"""Fewest and most of them."""


_ROUNDING = 1e-5
"""Relative differences in float64 that may be the module's own rounding in another type."""


def example_outputs(
    module: nn.Module, inputs: Any, output: Output, mode: Mode | None
) -> Any:
    """Run a module on a few data points and leave its buffers alone.

    Args:
        module: The model.
        inputs: The inputs, as for `curvd.export`.
        output: Which of its results.
        mode: Whose statistics BatchNorm uses; None: as it is.

    Returns:
        Its outputs, [B, ...]; several as they are, or in a tuple.

    Raises:
        InvalidGraph: If it fails.
    """
    rows = inputs_of(module.forward, few(inputs))
    picked = _Picked(Chosen(module, output))
    state = {name: buffer.clone() for name, buffer in picked.named_buffers()}
    # note: a forward that differentiates needs gradients to be on.
    with torch.enable_grad(), plain_checkpoints(), in_mode(module, mode):
        arguments = (rows.args, dict(rows.kwargs))
        try:
            result = torch.func.functional_call(picked, state, arguments)
        except CurvdError:
            raise
        except Exception as error:  # of the module's own code
            what = f"fails when it is called with {len(rows.leaves[0])} data points"
            raise failure(what, error) from error
    return detached(result)


class _Picked(nn.Module):
    """Calls a module, and leaves several outputs apart."""

    def __init__(self, chosen: Chosen) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module and pick from what it returns."""
        return self.chosen.picked(args, kwargs)


class _Losses:
    """A caller's loss beside what a server makes of it.

    Args:
        own: The caller's.
        spec: The server's.
    """

    def __init__(self, own: Callable[[Tensor, Tensor], Any], spec: LossSpec) -> None:
        self._own, self._spec, self._is_pair = own, spec, False

    def eager(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the caller's; of a pair, the sum."""
        result = self._own(outputs, targets)
        self._is_pair = isinstance(result, tuple | list)
        total: Tensor = result[0] if self._is_pair else result
        return total

    def exported(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the server's, as the caller's was at last: a mean may be counted."""
        divided = not self._is_pair
        return evaluated(self._spec, outputs, targets, divided=divided)


def prove_module(
    module: nn.Module,
    inputs: Any,
    output: Output,
    mode: Mode | None,
    graph: graph_pb.Graph,
    tensors: Mapping[str, Tensor],
    loss: tuple[Any, LossSpec, Tensor] | None = None,
    batch_size: int | None = None,
    types: Types | None = None,
) -> None:
    """Prove that a graph is the module that it was exported from.

    Args:
        module: The model.
        inputs: The inputs, as for `curvd.export`.
        output: Which of its results.
        mode: Which was chosen for the export; None: as it is.
        graph: What was exported.
        tensors: Its tensors by name.
        loss: The caller's, what a server makes of it, and all targets.
        batch_size: The batch size of the session; None: unknown, and all inputs are one mini-batch.
        types: Those of the module, for which the graph has another; None: it has the module's.

    Raises:
        GradientMismatch: If outputs, loss or gradients differ.
        InvalidSpec: If it mixes data points, or trains what is no parameter.
    """
    objective = targets = None
    if loss is not None:
        own, spec, targets = loss
        both = _Losses(own, spec)
        named = types_in(graph_pb.Graph.FromString(spec.graph or b""))
        objective = Objective(both.eager, both.exported, named)
    rows = Batch(inputs_of(module.forward, sampled(inputs)), sampled(targets))
    wrapper, whole = Chosen(module, output), inputs_of(module.forward, inputs)

    def compare(*, in_own_type: bool) -> None:
        prove(
            wrapper,
            rows,
            graph,
            tensors,
            objective,
            batches=_batches(whole, targets, batch_size),
            mixes=mode is Mode.BATCH_STATISTICS,
            types=types,
            in_own_type=in_own_type,
        )

    with in_mode(module, mode):
        try:
            compare(in_own_type=False)
        except GradientMismatch as error:
            check_closures(graph, error.metadata.get("parameters", "").split(", "))
            # A module that asks for the precision of its type gets another answer in float64.
            if float(error.metadata.get("largest", "inf")) > _ROUNDING:
                raise
            compare(in_own_type=True)


def _batches(
    inputs: Inputs, targets: Tensor | None, batch_size: int | None
) -> Iterator[Batch]:
    """Choose what is compared beside the first rows, in order of importance.

    Args:
        inputs: All of them.
        targets: Theirs; None: not known.
        batch_size: That of the session; None: all of them are one mini-batch.

    Yields:
        The data points that differ most from the others, as one mini-batch; the first
        mini-batch and the last, which may be smaller; then those that have the former in
        them, and then the others, from all over the data.
    """
    points = len(inputs.leaves[0])
    elements = sum(leaf[0].numel() for leaf in inputs.leaves)
    size = min(max(batch_size or points, 1), points)
    most = max(len(PROOF_ROWS), _ELEMENTS // max(elements, 1))
    fewest, many = _TELLING
    few = min(max(_TELLING_ELEMENTS // max(elements, 1), fewest), many, size)
    told = telling([*inputs.leaves, *([] if targets is None else [targets])], few)
    chosen = None if targets is None else targets.detach()[told]
    yield Batch(inputs.taken(told), chosen, always=True, telling=True)
    ends = (0, points - (points % size or size))
    with_told = (row - row % size for row in told)
    others = (size * batch for batch in scattered(-(-points // size)))
    for start in dict.fromkeys([*ends, *with_told, *others]):
        rows = min(size, most, points - start)
        given = None if targets is None else targets.detach()[start : start + rows]
        yield Batch(inputs.rows(start, rows), given, always=start in ends)


def leaves_of(inputs: Any) -> list[Tensor]:
    """List the tensors of inputs, in the order of the graph's.

    Args:
        inputs: The inputs, as for `curvd.export`.

    Returns:
        The tensors, all rows of them.
    """
    whole = inputs if isinstance(inputs, Mapping | tuple | list) else (inputs,)
    return [leaf for leaf in pytree.tree_leaves(whole) if isinstance(leaf, Tensor)]
