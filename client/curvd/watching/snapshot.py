"""One copy of a module's tensors, made between two writes of its optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from curvd.contract import ParameterLayout
from curvd.errors import InvalidSpec
from curvd.parameters import state_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from curvd.graph.origins import Origin

State = Callable[[], Mapping[str, Any]]
Watched = Any
"""A module, tensors by name, or a function that returns such."""


class Snapshot:
    """Memory on the host for one copy of some tensors; whoever uses it has a lock.

    Args:
        state: Returns the tensors as they are now.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._memory: dict[str, Tensor] = {}
        self._taken: dict[str, Tensor] = {}
        self._events: list[Any] = []

    def take(self) -> None:
        """Copy the tensors; those of a CUDA device in the order of its stream.

        The caller's thread is where the tensors are written, so nobody writes meanwhile.
        What it queues on the device later comes after the copy there, too.
        """
        import torch

        taken: dict[str, Tensor] = {}
        devices: set[torch.device] = set()
        with torch.no_grad():
            for name, tensor in _distinct(self._state()):
                taken[name] = self._room(name, tensor)
                taken[name].copy_(tensor, non_blocking=True)
                devices.add(tensor.device)
        self._taken = taken
        self._events = [
            torch.cuda.current_stream(device).record_event()
            for device in devices
            if device.type == "cuda"
        ]

    def values(self) -> Mapping[str, Tensor]:
        """Wait until what was taken has arrived.

        Returns:
            The tensors on the host, by name; the next `take` writes over them.
        """
        for event in self._events:
            event.synchronize()
        return self._taken

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        import torch

        room = self._memory.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            # Pinned: a copy into other memory waits for all that the device has to do.
            pinned = tensor.device.type == "cuda"
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._memory[name] = room
        return room


def _distinct(state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """Choose the tensors, one name of those that are tied."""
    import torch

    seen = set()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue  # a module's extra state, which no session has
        key = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        yield name, tensor


def followed(watched: Watched, layout: ParameterLayout, origin: Origin | None) -> State:
    """Find the tensors that a session has.

    Args:
        watched: A module, or a wrapper of one; tensors by name; or a function that
            returns such.
        layout: Parameters of the session.
        origin: What the session's module was when it was exported, if that is known.

    Returns:
        The function that returns them. A module's raises `InvalidSpec` once the module
        has changed in what is a constant of the session.

    Raises:
        InvalidSpec: If they are not those of the session, or sharded, or the module has
            changed in that way already.
        ModuleNotFoundError: If torch is not installed.
    """
    from torch import nn

    state: State
    if isinstance(watched, nn.Module):
        module = _fitting(watched, layout)
        state = lambda: state_of(module, origin)  # noqa: E731
    elif isinstance(watched, Mapping):
        state = lambda: watched  # noqa: E731
    elif callable(watched):
        state = watched
    else:
        msg = (
            "a watch follows a module, tensors by name, or a function that returns such; "
            f"got a {type(watched).__name__}"
        )
        raise InvalidSpec(msg)
    tensors = {n: t for n, t in state().items() if hasattr(t, "shape")}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            msg = (
                f"{name!r} is sharded (a DTensor), and a watch copies whole tensors: "
                "gather them on every rank (full_tensor()), and watch a dict of those"
            )
            raise InvalidSpec(msg, parameter=name)
    _check_fit(tensors, layout)
    return state


def _fitting(module: nn.Module, layout: ParameterLayout) -> nn.Module:
    """Find the module of a session in what it is wrapped in."""
    fits: list[tuple[str, nn.Module]] = [
        (path, inner)
        for path, inner in module.named_modules()
        if not _unfit(dict(inner.named_parameters(remove_duplicate=False)), layout)
    ]
    if not fits:
        _check_fit(dict(module.named_parameters(remove_duplicate=False)), layout)
    if fits[0][1] is not module and len(fits) > 1:
        paths = ", ".join(path for path, _ in fits)
        msg = f"several parts have the session's parameters: {paths}; watch one of them"
        raise InvalidSpec(msg)
    return fits[0][1]


def _unfit(state: Mapping[str, Any], layout: ParameterLayout) -> list[str]:
    return [
        f"{p.name} {list(p.shape)}"
        for p in layout.parameters
        if p.name not in state or tuple(state[p.name].shape) != tuple(p.shape)
    ]


def _check_fit(state: Mapping[str, Any], layout: ParameterLayout) -> None:
    if wrong := _unfit(state, layout):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        msg = (
            "this is not the module of the session, which has parameters "
            f"{', '.join(wrong[:3])}{more}: watch the module that session_for was given, "
            "or tensors by the session's names"
        )
        raise InvalidSpec(msg, parameters=len(wrong))


def identities(watched: Watched) -> frozenset[int]:
    """Tell by which objects an optimiser of these parameters is known.

    Args:
        watched: As for `followed`.

    Returns:
        Their ids; none of a function's, whose tensors may be others each time.
    """
    from torch import nn

    if isinstance(watched, nn.Module):
        return frozenset(map(id, watched.parameters()))
    return frozenset(map(id, watched.values() if isinstance(watched, Mapping) else ()))
