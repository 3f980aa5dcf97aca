"""What wrappers of modules put into the names of parameters."""

from __future__ import annotations

_PARTS = frozenset({
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
})
"""Parts of a name that stand for a wrapper; no layer of a user's has such a name."""


def without_wrappers(name: str) -> str:
    """Take away what stands for a wrapper and for nothing else.

    Args:
        name: The name of a parameter, its parts joined by dots.

    Returns:
        The name without such parts. A leading ``module.`` stays: a layer may have it.
    """
    return ".".join(part for part in name.split(".") if part not in _PARTS)
