"""A remote operator as curvlinops' linear operator; needs torch and curvlinops.

curvlinops' own algorithms (inverses, estimators, densities, algebra) then run on it
unchanged, each product being a call. SciPy's adapter is `RemoteOperator.to_scipy`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from curvd.remote import RemoteOperator


def to_curvlinops(operator: RemoteOperator, device: str = "cpu") -> Any:
    """Wrap an operator for curvlinops.

    Args:
        operator: Symmetric, [P, P].
        device: Where the vectors of the caller live.

    Returns:
        A ``curvlinops._torch_base.PyTorchLinearOperator`` on lists of tensors, one per
        parameter, or on [P] and [P, K].

    Raises:
        ModuleNotFoundError: If torch or curvlinops is not installed.

    Examples:
        >>> import torch
        >>> from curvd.integrations.curvlinops import to_curvlinops
        >>> H = to_curvlinops(session.hessian())
        >>> H.shape
        (43, 43)
        >>> (H @ torch.ones(43, dtype=torch.float64)).shape
        torch.Size([43])
    """
    try:
        import torch
        from curvlinops._torch_base import PyTorchLinearOperator
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in (
            "torch",
            "curvlinops",
        ):
            raise
        msg = (
            "to_curvlinops needs torch and curvlinops: pip install -c constraints.txt "
            "'.[torch]' curvlinops-for-pytorch in a checkout of curvd"
        )
        raise ModuleNotFoundError(msg, name=error.name) from error

    shapes = list(operator.layout.shapes)
    dtype = torch.float64 if operator.dtype == np.float64 else torch.float32

    # Inside the function: the base class is there only when curvlinops is.
    class CurvdLinearOperator(PyTorchLinearOperator):  # type: ignore[misc,unused-ignore]
        """Products are calls to the server."""

        SELF_ADJOINT = True

        def __init__(self) -> None:
            super().__init__(shapes, shapes)

        @property
        def device(self) -> torch.device:
            """Where vectors live."""
            return torch.device(device)

        @property
        def dtype(self) -> torch.dtype:
            """Element type of vectors."""
            return dtype

        def _matmat(self, X: list[Any]) -> list[Any]:
            """Multiply columns: one [*shape, K] per parameter."""
            found: list[Any] = operator.matmat(X)
            return found

    return CurvdLinearOperator()
