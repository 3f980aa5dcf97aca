"""States of torch around a call that change what operators compute, and no server has."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from curvd.errors import InvalidSpec


def check_surroundings() -> None:
    """Refuse such states, which a trace does not see.

    Raises:
        InvalidSpec: With the block to leave.
    """
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            msg = (
                f"torch.autocast is on for {kind}, and a session computes in one type: "
                "leave its block, or put this call under torch.autocast(enabled=False)"
            )
            raise InvalidSpec(msg, autocast=kind)
    modes = _get_current_dispatch_mode_stack()
    if modes:
        what = type(modes[-1]).__name__
        msg = (
            f"{what} is in force, which may change what operators return, and which no "
            "server has: leave its block"
        )
        raise InvalidSpec(msg, mode=what)
    if torch.is_inference_mode_enabled():
        msg = "torch.inference_mode is on, where nothing has a derivative: leave its block"
        raise InvalidSpec(msg, mode="inference_mode")
    if torch.get_default_device().type == "meta":
        msg = (
            "torch's default device is meta, where tensors have no values: call "
            "torch.set_default_device(None) before"
        )
        raise InvalidSpec(msg, device="meta")
