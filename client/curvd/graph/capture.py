"""A module is traced with torch.export and written as a graph."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from curvd.contract import Mode, Output
from curvd.errors import CurvdError, InvalidGraph, InvalidSpec
from curvd.graph.aliases import Alias
from curvd.graph.checkpoints import plain_checkpoints
from curvd.graph.derived import Program, derived, uses_transforms
from curvd.graph.examples import few
from curvd.graph.kept import KEPT
from curvd.graph.manifest import (
    CONSTANTS,
    Inputs,
    check_memory,
    exported_dtype,
    inputs_of,
    manifest,
)
from curvd.graph.packing import is_several, packed
from curvd.graph.quiet import quiet
from curvd.graph.selections import Selected, refusal
from curvd.graph.sources import source_of_error
from curvd.graph.statistics import in_mode, needed_mode
from curvd.graph.tape import Tape, write
from curvd.graph.translate import Translator
from curvd.graph.unchecked import unchecked
from curvd.graph.unfilled import called, unfilled
from curvd.v1 import graph_pb2 as graph_pb

_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# What torch.export says about a forward that differentiates.
_TRANSFORMS = (
    "found a fake tensor in the exported",
    "'constant'",
    "functorch",
    "symbolic",
)
# What it says about one that looks at values.
_VALUES = ("data-dependent", "datadependent", "dynamicoutputshape", "unbacked")


def capture(
    module: nn.Module, inputs: Any, output: Output, mode: Mode | None
) -> tuple[graph_pb.Graph, Mapping[str, Tensor], Mode]:
    """Export a module.

    Args:
        module: In the mode that its curvature is wanted in.
        inputs: Example inputs: a tensor, a tuple of arguments, or a dict of keywords.
        output: Which of its results; None: ``logits``, or the only or first tensor;
            several are laid side by side.
        mode: Whose statistics BatchNorm uses; None: the running ones.

    Returns:
        The graph, its tensors by name, and the mode that it needs.

    Raises:
        InvalidSpec: If its output has no batch axis, or nobody chose a mode.
    """
    inputs_of(module.forward, inputs)  # before rows are dropped
    rows = inputs_of(module.forward, few(inputs))

    def check(program: ExportedProgram | Program) -> None:
        _check_outputs(program)
        check_memory(module, program.constants)

    with in_mode(module, mode):
        wrapper = Chosen(module, output)
        graph, tensors = graph_of(module, wrapper, rows, "the module", check)
    return graph, tensors, needed_mode(graph, mode)


def graph_of(
    module: nn.Module,
    wrapper: nn.Module,
    rows: Inputs,
    what: str,
    check: Callable[[ExportedProgram | Program], None] | None = None,
) -> tuple[graph_pb.Graph, Mapping[str, Tensor]]:
    """Write what a module does as a graph; one that did the same is not traced again.

    Args:
        module: The module whose tensors it uses.
        wrapper: Calls it, as ``forward(args, kwargs)``.
        rows: The example inputs.
        what: How a message calls it.
        check: Refuses what was traced, if need be.

    Returns:
        The graph, and its tensors by name; both are the caller's own.

    Raises:
        InvalidGraph: If it is not to be had as a graph.
    """
    called(wrapper, rows)
    key = KEPT.key(wrapper, rows)
    found = None if key is None else KEPT.find(key, module)
    if found is not None:
        return found
    program = traced(wrapper, rows, what)
    if check is not None:
        check(program)
    graph, tensors = translated(module, program, rows)
    if key is not None and isinstance(program, ExportedProgram):
        if KEPT.still(key, wrapper, rows):
            KEPT.keep(key, graph, tensors)
    return graph, tensors


def _check_outputs(program: ExportedProgram | Program) -> None:
    """Refuse an output that is complex, or whose first axis is not the data points'."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    given = {n.name: n.meta.get("val") for n in placeholders}
    named = (given.get(name) for name in program.graph_signature.user_inputs)
    first = next(value for value in named if isinstance(value, Tensor))
    made = next(iter(program.graph.find_nodes(op="output"))).args[0]
    returned = program.graph_signature.user_outputs
    for node in made:
        value = node.meta.get("val") if getattr(node, "name", "") in returned else None
        if not isinstance(value, Tensor):
            continue
        if value.is_complex():
            msg = (
                "the module's output is complex, and losses are of real numbers: return "
                "torch.view_as_real(...) of it, or its abs()"
            )
            raise InvalidSpec(msg, dtype=value.dtype)
        shape = [str(size) for size in value.shape]
        batch = str(first.shape[0])
        if shape[:1] != [batch]:
            said = ", ".join(s.replace(batch, "B") for s in shape)
            msg = (
                f"the module's output has shape [{said}] for B data points; its first "
                "axis must be that of the data points, [B, ...]: return one row per "
                "data point, and leave means and sums over them to the loss"
            )
            raise InvalidSpec(msg, shape=said)


