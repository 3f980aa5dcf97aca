"""Proof that a graph is the module or loss that it was exported from.

A graph holds a forward pass; its derivatives follow from its operators. What a training
loop's ``.backward()`` computes may be something else: a function's own backward, a hook,
a region without gradients. So both are run on a few rows and compared, parameter by
parameter: with the caller's loss, at the parameters as they are; and with random
gradients of the outputs of very different sizes, at parameters nearby, because clipping
shows at large gradients only, and a layer of zeros hides the layers before it. What acts
on few data points only, such as a rare token or an outlier, shows there only: so those
that differ most from the others are compared together, and mini-batches of the session as
long as that takes hardly any time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvd.errors import InvalidSpec
from curvd.graph.companions import check_module, check_positions
from curvd.graph.compared import differing, shown_size, size_of
from curvd.graph.eager import Run, alike, multiplied, runs, widened
from curvd.graph.evaluate import Evaluator, types_in
from curvd.graph.manifest import Inputs
from curvd.graph.mismatches import NAMED, cut_off, mismatch
from curvd.graph.mixed import Types
from curvd.graph.seen import functions_in
from curvd.v1 import graph_pb2 as graph_pb

Scalar = Callable[[Tensor, Tensor], Tensor]
"""Outputs, targets -> one number."""

_NEARBY = 0.03
"""How far the second point lies from the parameters, relative to their scale."""
_FACTORS = (0.03, 30.0, -1.0)
"""By which parameters and inputs are multiplied where gradients are suspicious."""
_UNUSUAL = 1 / 3
"""Digits that count, as a power of the type's, where gradients of the outputs have unusual
sizes: torch's own backward of some operators (``matrix_exp``) rounds by that size."""
_SPARE_S = 0.02
"""Seconds of this thread that gradients of whole mini-batches may take together."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss of outputs and targets."""

    eager: Scalar
    """The caller's."""
    exported: Scalar
    """What a server computes."""
    types: Set[torch.dtype] = frozenset()
    """Floating point types that it computes in, beside the outputs' own."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Data points that are compared together."""

    inputs: Inputs
    targets: Tensor | None
    """None: the loss is not known."""
    always: bool = False
    """Whether outputs and loss are compared however long that takes."""
    telling: bool = False
    """Whether gradients are, too."""


def prove(
    wrapper: nn.Module,
    rows: Batch,
    graph: graph_pb.Graph,
    tensors: Mapping[str, Tensor],
    objective: Objective | None,
    *,
    batches: Iterable[Batch] = (),
    mixes: bool = False,
    types: Types | None = None,
    in_own_type: bool = False,
) -> None:
    """Compare a module with its graph.

    Args:
        wrapper: Calls the module, and returns the output that was exported.
        rows: A few data points.
        graph: What was exported.
        tensors: Its tensors by name.
        objective: The loss, if it is known.
        batches: Others, of the sizes that a session has; first those that are always
            compared.
        mixes: Whether a row of the output may depend on other data points.
        types: Those of the module, for which the graph has another.
        in_own_type: Whether the module is compared in its own type, not in float64.

    Raises:
        GradientMismatch: If outputs, loss or gradients differ.
        InvalidGraph: If the module cannot be run.
        InvalidSpec: If it mixes data points, or trains what is no parameter.
    """
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    counted = types_in(graph) | (frozenset() if types is None else types.own)
    points = rows.inputs
    own = dtype or torch.float32
    kinds = (own,) if in_own_type else (torch.float64, own)
    with runs(wrapper, points, kinds, counted) as (run, outputs):
        if types is not None and not run.movable:
            run.narrowest = types.narrowest
        proof = _Proof(run, graph, tensors, types)
        if not any(p.requires_grad for p in wrapper.parameters()):
            proof.check_outputs(outputs, proof.exported(), "")
            return
        if not outputs.requires_grad:
            raise cut_off(run.seen)
        digits = run.narrowest
        proof.compare(outputs, objective, rows.targets)
        run.narrowest = digits  # the loss may have had fewer
        if not mixes:
            proof.check_rows()
            proof.check_places()
        proof.check_strangers()
        proof.compare_batches(batches, objective)
        if run.movable:
            origin = [p.detach().clone() for p in run.module.parameters()]
            proof.compare_nearby(origin)
            if proof.suspicious:
                proof.compare_far(origin)
        else:
            proof.compare(outputs, None, None)


