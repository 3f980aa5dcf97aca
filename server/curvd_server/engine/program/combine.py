"""Elementwise arithmetic of a linear program, in as few passes over memory as it needs.

What lies between two matrix products adds, subtracts and scales tangents by constants, one
operation of the chain rule at a time. Each such chain is a sum of multiples

    c_1 t_1 + c_2 t_2 + ...

of the few tangents that enter it, whose factors are known before any vector is. They are
multiplied by each other once, and a product makes one pass for each tangent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from curvd_server.engine.program.constants import (
    Derivation,
    DerivedConstants,
    Values,
    is_constant,
    new_constant,
    shape_of,
)
from curvd_server.engine.program.nodes import call_before
from curvd_server.system import yield_point

aten = torch.ops.aten

_ADD, _SUB, _MUL, _NEG = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.neg.default,
)
_POWERS = {_MUL: 1, aten.mul.Scalar: 1, aten.div.Tensor: -1, aten.div.Scalar: -1}
"""Operations by a constant, and the power in which it multiplies."""
_SMALL = 8
"""A constant that is so many times smaller than what it multiplies costs no memory."""
_LONGEST = 64
"""Tangents up to which a sum is written into another."""

_TINY = 1e-300
"""By smaller numbers nothing is divided beforehand: their inverses are infinite."""

Term = tuple[float, tuple[tuple[str, int], ...]]
"""A number, and the names of constants that it multiplies, with their powers."""
Coefficient = tuple[Term, ...]
"""A sum of terms."""
Sum = dict[fx.Node, Coefficient]
"""Tangents, and what multiplies them."""

_ONE: Coefficient = ((1.0, ()),)
_MINUS: Coefficient = ((-1.0, ()),)


def combine(graph: fx.Graph, derived: DerivedConstants) -> None:
    """Write each elementwise chain as one sum of multiples of the tangents that enter it.

    What several chains read, or anything else than a chain, is computed once, unless it is a
    multiple of one tangent, which costs its readers nothing.

    Args:
        graph: A linear program with shapes; it is rewritten.
        derived: How constants are made; those of the multiples are added.
    """
    nodes = list(graph.nodes)
    known = {
        str(node.target): node.meta["val"]
        for node in nodes
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
    }
    chains = _Chains(graph, derived, known)
    for node in nodes:
        yield_point()
        chains.read(node)
    for node in nodes:
        yield_point()
        chains.write(node)


@dataclass(slots=True)
class _Chains:
    """The elementwise nodes of a graph, as sums."""

    graph: fx.Graph
    derived: DerivedConstants
    constants: dict[str, Tensor]
    """Shapes and types of the constants, by name."""
    sums: dict[fx.Node, Sum] = field(default_factory=dict)
    inner: set[fx.Node] = field(default_factory=set)
    """Nodes whose sums stand in those of all their users."""
    made: dict[Coefficient, str] = field(default_factory=dict)
    """Names of the constants that are coefficients."""
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What stands in the place of a node."""

    def read(self, node: fx.Node) -> None:
        """Read an elementwise node as a sum, and see whether its users can as well."""
        if not _is_elementwise(node):
            return
        found = self._sum(node, {})
        self.sums[node] = found
        # An operand that could not be taken apart is computed.
        self.inner -= found.keys()
        users = list(node.users)
        chained = [shape_of(u) == shape_of(node) and _is_elementwise(u) for u in users]
        if not users or not all(chained) or len(found) > _LONGEST:
            return
        if len(users) > 1:
            taken = len(found) == 1 and all(
                self._is_no_larger(user, *found.values()) for user in users
            )
        else:
            (user,) = users
            whole = self._sum(user, {node: {node: _ONE}})
            apart = _passes(node, found) + _passes(user, whole)
            both = _passes(user, self._sum(user, {node: found}))
            # In a tie what is a multiple of one tangent may yet meet another of it.
            taken = both < apart + (len(found) == 1)
        if taken:
            self.inner.add(node)

    def write(self, node: fx.Node) -> None:
        """Compute a sum in the place of its node, if anybody but a sum reads it."""
        if node not in self.sums or node in self.inner:
            return
        found = self.sums[node]
        total: fx.Node | None = None
        for tangent in sorted(found, key=lambda t: _rank(node, t, found[t])):
            term, coefficient = self.written.get(tangent, tangent), found[tangent]
            subtracts = total is not None and _is_negative(coefficient)
            if subtracts:
                coefficient = _times(coefficient, _MINUS)
            if coefficient != _ONE:
                factor = self._constant(node, coefficient)
                term = self._call(node, _MUL, term, factor)
            if total is None:
                total = term
            else:
                total = self._call(node, _SUB if subtracts else _ADD, total, term)
        if total is not None and shape_of(total) == shape_of(node):
            self.written[node] = total
            node.replace_all_uses_with(total)

    def _sum(self, node: fx.Node, read_as: Mapping[fx.Node, Sum]) -> Sum:
        """Read an elementwise node as a sum of what its operands are read as."""
        tangents = [
            a for a in node.args if isinstance(a, fx.Node) and not is_constant(a)
        ]
        read = [
            read_as.get(t) or (self.sums[t] if t in self.inner else {t: _ONE})
            for t in tangents
        ]
        factors = _factors(node, tangents)
        found = _added(node, read, factors)
        if not self._is_affordable(node, found):
            found = _added(node, [{t: _ONE} for t in tangents], factors)
        return found

    def _is_affordable(self, node: fx.Node, found: Sum) -> bool:
        """Tell whether no coefficient is large of which no factor is."""
        size = math.prod(shape_of(node))
        for coefficient in found.values():
            whole = math.prod(self._shape(coefficient))
            largest = max(
                (self.constants[n].numel() for _, of in coefficient for n, _ in of),
                default=1,
            )
            if whole > size or (whole > largest and whole * _SMALL > size):
                return False
        return True

    def _is_no_larger(self, user: fx.Node, coefficient: Coefficient) -> bool:
        """Tell whether a user that multiplies once more has a constant to give up for it."""
        size = math.prod(self._shape(coefficient))
        if user.target not in _POWERS or size * _SMALL <= math.prod(shape_of(user)):
            return True
        own = [a for a in user.args if isinstance(a, fx.Node) and is_constant(a)]
        return any(math.prod(shape_of(a)) >= size for a in own)

    def _shape(self, coefficient: Coefficient) -> tuple[int, ...]:
        shapes = [self.constants[n].shape for _, of in coefficient for n, _ in of]
        return tuple(torch.broadcast_shapes(*shapes)) if shapes else ()  # type: ignore[no-untyped-call]

    def _constant(self, at: fx.Node, coefficient: Coefficient) -> Any:
        """Make a coefficient before a node: a number, or a constant that may exist."""
        (number, factors), *others = coefficient
        if not others and not factors:
            return number
        if not others and number == 1.0 and len(factors) == 1 and factors[0][1] == 1:
            name = factors[0][0]
        elif coefficient in self.made:
            name = self.made[coefficient]
        else:
            value: Tensor = at.meta["val"]
            like = value.new_empty(self._shape(coefficient))
            names = tuple({n: None for _, of in coefficient for n, _ in of})
            derivation = Derivation(names, _computation(coefficient))
            node = new_constant(self.graph, at, self.derived, like, derivation)
            name = self.made[coefficient] = str(node.target)
            self.constants[name] = like
            return node
        with self.graph.inserting_before(at):
            node = self.graph.get_attr(name)
        node.meta["val"] = self.constants[name]
        return node

    def _call(self, at: fx.Node, target: Any, left: fx.Node, right: Any) -> fx.Node:
        shape = torch.broadcast_shapes(shape_of(left), shape_of(right))  # type: ignore[no-untyped-call]
        return call_before(self.graph, at, target, (left, right), tuple(shape))


