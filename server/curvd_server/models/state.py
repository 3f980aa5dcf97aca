"""What a module's state consists of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
