"""Kronecker-factored curvature: a product of two small matrices for each linear layer.

    operator = build(problem, OperatorSpec(kind="kfac", fisher="type-2"), budget_bytes=2**30)
    rows = operator.apply(columns)            # [K, P] -> [K, P]
    operator.eigenvalues()                    # [P], of the operator or its inverse

`sites` finds in the traced model what consumes each weight, `weights` joins those that are
one, `reading` makes blocks of that and proves them by autograd, `taps` and `rows` give inputs
and gradients of a mini-batch, `factors` sums them up over the data. Imports objective and
program; knows nothing of plans and linearisations, for it has none.
"""

from __future__ import annotations

from curvd_server.engine.kronecker.factors import Factors
from curvd_server.engine.kronecker.operator import KroneckerOperator, build, factors_of

__all__ = ["Factors", "KroneckerOperator", "build", "factors_of"]
