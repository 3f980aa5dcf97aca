"""A module itself beside a twin of it: once, on a few rows, as its owner runs it.

All that is traced, compared and differentiated is a twin of the module, or a copy of that.
Either does what the module does as long as its code reaches the module by no other way than
from a layer to its children. `curvd.graph.places` looks for such ways, and cannot know all of
them: a frame, a registry in a package, a thread's own data. Both run the same kernels here, so
that their results differ by nothing, however much a module magnifies rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvd.contract import Mode, Output
from curvd.errors import GradientMismatch
from curvd.graph.autocasts import alone
from curvd.graph.capture import Chosen
from curvd.graph.compared import differing, shown_size
from curvd.graph.examples import sampled
from curvd.graph.manifest import Inputs, inputs_of
from curvd.graph.unfilled import called

_OUTPUT = "the output"


def check_itself(
    module: nn.Module,
    twin: nn.Module,
    inputs: Any,
    output: Output,
    mode: Mode | None,
) -> None:
    """Compare what a module computes, and its gradients, with what its twin does.

    Args:
        module: In the mode that its owner has it in; if another was chosen for the graph,
            nothing is compared.
        twin: Of the same tensors; see `curvd.graph.twins`.
        inputs: The inputs, as for `curvd.export`.
        output: Which of its results.
        mode: The mode that was chosen; None: as it is.

    Raises:
        GradientMismatch: If they differ, or parameters move meanwhile.
    """
    is_other = mode is Mode.EVAL and any(m.training for m in module.modules())
    if is_other or mode is Mode.BATCH_STATISTICS:
        return
    versions = [p._version for p in module.parameters()]
    rows = inputs_of(module.forward, sampled(inputs))
    with alone(module):
        own, other = (_computed(Chosen(m, output), rows) for m in (module, twin))
    wrong = _differing(own, other)
    if wrong:
        moved = versions != [p._version for p in module.parameters()]
        with alone(module):
            again = _computed(Chosen(module, output), rows)
        if moved or not _differing(own, again):  # else it does not agree with itself
            raise _refusal(wrong, moved=moved)


def _computed(wrapper: nn.Module, rows: Inputs) -> dict[str, Tensor]:
    """Run a module and pull random gradients of its outputs back.

    ``.grad`` is left alone.

    Args:
        wrapper: Calls the module.
        rows: What with.

    Returns:
        The output, and the gradients by parameter; nothing if that fails, which others say.
    """
    outputs = called(wrapper, rows)
    if outputs is None:
        return {}
    found = {_OUTPUT: outputs.detach()}
    trained = {n: p for n, p in wrapper.named_parameters() if p.requires_grad}
    if outputs.requires_grad:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(outputs.shape, generator=generator).to(outputs)
        try:
            parts = torch.autograd.grad(
                outputs, list(trained.values()), cotangent, allow_unused=True
            )
        except Exception:  # of the module's own code
            return {}
        for (name, parameter), part in zip(trained.items(), parts, strict=True):
            full = torch.zeros_like(parameter) if part is None else part.to_dense()
            found[name.removeprefix("module.")] = full
    return found


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Compare outputs, and gradients together, far above rounding."""
    both = {name: (one[name], other[name]) for name in one if name in other}
    outputs = {name: pair for name, pair in both.items() if name == _OUTPUT}
    gradients = {name: pair for name, pair in both.items() if name != _OUTPUT}
    digits = torch.float32
    return differing(outputs, digits) | differing(gradients, digits)


def _refusal(wrong: Mapping[str, float], *, moved: bool) -> GradientMismatch:
    largest = max(wrong, key=lambda name: wrong[name])
    size = shown_size(wrong[largest])
    if moved:
        msg = (
            f"the parameters moved while the module was exported, and {largest} is another "
            f"now {size}: another thread trains it. Pause the training meanwhile, or "
            "export a copy (copy.deepcopy)"
        )
    else:
        kind = "" if largest == _OUTPUT else "the gradient of "
        msg = (
            "the module computes something else than a module of the same classes, "
            f"attributes, parameters and buffers, {kind}{largest} {size}, and that is what "
            "was exported: its forward looks something up by the very object (id(self), a "
            "registry, another object that holds it). Make it an attribute or a buffer of "
            "the module, or an input"
        )
    return GradientMismatch(msg, parameters=", ".join(wrong), largest=wrong[largest])
