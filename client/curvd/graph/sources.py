"""Where in the user's code an operator comes from."""

from __future__ import annotations

import os
import re
import traceback
from typing import Any

import torch

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(__file__) + os.sep


def source_of(node: Any) -> str:
    """Find the line of the user's module that a traced node comes from.

    Args:
        node: The node of torch.fx, with the stack of its call.

    Returns:
        For example ``net.py:12 in forward``; empty if only torch's code is to blame.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    foreign = (_TORCH, _OURS, "torch" + os.sep)
    users = [f for f in frames if not f[0].startswith(foreign)]
    return _shown(*users[-1]) if users else ""


def source_of_error(error: BaseException) -> str:
    """Find the line of the user's module at which tracing failed.

    Args:
        error: What torch raised.

    Returns:
        As `source_of`.
    """
    found, inside = "", False
    for frame in traceback.extract_tb(error.__traceback__):
        inside |= frame.name == "forward"
        if inside and not frame.filename.startswith((_TORCH, _OURS, "<")):
            found = _shown(frame.filename, str(frame.lineno), frame.name)
    return found


def source_here() -> str:
    """Find the line of the user's module that is being traced.

    Returns:
        As `source_of`.
    """
    foreign = (_TORCH, _OURS, "<")
    users = [f for f in traceback.extract_stack() if not f.filename.startswith(foreign)]
    return _shown(users[-1].filename, str(users[-1].lineno), users[-1].name)


def _shown(file: str, line: str, function: str) -> str:
    return f"{os.path.basename(file)}:{line} in {function}"
