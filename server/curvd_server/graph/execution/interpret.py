"""A graph is run: its operators are looked up once, its nodes go in a plain loop."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvd.contract import COMPLEX
from curvd.errors import InvalidSpec
from curvd_server.graph.execution.half import is_wide, widened
from curvd_server.graph.execution.operators import (
    COMPLEX_OF,
    DTYPES,
    MEMORY_FORMATS,
    batch_norm,
    makes_tensors,
    resolve,
)
from curvd_server.graph.form import (
    Argument,
    ElementType,
    Graph,
    Input,
    MemoryFormat,
    Node,
    Ref,
)
from curvd_server.system import yield_point


@dataclass(frozen=True, slots=True)
class Step:
    """A node that is ready to run."""

    node: Node
    index: int
    """Number of its result."""
    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    done: tuple[int, ...]
    """Values that nobody needs after it."""

    def run(self, values: list[Any]) -> None:
        """Compute its value, and let go of what is no longer needed."""
        # note: spelled out, because a small model's nodes take microseconds.
        arguments = [
            values[a.index]
            if type(a) is Ref
            else (filled(a, values) if type(a) is tuple else a)
            for a in self.arguments
        ]
        if self.options:
            options = {name: filled(o, values) for name, o in self.options.items()}
            values[self.index] = self.function(*arguments, **options)
        else:
            values[self.index] = self.function(*arguments)
        for index in self.done:
            values[index] = None


class Interpreter:
    """A graph whose operators are found; immutable, shared by all copies of a module.

    Args:
        graph: The graph whose operators are looked up.

    Raises:
        InvalidGraph: If one is not allowed, or does not take its arguments.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._functions = [_resolved(node) for node in graph.nodes]
        self._bound: dict[Any, tuple[Step, ...]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Interpreter:
        return self

    @functools.cached_property
    def was_training(self) -> str:
        """Name a BatchNorm that was exported in training mode; empty if there is none."""
        for node in self.graph.nodes:
            if node.operator == "aten.batch_norm.default":
                given = dict(enumerate(node.arguments)) | dict(node.options)
                mean = given.get(3, given.get("running_mean"))
                if given.get(5, given.get("training")) is True and mean is not None:
                    return str(node)
        return ""

    @functools.cached_property
    def padding(self) -> tuple[tuple[str, int], ...]:
        """Rows of parameters that are looked up as constants, by name and index."""
        first, tensors = len(self.graph.inputs), self.graph.tensors
        found: dict[tuple[str, int], None] = {}
        for node in self.graph.nodes:
            if node.operator == "aten.embedding.default":
                given = dict(enumerate(node.arguments)) | dict(node.options)
                weight = given.get(0, given.get("weight"))
                row = given.get(2, given.get("padding_idx", -1))
                if type(row) is int and row >= 0 and isinstance(weight, Ref):
                    at = weight.index - first
                    if 0 <= at < len(tensors) and tensors[at].role == "parameter":
                        found[tensors[at].names[0], row] = None
        return tuple(found)

    def bound(
        self, dtype: torch.dtype, device: torch.device, *, batch_statistics: bool
    ) -> tuple[Step, ...]:
        """Fill in what a session decides.

        Args:
            dtype: What it computes in.
            device: Where.
            batch_statistics: Whether BatchNorm uses the mini-batch's.

        Returns:
            The nodes that are needed, ready to run.
        """
        key = (dtype, device, batch_statistics)
        if key not in self._bound:
            kind = functools.partial(_placed, self.graph.dtype, dtype)
            graph, first = self.graph, self.graph.first_node
            done: dict[int, list[int]] = {}
            for index, last in enumerate(graph.last_use):
                done.setdefault(last, []).append(index)
            steps = []
            for at, node in enumerate(graph.nodes):
                yield_point()
                if graph.last_use[first + at] < 0:
                    continue  # nobody needs it
                function = self._functions[at]
                options = {n: _ready(o, kind) for n, o in node.options.items()}
                if makes_tensors(node.operator):
                    options["device"] = device
                if node.operator == "aten.batch_norm.default":
                    some_train = bool(self.was_training)
                    function = functools.partial(
                        batch_norm, batch_statistics, some_train
                    )
                if is_wide(node.operator, dtype):
                    function = functools.partial(widened, function, dtype)
                arguments = tuple(_ready(a, kind) for a in node.arguments)
                ends = tuple(done.get(at, ()))
                step = Step(node, first + at, function, arguments, options, ends)
                steps.append(step)
            self._bound[key] = tuple(steps)
        return self._bound[key]

    def evaluate(
        self,
        inputs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        *,
        batch_statistics: bool = False,
    ) -> list[Tensor]:
        """Run the graph.

        Args:
            inputs: What `bind` returned.
            tensors: Values of the graph's tensors, in order.
            batch_statistics: Whether BatchNorm uses the mini-batch's.

        Returns:
            Its outputs.

        Raises:
            InvalidSpec: If one is no tensor.
        """
        dtype, device = _setting(tensors, inputs)
        values: list[Any] = [*inputs, *tensors, *[None] * len(self.graph.nodes)]
        for step in self.bound(dtype, device, batch_statistics=batch_statistics):
            step.run(values)
        results = [values[index] for index in self.graph.outputs]
        for result in results:
            if not isinstance(result, Tensor):
                msg = f"the graph returns {type(result).__name__}, not a tensor"
                raise InvalidSpec(msg)
        return results


def _resolved(node: Node) -> Any:
    yield_point()
    return resolve(node)


def bind(
    inputs: Sequence[Input], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Put data in the order of a graph's inputs.

    Args:
        inputs: What the graph takes.
        args: Tensors in order, or one mapping.
        kwargs: Tensors by name.

    Returns:
        One tensor per input.

    Raises:
        InvalidSpec: If names, number, shapes or types differ.
    """
    given: Sequence[Any] = args
    if len(given) == 1 and isinstance(given[0], Mapping) and not kwargs:
        given, kwargs = [], given[0]
    names = [i.name for i in inputs]
    rest = names[len(given) :]
    if len(given) > len(names) or set(kwargs) != set(rest):
        got = [*names[: len(given)], *kwargs]
        msg = (
            f"the model was exported with the inputs {', '.join(names)}; the dataset "
            f"gives {len(args) or len(kwargs)}: {', '.join(got)}"
        )
        raise InvalidSpec(msg, expected=names, given=got)
    tensors = [*given, *(kwargs[name] for name in rest)]
    for want, tensor in zip(inputs, tensors, strict=True):
        floating = DTYPES[want.dtype].is_floating_point
        if tuple(tensor.shape[1:]) != want.shape or (
            tensor.is_floating_point() != floating
        ):
            kind = "floating point" if floating else want.dtype
            msg = (
                f"input {want.name!r} was exported as {kind} of shape "
                f"{list(want.shape)} per data point; the dataset has "
                f"{tensor.dtype} of {list(tensor.shape[1:])}"
            )
            raise InvalidSpec(msg, input=want.name)
    return tensors


def _setting(
    tensors: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[torch.dtype, torch.device]:
    """Find out what the session computes in: all floating point tensors agree."""
    for tensor in (*tensors, *inputs):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.float32, inputs[0].device


def _placed(exported: str, session: torch.dtype, wanted: str) -> torch.dtype:
    """Choose the type that an operator makes in a session.

    What was exported as the model's own type becomes the session's. Other types are
    there for a reason and stay, but a session in float64 is in float64 throughout.
    """
    kind = DTYPES[wanted]
    if kind.is_complex:
        own, wide = COMPLEX[exported], session is torch.float64
        return COMPLEX_OF[session] if wanted == own or wide else kind
    if not kind.is_floating_point:
        return kind
    return session if wanted == exported or session is torch.float64 else kind


def _ready(argument: Argument, kind: Any) -> Any:
    if isinstance(argument, ElementType):
        return kind(argument.name)
    if isinstance(argument, MemoryFormat):
        return MEMORY_FORMATS[argument.name]
    if isinstance(argument, tuple) and not any(isinstance(i, Ref) for i in argument):
        return list(argument)
    return argument  # references are looked up at each run


def filled(argument: Any, values: list[Any]) -> Any:
    """Look the references of an argument up.

    Args:
        argument: The argument, from a `Step`.
        values: The values, by number.

    Returns:
        What the operator is called with.
    """
    if type(argument) is Ref:
        return values[argument.index]
    if type(argument) is tuple:
        return [values[i.index] if type(i) is Ref else i for i in argument]
    return argument
