"""The asyncio client: the names and signatures of `curvd.remote.client`, with ``await``.

    async with curvd.aio.connect("127.0.0.1:50551") as client:
        session = await client.session("…")
        H = session.hessian()
        product = await (H @ v)

A client belongs to the event loop of its first call. Cancelling a task cancels its work
on the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from curvd._calls import (
    Call,
    ObserveOpening,
    Progress,
    Tensors,
    TensorStream,
    requests,
    upload,
)
from curvd._transport import AsyncConnection
from curvd.config import ClientConfig, Pem, TlsConfig
from curvd.contract import (
    DatasetInfo,
    DatasetSpec,
    Dtype,
    InputStyle,
    JacobianOf,
    LossSpec,
    Mode,
    ModelInfo,
    OperatorSpec,
    Output,
    ServerInfo,
    SessionInfo,
    StoredVector,
    Tier,
)
from curvd.errors import SessionNotFound, VectorNotFound
from curvd.exported import ExportedModel, prepare
from curvd.parameters import Values, exportable, updates
from curvd.remote import (
    Algebra,
    AsyncAsks,
    AsyncJacobian,
    AsyncMultiplies,
    AsyncOperatorSum,
    AsyncSubmatrix,
    ClientStages,
    DataPointQueries,
    Indices,
    OperatorBase,
    OperatorQueries,
    SessionBase,
    Vectors,
    configured,
    dense_bytes,
    name_of,
    names_of,
    opening,
    shown,
)
from curvd.remote.queries import (
    Influence,
    MarginalLikelihood,
    PosteriorSamples,
    Predictive,
    Sketch,
)
from curvd.tensors import Layout, operand

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
        self._connection = AsyncConnection(target, config)

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
        call = requests.create_session(
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
        if checkpoint is not None:
            try:
                await session.update_parameters(checkpoint=checkpoint)
            except BaseException:
                await session.delete()
                raise
        return session

    async def session(self, session_id: str) -> AsyncSession:
        """Find a session that exists; see `curvd.Client`."""
        call = requests.get_session(session_id)
        return AsyncSession(self._connection, await self._connection.run(call))

    async def sessions(self) -> list[SessionInfo]:
        """List the sessions, oldest first."""
        return await self._all(requests.list_sessions)

    async def models(self) -> list[ModelInfo]:
        """List the models on the server, oldest first. See `curvd.Client`."""
        return await self._all(requests.list_models)

    async def datasets(self) -> list[DatasetInfo]:
        """List the datasets on the server, oldest first. See `curvd.Client`."""
        return await self._all(requests.list_datasets)

    async def _all(self, page: Callable[[str], Call[requests.Page[T]]]) -> list[T]:
        """Ask for page after page."""
        found, token = await self._connection.run(page(""))
        while token:
            more, token = await self._connection.run(page(token))
            found += more
        return found

    async def delete_model(self, model: ModelInfo | str) -> None:
        """Delete a model that no session needs any more; see `curvd.Client`."""
        await self._connection.run(requests.delete_model(model))

    async def delete_dataset(self, dataset: DatasetInfo | str) -> None:
        """Delete a dataset that no session needs any more; see `curvd.Client`."""
        await self._connection.run(requests.delete_dataset(dataset))

    async def server_info(self) -> ServerInfo:
        """Describe the server: versions, limits, devices, builders, capabilities."""
        return await self._connection.run(requests.server_info())

    async def healthy(self) -> bool:
        """Tell whether the server is serving; False while it drains."""
        return await self._connection.run(requests.healthy())

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


class AsyncSession(DataPointQueries, AsyncAsks, SessionBase["AsyncOperator"]):
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

    def loss_jacobian(
        self,
        *,
        params: Sequence[str] | str | None = None,
        expected_version: int | None = None,
    ) -> AsyncJacobian:
        """Name the Jacobian of losses; see `curvd.Session`.

        Args:
            params: Globs over names that choose the parameters that it is in, in this
                order; None: all.
            expected_version: Refuse to compute at another parameter version.

        Returns:
            [N, P]: row n is the gradient of data point n's own loss.
        """
        return AsyncJacobian(
            session=self,
            of=JacobianOf.LOSSES,
            params=params,
            expected_version=expected_version,
        )

    def output_jacobian(
        self,
        *,
        params: Sequence[str] | str | None = None,
        expected_version: int | None = None,
    ) -> AsyncJacobian:
        """Name the Jacobian of outputs; see `curvd.Session`.

        Args:
            params: Globs over names that choose the parameters that it is in, in this
                order; None: all.
            expected_version: Refuse to compute at another parameter version.

        Returns:
            [N C, P], the C numbers of a data point one after the other.
        """
        return AsyncJacobian(
            session=self,
            of=JacobianOf.OUTPUTS,
            params=params,
            expected_version=expected_version,
        )

    async def gradient(
        self,
        *,
        layout: Layout = "flat",
        expected_version: int | None = None,
        store: str | None = None,
    ) -> tuple[float, Any]:
        """Compute the objective and its gradient; see `curvd.Session`."""
        call = requests.gradient(
            self._info, layout=layout, expected_version=expected_version, store=store
        )
        gradient = await self._connection.run(call)
        self.last = call.info
        if store is not None:
            gradient = requests.at_version(gradient, call.info)
        return requests.loss_of(call.info), gradient

    async def influence(self, queries: Any = None, **options: Any) -> Influence:
        """Compute influence by the GGN; see `curvd.Session`."""
        return await self.ggn().influence(queries, **options)

    async def predictive(self, inputs: Any, **options: Any) -> Predictive:
        """Compute variances of predictions by the GGN; see `curvd.Session`."""
        return await self.ggn().predictive(inputs, **options)

    async def posterior_samples(self, k: int = 1, **options: Any) -> PosteriorSamples:
        """Draw from the posterior of the GGN; see `curvd.Session`."""
        return await self.ggn().posterior_samples(k, **options)

    async def marginal_likelihood(
        self, priors: Any, **options: Any
    ) -> MarginalLikelihood:
        """Compute marginal likelihoods by the GGN; see `curvd.Session`."""
        return await self.ggn().marginal_likelihood(priors, **options)

    async def sketch(self, name: str = "sketch", **options: Any) -> Sketch:
        """Sketch the GGN, to precondition systems; see `curvd.Session`."""
        return await self.ggn().sketch(name, **options)

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
        call = requests.share_session(
            self._info,
            dataset,
            operators=operators,
            budget_bytes=budget_bytes,
            lease_s=lease_s,
            name=name,
            plan=plan,
        )
        return AsyncSession(self._connection, await self._connection.run(call), spec)

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
            )
            made = await updates.run_async(
                steps, asyncio.to_thread, self._connection.run
            )
            return self._advance(*made)

    async def put(
        self, name: str, value: Any, *, wire: str | None = None
    ) -> StoredVector:
        """Store a vector or columns in the session; see `curvd.Session`."""
        call = requests.put_vector(
            self._info,
            name,
            operand(value, self.layout, self._info.dtype),
            wire_type=requests.check_wire(wire, self._info.dtype),
        )
        return await self._connection.run(call)

    async def get(self, vector: StoredVector | str, *, wire: str | None = None) -> Any:
        """Fetch a stored vector; see `curvd.Session`."""
        wire_type = requests.check_wire(wire, self._info.dtype)
        found = vector
        if isinstance(found, str):
            found = self._named(found, await self.vectors())
        call = requests.get_vector(self._info, found, wire_type=wire_type)
        return await self._connection.run(call)

    async def vectors(self) -> list[StoredVector]:
        """List what the session stores, the oldest name first."""
        return await self._connection.run(requests.list_vectors(self.id))

    async def combine(
        self, terms: Mapping[StoredVector | str, float], store: str
    ) -> StoredVector:
        """Store a linear combination of stored vectors; see `curvd.Session`."""
        named = {name_of(vector): float(c) for vector, c in terms.items()}
        call = requests.combine_vectors(self.id, named, store)
        return await self._connection.run(call)

    async def inner_products(
        self, left: Vectors, right: Vectors | None = None
    ) -> NDArray[np.float64]:
        """Multiply stored vectors with each other; see `curvd.Session`."""
        call = requests.inner_products(
            self.id, names_of(left), () if right is None else names_of(right)
        )
        return await self._connection.run(call)

    async def orthonormalise(
        self, vectors: Vectors, store: str, *, tolerance: float = 0.0
    ) -> StoredVector:
        """Store an orthonormal basis of stored vectors; see `curvd.Session`."""
        call = requests.orthonormalise_vectors(
            self.id, names_of(vectors), store, tolerance
        )
        return await self._connection.run(call)

    async def discard(self, vector: StoredVector | str) -> None:
        """Forget a stored vector; see `curvd.Session`."""
        call = requests.delete_vector(self.id, name_of(vector))
        try:
            await self._connection.run(call)
        except VectorNotFound:
            if call.attempts == 1:
                raise

    async def refresh(self) -> SessionInfo:
        """Ask for the session as it is now: version, plans, lease."""
        self._info = await self._connection.run(requests.get_session(self.id))
        return self._info

    async def renew(self, lease_s: float | None = None) -> SessionInfo:
        """Put off the end of the lease; see `curvd.Session`."""
        call = requests.renew_session(self.id, lease_s)
        self._info = await self._connection.run(call)
        return self._info

    async def delete(self) -> None:
        """End the session, cancel its work and free its memory."""
        call = requests.delete_session(self.id)
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


class AsyncOperator(
    OperatorQueries,
    AsyncAsks,
    OperatorBase,
    AsyncMultiplies,
    Algebra["AsyncOperator", AsyncOperatorSum, AsyncSubmatrix],
):
    """``scale * A + damping * I`` on a session's parameters; see `curvd.RemoteOperator`.

    ``H @ x`` and ``x @ H`` check the operand at once and return what is to be awaited.

    Args:
        connection: To the server.
        session: The session whose parameters it acts on.
        spec: Which operator.
        expected_version: Refuse to compute at another parameter version.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        session: SessionInfo,
        spec: OperatorSpec,
        expected_version: int | None = None,
    ) -> None:
        super().__init__(session, spec, expected_version)
        self._connection = connection

    def __matmul__(self, x: T) -> Awaitable[T]:
        return self._run(self._product(x))

    def __rmatmul__(self, x: T) -> Awaitable[T]:
        return self._run(self._product(x, leading=True))

    async def multiply(
        self,
        x: Any,
        /,
        *,
        wire: str | None = None,
        store: str | None = None,
        verify: bool = False,
    ) -> Any:
        """Multiply, and say how vectors travel; see `curvd.RemoteOperator`."""
        call = self._product(x, wire=wire, store=store, verify=verify)
        return await self._run(call)

    async def matvec(self, v: T, /) -> T:
        """Multiply one vector; see `curvd.RemoteOperator`."""
        return await self._run(self._product(v, columns=False))

    async def matmat(self, V: T, /) -> T:
        """Multiply K columns; see `curvd.RemoteOperator`."""
        return await self._run(self._product(V, columns=True))

    async def iter_matmat(
        self, V: T, /, *, columns: int = 1
    ) -> AsyncGenerator[T, None]:
        """Multiply K columns and hand out blocks; see `curvd.RemoteOperator`."""
        call = self._blocks(V, columns)
        async with contextlib.aclosing(self._connection.blocks(call)) as blocks:
            async for block in blocks:
                yield call.wanted.finish(block)
        self.last = call.info

    async def to_dense(self) -> np.ndarray[Any, Any]:
        """Multiply it out; see `curvd.RemoteOperator`."""
        dense_bytes(self.shape, self.dtype)
        return await self.matmat(np.eye(self.shape[0], dtype=self.dtype))

    @property
    def _place(self) -> tuple[Any, ...]:
        return self._connection.target, self._session.id, self.expected_version

    def _like(self, spec: OperatorSpec) -> AsyncOperator:
        version = self.expected_version
        return AsyncOperator(self._connection, self._session, spec, version)

    def _sum_of(self, terms: tuple[Any, ...]) -> AsyncOperatorSum:
        return AsyncOperatorSum(terms)

    def _submatrix_of(
        self, operator: Any, rows: Indices, columns: Indices
    ) -> AsyncSubmatrix:
        return AsyncSubmatrix(operator, rows, columns)

    async def _run(self, call: TensorStream[T]) -> T:
        return self._taken(call, await self._connection.run(call))
