"""Tensors without memory that are made where a function of torch uses them.

A model may fill the machine, so nothing else of its size fits beside it: its parameters
in float64, moved ones, a direction. Each of these is a formula of what is there already.
`MadeAnew` looks like such a tensor, and is computed at each use, for as long as that
takes; `Leaves` are differentiated, too, and their gradients are handed on as they arrive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

_KNOWN = frozenset({
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "names",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_sparse",
    "is_quantized",
    "is_nested",
    "size",
    "dim",
    "numel",
    "nelement",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "element_size",
    "__len__",
})
"""What a tensor says about itself without its values."""
_VIEWS = frozenset({
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.detach.default,
    aten.alias.default,
})
"""What a traced program may do long before the value is used: the result is made anew, too."""


class MadeAnew(Tensor):
    """Looks like a contiguous tensor, and is made at each use.

    Functions of torch get what `make` returns in its place, also inside lists, and their
    results are ordinary tensors. Writing to one has no effect.

    Args:
        make: Makes it; contiguous, with this shape, type and device.
        shape: Its shape.
        dtype: Its type.
        device: Where it is made.
    """

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> MadeAnew:
        """Make the outside."""
        made: MadeAnew = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device
        )
        made.make = make
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with the values."""
        with torch._C.DisableTorchFunctionSubclass():
            if _name(func) in _KNOWN:
                return func(*args, **(kwargs or {}))
            if func in _VIEWS:
                return _view(func, *args)
            given = tree_map_only(MadeAnew, _made, (tuple(args), dict(kwargs or {})))
            return func(*given[0], **given[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse what would go on without being differentiated."""
        msg = f"{func} has met a tensor that has no values"
        raise NotImplementedError(msg)


def _made(tensor: MadeAnew) -> Tensor:
    return tensor.make()


def _name(func: Callable[..., Any]) -> str:
    """Name a function of torch, or the attribute that it reads."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name == "__get__" else name  # type: ignore[attr-defined]


def _view(func: Callable[..., Any], source: MadeAnew, *how: Any) -> MadeAnew:
    """View what is made anew as something else that is."""
    like = torch.empty(source.shape, dtype=source.dtype, device="meta")
    shape = func(like, *how).shape
    return MadeAnew(
        lambda: func(source.make(), *how), shape, source.dtype, source.device
    )


class Alive:
    """Knows by its storage what was made, for as long as it lives.

    Graphs keep its key in place of the values (`hooks`), and it is made again where a
    backward pass asks for them.

    Args:
        make: Makes it again, given its key; contiguous, without a graph.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make = make
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.kept: dict[int, int] = {}
        """Bytes of what graphs keep all the same, by the address of its storage."""

    def note(self, key: int, made: Tensor) -> Tensor:
        """Remember where something lies that was made; return it."""
        storage = made.untyped_storage()
        self._known[storage.data_ptr()] = StorageWeakRef(storage), key  # type: ignore[no-untyped-call]
        return made

    def hooks(self) -> contextlib.AbstractContextManager[None]:
        """Build graphs that do not keep what was made; a context."""
        hooks: contextlib.AbstractContextManager[None] = (
            torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        )
        return hooks

    def _pack(self, saved: Tensor) -> Any:
        at = saved.untyped_storage().data_ptr()
        known, key = self._known.get(at, (None, 0))
        if known is None or known.expired():  # type: ignore[no-untyped-call]
            self._known.pop(at, None)  # others lie there now
            self.kept[at] = saved.untyped_storage().nbytes()
            return saved.detach()
        return key, saved.size(), saved.stride(), saved.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        key, *view = packed
        return self.note(key, self._make(key)).as_strided(*view)


class Leaves:
    """What is differentiated, made at each use; what its gradients are is made of them.

    Graphs do not keep the values either: what a function saves of them for its backward
    pass is made again there. What it saves of other things, such as a weight that is
    computed of several parameters, it holds as ever.

    Args:
        make: Makes a leaf, given its index; contiguous, without a graph.
        like: Tensors of the leaves' shapes.
        dtype: Their type.
        device: Where they are made.
        summary: Makes of an index and a gradient what is wanted of it, linearly; the
            summaries of a leaf's uses are added.
    """

    def __init__(
        self,
        make: Callable[[int], Tensor],
        like: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
        summary: Callable[[int, Tensor], Tensor],
    ) -> None:
        self._make, self._summary = make, summary
        self._token = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
        self._alive = Alive(make)
        self._summaries: list[Tensor | None] = [None] * len(like)
        self.tensors = tuple(
            MadeAnew(_user(self, index), p.shape, dtype, device)
            for index, p in enumerate(like)
        )
        """To be given to a function that is differentiated."""

    def use(self, index: int) -> Tensor:
        """Make a leaf as a part of the graph that is being built."""
        made: Tensor = _Use.apply(self._token, self, index)  # type: ignore[no-untyped-call]
        return made

    def make(self, index: int) -> Tensor:
        """Make a leaf, and remember for as long as it lives where it lies."""
        return self._alive.note(index, self._make(index))

    def arrive(self, index: int, gradient: Tensor) -> None:
        """Take note of the gradient of one use."""
        summary, before = self._summary(index, gradient), self._summaries[index]
        self._summaries[index] = summary if before is None else before + summary

    def gradients(
        self, outputs: Callable[[], Tensor], cotangent: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Differentiate.

        Args:
            outputs: Computes something of `tensors`.
            cotangent: What it is multiplied by; None: it is a scalar.

        Returns:
            What was computed, and summaries of each leaf's gradient; None: not used.
        """
        with self.recording():
            value = outputs()
        return value.detach(), self.pulled(value, cotangent)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Build a graph that does not keep the leaves."""
        with torch.enable_grad(), self._alive.hooks():
            yield

    def pulled(self, value: Tensor, cotangent: Tensor | None) -> list[Tensor | None]:
        """Walk a graph backwards that was built while `recording`; see `gradients`."""
        self._summaries = [None] * len(self._summaries)
        if value.requires_grad:
            torch.autograd.backward(value, cotangent)
        return self._summaries


def _user(leaves: Leaves, index: int) -> Callable[[], Tensor]:
    return lambda: leaves.use(index)


class _Use(torch.autograd.Function):
    """One use of a leaf: forwards it is made, backwards its gradient arrives."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, leaves: Leaves, index: int) -> Tensor:
        ctx.leaves, ctx.index = leaves, index
        return leaves.make(index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.leaves.arrive(ctx.index, gradient)
        return None, None, None
