"""Making an asyncio client: models, datasets and sessions; see `curvd.remote.client`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from curvd._calls import (
    Call,
    ObserveOpening,
    Progress,
    Tensors,
    session_requests,
    upload,
)
from curvd._transport import AsyncConnection
from curvd.aio.session import AsyncSession
from curvd.config import ClientConfig, Pem, TlsConfig
from curvd.contract import (
    DatasetInfo,
    Dtype,
    InputStyle,
    LossSpec,
    Mode,
    ModelInfo,
    OperatorSpec,
    Output,
    ServerInfo,
    SessionInfo,
    Tier,
)
from curvd.exported import ExportedModel, prepare
from curvd.parameters import exportable
from curvd.remote import (
    ClientStages,
    checked,
    configured,
    opening,
    shown,
)

T = TypeVar("T")


def connect(
    target: str,
    *,
    config: ClientConfig | None = None,
    token: str | None = None,
    tls: TlsConfig | Pem | bool | None = None,
    deadline_s: float | None = None,
) -> AsyncClient:
    """Make a client; see `curvd.connect`.

    Examples:
        >>> import asyncio
        >>> async def sharpness():
        ...     async with curvd.aio.connect(target) as client:
        ...         session = await client.create_session(model, dataset, loss="cross_entropy")
        ...         async with session:
        ...             found = await session.hessian().eigsh(k=1, vectors=False)
        ...             return float(found.values[0])
        >>> round(asyncio.run(sharpness()), 4)
        1.3995
    """
    return AsyncClient(target, configured(config, token, tls, deadline_s))


class AsyncClient:
    """A server's models, datasets and sessions; see `curvd.Client`.

    Args:
        target: ``host:port``, or ``unix:/path``.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        self._connection = AsyncConnection(checked(target), config)

    async def register_model(
        self,
        model: str | ExportedModel,
        config: Mapping[str, Any] | None = None,
        state: Tensors | None = None,
        *,
        share_with: Sequence[str] = (),
        progress: Progress | bool = False,
    ) -> ModelInfo:
        """Register an architecture with its state; see `curvd.Client`."""
        with shown(progress, "model") as callback:
            # Hashing gigabytes would hold up the event loop.
            call = await asyncio.to_thread(
                upload.register_model, model, config, state, callback, share_with
            )
            return await self._connection.run(call)

    async def register_dataset(
        self,
        tensors: Tensors | Iterable[Any] | None = None,
        *,
        name: str | None = None,
        digest: str | None = None,
        inputs: Sequence[str] | str,
        target: str,
        batch_size: int,
        input_style: InputStyle | str = InputStyle.POSITIONAL,
        share_with: Sequence[str] = (),
        progress: Progress | bool = False,
    ) -> DatasetInfo:
        """Register named tensors as fixed mini-batches; see `curvd.Client`."""
        with shown(progress, "dataset") as callback:
            call = await asyncio.to_thread(
                upload.register_dataset,
                tensors,
                name=name,
                digest=digest,
                inputs=inputs,
                target=target,
                batch_size=batch_size,
                input_style=input_style,
                progress=callback,
                share_with=share_with,
            )
            return await self._connection.run(call)

    async def create_session(
        self,
        model: ModelInfo | str,
        dataset: DatasetInfo | str,
        *,
        loss: LossSpec | Mapping[str, Any] | str,
        weight_decay: float | Mapping[str, float] | None = None,
        dtype: Any = Dtype.FLOAT32,
        mode: Mode | str = Mode.EVAL,
        operators: Sequence[OperatorSpec | str] | None = (),
        params: Sequence[str] | str = (),
        budget_bytes: int | None = None,
        lease_s: float | None = None,
        name: str = "",
        validate_only: bool = False,
        plan: Tier | str | None = None,
        share_with: Sequence[str] = (),
        progress: ObserveOpening | bool = False,
    ) -> AsyncSession:
        """Bring a model, a dataset and a loss together; see `curvd.Client`."""
        call = session_requests.create_session(
            model,
            dataset,
            loss=loss,
            weight_decay=weight_decay,
            dtype=dtype,
            mode=mode,
            operators=operators,
            params=params,
            budget_bytes=budget_bytes,
            lease_s=lease_s,
            name=name,
            validate_only=validate_only,
            plan=plan,
            share_with=share_with,
        )
        with opening(progress) as observe:
            info = await self._connection.run(call.observed(observe))
        spec = dataset.spec if isinstance(dataset, DatasetInfo) else None
        return AsyncSession(self._connection, info, spec)

    async def session_for(
        self,
        module: Any,
        loss: Any,
        data: Any,
        *,
        batch_size: int | None = None,
        output: Output = None,
        dtype: Any = None,
        mode: Mode | str | None = None,
        check: bool = True,
        progress: ObserveOpening | bool = False,
        checkpoint: str | None = None,
        **options: Any,
    ) -> AsyncSession:
        """Bring a module, a loss and data into a session; see `curvd.Client`."""
        with opening(progress) as observe:
            stages = ClientStages(observe)
            stages.exporting()
            ready = await asyncio.to_thread(
                prepare,
                exportable(module),
                loss,
                data,
                output,
                mode,
                batch_size=batch_size,
                check=check,
            )
            dataset = await self.register_dataset(
                ready.data,
                inputs=ready.model.inputs,
                target=ready.target,
                batch_size=ready.batch_size,
                progress=stages.registering("dataset"),
            )
            model = await self.register_model(
                ready.model, progress=stages.registering("model")
            )
            session = await self.create_session(
                model,
                dataset,
                loss=ready.loss,
                dtype=ready.dtype if dtype is None else dtype,
                mode=ready.model.mode,
                progress=observe or False,
                **{"operators": None, **options},
            )
        session._origin = ready.origin
        if checkpoint is not None:
            try:
                await session.update_parameters(checkpoint=checkpoint)
            except BaseException:
                await session.delete()
                raise
        return session

    async def session(self, session_id: str) -> AsyncSession:
        """Find a session that exists; see `curvd.Client`."""
        call = session_requests.get_session(session_id)
        return AsyncSession(self._connection, await self._connection.run(call))

    async def sessions(self) -> list[SessionInfo]:
        """List the sessions, oldest first."""
        return await self._all(session_requests.list_sessions)

    async def models(self) -> list[ModelInfo]:
        """List the models on the server, oldest first. See `curvd.Client`."""
        return await self._all(session_requests.list_models)

    async def datasets(self) -> list[DatasetInfo]:
        """List the datasets on the server, oldest first. See `curvd.Client`."""
        return await self._all(session_requests.list_datasets)

    async def _all(
        self, page: Callable[[str], Call[session_requests.Page[T]]]
    ) -> list[T]:
        """Ask for page after page."""
        found, token = await self._connection.run(page(""))
        while token:
            more, token = await self._connection.run(page(token))
            found += more
        return found

    async def delete_model(self, model: ModelInfo | str) -> None:
        """Delete a model that no session needs any more; see `curvd.Client`."""
        await self._connection.run(session_requests.delete_model(model))

    async def delete_dataset(self, dataset: DatasetInfo | str) -> None:
        """Delete a dataset that no session needs any more; see `curvd.Client`."""
        await self._connection.run(session_requests.delete_dataset(dataset))

    async def server_info(self) -> ServerInfo:
        """Describe the server: versions, limits, devices, builders, capabilities."""
        return await self._connection.run(session_requests.server_info())

    async def healthy(self) -> bool:
        """Tell whether the server is serving; False while it drains."""
        return await self._connection.run(session_requests.healthy())

    async def close(self) -> None:
        """Close the connection; sessions stay on the server."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._connection.target}>"
