"""Places of the caller's code that no run here may fill with tensors that have no values.

Code that computes something once, a table of positions, a mask, keeps it; code that is watched
keeps what it saw. Both do so in attributes, in objects of their own, in globals, in what a
function closes over, by ``functools.lru_cache``. A trace runs that code on tensors without
values. Left in such a place, one of them would be what the caller's module returns, or fails
on, ever after.

So a module is called once as its owner calls it before it is run in any other way: then what
it keeps is there, with values (`called`). And whatever its code can reach by name is looked
through after each trace (`unfilled`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvd.graph.checkpoints import plain_checkpoints
from curvd.graph.manifest import Inputs
from curvd.graph.places import places
from curvd.graph.quiet import quiet


def called(wrapper: nn.Module, rows: Inputs) -> Tensor | None:
    """Call a module as its owner does, so that it keeps what it computes once.

    What had a value before has it afterwards: running statistics, counters, the random
    numbers to come. What was not there stays, as after any call.

    Args:
        wrapper: Calls the module.
        rows: What with.

    Returns:
        What it returned; None: it fails, which others say, or is not to be called yet.
    """
    if any(map(is_lazy, (*wrapper.parameters(), *wrapper.buffers()))):
        return None  # its first call is its owner's
    held = [(vars(layer), dict(vars(layer))) for layer in wrapper.modules()]
    state = {name: buffer.clone() for name, buffer in wrapper.named_buffers()}
    devices = {t.device.index for t in rows.leaves if t.device.type == "cuda"}
    random = torch.random.fork_rng(devices=[d for d in devices if d is not None])
    arguments = (rows.args, dict(rows.kwargs))
    try:
        # note: a forward that differentiates needs gradients to be on.
        with torch.enable_grad(), random, plain_checkpoints(), quiet():
            result = torch.func.functional_call(wrapper, state, arguments)
            return result if isinstance(result, Tensor) else None
    except Exception:  # of the module's own code
        return None
    finally:
        for now, before in held:
            for name, value in before.items():
                if value is not None and now.get(name) is not value:
                    now[name] = value


@dataclass
class Traces:
    """What `unfilled` has found."""

    found: bool = False
    """Whether the run left something behind."""


@contextlib.contextmanager
def unfilled(wrapper: nn.Module) -> Iterator[Traces]:
    """Take back what a trace leaves without values where the code of a module can reach.

    Nothing else is touched: a training may go on beside this.

    Args:
        wrapper: The module, with its layers.

    Yields:
        Whether there was anything; known afterwards.
    """
    reached, traces = list(places(wrapper)), Traces()
    try:
        yield traces
    finally:
        for place in reached:
            traces.found |= place.clean()
