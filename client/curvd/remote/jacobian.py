"""Jacobians of data points as rectangular operators: what `@` means for each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from curvd.contract import JacobianOf
from curvd.errors import InvalidSpec
from curvd.remote.queries import DataPointQueries
from curvd.remote.queries.jacobians import jacobian_layout

J = TypeVar("J", bound="JacobianBase")


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianBase:
    """What is known of a Jacobian without a call."""

    # Without it, NumPy would take ``ndarray @ jacobian`` apart into a loop over entries.
    __array_ufunc__ = None

    session: DataPointQueries
    of: JacobianOf
    """Of losses, [N, P], or of outputs, [N C, P]."""
    params: Sequence[str] | str | None
    expected_version: int | None
    transposed: bool = False

    @property
    def T(self: J) -> J:
        """The transpose, from the rows to the parameters."""
        return replace(self, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """[N, P] of losses, or the transpose of it.

        Raises:
            InvalidSpec: If it is of outputs, whose number only the server knows.
        """
        if self.of is not JacobianOf.LOSSES:
            msg = (
                "how many outputs a data point has is known to the server alone: read "
                "row_shape of session.jacobian_product(v, of='outputs')"
            )
            raise InvalidSpec(msg)
        layout, _ = jacobian_layout(self.session._info.layout, self.params)
        shape = self.session._info.data_points, layout.size
        return shape[::-1] if self.transposed else shape

    def _options(self) -> dict[str, Any]:
        return {
            "of": self.of,
            "params": self.params,
            "expected_version": self.expected_version,
            "transposed": self.transposed,
        }


class Jacobian(JacobianBase):
    """The Jacobian of the data points' losses or outputs, whose rows stay on the server.

    Examples:
        >>> J = session.loss_jacobian()
        >>> loss, gradient = session.gradient()
        >>> (J @ gradient).shape, (J.T @ np.ones((60, 2))).shape
        ((60,), (43, 2))
        >>> Z = session.output_jacobian(params="3.*")
        >>> (Z @ np.ones(18)).shape
        (180,)
    """

    def __matmul__(self, v: Any) -> Any:
        """Multiply: [P] or [P, K], or transposed [N C] or [N C, K]."""
        session: Any = self.session
        return session.jacobian_product(v, **self._options()).result


class AsyncJacobian(JacobianBase):
    """The same, awaited: ``await (J @ v)``; see `Jacobian`."""

    async def __matmul__(self, v: Any) -> Any:
        """Multiply: [P] or [P, K], or transposed [N C] or [N C, K]."""
        session: Any = self.session
        return (await session.jacobian_product(v, **self._options())).result
