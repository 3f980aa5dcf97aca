"""A module is traced with torch.export and written as a graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from curvd.errors import InvalidGraph, InvalidSpec
from curvd.graph.aliases import Alias
from curvd.graph.manifest import Inputs, exported_dtype, inputs_of, manifest
from curvd.graph.sources import source_of_error
from curvd.graph.tape import Tape, Value, write
from curvd.graph.translate import Translator
from curvd.types import Mode
from curvd.v1 import graph_pb2 as graph_pb

EXAMPLE_ROWS = 3
"""Data points that a module is traced with; neither 0 nor 1, which torch takes for
special cases."""


def capture(
    module: nn.Module, inputs: Any, output: str | int | None
) -> tuple[graph_pb.Graph, Mapping[str, Tensor], Mode]:
    """Export a module.

    Args:
        module: In the mode that its curvature is wanted in.
        inputs: Example inputs: a tensor, a tuple of arguments, or a dict of keywords.
        output: Which of its results; None: ``logits``, or the only or first tensor.

    Returns:
        The graph, its tensors by name, and the mode that it needs.
    """
    rows = inputs_of(module.forward, _rows(inputs))
    program = _traced(module, rows)
    return _translated(module, program, rows, output)


def _translated(
    module: nn.Module, program: ExportedProgram, rows: Inputs, output: str | int | None
) -> tuple[graph_pb.Graph, Mapping[str, Tensor], Mode]:
    signature = program.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    lifted = {
        str(spec.target): program.constants[str(spec.target)]
        for spec in signature.input_specs
        if spec.kind is InputKind.CONSTANT_TENSOR
    }
    listed = manifest(module, lifted)
    entries = rows.entries()
    given = iter(value for value, _ in entries)
    tape = Tape()
    values: dict[Any, Any] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        if isinstance(spec.arg, ConstantArgument):
            values[node] = spec.arg.value
        elif spec.kind is InputKind.USER_INPUT:
            values[node] = Alias.of(next(given), own=False)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constant = listed.by_name[f"_constants.{spec.target}"]
            values[node] = Alias.of(constant, own=False)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            tensor = listed.by_name[str(spec.target)]
            values[node] = Alias.of(tensor, own=False)
        else:
            msg = f"the module uses {spec.target}, a {spec.kind}, which is no tensor"
            raise InvalidGraph(msg)
    results = Translator(tape, program.graph_module, values).run(program.graph)
    chosen = _chosen(program, list(results), output)
    graph = write(
        tape,
        entries,
        listed.entries,
        [chosen],
        exported_dtype([*listed.tensors.values()]),
    )
    trained = any(
        node.operator == "aten.batch_norm.default"
        and node.arguments[5].literal.boolean
        and node.arguments[3].WhichOneof("kind")
        for node in graph.nodes
    )
    mode = Mode.BATCH_STATISTICS if trained else Mode.EVAL
    return graph, listed.tensors, mode


def _chosen(
    program: ExportedProgram, results: list[Any], output: str | int | None
) -> Value:
    """Pick the output that was asked for out of the module's result."""
    spec = program.graph_signature.output_specs
    users = [
        r for r, s in zip(results, spec, strict=True) if s.kind.name == "USER_OUTPUT"
    ]
    structure: Any = program.call_spec.out_spec.unflatten(users)
    found = structure
    if output is not None:
        try:
            indexed: Any = structure
            found = (
                indexed[output]
                if isinstance(structure, Mapping | list | tuple)
                else getattr(structure, str(output))
            )
        except (KeyError, IndexError, AttributeError, TypeError):
            msg = f"the module's {type(structure).__name__} has no output {output!r}"
            raise InvalidSpec(msg, output=output) from None
    elif not isinstance(structure, Alias):
        named = structure if isinstance(structure, Mapping) else vars_of(structure)
        found = named.get("logits")
        if not isinstance(found, Alias):
            leaves = pytree.tree_leaves(structure)
            found = next((r for r in leaves if isinstance(r, Alias)), None)
    if not isinstance(found, Alias):
        msg = (
            f"the module returned {type(structure).__name__} without a tensor at "
            f"output={output!r}; name one that depends on the inputs"
        )
        raise InvalidSpec(msg, output=output)
    return found.value


def vars_of(structure: Any) -> Mapping[str, Any]:
    """Read the attributes of a result that is no mapping.

    Args:
        structure: For example a dataclass or a named tuple.

    Returns:
        Its attributes; nothing if it has none.
    """
    logits = getattr(structure, "logits", None)
    return {} if logits is None else {"logits": logits}


def _rows(inputs: Any) -> Any:
    """Take a few data points, repeated if there are too few."""

    def few(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or not len(leaf):
            return leaf
        some = leaf.detach()[:EXAMPLE_ROWS]
        return torch.cat([some] * EXAMPLE_ROWS)[:EXAMPLE_ROWS]

    return pytree.tree_map(few, inputs)


def _traced(module: nn.Module, rows: Inputs) -> ExportedProgram:
    batch = Dim("batch", min=1)

    def dynamic(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) else None

    shapes = pytree.tree_map(dynamic, (rows.args, dict(rows.kwargs)))
    args, kwargs = shapes
    try:
        with torch.enable_grad(), _plain_layers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                module,
                rows.args,
                dict(rows.kwargs),
                dynamic_shapes=_by_name(module, args, kwargs),
                strict=False,
            )
    except Exception as error:  # torch says so in whatever way it likes
        raise _refusal(error) from error


def _by_name(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tuple(args) if not kwargs else {**_positional(module, args), **kwargs}


def _positional(module: nn.Module, args: Any) -> dict[str, Any]:
    import inspect

    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False))


@contextlib.contextmanager
def _plain_layers() -> Iterator[None]:
    """Keep transformer layers from their fused path, which has no derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _refusal(error: Exception) -> InvalidGraph:
    text = str(error)
    where = source_of_error(error)
    at = f" ({where})" if where else ""
    if "batch" in text and ("onstraint" in text or "specialized" in text):
        why = (
            f"fixes its batch size: sizes must come from the input, as in x.shape[0], "
            f"and not be the number {EXAMPLE_ROWS}"
        )
    elif "data-dependent" in text.lower() or "DataDependent" in type(error).__name__:
        why = (
            "decides by the values of tensors, or makes shapes from them: use "
            "torch.where, and masks instead of selections"
        )
    else:
        first = text.strip().partition("\n")[0][:300]
        why = f"cannot be traced by torch.export: {type(error).__name__}: {first}"
    msg = f"the module{at} {why}"
    return InvalidGraph(msg, source=where)
