"""A torchvision that was built for another torch, kept from libraries that only want to try.

Lightning imports torchvision if it finds one, and so cannot be imported beside one that does
not load, which is what an index has that builds it for CUDA alone.
"""

import contextlib
import functools
import importlib.metadata
import sys
from unittest import mock


@functools.cache
def _loads():
    try:
        import torchvision  # noqa: F401
    except Exception:
        sys.modules.pop("torchvision", None)
        return False
    return True


@contextlib.contextmanager
def aside_if_broken():
    """Hide it while something is imported, unless it loads."""
    if _loads():
        yield
        return
    real = importlib.metadata.distribution

    def distribution(name):
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    with (
        mock.patch.object(importlib.metadata, "distribution", distribution),
        mock.patch.dict(sys.modules, {"torchvision": None}),
    ):
        before = set(sys.modules)
        yield
        # `patch.dict` would forget what was imported meanwhile.
        kept = {name: sys.modules[name] for name in set(sys.modules) - before}
    sys.modules.update(kept)
