"""A session of the blocking client: gradients, operators, and new parameters."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd._calls import Progress, requests, upload
from curvd._transport import Connection
from curvd.contract import (
    DatasetInfo,
    DatasetSpec,
    JacobianOf,
    OperatorSpec,
    SessionInfo,
    StoredVector,
    Tier,
)
from curvd.errors import SessionNotFound, VectorNotFound
from curvd.parameters import Values, updates
from curvd.remote.asking import Asks
from curvd.remote.jacobian import Jacobian
from curvd.remote.operator import RemoteOperator
from curvd.remote.progress import shown
from curvd.remote.queries import (
    DataPointQueries,
    Influence,
    MarginalLikelihood,
    PosteriorSamples,
    Predictive,
    Sketch,
)
from curvd.remote.session_base import SessionBase, Vectors, name_of, names_of
from curvd.tensors import Layout, operand


class Session(DataPointQueries, Asks, SessionBase[RemoteOperator]):
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

    def loss_jacobian(
        self,
        *,
        params: Sequence[str] | str | None = None,
        expected_version: int | None = None,
    ) -> Jacobian:
        """Name the Jacobian of the data points' losses, as an operator.

        Args:
            params: Globs over names that choose the parameters that it is in, in this
                order; None: all.
            expected_version: Refuse to compute at another parameter version.

        Returns:
            [N, P]: row n is the gradient of data point n's own loss.

        Examples:
            >>> J = session.loss_jacobian()
            >>> loss, gradient = session.gradient()
            >>> np.allclose(J.T @ np.ones(60) / 60, gradient)
            True
        """
        return Jacobian(
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
    ) -> Jacobian:
        """Name the Jacobian of the model's outputs, as an operator.

        Args:
            params: Globs over names that choose the parameters that it is in, in this
                order; None: all.
            expected_version: Refuse to compute at another parameter version.

        Returns:
            [N C, P], the C numbers of a data point one after the other.
        """
        return Jacobian(
            session=self,
            of=JacobianOf.OUTPUTS,
            params=params,
            expected_version=expected_version,
        )

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
        call = requests.gradient(
            self._info, layout=layout, expected_version=expected_version, store=store
        )
        gradient = self._connection.run(call)
        self.last = call.info
        if store is not None:
            gradient = requests.at_version(gradient, call.info)
        return requests.loss_of(call.info), gradient

    def influence(self, queries: Any = None, **options: Any) -> Influence:
        """Compute what each data point has to do with the losses of queries, by the GGN.

        Args:
            queries: Data points, by name as in the dataset or a tuple of inputs and
                targets; or indices of the session's own; or None, all of these; or all of
                a session with the same parameters (`on`); or gradients that the session
                stores, [P] or [P, M], or their name.
            **options: Those of [`influence`][curvd.RemoteOperator.influence] of an
                operator.

        Returns:
            The scores, and how true the solutions are.

        Examples:
            >>> found = session.influence([0, 1], damping=0.1, top=3)
            >>> found.converged, found.indices.shape
            (True, (2, 2, 3))
            >>> session.influence(damping=0.1, self_only=True).self_influence.shape
            (60,)
        """
        return self.ggn().influence(queries, **options)

    def predictive(self, inputs: Any, **options: Any) -> Predictive:
        """Compute variances of predictions under the posterior of the GGN.

        Args:
            inputs: As in the dataset: an array [T, …], a tuple of these, or by name.
            **options: Those of [`predictive`][curvd.RemoteOperator.predictive] of an
                operator.

        Returns:
            The outputs, their variances, and how true the solutions are.

        Examples:
            >>> x = np.zeros((1, 4))
            >>> narrow, wide = (session.predictive(x, prior=p) for p in (100.0, 0.1))
            >>> bool(np.all(narrow.variance < wide.variance))
            True
        """
        return self.ggn().predictive(inputs, **options)

    def posterior_samples(self, k: int = 1, **options: Any) -> PosteriorSamples:
        """Draw from the posterior of the GGN.

        Args:
            k: How many.
            **options: Those of
                [`posterior_samples`][curvd.RemoteOperator.posterior_samples] of an
                operator.

        Returns:
            What is to be added to the parameters, draw by draw.

        Examples:
            >>> session.posterior_samples(2, prior=10.0).samples.shape
            (2, 43)
        """
        return self.ggn().posterior_samples(k, **options)

    def marginal_likelihood(self, priors: Any, **options: Any) -> MarginalLikelihood:
        """Compute Laplace's log marginal likelihood for several priors, by the GGN.

        Args:
            priors: Precisions, positive: a number, or several.
            **options: Those of
                [`marginal_likelihood`][curvd.RemoteOperator.marginal_likelihood] of an
                operator.

        Returns:
            The values, and their parts.

        Examples:
            >>> session.marginal_likelihood(np.logspace(-2, 2, 9)).best
            1.0
        """
        return self.ggn().marginal_likelihood(priors, **options)

    def sketch(self, name: str = "sketch", **options: Any) -> Sketch:
        """Sketch the GGN, to precondition systems of it and of the Hessian.

        Args:
            name: Under which the session keeps it.
            **options: Those of [`sketch`][curvd.RemoteOperator.sketch] of an operator.

        Returns:
            The values, and what the session stores.

        Examples:
            >>> session.sketch("top", rank=30).stored.name
            'top'
            >>> b = session.gradient()[1]
            >>> session.hessian().solve(b, damping=1.0, preconditioner="top").converged
            True
        """
        return self.ggn().sketch(name, **options)

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
        call = requests.share_session(
            self._info,
            dataset,
            operators=operators,
            budget_bytes=budget_bytes,
            lease_s=lease_s,
            name=name,
            plan=plan,
        )
        return Session(self._connection, self._connection.run(call), spec)

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
            )
            return self._advance(*updates.run(steps, self._connection.run))

    def put(self, name: str, value: Any, *, wire: str | None = None) -> StoredVector:
        """Store a vector or columns in the session, as operand of later products.

        What is stored is lost when the server restarts.

        Args:
            name: What to call it; one that exists is replaced.
            value: The value, as for ``H @ value``.
            wire: ``BF16`` or ``F16`` send half the bytes, rounded to nearest.

        Returns:
            What stands for it.

        Examples:
            >>> stored = session.put("ones", np.ones(43))
            >>> stored.shape, stored.dtype
            ((43,), 'F64')
            >>> H = session.hessian()
            >>> np.array_equal(H.multiply(stored), H @ np.ones(43))
            True
        """
        call = requests.put_vector(
            self._info,
            name,
            operand(value, self.layout, self._info.dtype),
            wire_type=requests.check_wire(wire, self._info.dtype),
        )
        return self._connection.run(call)

    def get(self, vector: StoredVector | str, *, wire: str | None = None) -> Any:
        """Fetch a stored vector.

        Args:
            vector: Which, or its name.
            wire: ``BF16`` or ``F16`` fetch half the bytes, rounded to nearest.

        Returns:
            [P], or [P, K].

        Examples:
            >>> stored = session.put("columns", np.eye(43, 2))
            >>> session.get("columns").shape
            (43, 2)
        """
        wire_type = requests.check_wire(wire, self._info.dtype)
        found = vector
        if isinstance(found, str):
            found = self._named(found, self.vectors())
        call = requests.get_vector(self._info, found, wire_type=wire_type)
        return self._connection.run(call)

    def vectors(self) -> list[StoredVector]:
        """List what the session stores, the oldest name first."""
        return self._connection.run(requests.list_vectors(self.id))

    def combine(
        self, terms: Mapping[StoredVector | str, float], store: str
    ) -> StoredVector:
        """Store a linear combination of stored vectors, where they are.

        Args:
            terms: Coefficients by vector, or by name; all of one shape.
            store: Name of the sum, which may be that of a term.

        Returns:
            What stands for the sum.

        Examples:
            >>> loss, g = session.gradient(store="g")
            >>> _ = session.put("x", np.ones(43))
            >>> stored = session.combine({"x": 1.0, "g": -0.1}, store="x")  # a step
            >>> np.allclose(session.get("x"), 1 - 0.1 * session.get("g"))
            True
        """
        named = {name_of(vector): float(c) for vector, c in terms.items()}
        return self._connection.run(requests.combine_vectors(self.id, named, store))

    def inner_products(
        self, left: Vectors, right: Vectors | None = None
    ) -> NDArray[np.float64]:
        """Multiply stored vectors with each other, where they are.

        Args:
            left: A stored vector or several, or their names; their columns, one after the
                other, are the rows of the answer.
            right: The same for its columns; None: `left`, so that it is a Gram matrix,
                whose diagonal has the squared norms.

        Returns:
            [L, R], summed in float64.

        Examples:
            >>> _ = session.put("two", np.eye(43, 2)), session.put("one", np.ones(43))
            >>> session.inner_products(["two", "one"])
            array([[ 1.,  0.,  1.],
                   [ 0.,  1.,  1.],
                   [ 1.,  1., 43.]])
        """
        call = requests.inner_products(
            self.id, names_of(left), () if right is None else names_of(right)
        )
        return self._connection.run(call)

    def orthonormalise(
        self, vectors: Vectors, store: str, *, tolerance: float = 0.0
    ) -> StoredVector:
        """Store an orthonormal basis of what stored vectors span, as columns.

        Args:
            vectors: A stored vector or several, or their names.
            store: Name of the basis.
            tolerance: Directions shorter than this, relative to the longest, are left
                out; 0: those that rounding hides.

        Returns:
            What stands for the basis, principal directions first.

        Examples:
            >>> _ = session.put("a", np.ones((43, 2)))  # the same column twice
            >>> session.orthonormalise("a", store="basis").shape
            (1, 43)
        """
        return self._connection.run(
            requests.orthonormalise_vectors(
                self.id, names_of(vectors), store, tolerance
            )
        )

    def discard(self, vector: StoredVector | str) -> None:
        """Forget a stored vector and free its memory.

        Args:
            vector: Which, or its name.

        Examples:
            >>> stored = session.put("for a while", np.ones(43))
            >>> session.discard(stored)
            >>> "for a while" in [vector.name for vector in session.vectors()]
            False
        """
        call = requests.delete_vector(self.id, name_of(vector))
        try:
            self._connection.run(call)
        except VectorNotFound:
            if call.attempts == 1:
                raise
            # An earlier attempt discarded it, and its answer was lost.

    def refresh(self) -> SessionInfo:
        """Ask for the session as it is now: version, plans, lease."""
        self._info = self._connection.run(requests.get_session(self.id))
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
        self._info = self._connection.run(requests.renew_session(self.id, lease_s))
        return self._info

    def delete(self) -> None:
        """End the session, cancel its work and free its memory."""
        call = requests.delete_session(self.id)
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
