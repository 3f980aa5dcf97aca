"""The session's own copy of a module, and the layers that are rewritten in it.

These have higher derivatives that torch gets wrong. Both were found by comparison with
central differences (torch 2.11 and 2.13); functional uses of the same kernels inside
a custom module are beyond reach here and are left to the verification.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

from curvd.contract import Mode
from curvd_server.engine.objective.data import Array, tensor_of
from curvd_server.graph.execution import GraphModule, without_onednn
from curvd_server.system import yield_point


class PlainWeightNorm(nn.Module):
    """``g * v / |v|`` from elementary operations.

    The double backward of ``torch._weight_norm`` is wrong in the rows of ``v``.
    """

    dim: int

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Scale the directions ``v`` to the lengths ``g``."""
        axes = [a for a in range(v.ndim) if self.dim == -1 or a != self.dim % v.ndim]
        return v * (g / v.square().sum(axes, keepdim=True).sqrt())


class PaddedEmbedding(nn.Embedding):
    """An embedding whose padding row is a constant in every AD mode.

    ``F.embedding(padding_idx=...)`` drops the padding row in reverse mode only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up; those at `padding_idx` carry no derivative."""
        rows = F.embedding(input, self.weight)
        padded = torch.eq(input, int(self.padding_idx or 0)).unsqueeze(-1)
        return torch.where(padded, rows.detach(), rows)


class DifferentiableLSTM(nn.LSTM):
    """An LSTM with derivatives in both AD modes, see `curvd_server.graph.execution`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer as torch defines it, without oneDNN's kernel."""
        with without_onednn():
            return super().forward(*args, **kwargs)


class WideFloats(TorchFunctionMode):
    """Reads float32 as float64 wherever a model names it.

    Models of language upcast norms and softmaxes to float32, which in a float64
    computation is a downcast: it rounds away what differences are made of.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with float64 for float32."""
        if func is Tensor.float:
            func = Tensor.double
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


class PlainRecurrence(TorchFunctionMode):
    """Runs recurrent layers by elementary operations, as torch takes them apart.

    On devices other than the CPU torch has fused ones: cuDNN's have a first derivative
    in training mode alone and no second one, and those of a cell no forward mode. On the
    CPU only an LSTM has one, and these stand-ins would choose it: see `DifferentiableLSTM`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or what stands for it."""
        plain = _PLAIN_RECURRENCE.get(getattr(func, "__name__", ""))
        # Sequences of several lengths have their sizes where others have their state.
        if plain is not None and not isinstance(args[3], Sequence):
            func = getattr(
                importlib.import_module("torch._decomp.decompositions"), plain
            )
        return func(*args, **(kwargs or {}))


_PLAIN_RECURRENCE = {
    f"{name}{overload}": plain
    for name, plain in (
        ("lstm", "lstm_impl"),
        ("gru", "gru_impl"),
        ("rnn_tanh", "rnn_tanh_input"),
        ("rnn_relu", "rnn_relu_input"),
    )
    for overload in ("", ".input")
}
"""Functions of torch and of its dispatcher by name, and their stand-ins there."""


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def rewrite(module: nn.Module) -> None:
    """Replace troublesome layers of `module` in place.

    Args:
        module: A copy that belongs to the session.
    """
    weight_norm: Any = getattr(parametrizations, "_WeightNorm", None)
    for layer in module.modules():
        if weight_norm is not None and type(layer) is weight_norm:
            layer.__class__ = PlainWeightNorm
        elif type(layer) is nn.LSTM:
            layer.__class__ = DifferentiableLSTM
        elif type(layer) is nn.Embedding and _is_plain_padding(layer):
            layer.__class__ = PaddedEmbedding


def _is_plain_padding(layer: nn.Embedding) -> bool:
    renormed = layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse
    return layer.padding_idx is not None and not renormed


def fixed_rows(module: nn.Module) -> tuple[tuple[str, int], ...]:
    """List the padding rows of a rewritten module, by parameter name and index.

    The outputs depend on such a row, but by definition no derivative does, so finite
    differences must not move it.
    """
    if isinstance(module, GraphModule):
        return module.fixed_rows
    names = {id(p): name for name, p in module.named_parameters()}
    padded = (m for m in module.modules() if isinstance(m, PaddedEmbedding))
    return tuple(
        (names[id(m.weight)], m.padding_idx)
        for m in padded
        if m.padding_idx is not None and m.weight.requires_grad
    )


