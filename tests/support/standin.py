"""A device that is not the CPU, on a machine that has no other.

Its tensors hold one on the CPU, behind torch's key for private devices, and follow the
rules of CUDA: moving is explicit, tensors of two devices do not mix, numbers of the CPU
may stand beside tensors where CUDA takes them, and random numbers come from a generator
of the device. So a line that would mix devices on a GPU raises here.

    import support.standin
    torch.ones(3, device=support.standin.NAME) + torch.ones(3)   # RuntimeError

What it has not: streams, memory of its own, and rounding that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
aten = torch.ops.aten
_MOVES = {aten._to_copy.default, aten.copy_.default}
_INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._unsafe_index.Tensor,
}
"""Their indices may be on the CPU."""


class StandIn(Tensor):
    """A tensor on the device; `held` has its elements."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> StandIn:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"StandIn({self.held})"

    # torch answers the next four without dispatching, and would find no memory.

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.held.numpy(force=True)
        msg = (
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()"
        )
        raise TypeError(msg)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        try:
            return run(func, args, kwargs or {})
        except Exception as error:
            if torch._C._current_autograd_node() is None:
                raise
            # torch's guard for such devices is Python, and Python that is asked while
            # an exception of Python unwinds a backward pass ends the process. So torch
            # gets what it cannot use, and says so in C++, with this text.
            said = f"{type(error).__name__}: {error}"
            returns = len(func._schema.returns)
            return said if returns == 1 else (said,) * returns


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call an operation on what its tensors hold, if they are where they must be."""
    there = torch.device(kwargs.get("device") or "cpu").type == NAME
    if there:
        kwargs = kwargs | {"device": torch.device("cpu")}
    leaves, structure = tree_flatten((args, kwargs))
    own = [t for t in leaves if isinstance(t, StandIn)]
    if own and func not in _MOVES:
        _check_company(func, args, leaves)
    if (there or own) and any(isinstance(t, torch.Generator) for t in leaves):
        msg = f"Expected a {NAME!r} device type for generator but found 'cpu'"
        raise RuntimeError(msg)
    held = [t.held if isinstance(t, StandIn) else t for t in leaves]
    args_held, kwargs_held = tree_unflatten(held, structure)
    out = func(*args_held, **kwargs_held)
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():  # sizes and strides of the tensor around change alike
            func(*args, **kwargs)
    if kwargs.get("device") is not None and not there:
        return out  # it moved to the CPU
    known = {id(t.held): t for t in own}
    stays = there or (bool(own) and not _moves_away(func, args))

    def around(tensor: Tensor) -> Tensor:
        same = known.get(id(tensor))
        return same if same is not None else StandIn(tensor) if stays else tensor

    return tree_map_only(Tensor, around, out)


def _moves_away(func: Any, args: Sequence[Any]) -> bool:
    """Tell whether a tensor of the CPU is written to."""
    return func is aten.copy_.default and not isinstance(args[0], StandIn)


def _check_company(func: Any, args: Sequence[Any], leaves: Sequence[Any]) -> None:
    """Refuse tensors of the CPU beside the device's where CUDA would."""
    guests = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, StandIn)]
    if func in _INDEXED:
        indices = {id(t) for t in args[1]}
        guests = [t for t in guests if id(t) not in indices]
    takes_numbers = torch.Tag.pointwise in func.tags or func in _INDEXED
    written = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    for t in guests:
        if t.ndim or not takes_numbers or any(t is w for w in written):
            msg = (
                "Expected all tensors to be on the same device, but found at least two "
                f"devices, {NAME}:0 and cpu! (in {func})"
            )
            raise RuntimeError(msg)


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


def _kernel(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(op, args, kwargs)


def _copy_from(source: Tensor, target: StandIn, non_blocking: bool = False) -> StandIn:
    target.held.copy_(source.held if isinstance(source, StandIn) else source)
    return target


# All three last as long as the process: torch keeps no reference, and cannot take it back.
_guard = _Guard()
_setup_privateuseone_for_python_backend(NAME, device_guard=_guard)
# Checkpoints ask every backend; nobody casts automatically here.
getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
_library = torch.library.Library("aten", "IMPL")
for _op in (
    *(aten.empty.memory_format, aten.empty_strided.default),
    *(aten.eye.default, aten.eye.m),  # torch's own resizes an empty tensor
):
    _library.impl(_op, _kernel(_op), "PrivateUse1")
_library.impl("_efficientzerotensor", _kernel(aten.zeros.default), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