class Chosen(nn.Module):
    """Calls a module and returns the output that is wanted.

    Args:
        module: What is called.
        output: Names or indices of its outputs; None: see `capture`.
    """

    def __init__(self, module: nn.Module, output: Output) -> None:
        super().__init__()
        self.module, self.output = module, output

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the module and pick from what it returns.

        Args:
            args: Its arguments.
            kwargs: Likewise by name.

        Returns:
            One tensor.

        Raises:
            InvalidSpec: If there is no such output, or it is no tensor.
        """
        found = self.picked(args, kwargs)
        return packed(found) if is_several(self.output) else found

    def picked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do the same with several outputs as they are, or in a tuple."""
        result, output = self.module(*args, **kwargs), self.output
        if output is ...:
            return result
        if isinstance(output, list | tuple):
            return tuple(_pick(result, name) for name in output)
        return _pick(result, output) if output is not None else _usual(result)


def _pick(result: Any, output: Any) -> Tensor:
    """Find an output by name or index."""
    by_name = isinstance(output, str) and not isinstance(result, Mapping)
    get: Any = getattr if by_name else operator.getitem
    try:
        found = get(result, output)
    except (KeyError, IndexError, AttributeError, TypeError):
        found = getattr(result, str(output), None)
        if found is None:
            msg = (
                f"the module's {_kind(result)} has no output {output!r}; {_has(result)}"
            )
            raise InvalidSpec(msg, output=output) from None
    return _tensor(result, found, output)


def _usual(result: Any) -> Tensor:
    """Find the output that is usual: the only one, the logits, or the first."""
    found = result
    if not isinstance(result, Tensor):
        found = result.get("logits") if isinstance(result, Mapping) else None
        found = getattr(result, "logits", found)
        if not isinstance(found, Tensor):
            items = result.values() if isinstance(result, Mapping) else result
            several = items if isinstance(items, Iterable) else ()
            found = next((i for i in several if isinstance(i, Tensor)), None)
    return _tensor(result, found, None)


def _tensor(result: Any, found: Any, output: Any) -> Tensor:
    if not isinstance(found, Tensor):
        msg = (
            f"the module's {_kind(result)} has no tensor at output={output!r}: "
            f"{_has(result)}"
        )
        raise InvalidSpec(msg, output=output)
    return found


def _kind(result: Any) -> str:
    name = "Tensor" if isinstance(result, Tensor) else type(result).__name__
    return f"result of type {name}"


def _has(result: Any) -> str:
    """Say which outputs a result has, and how one is chosen."""
    if isinstance(result, Tensor):
        return "it is one tensor, so leave output= out"
    names = list(result) if isinstance(result, Mapping) else []
    names = names or list(getattr(result, "_fields", ())) or _attributes(result)
    if not names and isinstance(result, list | tuple):
        names = list(range(len(result)))
    said = ", ".join(map(repr, names)) or "none"
    return f"it has {said}: name one of these as output="


def _attributes(result: Any) -> list[str]:
    """List the fields of a dataclass, or what another object holds."""
    return [n for n in getattr(result, "__dict__", {}) if not n.startswith("_")]


