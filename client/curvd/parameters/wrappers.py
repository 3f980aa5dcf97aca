"""Modules without what trains, averages or compiles them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from curvd.errors import InvalidSpec
from curvd.tensors import loaded

if TYPE_CHECKING:
    from curvd.graph.origins import Origin

_COUNT, _INNER = "n_averaged", "module."
"""What a state dict of `torch.optim.swa_utils.AveragedModel` has: its count, and the rest."""


def unwrapped(value: Any) -> Any:
    """Take a module out of its wrappers.

    Args:
        value: A module, wrapped as often as you like, or anything else.

    Returns:
        The module within; what is no wrapper as it is.
    """
    torch = loaded("torch")
    if torch is None:
        return value
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(value, parallel) or _is_averaged(value):
            value = value.module
        elif _is_compiled(value):
            value = value._orig_mod
        else:
            return value


def exportable(module: Any) -> Any:
    """Take a module out of its wrappers, for an export.

    Args:
        module: A module, wrapped or not, or anything else.

    Returns:
        The module within.

    Raises:
        InvalidSpec: If its parameters are shards: no rank has the whole of them.
    """
    inner = unwrapped(module)
    torch = loaded("torch")
    distributed = loaded("torch.distributed.tensor")
    if distributed is None or not isinstance(inner, torch.nn.Module):
        return inner
    for name, parameter in inner.named_parameters():
        if isinstance(parameter, distributed.DTensor):
            msg = (
                f"parameter {name!r} of the module is sharded over "
                f"{parameter.device_mesh.size()} ranks, and an export needs a whole module: "
                "call session_for before fully_shard, or with another instance, on one "
                "rank; then all ranks call client.session(id).update_parameters(module), "
                "which sends the shards as they are"
            )
            raise InvalidSpec(msg, parameter=name)
    return inner


def state_of(value: Any, origin: Origin | None = None) -> Any:
    """Give what has parameters by name the shape of a state dict.

    Args:
        value: A module, wrapped or not, or anything else.
        origin: What the session's module was when it was exported, if that is known.

    Returns:
        A module's state dict; that of an `AveragedModel` without its count; anything
        else as it is.

    Raises:
        InvalidSpec: If a module has changed in what is a constant of the session.
    """
    if isinstance(value, Mapping):
        return _of_pairs(_without_count(value))
    torch = loaded("torch")
    if torch is None or not isinstance(value, torch.nn.Module):
        return value
    inner = unwrapped(value)
    if origin is not None and not _is_sharded(inner):
        return _of_pairs(origin.state(inner))
    return _of_pairs(inner.state_dict())


def _of_pairs(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write complex tensors as pairs of real numbers, [..., 2], as an export does."""
    torch = loaded("torch")
    turning = [
        name
        for name, value in state.items()
        if torch is not None and isinstance(value, torch.Tensor) and value.is_complex()
    ]
    if not turning:
        return state
    real = {name: torch.view_as_real(state[name].resolve_conj()) for name in turning}
    return {**state, **real}


def _is_sharded(module: Any) -> bool:
    """Tell whether parameters are DTensors: layers are others then, on purpose."""
    distributed = loaded("torch.distributed.tensor")
    return distributed is not None and any(
        isinstance(parameter, distributed.DTensor) for parameter in module.parameters()
    )


def _without_count(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take away what an `AveragedModel` counts, and no model has."""
    others = [name for name in state if name != _COUNT]
    if len(others) == len(state) or not all(n.startswith(_INNER) for n in others):
        return state
    return {name: state[name] for name in others}


def _is_averaged(value: Any) -> bool:
    """Tell what averages the parameters of a training; its file may not be imported."""
    averages = loaded("torch.optim.swa_utils")
    return averages is not None and isinstance(value, averages.AveragedModel)


def _is_compiled(value: Any) -> bool:
    """Tell what torch.compile returns; its class is imported with the compiler only."""
    dynamo = loaded("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(value, dynamo.OptimizedModule)