class _Proof:
    """What is compared with what.

    Args:
        run: The module.
        graph: What was exported.
        tensors: Its tensors by name.
        types: Those of the module, for which the graph has another.
    """

    def __init__(
        self,
        run: Run,
        graph: graph_pb.Graph,
        tensors: Mapping[str, Tensor],
        types: Types | None,
    ) -> None:
        self.run, self.graph, self.tensors, self._types = run, graph, tensors, types
        self._evaluate = Evaluator(graph)
        self._homes = [_home(run.module, t.names[0]) for t in graph.tensors]
        self.functions: list[str] = []
        self.rows = run.inputs
        self.usual = 0.0
        """Size of the gradients so far."""

    @property
    def suspicious(self) -> bool:
        """Whether something was seen that may give other gradients."""
        return bool(self.run.seen.hooks or self.functions)

    def exported(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the graph at the module's parameters.

        Returns:
            Its output, and what it can be differentiated by.
        """
        given, trained = self._given()
        with torch.enable_grad():
            return self._evaluate(self._leaves(self.run.inputs), given)[0], trained

    def _leaves(self, inputs: Inputs) -> Sequence[Tensor]:
        """List inputs as the graph takes them."""
        if self._types is None or self.run.movable:
            return inputs.leaves  # of a copy, which is in one type itself
        found: tuple[Tensor, ...] = self._types.values(inputs.leaves)
        return found

    def _given(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """List the graph's tensors at the module's parameters, and those that train."""
        given: list[Tensor] = []
        trained: dict[str, Tensor] = {}
        for described, (home, leaf) in zip(
            self.graph.tensors, self._homes, strict=True
        ):
            name = described.names[0]
            value = getattr(home, leaf, self.tensors[name]).detach().clone()
            if value.is_complex():
                value = torch.view_as_real(value.resolve_conj())
            if value.is_floating_point():
                value = value.to(self.run.dtype)
            if described.role == graph_pb.GRAPH_TENSOR_ROLE_PARAMETER:
                trained[name] = value.requires_grad_()
            given.append(value)
        return given, trained

    def compare(
        self, outputs: Tensor, objective: Objective | None, targets: Tensor | None
    ) -> None:
        """Compare at the parameters as they are.

        Args:
            outputs: The outputs of the module.
            objective: The loss; None: random gradients of the outputs.
            targets: Those of the same data points.
        """
        self.functions = functions_in(outputs, self.run.outputs)
        found = self.exported()
        self.check_outputs(outputs, found, "")
        self._compare_objective(outputs, found, objective, targets, "")

    def _compare_objective(
        self,
        outputs: Tensor,
        found: tuple[Tensor, dict[str, Tensor]],
        objective: Objective | None,
        targets: Tensor | None,
        where: str,
    ) -> None:
        if objective is None or targets is None:
            self._compare_gradients(outputs, found, 1.0, where)
            return
        losses = self._losses(objective, outputs, found[0], targets, where)
        if losses is None:
            return
        loss, expected = losses
        if expected.requires_grad and loss.requires_grad:
            mine = self.run.gradients(loss, torch.ones_like(loss))
            self._check_gradients(mine, _pulled(expected, found[1], None), where)

    def _losses(
        self,
        objective: Objective,
        outputs: Tensor,
        found: Tensor,
        targets: Tensor,
        where: str,
    ) -> tuple[Tensor, Tensor] | None:
        """Compute both losses and compare them; None if they are not finite."""
        loss = self.run.loss(objective.eager, outputs, targets, objective.types)
        with torch.enable_grad():
            expected = objective.exported(found, alike(targets, found))
        if not torch.isfinite(expected):
            return None
        self._check({"the loss": (loss, expected)}, where)
        return loss, expected

    def _compare_loss(
        self, objective: Objective, outputs: Tensor, targets: Tensor, where: str
    ) -> None:
        """Compare a loss and its derivative by the outputs alone, which costs little."""
        mine, theirs = (outputs.detach().clone().requires_grad_() for _ in range(2))
        losses = self._losses(objective, mine, theirs, targets, where)
        if losses is None or not (losses[0].requires_grad and losses[1].requires_grad):
            return
        (got,) = torch.autograd.grad(losses[0], mine)
        (want,) = torch.autograd.grad(losses[1], theirs)
        self._check({"the derivative of the loss": (got, want)}, where)

    def check_rows(self) -> None:
        """Refuse a row of the output that depends on other data points."""
        whole = self.exported()[0]
        self.run.inputs = self.rows.rows(0, 2)
        part = self.exported()[0]
        self.run.inputs = self.rows
        wrong = differing({"rows": (whole[: len(part)], part)}, self.run.narrowest)
        if wrong:
            msg = (
                "a row of the module's output depends on the other data points of its "
                f"mini-batch {shown_size(wrong['rows'])}, so curvature depends on the "
                "batch size: make it a function of its own data point (statistics as "
                "buffers, sums over data points in the loss), or say "
                "mode='batch_statistics' if mini-batches are what you mean"
            )
            raise InvalidSpec(msg, difference=wrong["rows"])
        check_module(self.graph, self._leaves(self.rows), self._given()[0])

    def check_places(self) -> None:
        """Refuse a row of the output that depends on its place among the others."""
        check_positions(self.graph, self._leaves(self.rows), self._given()[0])

    def check_strangers(self) -> None:
        """Refuse tensors that train, but are no parameters: no update moves them."""
        before = {id(t): t for t in self.run.strangers}
        if not before:
            return
        outputs = self.run.outputs()
        self.run.gradients(outputs, torch.ones_like(outputs))
        # note: what forward itself makes requires a gradient too, but is another one.
        lasting = [t for t in self.run.strangers if id(t) in before]
        if lasting:
            shapes = ", ".join(str(list(t.shape)) for t in lasting[:NAMED])
            msg = (
                f"the module's output depends on what requires a gradient and is not "
                f"among its parameters (tensors of shape {shapes}), so a server would "
                "keep it as a constant that no update moves: make it a parameter of a "
                "layer (parameters in a list: an nn.ParameterList, layers: an "
                "nn.ModuleList), or detach() it"
            )
            raise InvalidSpec(msg, tensors=len(lasting))

    def compare_batches(
        self, batches: Iterable[Batch], objective: Objective | None
    ) -> None:
        """Compare at other data points, and at sizes that a session has.

        Code may take another way at either.
        """
        start_s, point_s, digits = time.thread_time(), 0.0, self.run.narrowest
        for batch in batches:
            points, begin_s = len(batch.inputs.leaves[0]), time.thread_time()
            quick = begin_s - start_s + points * point_s <= _SPARE_S
            if not (batch.always or quick):
                break
            self.run.inputs = widened(batch.inputs, self.run.dtype)
            try:
                outputs = self.run.outputs()
            except Exception:
                continue
            found = self.exported()
            where = f" with {points} data points"
            self.check_outputs(outputs, found, where)
            functions = functions_in(outputs, self.run.outputs)
            self.functions = list(dict.fromkeys((*self.functions, *functions)))
            if batch.telling or quick:
                self._compare_objective(outputs, found, objective, batch.targets, where)
                point_s = (time.thread_time() - begin_s) / points
            elif objective is not None and batch.targets is not None:
                self._compare_loss(objective, outputs, batch.targets, where)
            if self.suspicious:
                self._compare_gradients(outputs, found, 1.0, where)
            self.run.narrowest = digits  # the loss may have had fewer
        self.run.inputs = self.rows

    def compare_nearby(self, origin: Sequence[Tensor]) -> None:
        """Compare close to the parameters, with gradients of all sizes."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter, start in zip(
                self.run.module.parameters(), origin, strict=True
            ):
                if not start.is_floating_point():
                    continue  # a frozen one that counts or chooses
                noise = torch.randn(start.shape, generator=generator).to(start)
                root = float(start.square().mean().sqrt()) if start.numel() else 0.0
                parameter.copy_(start + _NEARBY * max(root, 1e-2) * noise)
        outputs, found = self.run.outputs(), self.exported()
        where = " at parameters nearby"
        self.check_outputs(outputs, found, where)
        large = 1e8 if self.run.dtype is torch.float64 else 1e2
        for factor in (1.0, large, 1 / large):
            self._compare_gradients(outputs, found, factor, where)

    def compare_far(self, origin: Sequence[Tensor]) -> None:
        """Compare where a backward of one's own may take another way."""
        inputs = self.run.inputs
        for factor in _FACTORS:
            where = f" with parameters and inputs times {factor:g}"
            self.run.inputs = multiplied(inputs, factor)
            with torch.no_grad():
                for parameter, start in zip(
                    self.run.module.parameters(), origin, strict=True
                ):
                    if start.is_floating_point():
                        parameter.copy_(start * factor)
            outputs, found = self.run.outputs(), self.exported()
            if torch.isfinite(found[0]).all():
                self.check_outputs(outputs, found, where)
                self._compare_gradients(outputs, found, 1.0, where)

    def check_outputs(
        self, outputs: Tensor, found: tuple[Tensor, dict[str, Tensor]], where: str
    ) -> None:
        """Compare what both return."""
        self._check({"the output": (outputs, found[0])}, where)

    def _compare_gradients(
        self,
        outputs: Tensor,
        found: tuple[Tensor, dict[str, Tensor]],
        factor: float,
        where: str,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(outputs.shape, generator=generator).to(outputs)
        mine = self.run.gradients(outputs, factor * cotangent)
        pulled = _pulled(found[0], found[1], cotangent.to(found[0]))
        expected = {n: None if g is None else factor * g for n, g in pulled.items()}
        if factor != 1.0:
            where = f"{where} and a gradient of the outputs of size {factor:g}"
        self._check_gradients(mine, expected, where, factor)

    def _check_gradients(
        self,
        mine: Mapping[str, Tensor | None],
        expected: Mapping[str, Tensor | None],
        where: str,
        factor: float = 1.0,
    ) -> None:
        pairs = {}
        for name, want in expected.items():
            got = mine[f"module.{name}"]
            if got is not None or want is not None:
                like = want if got is None else got
                assert like is not None
                zero = torch.zeros_like(like)
                pairs[name] = (
                    zero if got is None else got,
                    zero if want is None else want,
                )
        if factor == 1.0:
            self._check(pairs, where, self.usual)
        else:
            self._check(pairs, where, power=_UNUSUAL)
        size = size_of(pairs)
        if factor == 1.0 and math.isfinite(size):
            self.usual = max(self.usual, size)

    def _check(
        self,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        where: str,
        least: float = 0.0,
        power: float = 0.5,
    ) -> None:
        """Compare tensors of one kind: (module's, graph's) by name."""
        wrong = differing(pairs, self.run.narrowest, least, power)
        if wrong:
            raise mismatch(wrong, where, self.run.seen, self.functions)


def _home(wrapper: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """Find the layer that has a tensor, and its attribute; None: a constant of the code."""
    path, _, leaf = f"module.{name}".rpartition(".")
    try:
        return wrapper.get_submodule(path), leaf
    except AttributeError:
        return None, leaf


def _pulled(
    result: Tensor, trained: Mapping[str, Tensor], cotangent: Tensor | None
) -> dict[str, Tensor | None]:
    if not result.requires_grad or not trained:
        return dict.fromkeys(trained)
    rows = torch.autograd.grad(
        result, list(trained.values()), cotangent, allow_unused=True, retain_graph=True
    )
    return dict(zip(trained, rows, strict=True))