def translated(
    module: nn.Module, program: ExportedProgram | Program, rows: Inputs
) -> tuple[graph_pb.Graph, Mapping[str, Tensor]]:
    """Write what was traced as a graph.

    Args:
        module: The module whose tensors it uses, without the prefix ``module.`` of the wrapper.
        program: What was traced.
        rows: The example inputs.

    Returns:
        The graph, and its tensors by name.

    Raises:
        InvalidGraph: If it is not to be had as a graph.
    """
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    lifted = {
        str(spec.target): program.constants[str(spec.target)]
        for spec in specs.values()
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
        target = str(spec.target)
        if isinstance(spec.arg, ConstantArgument):
            values[node] = spec.arg.value
        elif spec.kind is InputKind.USER_INPUT:
            values[node] = Alias.of(next(given), own=False)
        elif spec.kind in _TENSORS:
            constant = spec.kind is InputKind.CONSTANT_TENSOR
            name = (
                f"{CONSTANTS}.{target}" if constant else target.removeprefix("module.")
            )
            value = listed.by_name[name]
            if name in listed.turning:
                value = tape.emit("aten.view_as_complex.default", value)
            values[node] = Alias.of(value, own=False)
        else:
            held = type(program.constants.get(target)).__name__
            msg = (
                f"forward uses an object of type {held}, which no server has (a generator "
                "of random numbers, say): compute what it gives before, and make that a "
                "buffer or an input"
            )
            raise InvalidGraph(msg, used=held)
    with quiet():
        results = Translator(tape, program.graph_module, values).run(program.graph)
    kept = [
        result
        for result, spec in zip(
            results, program.graph_signature.output_specs, strict=True
        )
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    if any(isinstance(result, Selected) for result in kept):
        raise refusal(tape, "aten.index.Tensor")
    if not all(isinstance(result, Alias) for result in kept):
        msg = "the module's output does not depend on its inputs"
        raise InvalidGraph(msg)
    dtype = exported_dtype([*listed.tensors.values(), *rows.leaves])
    outputs = [result.value for result in kept]
    graph = write(tape, entries, listed.entries, outputs, dtype)
    return graph, listed.tensors


def traced(
    wrapper: nn.Module, rows: Inputs, what: str = "the module"
) -> ExportedProgram | Program:
    """Trace a wrapper's ``forward(args, kwargs)`` with an open batch size.

    Args:
        wrapper: Calls what is exported.
        rows: What with.
        what: How a message calls it.

    Returns:
        What torch.export found, or what runs below autograd where it finds nothing.

    Raises:
        InvalidGraph: If it cannot be traced.
    """
    try:
        with torch.enable_grad(), unchecked(), plain_checkpoints(), quiet(), _unsaved():
            try:
                found = _exported(wrapper, rows)
                if not uses_transforms(found.graph):
                    return found
            except CurvdError:
                raise  # said by the wrapper
            except Exception as error:  # torch says so in whatever way it likes
                return _derived(wrapper, rows, error)
            return derived(wrapper, rows)
    except CurvdError:
        raise
    except Exception as error:
        raise _refusal(error, what) from error


def _unsaved() -> contextlib.AbstractContextManager[None]:
    """Compute shapes without remembering them.

    With an open batch size an operator's shapes hardly come twice, and to remember them
    takes longer than to compute them: a tenth of an export.
    """
    found: contextlib.AbstractContextManager[None] = config.patch(
        fake_tensor_cache_enabled=False
    )
    return found


def _derived(wrapper: nn.Module, rows: Inputs, error: Exception) -> Program:
    """Trace below autograd; if that is no better, say what torch.export said."""
    try:
        return derived(wrapper, rows)
    except CurvdError as better:
        raise better from error
    except Exception as other:
        inside = any(said in str(error) for said in _TRANSFORMS)
        raise other if inside else error from None


def _exported(wrapper: nn.Module, rows: Inputs) -> ExportedProgram:
    batch = Dim("batch", min=1)

    def dynamic(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) else None

    shapes = pytree.tree_map(dynamic, (rows.args, dict(rows.kwargs)))
    with unfilled(wrapper):
        return torch.export.export(
            wrapper,
            (rows.args, dict(rows.kwargs)),
            dynamic_shapes=shapes,
            strict=False,
        )


def _refusal(error: Exception, what: str) -> InvalidGraph:
    text = str(error)
    where = source_of_error(error)
    at = f" ({where})" if where else ""
    if "batch" in text and ("onstraint" in text or "specialized" in text):
        why = (
            "fixes its batch size: sizes must come from the input as x.shape[0]; "
            "len(x) and int(x.shape[0]) are numbers of the example"
        )
    elif "lstsq" in text:
        why = (
            "calls torch.linalg.lstsq, whose rank depends on values: use "
            "torch.linalg.pinv, or torch.linalg.solve of the normal equations"
        )
    elif "numpy" in text:
        why = (
            "makes an array of numpy from a tensor, which has no derivative: write it "
            "with torch's operators"
        )
    elif "'FakeTensor' object has no attribute" in text:
        name = text.partition("no attribute ")[2].split("\n")[0]
        why = (
            f"reads an attribute {name} of a parameter, buffer or input: make it an attribute "
            "of the layer"
        )
    elif "ninitialized parameter" in text:
        why = "has lazy layers that know no shape yet: call it once before exporting"
    elif any(said in f"{type(error).__name__} {text}".lower() for said in _VALUES):
        why = (
            "decides by the values of tensors, or makes numbers or shapes from them "
            "(.item(), float()): use torch.where, masks instead of selections, and "
            "tensors instead of numbers"
        )
    else:
        first = text.strip().partition("\n")[0][:300]
        why = f"cannot be traced by torch.export: {type(error).__name__}: {first}"
        return InvalidGraph(f"{what}{at} {why}", source=where, failed="trace")
    return InvalidGraph(f"{what}{at} {why}", source=where)