def use_batch_statistics(module: nn.Module) -> None:
    """Make every BatchNorm of `module` normalise with its mini-batch's statistics.

    Args:
        module: A copy in evaluation mode that belongs to the session.
    """
    for layer in module.modules():
        if isinstance(layer, GraphModule):
            layer.use_batch_statistics()
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            # Without running statistics evaluation mode uses the batch's, and
            # nothing is read or written.
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None


class _GentleMemo(dict[int, Any]):
    """What was copied already; to look something up is a yield point of long work.

    Copying a module of a thousand layers takes a second of Python.
    """

    def get(self, key: int, default: Any = None) -> Any:
        """Look up a copy."""
        yield_point()
        return super().get(key, default)


Cut = Callable[[str, Array], Tensor]
"""Takes, of a parameter by name, the part that is held here; flat, and not a view."""


def take_apart(
    module: nn.Module,
    mode: Mode,
    state: Mapping[str, Array],
    dtype: torch.dtype,
    device: torch.device,
    chosen: Sequence[str],
    cut: Cut | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], nn.Module]:
    """Split a module into variables, constants and a skeleton without parameters.

    Args:
        module: Copied, never modified.
        mode: How BatchNorm behaves.
        state: Values by name; those missing are the module's own.
        dtype: The dtype of floating point tensors.
        device: Where they go.
        chosen: Names of the parameters to differentiate.
        cut: Takes the part of a parameter that is held here; None: all of it.

    Returns:
        Differentiated parameters by name in the order `chosen`, the other parameters
        and the buffers by name, and the rewritten copy in evaluation mode, its
        parameters without memory.
    """

    def place(name: str, own: Tensor, cut: Cut | None = None) -> Tensor:
        yield_point()
        if cut is not None:
            value = cut(name, state[name] if name in state else own.detach())
        else:
            value = tensor_of(state[name]) if name in state else own.detach().clone()
        kind = dtype if own.is_floating_point() else own.dtype
        return value.to(device, kind).contiguous()

    free = set(chosen)
    skeleton = _copied(module, free).eval().to(dtype)
    rewrite(skeleton)
    if mode is Mode.BATCH_STATISTICS:
        use_batch_statistics(skeleton)
    kept = {name for name, _ in skeleton.named_buffers()}
    own = dict(module.named_parameters())
    variables = {name: place(name, own[name], cut) for name in chosen}
    constants = {n: place(n, p, cut) for n, p in own.items() if n not in free}
    for name, b in module.named_buffers():
        if name in kept:
            constants[name] = place(name, b)
    return variables, constants, skeleton


def _copied(module: nn.Module, free: Set[str]) -> nn.Module:
    """Copy a module without the memory of its parameters, of which some are free."""
    if type(module) is GraphModule:
        return module.copied(free)
    memo: dict[int, Any] = _GentleMemo({
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=name in free)
        for name, p in module.named_parameters()
    })
    return copy.deepcopy(module, memo)


def aliases(module: nn.Module) -> dict[str, str]:
    """Map further names of tied parameters to the name that each goes by."""
    first: dict[int, str] = {}
    pairs = module.named_parameters(remove_duplicate=False)
    homes = {name: first.setdefault(id(p), name) for name, p in pairs}
    return {name: home for name, home in homes.items() if name != home}


def aliased(module: nn.Module, state: Mapping[str, Array]) -> dict[str, Array]:
    """Let a tied parameter be given under any of its names."""
    known = dict(state)
    for name, home in aliases(module).items():
        if name in state:
            known.setdefault(home, state[name])
    return known


def use_differentiable_attention() -> None:
    """Allow only the attention kernel that can be differentiated twice.

    Process-global (also on the CPU), so the server calls it once at start-up.
    """
    with warnings.catch_warnings():
        # torch's own forward-mode rules use what torch itself deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)
    # A line on stderr for each product by an operator without a batching rule, of which a
    # caller can change nothing; the server's log has lines of its own.
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    # nn.TransformerEncoderLayer's fused path has no derivative at all.
    torch.backends.mha.set_fastpath_enabled(False)
