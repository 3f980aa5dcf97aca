"""Libraries whose models an operator may allow, by globs over their names."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from curvd.errors import InvalidSpec, install

LIBRARIES = ("timm", "torchvision", "transformers")
"""Those whose models clients may build by name, where an operator allows them."""


def check_libraries(patterns: Sequence[str]) -> tuple[str, ...]:
    """Refuse globs that an operator cannot have meant.

    Args:
        patterns: Globs over ``library:name``, for example ``timm:vit_*``.

    Returns:
        The patterns.

    Raises:
        InvalidSpec: If a library is unknown or not installed.
    """
    for pattern in patterns:
        library, colon, name = pattern.partition(":")
        if library not in LIBRARIES or not (colon and name):
            msg = (
                f"library {pattern!r} must be one of {', '.join(LIBRARIES)}, a colon, and "
                "a glob over its model names"
            )
            raise InvalidSpec(msg, library=pattern)
        if importlib.util.find_spec(library) is None:
            msg = (
                f"library {pattern!r} is allowed, but {library} is not installed: "
                f"{install(library)}"
            )
            raise InvalidSpec(msg, library=pattern, extra=library)
    return tuple(patterns)
