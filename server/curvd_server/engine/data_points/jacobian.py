"""The Jacobian of the data points' losses, or of the model's outputs, in both directions.

With z the outputs of data points and ``c_n = dloss_n / dz_n``, row n of the losses'
Jacobian is ``c_n^T dz_n/dp``, the gradient of the data point's own loss. It is multiplied
in one of three ways, equal in exact arithmetic:

* ``forward``: tangents of the outputs in forward mode, then an inner product with c_n;
* ``transposed``: the same tangents by differentiating the backward pass, which is linear in
  what it is given, once more in reverse mode (Townsend's double backward trick);
* ``rows``: all gradients of a part, [b, P], and a matrix product. It costs about a gradient
  where positions share weights, and then nearly nothing for each further column.

The other direction is one backward pass per column, or rows. Which is the fastest is found
out on the first part of the data, where each has to agree with plain autograd, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvd.contract import JacobianOf
from curvd.errors import CurvatureUnverified, NotFinite
from curvd_server.engine.data_points.gradients import Gradients
from curvd_server.engine.finite import check_finite
from curvd_server.engine.objective import (
    Batch,
    Problem,
    add_rows,
    rows_of,
    tangents_of,
)
from curvd_server.system import is_out_of_memory, yield_point

Product = Callable[[Batch, Tensor], Tensor]
"""A way to multiply with the rows of some data points, in either direction."""

_AT_ONCE = 16
"""Columns that go through a vectorised pass together."""
_FEW = 8
"""One in so many data points tells whether rows take so many times as long as another."""
_SHORT_S = 0.1
"""What takes less is timed a second time: the first call of everything is slow."""


class Jacobian:
    """Rows of a Jacobian, those of some data points at a time.

    Args:
        problem: The objective.
        of: Of what.
    """

    def __init__(self, problem: Problem, of: JacobianOf) -> None:
        self._problem, self._of = problem, of
        self._gradients = Gradients(problem)
        self.plans: dict[str, str] = {}
        """By direction, ``push`` or ``pull``, the plan that was the fastest."""

    def push(self, batch: Batch, V: Tensor) -> Tensor:
        """Multiply columns: ``J v`` for some data points.

        Args:
            batch: The data points.
            V: [K, P].

        Returns:
            [b, K], or of the outputs [b, K, *outputs].

        Raises:
            CurvatureUnverified: If no plan agrees with plain autograd.
        """
        plans = {"forward": self._forward, "transposed": self._transposed}
        return self._best("push", plans, self._rows_times, batch, V)

    def pull(self, batch: Batch, W: Tensor) -> Tensor:
        """Multiply with the transposed Jacobian: ``J^T w`` of some data points.

        Args:
            batch: The data points.
            W: [b, K], or of the outputs [b, K, *outputs].

        Returns:
            [K, P].

        Raises:
            CurvatureUnverified: If no plan agrees with plain autograd.
        """
        plans = {"vectorised": self._reverse_together, "reverse": self._reverse}
        unfit = ["vectorised"] if W.shape[1] == 1 else []
        return self._best("pull", plans, self._times_rows, batch, W, unfit)

    def rows(self, batch: Batch) -> Tensor:
        """Compute the gradients of some data points' losses: [b, P]."""
        return self._gradients.flat(batch)

    def outputs_shape(self, batch: Batch) -> tuple[int, ...]:
        """Find the shape of what one data point has: empty for losses."""
        if self._of is JacobianOf.LOSSES:
            return ()
        with torch.no_grad():
            return tuple(
                self._problem.outputs(self._problem.parameters, batch).shape[1:]
            )

    def _best(
        self,
        direction: str,
        plans: Mapping[str, Product],
        by_rows: Product,
        batch: Batch,
        operand: Tensor,
        unfit: Sequence[str] = (),
    ) -> Tensor:
        if self._of is JacobianOf.LOSSES:
            plans = {**plans, "rows": by_rows}
        if direction not in self.plans:
            fit = {name: plan for name, plan in plans.items() if name not in unfit}
            return self._choose(direction, fit, batch, operand)
        return self._finite(batch, plans[self.plans[direction]](batch, operand))

    def _finite(self, batch: Batch, product: Tensor) -> Tensor:
        check_finite(
            self._problem, batch, f"a product of the {self._of} Jacobian", [product]
        )
        return product

    def _choose(
        self,
        direction: str,
        plans: Mapping[str, Product],
        batch: Batch,
        operand: Tensor,
    ) -> Tensor:
        """Time every plan that agrees with plain autograd; return the product."""
        found: dict[str, tuple[float, Tensor]] = {}
        wrong: list[str] = []
        for name, plan in plans.items():
            yield_point()
            best = min((seconds for seconds, _ in found.values()), default=math.inf)
            try:
                if name == "rows" and self._is_hopeless(
                    direction, batch, operand, best
                ):
                    continue
                seconds, product = _timed(plan, batch, operand)
                self._finite(batch, product)
            except NotFinite:
                raise
            except Exception as error:
                if is_out_of_memory(error) and name != "rows":
                    raise
                wrong.append(f"{name}: {type(error).__name__}")
                continue  # not every operator has every derivative
            if self._agrees(direction, batch, operand, product):
                found[name] = seconds, product
            else:
                wrong.append(f"{name}: differs from the backward pass")
        if not found:
            msg = (
                f"no plan of the {self._of} Jacobian agrees with plain reverse mode "
                f"({'; '.join(wrong)}): a layer's derivative is wrong or missing; replace it"
            )
            raise CurvatureUnverified(msg, plans=", ".join(plans))
        name = min(found, key=lambda name: found[name][0])
        self.plans[direction] = name
        return found[name][1]

    def _is_hopeless(
        self, direction: str, batch: Batch, operand: Tensor, best_s: float
    ) -> bool:
        """Tell by a few data points that rows are much slower than another plan.

        Without shared weights they take tens of gradients, and as much memory.
        """
        count = len(batch.targets)
        few = rows_of(batch, slice(0, max(1, count // _FEW)))
        if direction == "push":
            seconds, _ = _timed(self._rows_times, few, operand)
        else:
            seconds, _ = _timed(self._times_rows, few, operand[: len(few.targets)])
        return seconds > best_s

    def _agrees(
        self, direction: str, batch: Batch, operand: Tensor, product: Tensor
    ) -> bool:
        """Compare with plain reverse mode, along random weights of the data points."""
        eps = torch.finfo(self._problem.dtype).eps
        if direction == "pull":
            known = self._reverse(batch, operand)
            error = (product - known).double().norm()
            return bool(error <= eps**0.5 * known.double().norm() + 1e-300)
        generator = torch.Generator().manual_seed(0)
        shape = (len(product), 1, *product.shape[2:])
        W = torch.randn(shape, generator=generator, dtype=torch.float64).to(product)
        known = self._reverse(batch, W)[0].double()
        terms = (product * W).double().movedim(1, 0)
        ours = terms.reshape(len(operand), -1).sum(1)
        theirs = operand.double() @ known
        # Not relative to the sum: terms of many data points cancel.
        scale = known.norm() * operand.double().norm(dim=1)
        return bool(((ours - theirs).abs() <= eps**0.5 * scale + 1e-300).all())

    def _cotangents(self, z: Tensor, batch: Batch) -> Tensor:
        """Differentiate each data point's loss in its outputs: [b, *outputs]."""
        wide = torch.promote_types(z.dtype, torch.float32)
        with torch.enable_grad():
            leaf = z.detach().to(wide).requires_grad_()
            loss = self._problem.loss.sum(leaf, batch.targets)
            (found,) = torch.autograd.grad(loss, leaf)
        return found

    def _weighed(self, z: Tensor, batch: Batch, W: Tensor) -> Tensor:
        """Make what is pulled back of weights: [b, K, *outputs]."""
        if self._of is JacobianOf.OUTPUTS:
            return W.to(z.dtype)
        c = self._cotangents(z, batch)
        W = W.reshape(*W.shape[:2], *(1 for _ in c.shape[1:]))
        return (W * c[:, None]).to(z.dtype)

    def _contracted(self, z: Tensor, batch: Batch, pushed: Tensor) -> Tensor:
        """Make the products of tangents of the outputs, [K, b, *outputs]: [b, K, …]."""
        pushed = pushed.movedim(1, 0).to(self._problem.result_dtype)
        if self._of is JacobianOf.OUTPUTS:
            return pushed
        terms = pushed * self._cotangents(z, batch)[:, None]
        return terms.reshape(*terms.shape[:2], -1).sum(2)

    def _forward(self, batch: Batch, V: Tensor) -> Tensor:
        problem = self._problem
        here = tuple(p.detach() for p in problem.parameters)

        def outputs(*parameters: Tensor) -> Tensor:
            return problem.outputs(parameters, batch)

        def pushed(*tangents: Tensor) -> tuple[Tensor, Tensor]:
            pair: Any = torch.func.jvp(outputs, here, tangents)
            z, row = pair
            return z, row

        parts = []
        # note: with grad mode off torch picks fused passes that have no forward mode.
        with torch.enable_grad():
            for columns in V.split(_AT_ONCE):  # type: ignore[no-untyped-call]
                wide = tangents_of(columns, problem.layout)
                tangents = [t.to(p.dtype) for t, p in zip(wide, here, strict=True)]
                if len(columns) == 1:
                    z, one = pushed(*(t[0] for t in tangents))
                    parts.append(one[None].detach())
                    continue
                every: Any = torch.func.vmap(pushed, out_dims=(None, 0))  # type: ignore[arg-type]
                z, some = every(*tangents)
                parts.append(some.detach())
        return self._contracted(z, batch, torch.cat(parts))

    def _transposed(self, batch: Batch, V: Tensor) -> Tensor:
        problem = self._problem
        with torch.enable_grad():
            leaves, z = self._graph(batch)
            dummy = torch.zeros_like(z, requires_grad=True)
            pulled = self._backward(z, leaves, dummy, create_graph=True)
            rows = [
                self._once_more(pulled, dummy, tangents_of(v, problem.layout))
                for v in V
            ]
        return self._contracted(z, batch, torch.stack(rows))

    def _once_more(
        self, pulled: Sequence[Tensor | None], dummy: Tensor, tangents: Sequence[Tensor]
    ) -> Tensor:
        pairs = [
            (row, t.to(row.dtype))
            for row, t in zip(pulled, tangents, strict=True)
            if row is not None and row.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(dummy)
        (found,) = torch.autograd.grad(
            [row for row, _ in pairs],
            [dummy],
            [t for _, t in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        return torch.zeros_like(dummy) if found is None else found.detach()

    def _rows_times(self, batch: Batch, V: Tensor) -> Tensor:
        return self.rows(batch) @ V.T

    def _reverse(self, batch: Batch, W: Tensor) -> Tensor:
        return self._pulled(batch, W, together=False)

    def _reverse_together(self, batch: Batch, W: Tensor) -> Tensor:
        return self._pulled(batch, W, together=True)

    def _pulled(self, batch: Batch, W: Tensor, *, together: bool) -> Tensor:
        problem = self._problem
        out = W.new_zeros(W.shape[1], problem.layout.size, dtype=problem.result_dtype)
        with torch.enable_grad():
            leaves, z = self._graph(batch)
            if not z.requires_grad:
                return out
            weights = self._weighed(z, batch, W).movedim(1, 0)
            if together:
                for start in range(0, len(weights), _AT_ONCE):
                    some = weights[start : start + _AT_ONCE]
                    rows = self._backward(z, leaves, some, is_grads_batched=True)
                    add_rows(out[start : start + _AT_ONCE], problem.layout, rows)
                return out
            for place, weight in zip(out, weights, strict=True):
                add_rows(place, problem.layout, self._backward(z, leaves, weight))
        return out

    def _times_rows(self, batch: Batch, W: Tensor) -> Tensor:
        return W.T @ self.rows(batch)

    def _graph(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        leaves = [p.detach().requires_grad_() for p in self._problem.parameters]
        return leaves, self._problem.outputs(leaves, batch)

    def _backward(
        self, z: Tensor, leaves: Sequence[Tensor], weights: Tensor, **more: Any
    ) -> Sequence[Tensor | None]:
        if not z.requires_grad:
            return [None] * len(leaves)
        return torch.autograd.grad(
            z, leaves, weights, retain_graph=True, allow_unused=True, **more
        )


def _timed(plan: Product, batch: Batch, operand: Tensor) -> tuple[float, Tensor]:
    """Compute a product, and measure the seconds that it takes."""
    for again in (False, True):
        start = time.perf_counter()
        product = plan(batch, operand)
        if product.device.type == "cuda":
            torch.cuda.synchronize(product.device)
        seconds = time.perf_counter() - start
        if again or seconds > _SHORT_S:
            break
    return seconds, product
