"""What a module's state consists of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from curvd.contract import TensorInfo
from curvd_server.storage import Architecture

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def architecture_of(module: nn.Module) -> Architecture:
    """List the tensors of a module's state.

    Args:
        module: Perhaps without memory.

    Returns:
        All of them, tied ones under each of their names.
    """
    names: dict[int, str] = {}
    tensors, ties, buffers = {}, {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            dtype, shape = _NAMES[tensor.dtype], tuple(tensor.shape)
            tensors[name] = TensorInfo(name, dtype, shape)
            home = names.setdefault(id(tensor), name)
            if home != name:
                ties[name] = home
            if not isinstance(tensor, nn.Parameter):
                buffers.add(name)
    return Architecture(tensors, ties, frozenset(buffers))


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give parameters that are made inside no memory; buffers have theirs.

    Each takes memory until a module has it, so no two do at once. Process-wide.

    Yields:
        Nothing.
    """
    known = WeakIdKeyDictionary()  # one that several modules have is one

    def emptied(module: nn.Module, name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        if parameter not in known:
            meta = parameter.detach().to("meta")
            known[parameter] = nn.Parameter(meta, parameter.requires_grad)
        return known[parameter]

    hook = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        hook.remove()
