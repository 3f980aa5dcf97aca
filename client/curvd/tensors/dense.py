"""What looks like an array, and does not have all its numbers in memory, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from curvd.tensors.loaded import loaded


def not_dense(value: Any) -> str | None:
    """Say why an array or tensor is not a block of numbers, and how to make it one.

    Args:
        value: Anything.

    Returns:
        What follows "it is", with the remedy; None of arrays of numbers, and of what is
        no array.
    """
    if isinstance(value, np.ma.MaskedArray):
        return "masked: pass .filled(value), the mask has no meaning here"
    torch = loaded("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    if value.device.type == "meta":
        return "on the meta device, which holds no numbers"
    if value.is_nested:
        return "nested: pad it, torch.nested.to_padded_tensor(x, 0.0)"
    if value.layout != torch.strided:
        return "sparse: pass .to_dense()"
    if value.is_quantized:
        return "quantised: pass .dequantize()"
    return None
