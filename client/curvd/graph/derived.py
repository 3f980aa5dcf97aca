"""Tracing below autograd: for a forward that differentiates, or counts its rows.

torch.export records what a module calls, and so cannot see inside ``autograd.grad`` or
``torch.func``. Here the operators that these run are recorded instead, once for each of
several batch sizes; wherever the numbers in the code differ, they must be one affine
function of the batch size, which is then written in their place. So ``len(x)`` works,
and code that does different things for different batch sizes is found out.
"""

from __future__ import annotations

import operator as python
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from curvd.errors import InvalidGraph
from curvd.graph.decompose import table
from curvd.graph.manifest import Inputs
from curvd.graph.plain import NORMS
from curvd.graph.unfilled import unfilled

SIZES = (5, 7, 11, 2, 509)
"""Batch sizes that are traced: two make an affine function, the others check it, and find
code that takes another way for small or large ones."""
aten = torch.ops.aten
_DATA: Any = Tensor.data
_DETACHING = frozenset({Tensor.detach, torch.detach, _DATA.__get__})


@dataclass(frozen=True)
class Program:
    """What was traced, in the form of torch's ``ExportedProgram``."""

    graph_module: fx.GraphModule
    graph_signature: ExportGraphSignature
    constants: Mapping[str, Tensor]

    @property
    def graph(self) -> fx.Graph:
        """The operators."""
        return self.graph_module.graph


def uses_transforms(graph: fx.Graph) -> bool:
    """Tell whether exported code contains ``vmap`` or another transform as it is.

    Args:
        graph: The graph, from torch.export.

    Returns:
        Whether it has to be traced below autograd instead.
    """
    return any(
        getattr(node.target, "__module__", "").startswith("torch._functorch")
        for node in graph.nodes
        if node.op == "call_function"
    )


def derived(wrapper: nn.Module, rows: Inputs) -> Program:
    """Trace a wrapper's ``forward(args, kwargs)`` below autograd.

    Args:
        wrapper: Calls what is exported.
        rows: What with.

    Returns:
        The operators, with the batch size left open.

    Raises:
        InvalidGraph: If they depend on the batch size in another way.
    """
    with unfilled(wrapper):
        traces = [_trace(wrapper, rows, size) for size in SIZES]
    _open_batch(traces)
    return _program(wrapper, traces[0])


class _Marked(TorchFunctionMode):
    """Tells what the code detaches from what autograd does for itself.

    Both would be recorded as ``detach``. Values that the code takes for constants are
    copied by ``detach_copy``, and all other detaching is autograd's own.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch and mark its results if they are constants."""
        options = kwargs or {}
        enabled = torch.is_grad_enabled()
        result = func(*args, **options)
        constant = not enabled or func in _DETACHING
        if func is torch.autograd.grad:
            constant = not options.get("create_graph", False)
        if not constant:
            return result
        given = {id(leaf) for leaf in pytree.tree_leaves((args, options))}
        return pytree.tree_map(
            lambda leaf: (
                aten.detach_copy.default(leaf)
                if isinstance(leaf, Tensor) and id(leaf) not in given
                else leaf
            ),
            result,
        )


