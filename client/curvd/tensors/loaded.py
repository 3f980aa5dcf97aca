"""Libraries that a caller may use, and that are not imported for him."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def loaded(name: str) -> Any:
    """Find a library that is imported, wholly.

    While a thread imports torch, which takes seconds, it stands in `sys.modules` without
    most of what it has; another thread that asks meanwhile waits here for the rest.

    Args:
        name: Of a module, such as ``torch`` or ``torch.distributed.tensor``.

    Returns:
        The module; None if nobody has imported it.
    """
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is None or not getattr(spec, "_initializing", False):
        return module  # most calls, of which each product has several
    return importlib.import_module(name)
