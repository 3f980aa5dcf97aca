"""A session of the blocking client: gradients, operators, and new parameters."""

from __future__ import annotations

import uuid
from types import TracebackType
from typing import Any

from curvd import _requests, _uploads
from curvd._connection import Connection
from curvd._session import SessionBase
from curvd._uploads import Progress, Tensors
from curvd.arrays import Layout
from curvd.errors import SessionNotFound
from curvd.operator import RemoteOperator
from curvd.progress import shown
from curvd.types import OperatorSpec, SessionInfo


class Session(SessionBase[RemoteOperator]):
    """A model, a dataset and a loss on a device of the server.

    It outlives this object and the client. In a ``with`` it is deleted at the end.

    Args:
        connection: To the server.
        info: What the server said about it.
    """

    def __init__(self, connection: Connection, info: SessionInfo) -> None:
        super().__init__(info)
        self._connection = connection

    def operator(
        self, spec: OperatorSpec, *, expected_version: int | None = None
    ) -> RemoteOperator:
        """Make any operator; see `hessian`, `ggn`, `fisher`, `empirical_fisher`.

        Args:
            spec: Which.
            expected_version: Refuse to compute at another parameter version.

        Returns:
            The operator.
        """
        return RemoteOperator(self._connection, self._info, spec, expected_version)

    def gradient(
        self, *, layout: Layout = "flat", expected_version: int | None = None
    ) -> tuple[float, Any]:
        """Compute the objective and its gradient.

        Args:
            layout: ``flat`` [P], or per parameter: ``list`` or ``dict``.
            expected_version: Refuse to compute at another parameter version.

        Returns:
            The loss, and the gradient in NumPy.
        """
        call = _requests.gradient(
            self._info, layout=layout, expected_version=expected_version
        )
        gradient = self._connection.run(call)
        self.last = call.info
        return _requests.loss_of(call.info), gradient

    def update_parameters(
        self,
        values: Tensors,
        *,
        expected_version: int | None = None,
        progress: Progress | bool = False,
    ) -> int:
        """Replace some or all values of parameters and buffers.

        Args:
            values: By name, shapes unchanged, or the path of a safetensors file.
            expected_version: The version that this update is based on; another
                current version is refused.
            progress: Called with bytes done and in total; True draws a bar on stderr.

        Returns:
            The new version.
        """
        with shown(progress, "parameters") as callback:
            call = _uploads.update_parameters(
                self.id,
                values,
                expected_version=expected_version,
                request_id=uuid.uuid4().hex,
                progress=callback,
            )
            return self._advance(*self._connection.run(call))

    def refresh(self) -> SessionInfo:
        """Ask for the session as it is now: version, plans, lease."""
        self._info = self._connection.run(_requests.get_session(self.id))
        return self._info

    def renew(self, lease_s: float | None = None) -> SessionInfo:
        """Put off the end of the lease; any call on the session does so too.

        Args:
            lease_s: A new lease; None: as long as before.

        Returns:
            The session as it is now.
        """
        self._info = self._connection.run(_requests.renew_session(self.id, lease_s))
        return self._info

    def delete(self) -> None:
        """End the session, cancel its work and free its memory."""
        call = _requests.delete_session(self.id)
        try:
            self._connection.run(call)
        except SessionNotFound:
            if call.attempts == 1:
                raise
            # An earlier attempt deleted it, and its answer was lost.

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.delete()
        except SessionNotFound:
            pass  # its end is what was wanted
