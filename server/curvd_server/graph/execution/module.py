"""A graph as a module: its parameters under their names, without memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvd.errors import InvalidGraph, InvalidSpec
from curvd_server.graph.execution.interpret import Interpreter, bind
from curvd_server.graph.execution.operators import DTYPES


class GraphModule(nn.Module):
    """Runs a graph. Its parameters have no memory until `functional_call` brings some.

    Args:
        interpreter: What it runs.
    """

    def __init__(self, interpreter: Interpreter) -> None:
        super().__init__()
        self._interpreter = interpreter
        self._batch_statistics = False
        tensors = interpreter.graph.tensors
        values = [_tensor(t.role, t.shape, DTYPES[t.dtype]) for t in tensors]
        # Homes first: the order of submodules is the order of the parameters.
        self._homes = [
            _place(self, t.names[0], value)
            for t, value in zip(tensors, values, strict=True)
        ]
        for tensor, value in zip(tensors, values, strict=True):
            for name in tensor.names[1:]:
                _place(self, name, value)

    @property
    def fixed_rows(self) -> tuple[tuple[str, int], ...]:
        """Rows of parameters that carry no derivative, by name and index."""
        return self._interpreter.padding

    @property
    def cut_off(self) -> tuple[str, ...]:
        """Lines at which values that depend on parameters become constants."""
        return self._interpreter.graph.cut_off

    def copied(self, trained: Collection[str]) -> GraphModule:
        """Make another module of the same graph; `copy.deepcopy` takes ten times as long.

        Args:
            trained: Names of the parameters that are differentiated; the others are not.

        Returns:
            The module, without memory too.
        """
        twin = GraphModule(self._interpreter)
        twin._batch_statistics = self._batch_statistics
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in trained)
        return twin

    def use_batch_statistics(self) -> None:
        """Make every BatchNorm use its mini-batch's statistics."""
        self._batch_statistics = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the graph on a mini-batch.

        Args:
            *args: The inputs in order, or one mapping with all of them by name.
            **kwargs: The inputs by name.

        Returns:
            Its first output.

        Raises:
            InvalidSpec: If the inputs are not those that were exported, or BatchNorm
                is to evaluate in a graph that was exported in training mode.
        """
        return self._run(
            [getattr(home, leaf) for home, leaf in self._homes], args, kwargs
        )

    def at(
        self,
        state: Mapping[str, Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Run the graph with values for its tensors.

        It is `torch.func.functional_call`, without putting them into the module and out
        again, which takes as long as a few operators for each of them.

        Args:
            state: Values by any of a tensor's names; the others are the module's own.
            args: See `forward`.
            kwargs: Likewise.

        Returns:
            Its first output.

        Raises:
            InvalidSpec: See `forward`.
        """
        tensors = []
        for described, (home, leaf) in zip(
            self._interpreter.graph.tensors, self._homes, strict=True
        ):
            name = next((name for name in described.names if name in state), None)
            tensors.append(getattr(home, leaf) if name is None else state[name])
        return self._run(tensors, args, kwargs)

    def _run(
        self, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        graph = self._interpreter.graph
        if self._interpreter.was_training and not self._batch_statistics:
            msg = (
                f"{self._interpreter.was_training} was exported in training mode: create "
                "the session with mode='batch_statistics', or export module.eval()"
            )
            raise InvalidSpec(msg)
        given = bind(graph.inputs, args, kwargs)
        return self._interpreter.evaluate(
            given, tensors, batch_statistics=self._batch_statistics
        )[0]

    def extra_repr(self) -> str:
        """Name the graph: plans are remembered by what a module prints."""
        return self._interpreter.graph.digest


def _tensor(role: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make a tensor without memory."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
    if role == "buffer":
        return tensor
    return nn.Parameter(tensor, requires_grad=role == "parameter")


def _place(root: nn.Module, name: str, value: Tensor) -> tuple[nn.Module, str]:
    """Register a tensor under a dotted name.

    Returns:
        Where it is: the submodule, and the attribute.
    """
    *path, leaf = name.split(".")
    module = root
    try:
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if isinstance(value, nn.Parameter):
            module.register_parameter(leaf, value)
        else:
            module.register_buffer(leaf, value)
    except (KeyError, AttributeError, TypeError) as error:
        msg = f"tensor name {name!r} cannot be used: {error.args[0]}"
        raise InvalidGraph(msg, tensor=name) from error
    return module, leaf
