"""A remote operator as a SciPy linear operator; needs the extra ``curvd[scipy]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from curvd.errors import InvalidSpec, InvalidVector, missing
from curvd.tensors import Array

try:
    from scipy.sparse.linalg import LinearOperator
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "scipy":
        raise
    raise missing(what="to_scipy()", module="scipy", extra="scipy") from error

if TYPE_CHECKING:
    from curvd.remote import OperatorSum, RemoteOperator, Submatrix


def linear_operator(
    operator: RemoteOperator | OperatorSum | Submatrix, dtype: Any
) -> LinearOperator:
    """Wrap an operator for SciPy.

    Args:
        operator: Symmetric, [P, P], or a submatrix of one, [R, C].
        dtype: What SciPy computes in.

    Returns:
        An operator that casts operands to what the session takes, and products to
        ``np.result_type(dtype, x.dtype)``, as SciPy's own operators do.

    Raises:
        InvalidSpec: If SciPy is to compute in integers.
    """
    dtype = np.dtype(dtype)
    if dtype.kind not in "fc":
        msg = f"SciPy computes in a floating type, got {dtype}: take np.float64"
        raise InvalidSpec(msg, dtype=dtype)

    def multiply(x: Array, operator: Any = operator) -> Array:
        # SciPy hands over [P], [P, 1] or [P, K].
        if not np.can_cast(x.dtype, operator.dtype, "same_kind"):
            msg = f"a product of {x.dtype} is not defined; this operator is {operator.dtype}"
            raise InvalidVector(msg, given=x.dtype, expected=operator.dtype)
        product: Array = operator @ x.astype(operator.dtype, copy=False)
        return product.astype(np.result_type(dtype, x.dtype), copy=False)

    def multiply_transposed(x: Array) -> Array:
        return multiply(x, operator.T)

    return LinearOperator(
        operator.shape,
        matvec=multiply,
        rmatvec=multiply_transposed,
        matmat=multiply,
        rmatmat=multiply_transposed,
        dtype=dtype,
    )
