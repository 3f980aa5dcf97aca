"""From what torch.export traced to operators of the contract."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import fx

from curvd.errors import InvalidGraph
from curvd.graph.aliases import Alias, View, item_of, view_of
from curvd.graph.decompose import decomposed, is_known
from curvd.graph.promotion import promoted
from curvd.graph.rewrites import is_nothing, refuse, rewritten
from curvd.graph.schemas import (
    DROPPED,
    EXACT,
    RENAMED,
    UNDECLARED,
    aliases,
    is_view,
    is_written,
    items,
    meta_of,
    names,
    positions,
    trimmed,
)
from curvd.graph.selections import (
    UNKNOWN,
    Selected,
    check_known,
    chosen_by,
    is_elementwise,
    put_back,
    refusal,
    selection,
    total,
)
from curvd.graph.sources import source_of
from curvd.graph.tape import Tape, Value

_SIZES: Mapping[Any, str] = {
    python.add: "add",
    python.sub: "sub",
    python.mul: "mul",
    python.floordiv: "floordiv",
    python.mod: "mod",
    python.truediv: "truediv",
    python.neg: "neg",
    python.eq: "eq",
    python.ne: "ne",
    python.lt: "lt",
    python.le: "le",
    python.gt: "gt",
    python.ge: "ge",
    python.and_: "and",
    python.or_: "or",
    python.not_: "not",
    math.trunc: "int",
    min: "min",
    max: "max",
    torch.sym_max: "max",
    torch.sym_min: "min",
    torch.sym_float: "float",
    torch.sym_int: "int",
    torch.sym_not: "not",
}
# Only their side effect is wanted: to stop at run time.
_CHECKS = (
    *("_assert", "sym_constrain", "_guards", "_linalg_check_errors"),
    "_has_same_storage_numel",
)
# Views by their schema which copy if memory is not laid out right.
_MAYBE = frozenset({"reshape", "contiguous", "to", "flatten", "reshape_as"})
_CHOOSING = frozenset({"index", "masked_select"})
_TURNED = frozenset({
    "squeeze_",
    "swapaxes_",
    "swapdims_",
    "t_",
    "transpose_",
    "unsqueeze_",
})
_CREATING = frozenset(
    """
    arange eye full full_like new_full new_ones new_zeros ones ones_like scalar_tensor
    tril_indices triu_indices zeros zeros_like
    """.split()
)


class Translator:
    """Walks one traced function.

    Args:
        tape: Where operators go.
        root: Holds the bodies of regions.
        values: The values of the placeholders; changed as the walk goes.
        outer: Ids of memory cells that it sees but must not write to.
    """

    def __init__(
        self,
        tape: Tape,
        root: fx.GraphModule,
        values: dict[fx.Node, Any],
        outer: Set[int] = frozenset(),
    ) -> None:
        self._tape, self._root, self._values = tape, root, values
        self._outer, self._position = outer, 0

    def run(self, graph: fx.Graph) -> Any:
        """Translate a function.

        Args:
            graph: Its nodes; the placeholders have values.

        Returns:
            What it returns, with aliases for tensors.
        """
        order = positions(graph)
        for node in graph.nodes:
            self._position = order[node]
            if node.op == "call_function":
                self._tape.source = source_of(node) or self._tape.source
                result = self._call(node)
                for alias in aliases(result):
                    last = max((order[u] for u in node.users), default=-1)
                    alias.last_use = max(alias.last_use, last)
                self._values[node] = result
            elif node.op == "output":
                return self._look_up(node.args[0])
        return None

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        if target is python.getitem:
            sequence, index = (self._look_up(a) for a in node.args)
            return sequence[index]
        if target in _SIZES:
            numbers = [self._plain(self._look_up(a)) for a in node.args]
            if any(number is UNKNOWN for number in numbers):
                return UNKNOWN
            return self._tape.emit(f"sym.{_SIZES[target]}", *numbers)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(node, target)
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            msg = (
                f"operator {target}{self._tape.where} is not one of torch's own: write "
                "it with torch's operators"
            )
            raise InvalidGraph(msg, operator=str(target), source=self._tape.source)
        return self._operator(node, target)

    def _region(self, node: fx.Node, target: Any) -> Any:
        """Inline a region with or without gradients, or without autocast; refuse others."""
        name, where = target.name(), self._tape.where
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *arguments = (self._look_up(a) for a in node.args)
            return self._inlined(body, arguments, detach=not enabled)
        if name == "wrap_with_autocast":
            _, _, enabled, _, body, *arguments = (self._look_up(a) for a in node.args)
            if not enabled:
                return self._inlined(body, arguments, detach=False)
            advice = "export without torch.autocast; the session has a dtype"
        else:
            advice = "write it with torch.where, so that every step runs for all data"
        msg = f"operator {name}{where} cannot be exported: {advice}"
        raise InvalidGraph(msg, operator=name, source=self._tape.source)

    def _inlined(
        self, body: fx.GraphModule, arguments: list[Any], *, detach: bool
    ) -> Any:
        """Run a region; under no_grad its results carry no derivative."""
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        inner = dict(zip(placeholders, arguments, strict=True))
        where = self._tape.source
        known = [a for v in self._values.values() for a in aliases(v)]
        seen, uses = {id(a.cell) for a in known}, {a: a.last_use for a in known}
        results = Translator(self._tape, body, inner, seen).run(body.graph)
        for alias in (a for v in inner.values() for a in aliases(v)):
            alias.last_use = uses.get(alias, -1)  # positions in there mean nothing here

        def detached(result: Any) -> Any:
            if isinstance(result, list | tuple):
                return [detached(r) for r in result]
            if not isinstance(result, Alias):
                return result
            if isinstance(result, Selected):
                raise refusal(self._tape, "aten.index.Tensor")
            return Alias.of(self._tape.emit("aten.detach.default", result.value))

        found = detached(results) if detach else results
        self._tape.source = where
        return found

    def _operator(self, node: fx.Node, target: Any) -> Any:
        name = target.overloadpacket.__name__
        if name.startswith(_CHECKS):
            return None
        if name in _TURNED:  # whoever uses it later uses what it returns
            form = "int" if name == "transpose_" else target._overloadname
            target = getattr(getattr(torch.ops.aten, name[:-1]), form)
            name = name[:-1]
        arguments = self._arguments(node, target)
        operator = f"aten.{name}.{target._overloadname}"
        check_known(self._tape, operator, arguments)
        if name in _CHOOSING and self._is_choice(node, name):
            return self._chosen(node, operator, arguments)
        if chosen_by(arguments):
            return self._of_choices(node, name, target, arguments)
        return self._of_tensors(node, name, target, arguments)

    def _is_choice(self, node: fx.Node, name: str) -> bool:
        """Tell whether an operator chooses elements by a mask."""
        given = items(node.args[1]) if name == "index" else [node.args[1]]
        metas = [meta_of(item) for item in given]
        return any(meta is not None and meta.dtype is torch.bool for meta in metas)

    def _chosen(self, node: fx.Node, operator: str, arguments: Any) -> Selected:
        base, mask = (arguments.get(name) for name in ("self", "mask"))
        traced = node.args[1]
        if mask is None:
            mask, traced = (items(v)[0] for v in (arguments["indices"], node.args[1]))
        metas = meta_of(node.args[0]), meta_of(traced)
        if len(items(arguments.get("indices", [0]))) != 1 or None in metas:
            raise refusal(self._tape, operator)
        whole, part = metas
        if "mask" in arguments and whole.shape != part.shape:
            raise refusal(self._tape, operator)
        return selection(self._tape, base, mask, whole.dim(), part.dim())

    def _of_choices(self, node: fx.Node, name: str, target: Any, arguments: Any) -> Any:
        """Compute with what masks chose: element by element, or all of it."""
        operator = f"aten.{name}.{target._overloadname}"
        first, *_ = chosen_by(arguments)
        if name == "sym_numel" or (name == "sym_size" and not arguments["dim"]):
            return UNKNOWN
        if name in ("index_put", "index_put_"):
            return self._put_back(node, name, target, arguments)
        meta = meta_of(node.args[0])
        if operator in ("aten.sum.default", "aten.mean.default"):
            if arguments["dtype"] is None:
                mean = name == "mean"
                shape = tuple(meta.shape[1:])
                return Alias.of(total(self._tape, first, shape, mean=mean))
        given = [n for n in node.all_input_nodes if meta_of(n) is not None]
        chosen = [isinstance(self._values[n], Selected) for n in given]
        dims = [meta_of(n).dim() for n in given]
        if is_elementwise(target, arguments, dims, chosen):
            result = self._of_tensors(node, name, target, arguments)
            return (
                result if isinstance(result, Selected) else Selected.like(result, first)
            )
        raise refusal(self._tape, operator)

    def _put_back(self, node: fx.Node, name: str, target: Any, arguments: Any) -> Any:
        mask = items(arguments["indices"])
        values, base = arguments["values"], arguments["self"]
        fits = isinstance(values, Selected) and len(mask) == 1
        if not fits or arguments["accumulate"] or mask[0].value is not values.mask:
            raise refusal(self._tape, f"aten.{name}.{target._overloadname}")
        rest = meta_of(node.args[0]).dim() - values.axes
        new = put_back(self._tape, base.value, values, rest)
        if name == "index_put":
            return Alias.of(new)
        return self._write(node, name, target, arguments, new)

    def _of_tensors(self, node: fx.Node, name: str, target: Any, arguments: Any) -> Any:
        operator = f"aten.{name}.{target._overloadname}"
        if name == "sym_size":
            base, axis = arguments["self"], arguments["dim"]
            return self._tape.emit("sym.size", base.value, axis)
        if name == "sym_numel":
            return self._tape.emit("sym.numel", arguments["self"].value)
        refuse(self._tape, operator, arguments)
        first = next(iter(arguments.values()), None)
        if is_nothing(operator, arguments):
            return first
        written = [a for a in target._schema.arguments if is_written(a)]
        if written or name in ("__iand__", "__ior__", "__ixor__"):
            return self._write(node, name, target, arguments)
        if not is_known(target):
            parts = self._taken_apart(node, target)
            if parts is not None:
                return parts
        if isinstance(first, Alias) and is_view(target, name):
            return self._view(node, name, operator, target, arguments, first)
        return self._pure(node, name, operator, target, arguments)

    def _taken_apart(self, node: fx.Node, target: Any) -> Any:
        """Translate what an operator consists of; None if that is unknown."""
        found = decomposed(node, target)
        if found is None:
            return None
        body, leaves = found
        return self._inlined(body, [self._look_up(n) for n in leaves], detach=False)

    def _pure(
        self, node: fx.Node, name: str, operator: str, target: Any, arguments: Any
    ) -> Any:
        plain = {key: self._plain(a) for key, a in arguments.items()}
        value = self._emitted(node, name, operator, target, plain)
        meta = node.meta.get("val")
        if isinstance(meta, list | tuple):
            return [
                Alias.of(self._tape.emit("sym.item", value, k))
                for k in range(len(meta))
            ]
        return Alias.of(value) if isinstance(meta, torch.Tensor) else value

    def _emitted(
        self, node: fx.Node, name: str, operator: str, target: Any, plain: Any
    ) -> Value:
        """Emit a pure operator, perhaps in another way."""
        better = rewritten(self._tape, operator, plain)
        if better is not None:
            return better
        plain = promoted(self._tape, node, target, operator, plain)
        if name in RENAMED:
            operator = f"aten.{RENAMED[name]}.{target._overloadname}"
        positional, options = trimmed(target, plain)
        if name in _CREATING and options.get("dtype") is None:
            meta = node.meta.get("val")
            if isinstance(meta, torch.Tensor) and "dtype" in names(target):
                options["dtype"] = meta.dtype
        return self._tape.emit(operator, *positional, **options)

    def _view(
        self,
        node: fx.Node,
        name: str,
        operator: str,
        target: Any,
        arguments: Any,
        base: Alias,
    ) -> Any:
        rest = {k: self._plain(a) for k, a in list(arguments.items())[1:]}
        positional, options = trimmed(target, {"": None, **rest})
        operator, tail = EXACT.get(name, operator), tuple(positional[1:])
        if operator in ("aten.to.device", "aten.to.dtype_layout"):
            operator, tail, options = "aten.to.dtype", (rest["dtype"],), {}
        certain = name not in _MAYBE | UNDECLARED
        base_meta = meta_of(node.args[0])
        turning = base_meta is not None and base_meta.is_complex()
        view = view_of(
            self._tape, operator, tail, options, certain=certain, turning=turning
        )
        if operator == "aten.reshape.default" and not certain:
            view = View(view.replay, None, certain=False)
        meta = node.meta.get("val")
        if not isinstance(meta, list | tuple):
            return base.viewed(view)
        whole = view.replay(base.value)
        return [
            base.viewed(
                item_of(self._tape, view, k),
                self._tape.emit("sym.item", whole, k),
            )
            for k in range(len(meta))
        ]

    def _write(
        self,
        node: fx.Node,
        name: str,
        target: Any,
        arguments: Any,
        better: Value | None = None,
    ) -> Any:
        """Make an in-place operator pure, and let others see what it wrote.

        Args:
            node: Calls it.
            name: Its name.
            target: The operator.
            arguments: Its arguments.
            better: What it writes, if that is known.
        """
        written: Alias = next(iter(arguments.values()))
        pure = RENAMED.get(name, name.rstrip("_"))
        if not isinstance(written, Alias) or not name.endswith("_"):
            raise self._unwritable(
                name,
                "writes to an argument (out=), as spectral_norm does while it trains: "
                "call module.eval(), or use what it returns",
            )
        if not written.cell.own or id(written.cell) in self._outer:
            if self._is_counter(node):
                return written
            what = "what the module did not make itself in this call"
            raise self._unwritable(
                name,
                f"writes to {what}: an input, a parameter or a "
                "buffer; make a copy with clone() first",
            )
        plain = {key: self._plain(a) for key, a in arguments.items()}
        if better is None:
            operator = f"aten.{name}.{target._overloadname}"
            better = rewritten(self._tape, operator, plain)
        if better is None:
            packet = getattr(torch.ops.aten, pure, None)
            overload = target._overloadname
            if packet is None or overload not in packet.overloads():
                raise self._unwritable(name, "has no form that is not in-place")
            twin, operator = getattr(packet, overload), f"aten.{pure}.{overload}"
            if not is_known(twin):
                parts = self._taken_apart(node, twin)
                better = None if parts is None else self._plain(parts)
            if better is None:
                better = self._emitted(node, pure, operator, twin, plain)
        own = meta_of(node.args[0]).dtype
        others = [
            a for a in (*node.args, *node.kwargs.values()) if meta_of(a) is not None
        ]
        if any(meta_of(a).dtype != own for a in others):
            better = self._tape.emit("aten.to.dtype", better, own)
        if not written.write(better, self._position):
            raise self._unwritable(
                name,
                "writes to memory that is also seen in another way, and used later: use "
                "the form that is not in-place",
            )
        return written

    def _is_counter(self, node: fx.Node) -> bool:
        """Tell whether BatchNorm counts its calls, which changes no output."""
        name = str(getattr(node.args[0], "name", ""))
        return name.endswith("num_batches_tracked") and not node.users

    def _unwritable(self, name: str, why: str) -> InvalidGraph:
        msg = f"operator aten.{name}{self._tape.where} {why}"
        return InvalidGraph(msg, operator=f"aten.{name}", source=self._tape.source)

    def _arguments(self, node: fx.Node, target: Any) -> dict[str, Any]:
        """Read all arguments by the names of the schema; those dropped are left out."""
        found: dict[str, Any] = {}
        for k, argument in enumerate(target._schema.arguments):
            if argument.name in DROPPED:
                continue
            if k < len(node.args) and not argument.kwarg_only:
                found[argument.name] = self._look_up(node.args[k])
            elif argument.name in node.kwargs:
                found[argument.name] = self._look_up(node.kwargs[argument.name])
            else:
                found[argument.name] = argument.default_value
        return found

    def _look_up(self, item: Any) -> Any:
        if isinstance(item, list | tuple):
            return [self._look_up(i) for i in item]
        if not isinstance(item, fx.Node):
            return item
        if item.op == "get_attr":
            return getattr(self._root, str(item.target))
        return self._values[item]

    def _plain(self, item: Any) -> Any:
        if isinstance(item, list | tuple):
            return [self._plain(i) for i in item]
        if isinstance(item, complex):
            parts = [
                self._tape.emit("aten.scalar_tensor.default", part, dtype=torch.float64)
                for part in (item.real, item.imag)
            ]
            return self._tape.emit("aten.complex.default", *parts)
        return item.value if isinstance(item, Alias) else item
