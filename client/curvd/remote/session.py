"""A session of the blocking client: gradients, operators, and new parameters."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from curvd._calls import Progress, curvature_requests, session_requests, upload
from curvd._transport import Connection
from curvd.contract import (
    DatasetInfo,
    DatasetSpec,
    JacobianOf,
    OperatorSpec,
    SessionInfo,
    Tier,
)
from curvd.errors import SessionNotFound
from curvd.parameters import Values, updates
from curvd.remote.asking import Asks
from curvd.remote.ggn_queries import GgnQueries
from curvd.remote.jacobian import Jacobian
from curvd.remote.operator import RemoteOperator
from curvd.remote.progress import shown
from curvd.remote.queries import DataPointQueries
from curvd.remote.session_base import SessionBase
from curvd.remote.stored_vectors import StoredVectors
from curvd.tensors import Layout


class Session(
    DataPointQueries,
    GgnQueries,
    Asks,
    StoredVectors,
    SessionBase[RemoteOperator, Jacobian],
):
    """A model, a dataset and a loss on a device of the server.

    It outlives this object and the client. In a ``with`` it is deleted at the end.

    Args:
        connection: To the server.
        info: What the server said about it.
        dataset: What its inputs and its target are called, if that is known.

    Examples:
        >>> with client.create_session(model, dataset, loss="cross_entropy") as session:
        ...     session.info.state
        <SessionState.READY: 'ready'>
        >>> session.id in [info.id for info in client.sessions()]
        False
    """

    def __init__(
        self,
        connection: Connection,
        info: SessionInfo,
        dataset: DatasetSpec | None = None,
    ) -> None:
        super().__init__(info, dataset)
        self._connection = connection

    def operator(
        self, spec: OperatorSpec, *, expected_version: int | None = None
    ) -> RemoteOperator:
        """Make any operator; `hessian` and the other methods name each kind.

        Args:
            spec: The operator.
            expected_version: Refuse to compute at another parameter version.

        Returns:
            The operator.
        """
        return RemoteOperator(self._connection, self._info, spec, expected_version)

    def gradient(
        self,
        *,
        layout: Layout = "flat",
        expected_version: int | None = None,
        store: str | None = None,
    ) -> tuple[float, Any]:
        """Compute the objective and its gradient.

        Args:
            layout: ``flat`` [P], or per parameter: ``list`` or ``dict``.
            expected_version: Refuse to compute at another parameter version.
            store: Keep the gradient in the session under this name, and fetch nothing.

        Returns:
            The loss, and the gradient in NumPy, or what stands for it.

        Examples:
            >>> loss, gradient = session.gradient()
            >>> round(loss, 4), gradient.shape
            (1.9866, (43,))
            >>> loss, gradient = session.gradient(layout="dict")
            >>> gradient["3.weight"].shape
            (3, 5)
            >>> loss, stored = session.gradient(store="g")
            >>> stored.shape
            (43,)
        """
        call = curvature_requests.gradient(
            self._info, layout=layout, expected_version=expected_version, store=store
        )
        gradient = self._connection.run(call)
        self.last = call.info
        if store is not None:
            gradient = curvature_requests.at_version(gradient, call.info)
        return curvature_requests.loss_of(call.info), gradient

    def on(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        operators: Sequence[OperatorSpec | str] | None = None,
        budget_bytes: int | None = None,
        lease_s: float | None = None,
        name: str = "",
        plan: Tier | str | None = None,
    ) -> Session:
        """Have the same model and loss on other data, such as a test set.

        Both sessions share the parameters, in memory and on the way: an update of either
        is one of both, and they always are at the same version. Each has operators and
        stored vectors of its own, and ends by itself. Operators of both add up:
        ``(0.9 * train.hessian() + 0.1 * test.hessian()) @ v``.

        Args:
            data: As for `Client.session_for`, or what `Client.register_dataset` returns,
                or the id of a dataset.
            batch_size: ``B``; None: as in this session.
            operators: What to build before the answer; None: nothing.
            budget_bytes: As for `Client.create_session`.
            lease_s: As for `Client.create_session`.
            name: A label for people.
            plan: As for `Client.create_session`.

        Returns:
            The session on the other data.

        Examples:
            >>> train = client.create_session(model, dataset, loss="cross_entropy", dtype="F64")
            >>> test = train.on({"x": np.ones((10, 4)), "y": np.zeros(10, dtype=int)})
            >>> test.info.data_points, test.layout == train.layout
            (10, True)
            >>> train.update_parameters({"3.bias": np.ones(3)})
            2
            >>> test.refresh().version
            2
        """
        dataset, spec = data, self._dataset
        if isinstance(data, DatasetInfo):
            spec = data.spec
        elif not isinstance(data, str):
            dataset = self._connection.run(upload.register_like(spec, data, batch_size))
        call = session_requests.share_session(
            self._info,
            dataset,
            operators=operators,
            budget_bytes=budget_bytes,
            lease_s=lease_s,
            name=name,
            plan=plan,
        )
        other = Session(self._connection, self._connection.run(call), spec)
        other._origin = self._origin
        return other

    def update_parameters(
        self,
        values: Values | None = None,
        *,
        checkpoint: str | None = None,
        prefix: str = "",
        expected_version: int | None = None,
        progress: Progress | bool = False,
        copy: bool = True,
    ) -> int:
        """Replace some or all values of parameters and buffers.

        The values are copied first, while no optimiser of torch is in a step: training
        may go on beside this call. Other writers need a lock of their own.

        Args:
            values: A module, or values by name, shapes unchanged, such as a state dict,
                or the path of a safetensors file. Modules may be wrapped (DDP,
                torch.compile), and names have the wrappers' prefixes. With DTensors
                (FSDP2) all ranks call; each sends its slices, and all make one version.
            checkpoint: In place of values, what the server reads itself: a path from its
                ``checkpoints_root`` to safetensors, one file or several with an index,
                or to a folder of ``torch.distributed.checkpoint``.
            prefix: What stands before the names of the model's tensors in the checkpoint,
                such as ``"model."``; empty: found out, if there is but one.
            expected_version: The version that this update is based on; another
                current version is refused.
            progress: Called with bytes done and in total; True draws a bar on stderr.
            copy: Whether to copy; False spares the memory where nobody writes.

        Returns:
            The new version.

        Examples:
            >>> session = client.create_session(model, dataset, loss="cross_entropy", dtype="F64")
            >>> session.update_parameters({"3.bias": np.ones(3)})
            2
            >>> session.hessian(expected_version=1) @ np.ones(43)
            Traceback (most recent call last):
                ...
            curvd.errors.VersionMismatch: session ... is at version 2, not 1
        """
        with shown(progress, "parameters") as callback:
            steps = updates.update_parameters(
                self._info,
                values,
                checkpoint=checkpoint,
                prefix=prefix,
                expected_version=expected_version,
                request_id=uuid.uuid4().hex,
                progress=callback,
                copy=copy,
                origin=self._origin,
            )
            return self._advance(*updates.run(steps, self._connection.run))

    def refresh(self) -> SessionInfo:
        """Ask for the session as it is now: version, plans, lease."""
        self._info = self._connection.run(session_requests.get_session(self.id))
        return self._info

    def renew(self, lease_s: float | None = None) -> SessionInfo:
        """Put off the end of the lease; any call on the session does so too.

        Args:
            lease_s: A new lease; None: as long as before.

        Returns:
            The session as it is now.

        Examples:
            >>> session = client.create_session(model, dataset, loss="nll", lease_s=60)
            >>> before = session.info.expire_time_s
            >>> session.renew(3600).expire_time_s > before + 3000
            True
        """
        self._info = self._connection.run(
            session_requests.renew_session(self.id, lease_s)
        )
        return self._info

    def delete(self) -> None:
        """End the session, cancel its work and free its memory."""
        call = session_requests.delete_session(self.id)
        try:
            self._connection.run(call)
        except SessionNotFound:
            if call.attempts == 1:
                raise
            # An earlier attempt deleted it, and its answer was lost.

    def __enter__(self) -> Session:
        self._enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._entered_here():
            with contextlib.suppress(SessionNotFound):  # its end is what was wanted
                self.delete()

    def _jacobian(
        self,
        of: JacobianOf,
        params: Sequence[str] | str | None,
        expected_version: int | None,
    ) -> Jacobian:
        return Jacobian(
            session=self, of=of, params=params, expected_version=expected_version
        )