def _is_elementwise(node: fx.Node) -> bool:
    """Tell whether a node adds, subtracts or scales tangents of its own type."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    if node.target is aten.clone.default:
        source: Any = node.args[0]
        return _layout(source) == _layout(node)
    if node.kwargs or any(not _is_of_type(node, a) for a in node.args):
        return False
    known = [is_constant(a) for a in node.args]
    if node.target in (_ADD, _SUB, _NEG):
        return not any(known)
    if node.target not in _POWERS or known.count(False) != 1:
        return False
    if _POWERS[node.target] > 0:
        return True
    # A number whose inverse is none is left where it stands.
    by: Any = node.args[1]
    return known[1] and (isinstance(by, fx.Node) or abs(by) > _TINY)


def _is_of_type(node: fx.Node, operand: Any) -> bool:
    if not isinstance(operand, fx.Node):
        return isinstance(operand, int | float)
    value, mine = operand.meta.get("val"), node.meta["val"]
    return isinstance(value, Tensor) and value.dtype == mine.dtype


def _layout(node: Any) -> tuple[Any, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    return value.dtype, value.device, tuple(value.shape), value.stride()


def _factors(node: fx.Node, tangents: list[fx.Node]) -> list[Coefficient]:
    """Say by what a node multiplies each of its tangents."""
    if node.target in _POWERS:
        power = _POWERS[node.target]
        by = next(a for a in node.args if a is not tangents[0])
        if isinstance(by, fx.Node):
            return [((1.0, ((str(by.target), power),)),)]
        return [((float(by) ** power, ()),)]  # type: ignore[arg-type]
    if node.target is _NEG:
        return [_MINUS]
    return [_ONE, _MINUS if node.target is _SUB else _ONE]


def _added(node: fx.Node, read: list[Sum], factors: list[Coefficient]) -> Sum:
    """Add multiples of sums."""
    total: Sum = {}
    for one, factor in zip(read, factors, strict=False):
        for tangent, coefficient in one.items():
            more = _times(coefficient, factor)
            total[tangent] = _plus(total.get(tangent, ()), more)
    return {tangent: c for tangent, c in total.items() if c}


def _times(left: Coefficient, right: Coefficient) -> Coefficient:
    return _plus(
        *(
            ((a * b, tuple(sorted((*of_a, *of_b)))),)
            for a, of_a in left
            for b, of_b in right
        )
    )


def _plus(*coefficients: Coefficient) -> Coefficient:
    """Add coefficients; terms of the same constants become one."""
    total: dict[tuple[tuple[str, int], ...], float] = {}
    for coefficient in coefficients:
        for number, factors in coefficient:
            total[factors] = total.get(factors, 0.0) + number
    return tuple((number, factors) for factors, number in total.items() if number)


def _is_negative(coefficient: Coefficient) -> bool:
    return all(number < 0 for number, _ in coefficient)


def _passes(node: fx.Node, found: Sum) -> int:
    """Count the operations that a sum takes: the first may be there already."""
    return len(found) - any(
        c == _ONE and shape_of(t) == shape_of(node) for t, c in found.items()
    )


def _rank(node: fx.Node, tangent: fx.Node, coefficient: Coefficient) -> int:
    """Order the terms of a sum: what is there, then what is added and whole."""
    if shape_of(tangent) != shape_of(node):
        return 3
    if coefficient == _ONE:
        return 0
    return 2 if _is_negative(coefficient) else 1


def _computation(coefficient: Coefficient) -> Any:
    """Say how a coefficient is computed of the constants it names."""

    def compute(values: Values) -> Tensor:
        total: Any = 0
        for number, factors in coefficient:
            product: Any = number
            for name, power in factors:
                product = (
                    product * values[name] if power > 0 else product / values[name]
                )
            total = total + product
        result: Tensor = total
        return result

    return compute
