"""Queries, a family in each file: methods that ask, and what is answered.

`curvd.queries` has the results by name: what the files list. A method is the same for both
clients (`curvd.remote.asking`). Imports calls; knows no operator and no session.
"""

from __future__ import annotations

from curvd.remote.queries.base import *  # noqa: F403 - each file lists what is public
from curvd.remote.queries.data_points import *  # noqa: F403
from curvd.remote.queries.density import *  # noqa: F403
from curvd.remote.queries.density import DensityQueries
from curvd.remote.queries.eigenpairs import *  # noqa: F403
from curvd.remote.queries.eigenpairs import EigenpairQueries
from curvd.remote.queries.estimates import *  # noqa: F403
from curvd.remote.queries.estimates import EstimateQueries
from curvd.remote.queries.influence import *  # noqa: F403
from curvd.remote.queries.influence import InfluenceQueries
from curvd.remote.queries.jacobians import *  # noqa: F403
from curvd.remote.queries.laplace import *  # noqa: F403
from curvd.remote.queries.laplace import LaplaceQueries
from curvd.remote.queries.posterior import *  # noqa: F403
from curvd.remote.queries.systems import *  # noqa: F403
from curvd.remote.queries.systems import SketchQueries, SystemQueries


class OperatorQueries(
    EigenpairQueries,
    EstimateQueries,
    DensityQueries,
    InfluenceQueries,
    LaplaceQueries,
    SystemQueries,
    SketchQueries,
):
    """Whole computations that run on the server; a base of `curvd.RemoteOperator`.

    Results say what they cost (`products`), to which parameter `version` they belong
    and whether they `converged`. Leaving a call, by an exception or Ctrl-C, stops the
    work on the server; the latest progress is a note of the exception.
    """
