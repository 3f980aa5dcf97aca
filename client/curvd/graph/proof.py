"""Proof that a graph is the module or loss that it was exported from.

A graph holds a forward pass; its derivatives follow from its operators. What a training
loop's ``.backward()`` computes may be something else: a function's own backward, a hook,
a region without gradients. So both are run on a few rows and compared, parameter by
parameter: with the caller's loss, at the parameters as they are; and with random
gradients of the outputs of very different sizes, at parameters nearby, because clipping
shows at large gradients only, and a layer of zeros hides the layers before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvd.errors import GradientMismatch
from curvd.graph.eager import Digits, Run, functions_in, multiplied, runs
from curvd.graph.evaluate import evaluate
from curvd.graph.manifest import Inputs
from curvd.v1 import graph_pb2 as graph_pb

Scalar = Callable[[Tensor], Tensor]
"""Outputs -> one number."""

_NEARBY = 0.03
"""How far the second point lies from the parameters, relative to their scale."""
_FACTORS = (0.03, 30.0, -1.0)
"""By which parameters and inputs are multiplied where gradients are suspicious."""
_NAMED = 5
"""Parameters that a message names."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss of the rows that are compared."""

    eager: Scalar
    """The caller's."""
    exported: Scalar
    """What a server computes."""


def prove(
    wrapper: nn.Module,
    rows: Inputs,
    graph: graph_pb.Graph,
    tensors: Mapping[str, Tensor],
    objective: Objective | None,
) -> None:
    """Compare a module with its graph.

    Args:
        wrapper: Calls the module, and returns the output that was exported.
        rows: A few data points.
        graph: What was exported.
        tensors: Its tensors by name.
        objective: The loss, if it is known.

    Raises:
        GradientMismatch: If outputs, loss or gradients differ.
        InvalidGraph: If the module cannot be run.
    """
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    with runs(wrapper, rows, dtype or torch.float32) as (run, outputs):
        proof = _Proof(run, graph, tensors)
        if not any(p.requires_grad for p in wrapper.parameters()):
            proof.check_outputs(outputs, proof.exported(), "")
            return
        if not outputs.requires_grad:
            raise proof.cut_off()
        digits = run.narrowest
        proof.compare(outputs, objective)
        run.narrowest = digits  # the loss may have had fewer
        if run.movable:
            origin = [p.detach().clone() for p in run.module.parameters()]
            proof.compare_nearby(origin)
            if run.hooks or proof.functions:
                proof.compare_far(origin)
        else:
            proof.compare(outputs, None)


