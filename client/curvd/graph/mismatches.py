"""What is said of a module that is not its graph: what differs, by how much, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from curvd.errors import GradientMismatch
from curvd.graph.compared import shown_size
from curvd.graph.seen import Seen

NAMED = 5
"""Parameters that a message names."""


def cut_off(seen: Seen) -> GradientMismatch:
    """Say that nothing can be trained.

    Args:
        seen: What was seen while the module ran.
    """
    if seen.cut:
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


def mismatch(
    wrong: Mapping[str, float], where: str, seen: Seen, functions: Sequence[str]
) -> GradientMismatch:
    """Say what differs, by how much, and what may be the cause.

    Args:
        wrong: Relative errors, by name.
        where: Under which circumstances, for the message.
        seen: What was seen while the module ran.
        functions: Names of the functions with a backward of their own.
    """
    names = sorted(wrong, key=lambda name: -wrong[name])
    sizes = ", ".join(f"{n} {shown_size(wrong[n])}" for n in names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    given = _reasons(
        seen,
        functions,
        forward="the output" in wrong,
        missing=math.inf in wrong.values(),
    )
    causes, remedies = zip(*given, strict=True)
    msg = (
        "what .backward() computes is not the derivative of what was exported: "
        f"{sizes}{more}{where}. Seen in the module: {'; '.join(causes)}. A server "
        "differentiates the forward pass and knows nothing else: "
        f"{'; '.join(dict.fromkeys(remedies))}"
    )
    largest = max(wrong.values())
    return GradientMismatch(msg, parameters=", ".join(names), largest=largest)


def _reasons(
    seen: Seen, functions: Sequence[str], *, forward: bool, missing: bool
) -> Iterator[tuple[str, str]]:
    """Name what may be the cause, and what to do about each.

    Args:
        seen: What was seen.
        functions: Those with a backward of their own.
        forward: Whether the outputs differ already.
        missing: Whether what is exported has no gradient where the module has one.
    """
    for name in functions:
        yield (
            f"torch.autograd.Function {name} with a backward of its own",
            "write it with torch's operators, so that their derivative is the "
            "gradient you mean; a straight-through estimator's is that of no "
            "function and has no Hessian: leave it out, or round the parameters "
            "before you export them",
        )
    hooks = "remove the hooks before exporting, or write what they do into forward "
    for hook in dict.fromkeys(seen.hooks):
        yield hook, f"{hooks}or the loss"
    if seen.cut:
        yield (
            "a reentrant checkpoint none of whose inputs requires a gradient",
            "use checkpoint(..., use_reentrant=False)",
        )
    if seen.hooks or functions or seen.cut:
        return
    if forward:
        yield (
            "neither a hook nor a backward of its own, so its forward depends on "
            "something beside inputs and the numbers of parameters and buffers (an "
            "attribute of a parameter, say), or does other things for other batch sizes or "
            "types",
            "make that a buffer or an input, or do the same for every size and type",
        )
    elif missing:
        yield (
            "neither a function with a backward of its own nor a hook, but what is exported "
            "does not depend on the parameter, so forward uses something that was "
            "computed from it before and kept (a cache that an earlier call filled)",
            "compute it in each forward, or no update would move it",
        )
    else:
        yield (
            "neither a function with a backward of its own nor a hook on a tensor, "
            "parameter or layer, but the outputs agree, so a hook of another kind "
            "(saved_tensors_hooks, or on a node of autograd's graph) is at work",
            f"{hooks}or the loss",
        )
