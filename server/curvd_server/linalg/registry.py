"""Queries that are all algorithm, by their options; and all algorithms, by their names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from curvd.contract import QueryOptions
from curvd_server.linalg.base import Query
from curvd_server.linalg.definition import Definition
from curvd_server.linalg.density import spectral_density
from curvd_server.linalg.diagonals import diagonal
from curvd_server.linalg.eigenpairs import eigsh
from curvd_server.linalg.linear_systems import solve
from curvd_server.linalg.log_determinants import logdet
from curvd_server.linalg.norm import frobenius_norm
from curvd_server.linalg.nystrom import nystrom
from curvd_server.linalg.shifted import solve_dampings
from curvd_server.linalg.shifted_determinants import (
    shifted_determinants,
    weighted_determinants,
)
from curvd_server.linalg.traces import trace

ALGORITHMS: Mapping[str, Callable[..., Query[Any]]] = {
    algorithm.__name__: algorithm
    for algorithm in (
        diagonal,
        eigsh,
        frobenius_norm,
        logdet,
        nystrom,
        shifted_determinants,
        solve,
        solve_dampings,
        spectral_density,
        trace,
        weighted_determinants,
    )
}
"""What `Products.begin` may begin where vectors are in parts, in another process."""


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
