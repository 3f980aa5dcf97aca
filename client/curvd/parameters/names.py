"""Names of parameters without what wrappers put into them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from curvd.contract import without_wrappers
from curvd.errors import InvalidTensors

_OUTER = "module."
"""What DistributedDataParallel and DataParallel put before every name."""


def plain_names(given: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Find out which parameters are meant.

    A leading ``module.`` may be a wrapper's or a layer's, so it is taken away only where
    that settles it: all names have it, none is known with it, and one is known without.

    Args:
        given: Names from a state dict, perhaps with prefixes of wrappers.
        known: Names of the session's parameters, perhaps not all of the model's.

    Returns:
        Given name -> plain name; what is not certain stays what it is.

    Raises:
        InvalidTensors: If two names become one.
    """
    found = {name: name if name in known else without_wrappers(name) for name in given}
    while (
        found
        and not any(name in known for name in found.values())
        and all(name.startswith(_OUTER) for name in found.values())
    ):
        shorter = {old: new.removeprefix(_OUTER) for old, new in found.items()}
        if any(name in known for name in shorter.values()):
            found = shorter
            break
        if not all(name.startswith(_OUTER) for name in shorter.values()):
            break
        found = shorter
    _check_one_each(found)
    return found


def _check_one_each(found: dict[str, str]) -> None:
    first: dict[str, str] = {}
    for old, new in found.items():
        if new in first:
            msg = (
                f"{first[new]!r} and {old!r} both are parameter {new!r} once prefixes of "
                "wrappers are taken away: give one of them"
            )
            raise InvalidTensors(msg, tensor=new)
        first[new] = old