def prove_loss(
    wrapper: nn.Module,
    graph: graph_pb.Graph,
    tensors: Mapping[str, Tensor],
    outputs: Tensor,
    targets: Tensor,
) -> None:
    """Compare a loss with its graph, at outputs of very different sizes.

    Args:
        wrapper: Calls the loss; returns its sum, and perhaps a weight.
        graph: What was exported.
        tensors: Its constants by name.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].

    Raises:
        GradientMismatch: If values or gradients differ.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(outputs.shape, generator=generator).to(outputs)
    root = float(outputs.double().square().mean().sqrt())
    constants = [tensors[described.names[0]] for described in graph.tensors]
    nearby = outputs + _NEARBY * max(root, 1e-2) * noise
    usual = 0.0
    for z in (outputs, nearby, *(factor * nearby for factor in _FACTORS)):
        try:
            pairs, narrowest = _of_loss(wrapper, graph, constants, z, targets)
        except Exception:
            if z is outputs:
                raise
            continue  # it is not defined there
        wrong = differing(pairs, narrowest, usual)
        size = size_of(pairs)
        usual = max(usual, size) if math.isfinite(size) else usual
        if wrong:
            sizes = ", ".join(f"{n} {_size(size)}" for n, size in wrong.items())
            msg = (
                "what the loss returns and its .backward() computes is not what was "
                f"exported: {sizes}. A server differentiates what the loss computes, and "
                "knows nothing else: write it with torch's operators, without hooks, a "
                "backward of its own, or anything that changes between two calls"
            )
            raise GradientMismatch(
                msg, parameters="the loss", largest=max(wrong.values())
            )


def _of_loss(
    wrapper: nn.Module,
    graph: graph_pb.Graph,
    constants: Sequence[Tensor],
    outputs: Tensor,
    targets: Tensor,
) -> tuple[dict[str, tuple[Tensor, Tensor]], torch.dtype]:
    """Differentiate a loss and its graph by the outputs, in float64 where it can."""
    for dtype in dict.fromkeys((torch.float64, outputs.dtype)):
        leaf, y = _wide(outputs, dtype).requires_grad_(), _wide(targets, dtype)
        digits = Digits(dtype)
        try:
            with torch.enable_grad(), digits:
                total, *weight = wrapper((leaf, y), {})
        except Exception:
            if dtype is outputs.dtype:
                raise
            continue
        with torch.enable_grad():
            given = [_wide(t, dtype) for t in constants]
            other = leaf.detach().requires_grad_()  # without the hooks of the first
            want, *counted = evaluate(graph, (other, y), given)
        pairs = {
            "its value": (total, want),
            "its gradient": (_slope(total, leaf), _slope(want, other)),
        }
        if weight:
            pairs["its weight"] = weight[0], counted[0]
        return pairs, digits.narrowest
    raise AssertionError


def _size(error: float) -> str:
    """Say how far something is off."""
    if math.isfinite(error):
        return f"(relative difference {error:.2g})"
    return "(what is exported has none, or another shape)"


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor


def _slope(total: Tensor, leaf: Tensor) -> Tensor:
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    (row,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if row is None else row


class _Proof:
    """What is compared with what.

    Args:
        run: The module.
        graph: What was exported.
        tensors: Its tensors by name.
    """

    def __init__(
        self, run: Run, graph: graph_pb.Graph, tensors: Mapping[str, Tensor]
    ) -> None:
        self.run, self.graph, self.tensors = run, graph, tensors
        self.functions: list[str] = []
        self.usual = 0.0
        """Size of the gradients so far."""

    def exported(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the graph at the module's parameters.

        Returns:
            Its output, and what it can be differentiated by.
        """
        module = self.run.module
        values: dict[str, Tensor] = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        given, trained = [], {}
        for described in self.graph.tensors:
            name = described.names[0]
            value = values.get(f"module.{name}", self.tensors[name]).detach().clone()
            if value.is_complex():
                value = torch.view_as_real(value.resolve_conj())
            if value.is_floating_point():
                value = value.to(self.run.dtype)
            if described.role == graph_pb.GRAPH_TENSOR_ROLE_PARAMETER:
                trained[name] = value.requires_grad_()
            given.append(value)
        with torch.enable_grad():
            return evaluate(self.graph, self.run.inputs.leaves, given)[0], trained

    def compare(self, outputs: Tensor, objective: Objective | None) -> None:
        """Compare at the parameters as they are.

        Args:
            outputs: Of the module.
            objective: The loss; None: random gradients of the outputs.
        """
        self.functions = functions_in(self.run, outputs)
        found = self.exported()
        self.check_outputs(outputs, found, "")
        if objective is None:
            self._compare_gradients(outputs, found, 1.0, "")
            return
        loss = self.run.loss(objective.eager, outputs)
        with torch.enable_grad():
            expected = objective.exported(found[0])
        if not torch.isfinite(expected):
            return
        self._check({"the loss": (loss, expected)}, "")
        if expected.requires_grad and loss.requires_grad:
            mine = self.run.gradients(loss, torch.ones_like(loss))
            self._check_gradients(mine, _pulled(expected, found[1], None), "")

    def compare_nearby(self, origin: Sequence[Tensor]) -> None:
        """Compare close to the parameters, with gradients of all sizes."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter, start in zip(
                self.run.module.parameters(), origin, strict=True
            ):
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
        self._check(pairs, where, self.usual if factor == 1.0 else 0.0)
        size = size_of(pairs)
        if factor == 1.0 and math.isfinite(size):
            self.usual = max(self.usual, size)

    def _check(
        self,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        where: str,
        least: float = 0.0,
    ) -> None:
        """Compare tensors of one kind: (module's, graph's) by name."""
        wrong = differing(pairs, self.run.narrowest, least)
        if wrong:
            raise self._mismatch(wrong, where)

    def cut_off(self) -> GradientMismatch:
        """Say that nothing can be trained."""
        if self.run.cut:
            why = (
                "a reentrant checkpoint is called with no input that requires a "
                "gradient: use checkpoint(..., use_reentrant=False)"
            )
        else:
            why = (
                "torch.no_grad(), inference_mode or detach() cuts them off: remove it, "
                "or freeze what is not trained (requires_grad_(False))"
            )
        msg = f"no parameter of the module gets a gradient from its output: {why}"
        return GradientMismatch(msg, parameters="all")

    def _mismatch(self, wrong: Mapping[str, float], where: str) -> GradientMismatch:
        names = sorted(wrong, key=lambda name: -wrong[name])
        sizes = ", ".join(f"{n} {_size(wrong[n])}" for n in names[:_NAMED])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        causes, remedies = zip(*self._reasons(), strict=True)
        msg = (
            "what .backward() computes is not the derivative of what was exported: "
            f"{sizes}{more}{where}. Seen in the module: {'; '.join(causes)}. A server "
            "differentiates the forward pass and knows nothing else: "
            f"{'; '.join(dict.fromkeys(remedies))}"
        )
        largest = max(wrong.values())
        return GradientMismatch(msg, parameters=", ".join(names), largest=largest)

    def _reasons(self) -> Iterator[tuple[str, str]]:
        """Name what may be the cause, and what to do about each."""
        for name in self.functions:
            yield (
                f"torch.autograd.Function {name} with a backward of its own",
                "write it with torch's operators, so that their derivative is the "
                "gradient you mean; a straight-through estimator's is that of no "
                "function and has no Hessian: leave it out, or round the parameters "
                "before you export them",
            )
        for hook in dict.fromkeys(self.run.hooks):
            yield (
                hook,
                "remove the hooks before exporting, or write what they do into "
                "forward or the loss",
            )
        if self.run.cut:
            yield (
                "a reentrant checkpoint none of whose inputs requires a gradient",
                "use checkpoint(..., use_reentrant=False)",
            )
        if not (self.functions or self.run.hooks or self.run.cut):
            yield (
                "neither a hook nor a backward of its own, so its forward depends on "
                "something beside inputs, parameters and buffers",
                "make that a buffer or an input",
            )


def differing(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    narrowest: torch.dtype,
    least: float = 0.0,
) -> dict[str, float]:
    """Find what differs by more than rounding.

    Args:
        pairs: What was got, and what it should be, by name.
        narrowest: The type with the fewest digits that went into it.
        least: The size that they have elsewhere; where they vanish, because a function
            saturates, rounding is judged by it.

    Returns:
        Relative errors of those that differ; none if something is not finite, which is
        the server's to name.
    """
    eps = torch.finfo(narrowest).eps
    wide = {
        n: (a.detach().double(), b.detach().double()) for n, (a, b) in pairs.items()
    }
    total = size_of(pairs)
    scale = max(total, least)
    wrong = {}
    for name, (got, want) in wide.items():
        off = math.inf if got.shape != want.shape else float((got - want).norm())
        size = float(want.norm())
        if not off <= math.sqrt(eps) * size + 100 * eps * scale:
            wrong[name] = off / size if size else math.inf
    return wrong if math.isfinite(total) else {}


def size_of(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Measure what several tensors should be, together."""
    return math.hypot(*(float(w.detach().double().norm()) for _, w in pairs.values()))


def _pulled(
    result: Tensor, trained: Mapping[str, Tensor], cotangent: Tensor | None
) -> dict[str, Tensor | None]:
    if not result.requires_grad or not trained:
        return dict.fromkeys(trained)
    rows = torch.autograd.grad(
        result, list(trained.values()), cotangent, allow_unused=True, retain_graph=True
    )
    return dict(zip(trained, rows, strict=True))
