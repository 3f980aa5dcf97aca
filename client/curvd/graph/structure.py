"""What a module does, operator by operator, without a single number: see `structure`.

Tracing a module for a graph takes tenths of a second, most of it arithmetic of the open
batch size. To run it on tensors without memory takes a hundredth, and tells whether another
module does the same. Nothing is concluded from how a module is written, because its code may
read what nobody can list, globals, closures, patched methods: the code runs, and what it
calls is what counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from curvd.graph.checkpoints import plain_checkpoints
from curvd.graph.forms import key_of, recalled, remember
from curvd.graph.manifest import Inputs
from curvd.graph.quiet import quiet
from curvd.graph.unchecked import unchecked
from curvd.graph.unfilled import Traces, unfilled
from curvd.graph.unmoved import Unsure, unmoved

SIZES = (3, 10_007)
"""Batch sizes of the runs, the second a large prime: no number of the code is one by chance,
and whoever takes another way beyond some size does so there."""
_CALLS = 50_000
"""Of operators, in a run; what loops over data points would make many more."""
_CONSTANT_BYTES = 4 << 20
"""Of all constants of a module, which are compared by value."""
_META = torch.device("meta")
_NAMESPACES = ("aten", "prim", "prims")
"""Whose operators do the same as long as torch is loaded; those of users can be replaced."""
_ATOMS = (bool, int, float, complex, str, type(None))
_KINDS = (torch.dtype, torch.layout, torch.memory_format, torch.device)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def structure(
    wrapper: nn.Module, rows: Inputs, sizes: Sequence[int] = SIZES
) -> tuple[bytes, ...] | None:
    """Digest all that a trace of a module depends on.

    It is run at some batch sizes on tensors of ``meta``, which have no values, so code that looks
    at values ends here. Each call of an operator is noted: its numbers; which memory it reads
    and in which shape, by the parameters, buffers, inputs and results that it belongs to;
    constants by their values; and whether gradients and autocast are on. Beside that,
    names, ties, shapes, types, roles and places of all tensors, and the classes of all layers.

    Args:
        wrapper: Calls what is exported, as ``forward(args, kwargs)``.
        rows: What with.
        sizes: The batch sizes.

    Returns:
        A digest for each size, equal for two modules only if both do the same; None where that
        cannot be told: a forward that looks at values or keeps something for later, operators
        of users, hidden parameters, modes of torch's that are in force.
    """
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return None
    digests: list[bytes] = []
    traces = Traces()
    try:
        known = repr(list(_tensors(wrapper, rows))).encode()
        generators = torch.random.fork_rng(devices=[])
        with (
            torch.enable_grad(),
            unchecked(),
            plain_checkpoints(),
            quiet(),
            generators,
            unfilled(wrapper) as traces,
        ):
            calls = _CALLS
            for size in sizes:  # whose calls are as many, or it loops over data points
                digest = hashlib.blake2b(known, digest_size=32)
                with unmoved(wrapper):
                    calls = _run(wrapper, rows, size, calls, digest.update)
                digests.append(digest.digest())
    except Exception:  # of the module's own code, on tensors that it was not made for
        digests = []
    return None if traces.found or not digests else tuple(digests)


def _tensors(wrapper: nn.Module, rows: Inputs) -> Iterator[Any]:
    """List what is known of a module before it runs."""
    yield [f"{type(m).__module__}.{type(m).__qualname__}" for m in wrapper.modules()]
    yield torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    first: dict[int, int] = {}
    for name, tensor, kind in _named(wrapper):
        if type(tensor) not in _TENSORS:
            raise Unsure
        number = first.setdefault(id(tensor), len(first))
        yield name, kind, number, tensor.requires_grad, tensor.device, _form(tensor)
    yield rows.names, str(pytree.tree_structure((rows.args, dict(rows.kwargs))))
    for leaf in rows.leaves:
        yield _form(leaf), leaf.device, leaf.requires_grad


def _named(wrapper: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """List parameters and buffers under each of their names."""
    for name, parameter in wrapper.named_parameters(remove_duplicate=False):
        yield name, parameter, "parameter"
    for name, buffer in wrapper.named_buffers(remove_duplicate=False):
        yield name, buffer, "buffer"


def _run(
    wrapper: nn.Module,
    rows: Inputs,
    size: int,
    most: int,
    note: Callable[[bytes], None],
) -> int:
    """Run a module without memory, and note what it calls.

    Args:
        wrapper: The module.
        rows: Inputs of the form that it takes.
        size: How many data points it is given.
        most: Calls of operators that it may make.
        note: Takes each line.

    Returns:
        How many calls it made.
    """
    recorder = _Recorder(most, note)
    state = {}
    for name, tensor, _ in _named(wrapper):
        state[name] = recorder.stand_in(tensor)

    def without_memory(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        twin = torch.empty((size, *leaf.shape[1:]), dtype=leaf.dtype, device=_META)
        return recorder.known(twin.requires_grad_(leaf.requires_grad))

    args, kwargs = pytree.tree_map(without_memory, (rows.args, dict(rows.kwargs)))
    with recorder, _Valued(recorder):
        result = torch.func.functional_call(wrapper, state, (args, kwargs))
    recorder.line("returns", recorder.shown(result))
    return recorder.calls


class _Valued(TorchFunctionMode):
    """Sees what no operator shows: numbers that become tensors, and autocast.

    Args:
        recorder: Notes it.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder, self._cast = recorder, _autocast()
        recorder.line("autocast", self._cast)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch, one that makes a tensor of numbers not on ``meta``."""
        options, cast = dict(kwargs or {}), _autocast()
        if cast != self._cast:
            self._recorder.line("autocast", cast)
            self._cast = cast
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            if (
                options.get("device") is not None
                and torch.device(options["device"]) == _META
            ):
                del options["device"]
        return func(*args, **options)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators without memory, and notes each.

    Args:
        most: How many.
        note: Takes each line.
    """

    def __init__(self, most: int, note: Callable[[bytes], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0
        self._most, self._note = most, note
        self._memory: dict[int, tuple[int, Any]] = {}
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()
        self._constant_bytes = 0

    def line(self, *parts: Any) -> None:
        """Note something."""
        self._note(repr(parts).encode())

    def known(self, tensor: Tensor) -> Tensor:
        """Number the memory of a tensor, if it has no number yet."""
        storage = tensor.untyped_storage()
        # note: held, so that no other memory gets its address.
        self._memory.setdefault(storage._cdata, (len(self._memory), storage))
        return tensor

    def stand_in(self, tensor: Tensor) -> Tensor:
        """Make one without memory for a parameter or buffer.

        Args:
            tensor: The tensor; each has one, however many names it goes by.

        Returns:
            The other, of the same form.
        """
        if id(tensor) not in self._twins:
            twin = self.known(_without_memory(tensor))
            self._twins[id(tensor)] = tensor, twin
            self._own.add(tensor.untyped_storage()._cdata)
        return self._twins[id(tensor)][1]

    def shown(self, item: Any) -> Any:
        """Describe an argument or a result by what does not change from run to run."""
        if isinstance(item, Tensor):
            if type(item) not in _TENSORS:
                raise Unsure
            number, _ = self._memory[item.untyped_storage()._cdata]
            signs = item.requires_grad, item.is_conj(), item.is_neg()
            return number, item.storage_offset(), _form(item), signs
        if isinstance(item, list | tuple):
            return [self.shown(part) for part in item]
        if isinstance(item, Mapping):
            return [(self.shown(k), self.shown(v)) for k, v in item.items()]
        if type(item) in _ATOMS or isinstance(item, _KINDS):
            return item
        raise Unsure

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note a call, and make it without memory."""
        self.calls += 1
        if func.namespace not in _NAMESPACES or self.calls > self._most:
            raise Unsure
        given = _mapped(self._here, [args, kwargs or {}])
        self.line(str(func), self.shown(given), torch.is_grad_enabled())
        key = key_of(func, given)
        result = None if key is None else recalled(key)
        if result is None:
            args, options = _mapped(_without_place, given)
            if any(a.name == "device" and a.kwarg_only for a in func._schema.arguments):
                options["device"] = _META
            result = func(*args, **options)
            if key is not None:
                remember(key, result, self._memory.keys())
        for leaf in result if isinstance(result, list | tuple) else [result]:
            if isinstance(leaf, Tensor):
                self.known(leaf)
        self.line(self.shown(result))
        return result

    def _here(self, item: Any) -> Any:
        """Find what stands for a tensor that has memory."""
        if not isinstance(item, Tensor) or item.device == _META:
            return item
        if id(item) not in self._twins:
            self._twins[id(item)] = item, self._constant(item)
        return self._twins[id(item)][1]

    def _constant(self, tensor: Tensor) -> Tensor:
        """Take in a constant of the code, by its value."""
        self._constant_bytes += tensor.nbytes
        hidden = tensor.untyped_storage()._cdata in self._own
        if hidden or tensor.requires_grad or type(tensor) not in _TENSORS:
            raise Unsure
        if self._constant_bytes > _CONSTANT_BYTES:
            raise Unsure
        whole = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
        content = whole.contiguous().view(torch.uint8).numpy().tobytes()
        self.line("constant", tensor.device, _form(tensor), content)
        return self.known(_without_memory(tensor))


def _without_memory(tensor: Tensor) -> Tensor:
    """Make a tensor of the same form that has no values."""
    return torch.empty_strided(
        tensor.shape,
        tensor.stride(),
        dtype=tensor.dtype,
        device=_META,
        requires_grad=tensor.requires_grad,
    )


def _mapped(function: Callable[[Any], Any], item: Any) -> Any:
    """Apply a function to all that an operator is given; less general than pytree, and faster."""
    if isinstance(item, list | tuple):
        return [_mapped(function, part) for part in item]
    if isinstance(item, dict):
        return {name: _mapped(function, part) for name, part in item.items()}
    return function(item)


def _without_place(item: Any) -> Any:
    return _META if isinstance(item, torch.device) else item


def _form(tensor: Tensor) -> Any:
    """Describe shape and type."""
    return list(tensor.shape), tensor.stride(), tensor.dtype


def _autocast() -> Any:
    """Read which types autocast computes in; operators without memory do not follow it."""
    return [
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        for kind in ("cpu", "cuda")
    ]
