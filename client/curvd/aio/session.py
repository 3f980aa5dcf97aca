"""A session of the asyncio client; see `curvd.remote.session`."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from curvd._calls import (
    Progress,
    curvature_requests,
    session_requests,
    upload,
)
from curvd._transport import AsyncConnection
from curvd.aio.operator import AsyncOperator
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
from curvd.remote import (
    AsyncAsks,
    AsyncJacobian,
    AsyncStoredVectors,
    DataPointQueries,
    GgnQueries,
    SessionBase,
    shown,
)
from curvd.tensors import Layout


class AsyncSession(
    DataPointQueries,
    GgnQueries,
    AsyncAsks,
    AsyncStoredVectors,
    SessionBase[AsyncOperator, AsyncJacobian],
):
    """A model, a dataset and a loss on a device of the server; see `curvd.Session`.

    Args:
        connection: To the server.
        info: What the server said about it.
        dataset: What its inputs and its target are called, if that is known.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        info: SessionInfo,
        dataset: DatasetSpec | None = None,
    ) -> None:
        super().__init__(info, dataset)
        self._connection = connection

    def operator(
        self, spec: OperatorSpec, *, expected_version: int | None = None
    ) -> AsyncOperator:
        """Make any operator; see `curvd.Session`."""
        return AsyncOperator(self._connection, self._info, spec, expected_version)

    async def gradient(
        self,
        *,
        layout: Layout = "flat",
        expected_version: int | None = None,
        store: str | None = None,
    ) -> tuple[float, Any]:
        """Compute the objective and its gradient; see `curvd.Session`."""
        call = curvature_requests.gradient(
            self._info, layout=layout, expected_version=expected_version, store=store
        )
        gradient = await self._connection.run(call)
        self.last = call.info
        if store is not None:
            gradient = curvature_requests.at_version(gradient, call.info)
        return curvature_requests.loss_of(call.info), gradient

    async def on(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        operators: Sequence[OperatorSpec | str] | None = None,
        budget_bytes: int | None = None,
        lease_s: float | None = None,
        name: str = "",
        plan: Tier | str | None = None,
    ) -> AsyncSession:
        """Have the same model and loss on other data; see `curvd.Session`."""
        dataset, spec = data, self._dataset
        if isinstance(data, DatasetInfo):
            spec = data.spec
        elif not isinstance(data, str):
            registering = await asyncio.to_thread(
                upload.register_like, spec, data, batch_size
            )
            dataset = await self._connection.run(registering)
        call = session_requests.share_session(
            self._info,
            dataset,
            operators=operators,
            budget_bytes=budget_bytes,
            lease_s=lease_s,
            name=name,
            plan=plan,
        )
        other = AsyncSession(self._connection, await self._connection.run(call), spec)
        other._origin = self._origin
        return other

    async def update_parameters(
        self,
        values: Values | None = None,
        *,
        checkpoint: str | None = None,
        prefix: str = "",
        expected_version: int | None = None,
        progress: Progress | bool = False,
        copy: bool = True,
    ) -> int:
        """Replace some or all values; see `curvd.Session`."""
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
            made = await updates.run_async(
                steps, asyncio.to_thread, self._connection.run
            )
            return self._advance(*made)

    async def refresh(self) -> SessionInfo:
        """Ask for the session as it is now: version, plans, lease."""
        self._info = await self._connection.run(session_requests.get_session(self.id))
        return self._info

    async def renew(self, lease_s: float | None = None) -> SessionInfo:
        """Put off the end of the lease; see `curvd.Session`."""
        call = session_requests.renew_session(self.id, lease_s)
        self._info = await self._connection.run(call)
        return self._info

    async def delete(self) -> None:
        """End the session, cancel its work and free its memory."""
        call = session_requests.delete_session(self.id)
        try:
            await self._connection.run(call)
        except SessionNotFound:
            if call.attempts == 1:
                raise
            # An earlier attempt deleted it, and its answer was lost.

    async def __aenter__(self) -> AsyncSession:
        self._enter()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._entered_here():
            with contextlib.suppress(SessionNotFound):  # its end is what was wanted
                await self.delete()

    def _jacobian(
        self,
        of: JacobianOf,
        params: Sequence[str] | str | None,
        expected_version: int | None,
    ) -> AsyncJacobian:
        return AsyncJacobian(
            session=self, of=of, params=params, expected_version=expected_version
        )