def _trace(wrapper: nn.Module, rows: Inputs, size: int) -> fx.GraphModule:
    """Record the operators at one batch size, without computing."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    own = dict(_state(wrapper))
    state = [mode.from_tensor(value) for value in own.values()]
    leaves, spec = pytree.tree_flatten((rows.args, dict(rows.kwargs)))
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    given = [
        mode.from_tensor(leaves[k][:1].repeat(size, *[1] * (leaves[k].dim() - 1)))
        for k in places
    ]

    def run(state: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for k, value in zip(places, given, strict=True):
            filled[k] = value
        arguments = pytree.tree_unflatten(filled, spec)
        named = dict(zip(own, state, strict=True))
        with _Marked():
            result = torch.func.functional_call(wrapper, named, arguments)
        return list(result) if isinstance(result, tuple) else [result]

    with mode, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        traced: fx.GraphModule = make_fx(run, {**table(), **NORMS})(state, given)
    for node in list(traced.graph.nodes):
        _check_outputs(node)
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif node.target is aten.detach_copy.default:
            node.target = aten.detach.default
    return traced


def _check_outputs(node: fx.Node) -> None:
    """Refuse a number among several results that has no derivative, if it is used.

    autograd knows how such a number depends on the arguments when it differentiates
    the operator; whoever reads recorded code does not.
    """
    used = [user for user in node.users if user.target is python.getitem and user.users]
    if not used:
        return

    def bare(item: Any) -> Any:
        value = item.meta.get("val") if isinstance(item, fx.Node) else item
        if not isinstance(value, Tensor):
            return value
        wants = value.is_floating_point() or value.is_complex()
        return torch.empty_like(value, device="meta", requires_grad=wants)

    args, kwargs = pytree.tree_map(
        bare, (node.args, dict(node.kwargs)), is_leaf=lambda i: isinstance(i, fx.Node)
    )
    target: Any = node.target
    results = target(*args, **kwargs)
    for user in used:
        result = results[user.args[1]]
        if result.is_floating_point() and not result.requires_grad:
            msg = (
                f"operator {node.target} returns a number whose derivative is lost where "
                "the module differentiates: write it with elementary operators"
            )
            raise InvalidGraph(msg, operator=str(node.target))


def _state(wrapper: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from wrapper.named_parameters()
    yield from wrapper.named_buffers()


def _open_batch(traces: Sequence[fx.GraphModule]) -> None:
    """Write sizes of the first trace as functions of the batch size.

    Args:
        traces: The same code at `SIZES`; the first is changed.

    Raises:
        InvalidGraph: If the code is another at another size.
    """
    graph = traces[0].graph
    columns = [list(trace.graph.nodes) for trace in traces]
    if len({len(nodes) for nodes in columns}) != 1:
        raise _depends()
    places = [{node: k for k, node in enumerate(nodes)} for nodes in columns]
    *_, data = (n for n in columns[0] if n.op == "placeholder")
    batch = _Batch(graph, data)
    for nodes in zip(*columns, strict=True):
        first = nodes[0]
        if len({(n.op, n.target) for n in nodes}) != 1:
            raise _depends()
        if first.op == "get_attr":
            values = [getattr(t, str(first.target)) for t in traces]
            if any(not torch.equal(values[0], v) for v in values[1:]):
                raise _depends()
        flat = [pytree.tree_flatten((n.args, dict(n.kwargs)), _is_leaf) for n in nodes]
        if any(spec != flat[0][1] for _, spec in flat):
            raise _depends()
        leaves = []
        for several in zip(*(leaves for leaves, _ in flat), strict=True):
            if isinstance(several[0], fx.Node):
                found = {place.get(n) for place, n in zip(places, several, strict=True)}
                if len(found) != 1:
                    raise _depends()
                leaves.append(several[0])
            elif all(type(v) is type(several[0]) and v == several[0] for v in several):
                leaves.append(several[0])
            else:
                leaves.append(batch.expression(several))
        first.args, first.kwargs = pytree.tree_unflatten(leaves, flat[0][1])


def _is_leaf(item: Any) -> bool:
    return isinstance(item, fx.Node)


class _Batch:
    """Writes numbers as functions of the batch size.

    Args:
        graph: Where to.
        data: One of its inputs that has the batch axis.
    """

    def __init__(self, graph: fx.Graph, data: fx.Node) -> None:
        self._graph, self._data = graph, data
        self._place = data
        """The functions stand behind each other, before all other operators."""
        self._known: dict[Any, fx.Node] = {}

    def expression(self, values: Sequence[Any]) -> fx.Node:
        """Find ``a * B + b``, or ``c / B``, that takes these values at `SIZES`."""
        if all(type(v) is int for v in values):
            slope, rest = divmod(values[1] - values[0], SIZES[1] - SIZES[0])
            start = values[0] - slope * SIZES[0]
            if rest or list(values) != [start + slope * size for size in SIZES]:
                raise _depends()
            batch = self._emit(aten.sym_size.int, self._data, 0)
            scaled = batch if slope == 1 else self._emit(python.mul, batch, slope)
            return self._emit(python.add, scaled, start) if start else scaled
        if not all(type(v) is float for v in values):
            raise _depends()
        products = [v * size for v, size in zip(values, SIZES, strict=True)]
        if max(products) - min(products) > 1e-12 * abs(products[0]):
            raise _depends()
        batch = self._emit(aten.sym_size.int, self._data, 0)
        return self._emit(python.truediv, products[0], batch)

    def _emit(self, target: Any, *args: Any) -> fx.Node:
        key = (target, *args)
        if key not in self._known:
            with self._graph.inserting_after(self._place):
                self._place = self._graph.call_function(target, args)
            self._known[key] = self._place
        return self._known[key]


def _program(wrapper: nn.Module, traced: fx.GraphModule) -> Program:
    """Say what the inputs of traced code are, constants included."""
    graph, constants = traced.graph, dict[str, Tensor]()
    names, buffers = (
        [name for name, _ in _state(wrapper)],
        dict(wrapper.named_buffers()),
    )
    specs = []
    for k, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        argument = TensorArgument(name=node.name)
        if k >= len(names):
            specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
            continue
        kind = InputKind.BUFFER if names[k] in buffers else InputKind.PARAMETER
        specs.append(InputSpec(kind, argument, names[k], persistent=True))
    start = next(iter(graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        constants[name] = getattr(traced, name)
        with graph.inserting_before(start):
            lifted = graph.placeholder(name)
        node.replace_all_uses_with(lifted)
        graph.erase_node(node)
        argument = TensorArgument(name=lifted.name)
        specs.append(InputSpec(InputKind.CONSTANT_TENSOR, argument, name))
    made = next(iter(graph.find_nodes(op="output"))).args[0]
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=n.name), None)
        for n in made
    ]
    return Program(traced, ExportGraphSignature(specs, outputs), constants)


def _depends() -> InvalidGraph:
    msg = (
        "the module does different things for different batch sizes: sizes must come "
        "from the input as x.shape[0], and the operators must be the same for all"
    )
    return InvalidGraph(msg)
