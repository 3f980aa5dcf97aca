"""Algorithms on a linear map that is only given by its products: eigenvalues, traces, solves.

Generators that ask for products and are sent them; the `DEFINITION` of a file is how a server
runs its query. Imports torch, and of curvd enumerations, options and errors alone; knows no
network, no session and no model.
"""

from __future__ import annotations

from curvd_server.linalg.base import Products, Progress, Query, Runner
from curvd_server.linalg.block_krylov import factors
from curvd_server.linalg.definition import Definition, Room, Tensors
from curvd_server.linalg.density import spectral_density
from curvd_server.linalg.diagonals import diagonal
from curvd_server.linalg.eigenpairs import (
    EigshResult,
    default_basis,
    eigsh,
    search_basis,
)
from curvd_server.linalg.linear_systems import SolveResult, solve
from curvd_server.linalg.log_determinants import logdet
from curvd_server.linalg.low_rank import LowRank
from curvd_server.linalg.norm import frobenius_norm
from curvd_server.linalg.nystrom import NystromResult, nystrom
from curvd_server.linalg.precisions import likeliest_precisions
from curvd_server.linalg.random_probes import probes
from curvd_server.linalg.registry import ALGORITHMS, definitions_in
from curvd_server.linalg.sampling import Estimate, Target
from curvd_server.linalg.scales import multiply_by_powers, units_of
from curvd_server.linalg.shifted import joined, solve_dampings
from curvd_server.linalg.shifted_determinants import (
    ShiftedDeterminants,
    shifted_determinants,
    weighted_determinants,
)
from curvd_server.linalg.sized import (
    as_type,
    check_exponents,
    in_units,
    lengths,
    sized_products,
)
from curvd_server.linalg.space import Group, Space
from curvd_server.linalg.traces import trace
from curvd_server.linalg.whole import matrix

__all__ = [
    "ALGORITHMS",
    "Definition",
    "EigshResult",
    "Estimate",
    "Group",
    "LowRank",
    "NystromResult",
    "Products",
    "Progress",
    "Query",
    "Room",
    "Runner",
    "ShiftedDeterminants",
    "SolveResult",
    "Space",
    "Target",
    "Tensors",
    "as_type",
    "check_exponents",
    "default_basis",
    "definitions_in",
    "diagonal",
    "eigsh",
    "factors",
    "frobenius_norm",
    "in_units",
    "joined",
    "lengths",
    "likeliest_precisions",
    "logdet",
    "matrix",
    "multiply_by_powers",
    "nystrom",
    "probes",
    "search_basis",
    "shifted_determinants",
    "sized_products",
    "solve",
    "solve_dampings",
    "spectral_density",
    "trace",
    "units_of",
    "weighted_determinants",
]
