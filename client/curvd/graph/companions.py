"""Whether data points are joined where the caller's data do not show it.

A clamp at a statistic of the mini-batch may do nothing at the data as they are and act after
an update of the parameters; from there on curvature depends on how data points are cut into
mini-batches. So a data point is computed in other company: beside copies of itself, beside
others many times larger, beside nothing but zeros, beside NaN. Whatever its companions are,
what belongs to it has to stay the same.

The graphs are run, in the place of module and loss, whose equals they are proven to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.errors import InvalidSpec
from curvd.graph.compared import shown_size
from curvd.graph.evaluate import Evaluator, evaluate
from curvd.graph.tainted import Absorbing, Unbounded, embedded
from curvd.v1 import graph_pb2 as graph_pb

_SCALES = (1.0, 30.0)
"""By which parameters are multiplied: what is bounded grows through them alone."""
_ELEMENTS = 1 << 20
"""Of the outputs that a loss is tried on."""
_POINTS = 32
"""Data points that a loss is tried on: among so many, one may be five deviations off."""
_CLOSE = 1e-3
"""How far outputs close to their targets are from them, beside those of the example."""
_INTEGERS = frozenset({"I8", "I16", "I32", "I64", "U8"})
_REMEDY = "so curvature would depend on the batch size, at the latest after an update: "


@dataclass(frozen=True, slots=True)
class _Company:
    """What the other data points of a mini-batch are made to be."""

    said: str
    """For a message, after "beside"."""
    factor: float = 1.0
    """What their numbers are multiplied by."""
    same: bool = False
    """Whether they are copies of the data point itself."""
    one: bool = False
    """Whether it is one of them, and not all."""

    def made(self, leaf: Tensor, row: int) -> Tensor:
        """Change the companions of a row.

        Args:
            leaf: Numbers of any kind, [B, ...].
            row: Whose they are.

        Returns:
            The same with others beside this row.
        """
        if self.same:
            return leaf[row].expand_as(leaf).clone()
        others = [k for k in range(len(leaf)) if k != row]
        changed = leaf.clone()
        if self.one:
            others = others[:1]
        else:  # those beside them change, too, where no number can be multiplied
            changed[others] = leaf[others[1:] + others[:1]]
        if leaf.is_floating_point():
            changed[others] = changed[others] * self.factor
        return changed


_COPIES = _Company("copies of itself", same=True)
_LARGE = _Company("data points a million times as large", 1e6)
_NEGATIVE = _Company("data points minus a million times as large", -1e6)
_OF_MODULE = (
    _COPIES,
    _LARGE,
    _NEGATIVE,
    _Company("data points a thousand times as large", 1e3),
    _Company("one that is a million times as large", 1e6, one=True),
    _Company("data points that are zero", 0.0),
    _Company("one that is NaN", math.nan, one=True),
)
_FARTHER = (_COPIES, _LARGE, _NEGATIVE)
_OTHERS = _Company("other data points")
_OF_LOSS = (
    _COPIES,
    *(
        _Company(f"outputs {factor:g} times as large", factor, one=one)
        for factor in (0.0, 0.03, 10.0, 1e3, 1e6, -1e6)
        for one in (False, True)
    ),
)


def check_module(
    graph: graph_pb.Graph, leaves: Sequence[Tensor], given: Sequence[Tensor]
) -> None:
    """Refuse a module of whose output a row depends on other data points.

    Args:
        graph: What was exported.
        leaves: Inputs of a few data points, [B, ...] each, B >= 2.
        given: Values of the graph's tensors.

    Raises:
        InvalidSpec: If in some company a row is another.
    """
    # An index beyond the end is an exception on a CPU, and the end of a process's CUDA.
    fragile = leaves[0].device.type != "cpu" and _makes_integers(graph)
    looks_up = not all(leaf.is_floating_point() for leaf in leaves)
    run = Evaluator(graph)
    for scale in _SCALES:
        tensors = [
            t * scale if d.role == graph_pb.GRAPH_TENSOR_ROLE_PARAMETER else t
            for d, t in zip(graph.tensors, given, strict=True)
        ]
        whole = _rows(run, tensors, leaves)
        if whole is None:
            continue
        ones = torch.ones(len(whole), dtype=torch.float64, device=whole.device)
        for turn, company in enumerate(_OF_MODULE if scale == 1.0 else _FARTHER):
            row = turn % len(whole)
            if fragile and company.factor != 1.0:
                continue
            factors = company.made(ones, row) if looks_up else None
            others = [company.made(leaf, row) for leaf in leaves]
            error = _change(run, tensors, others, factors, row, whole)
            if error:  # perhaps because of what a mask would have taken out
                with Absorbing():
                    error = _change(run, tensors, others, factors, row, whole)
            if error:
                raise _joined_rows(company, error)


def check_positions(
    graph: graph_pb.Graph, leaves: Sequence[Tensor], given: Sequence[Tensor]
) -> None:
    """Refuse a module of whose output a row depends on which row of the mini-batch it is.

    Args:
        graph: What was exported.
        leaves: Inputs of a few data points, [B, ...] each.
        given: Values of the graph's tensors.

    Raises:
        InvalidSpec: If data points that change places are others.
    """
    run = Evaluator(graph)
    whole = _rows(run, given, leaves)
    for places in (_turned, _backwards) if whole is not None else ():
        order = places(len(leaves[0]))
        found = _rows(run, given, [leaf[order] for leaf in leaves])
        if whole is None or found is None or len(found) != len(order):
            continue
        pairs = zip(found, whole[order], strict=True)
        error = max(_off(row, want, whole) for row, want in pairs)
        if error:
            msg = (
                "a row of the module's output depends on which row of the mini-batch it "
                f"is: data points that change places change {shown_size(error)}. "
                "Curvature would depend on the batch size: take positions within a data "
                "point (x.shape[1], not x.shape[0]), with the batch axis first"
            )
            raise InvalidSpec(msg, difference=error)


def _turned(count: int) -> list[int]:
    return [*range(1, count), 0]


def _backwards(count: int) -> list[int]:
    return [*range(count)][::-1]


def _change(
    run: Evaluator,
    tensors: Sequence[Tensor],
    leaves: Sequence[Tensor],
    factors: Tensor | None,
    row: int,
    whole: Tensor,
) -> float:
    """Say how far a row is off in some company, 0 where nothing is known of it."""
    found = _rows(run, tensors, leaves, factors)
    return 0.0 if found is None else _off(found[row], whole[row], whole)


def _rows(
    run: Evaluator,
    tensors: Sequence[Tensor],
    leaves: Sequence[Tensor],
    factors: Tensor | None = None,
) -> Tensor | None:
    """Run a module; None where an operator is not defined."""
    try:
        with torch.no_grad(), embedded(leaves, factors):
            return run(leaves, tensors)[0]
    except Exception:
        return None


def check_loss(
    graph: graph_pb.Graph,
    constants: Sequence[Tensor],
    outputs: Tensor,
    targets: Tensor,
) -> None:
    """Refuse a loss that treats an output by what those of other data points are.

    Targets change places, but stay those that there are: they do not move.

    Args:
        graph: What was exported: the sum over a mini-batch, and perhaps its weight.
        constants: Its tensors.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].

    Raises:
        InvalidSpec: If in some company the derivative by a row's outputs is another.
    """
    count = min(_POINTS, max(3, _ELEMENTS // max(1, outputs[0].numel())))
    z, y = (t.detach()[:count].cpu() for t in (outputs, targets))
    if len(z) < 2:
        return
    z, y, *constants = (
        t.double() if t.is_floating_point() else t for t in (z, y, *constants)
    )
    constants = [t.cpu() for t in constants]

    def slopes(z: Tensor, y: Tensor) -> tuple[Tensor, int]:
        leaf = z.detach().requires_grad_()
        counting = Unbounded()
        with torch.enable_grad(), counting:
            total = evaluate(graph, (leaf, y), constants)[0]
            (found,) = torch.autograd.grad(total, leaf)
        return found, counting.count

    companies, origins = list(_OF_LOSS), [z]
    if z.shape == y.shape and y.is_floating_point():
        companies.append(_Company("outputs that are their targets"))
        origins.append(y + _CLOSE * (z - y))  # where a training leads to
    for own in origins:
        try:
            whole, before = slopes(own, y)
        except Exception:  # it is not defined there
            continue
        for turn, company in enumerate(companies):
            row = turn % len(z)
            others, labels = company.made(own, row), company.made(y, row)
            if y.is_floating_point() and company.factor != 1.0:
                labels = _OTHERS.made(y, row)
            if "targets" in company.said:
                others = labels.clone()
                others[row] = own[row]
            try:
                found, count = slopes(others, labels)
            except Exception:  # it is not defined there
                continue
            # What overflows says nothing: guards against it act on whole mini-batches.
            error = 0.0 if count > before else _off(found[row], whole[row], whole)
            if error:
                raise _joined_losses(company, error)


def _off(found: Tensor, want: Tensor, whole: Tensor) -> float:
    """Tell how far a row is off beside what it is elsewhere; 0 within rounding.

    Args:
        found: The row in some company.
        want: The same in its own.
        whole: All rows, for their size.
    """
    known = torch.isfinite(want)
    if not known.any():
        return 0.0
    off = torch.where(known, found - want, torch.zeros_like(want)).double().norm()
    size = float(torch.where(known, want, torch.zeros_like(want)).double().norm())
    usual = torch.where(torch.isfinite(whole), whole, torch.zeros_like(whole))
    scale = max(size, float(usual.double().abs().max()))
    # note: kernels may compute other rows a little differently where one is NaN.
    if float(off) <= math.sqrt(torch.finfo(want.dtype).eps) * scale:
        return 0.0
    return float(off) / size if size else math.inf


def _joined_rows(company: _Company, error: float) -> InvalidSpec:
    changes = "is NaN" if math.isnan(error) else f"changes {shown_size(error)}"
    msg = (
        "data points are joined: a row of the module's output depends on the other data "
        f"points of its mini-batch. Beside {company.said} it {changes}, {_REMEDY}make it a "
        "function of its own data point (statistics as buffers, or over the axes of one "
        "data point: h / h.abs().amax(1, keepdim=True).clamp(min=1)), or say "
        "mode='batch_statistics' if mini-batches are what you mean"
    )
    return InvalidSpec(msg, difference=error)


def _joined_losses(company: _Company, error: float) -> InvalidSpec:
    msg = (
        "data points are joined: what the loss does with one of them depends on the "
        f"others of its mini-batch. Beside {company.said} its derivative by the same "
        f"outputs changes {shown_size(error)}, {_REMEDY}a clamp, a threshold or a weight "
        "may look at one data point's own loss, not at a mean, sum or extreme over the "
        "mini-batch: F.mse_loss(z, y, reduction='none').mean(1).clamp(max=c).mean()"
    )
    return InvalidSpec(msg, difference=error)


def _makes_integers(graph: graph_pb.Graph) -> bool:
    """Tell whether numbers may become indices."""
    return any(
        argument.literal.dtype in _INTEGERS
        for node in graph.nodes
        for argument in node.arguments
        if argument.WhichOneof("kind") == "literal"
        and argument.literal.WhichOneof("kind") == "dtype"
    )
