"""The architecture as a function of its parameters and of a mini-batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvd.contract import DatasetSpec, InputStyle
from curvd.errors import InvalidSpec
from curvd_server.engine.objective.company import ALONE, Company
from curvd_server.engine.objective.data import Batch
from curvd_server.engine.objective.layer_patches import PlainRecurrence, WideFloats
from curvd_server.graph.execution import GraphModule


@dataclass(frozen=True, slots=True)
class Model:
    """The architecture, with everything that is not differentiated."""

    skeleton: nn.Module
    """In evaluation mode; its own parameters have no memory (device ``meta``)."""
    constants: Mapping[str, Tensor]
    """Frozen parameters and buffers by name."""
    names: tuple[str, ...]
    """Names of the differentiated parameters, in order."""
    data: DatasetSpec
    fixed: tuple[tuple[str, int], ...] = ()
    """Rows of parameters that carry no derivative (padding), by name and index."""
    programs: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was traced of this architecture; shared by all models that have it."""

    def __call__(self, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        """Run the model.

        Args:
            parameters: One tensor per name.
            batch: The data.

        Returns:
            Its outputs; of a structured result, the field ``logits``.

        Raises:
            InvalidSpec: If the result is neither a tensor nor has ``logits``.
        """
        state = dict(self.constants)
        state.update(zip(self.names, parameters, strict=True))
        return self.run(state, batch)

    @property
    def company(self) -> Company:
        """Who computes it."""
        return ALONE

    def run(self, state: dict[str, Tensor], batch: Batch) -> Tensor:
        """Run the model with values for all of its tensors; see the call.

        Args:
            state: Parameters and constants by name.
            batch: The data.

        Returns:
            Its outputs.
        """
        args: tuple[Any, ...] = batch.inputs
        kwargs: dict[str, Tensor] = {}
        if self.data.input_style is InputStyle.KEYWORDS:
            args, kwargs = (), self._named(batch)
        elif self.data.input_style is InputStyle.MAPPING:
            args = (self._named(batch),)
        first = state[self.names[0]]
        with contextlib.ExitStack() as modes:
            if first.dtype is torch.float64:
                modes.enter_context(WideFloats())
            if first.device.type != "cpu":
                modes.enter_context(PlainRecurrence())
            if isinstance(self.skeleton, GraphModule):
                return self.skeleton.at(state, args, kwargs)
            result = torch.func.functional_call(self.skeleton, state, args, kwargs)
        if isinstance(result, Mapping):
            result = result.get("logits", result)
        result = getattr(result, "logits", result)
        if not isinstance(result, Tensor):
            msg = (
                f"the model returned {type(result).__name__}; it must return a tensor "
                "or something with a field 'logits'"
            )
            raise InvalidSpec(msg, returned=type(result).__name__)
        return result

    def restricted(self, names: Sequence[str], others: Mapping[str, Tensor]) -> Model:
        """Make the same architecture with fewer parameters that are differentiated.

        Args:
            names: Which are.
            others: Values of those that are no longer, which become constants.

        Returns:
            The model.
        """
        return dataclasses.replace(
            self,
            constants={**self.constants, **others},
            names=tuple(names),
            fixed=tuple(f for f in self.fixed if f[0] in names),
        )

    def exactly(self, constants: Mapping[str, Tensor]) -> Model:
        """Make the same architecture with constants in float64 on the CPU.

        Args:
            constants: By name, in float64.

        Returns:
            The model.
        """
        return dataclasses.replace(self, constants=constants)

    def recording(
        self, parameters: Sequence[Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Say within what a graph of it is built that is kept.

        Args:
            parameters: One tensor per name.

        Returns:
            A context.
        """
        return contextlib.nullcontext()

    def kept(self) -> dict[int, int]:
        """Bytes that the latest graph within `recording` keeps, by address of the storage.

        Nothing, if it records nothing by itself.
        """
        return {}

    def _named(self, batch: Batch) -> dict[str, Tensor]:
        return dict(zip(self.data.inputs, batch.inputs, strict=True))
