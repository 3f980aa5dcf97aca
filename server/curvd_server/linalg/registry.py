"""Every query that is all algorithm, found by its options in the files beside this one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from curvd.contract import QueryOptions
from curvd_server.linalg.definition import Definition


def definitions_in(
    package: str,
) -> Mapping[type[QueryOptions], Definition[Any, Any, Any]]:
    """Collect the ``DEFINITION`` of each file of a package that has one.

    Args:
        package: The name of the package, imported.

    Returns:
        The definitions by the class of their options.
    """
    path = importlib.import_module(package).__path__
    modules = (
        importlib.import_module(f"{package}.{found.name}")
        for found in pkgutil.iter_modules(path)
    )
    found = (getattr(module, "DEFINITION", None) for module in modules)
    return {each.options: each for each in found if each is not None}
