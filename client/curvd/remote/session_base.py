"""What a session offers without a call, the same for both clients."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from curvd._transport import Process, current_process
from curvd.contract import (
    DatasetSpec,
    Distribution,
    JacobianOf,
    OperatorKind,
    OperatorSpec,
    ParameterLayout,
    Probe,
    ResultInfo,
    SessionInfo,
    check_patterns,
    select,
)
from curvd.errors import InvalidSpec
from curvd.remote.factored import FactoredOperators
from curvd.remote.operator_options import (
    FisherOptions,
    GgnOptions,
    LinearisedOptions,
    OperatorOptions,
    makes,
)

if TYPE_CHECKING:
    from curvd.graph.origins import Origin

O = TypeVar("O")  # noqa: E741 - the operator type of the client
J = TypeVar("J")  # its type of Jacobians


class SessionBase(FactoredOperators[O], ABC, Generic[O, J]):
    """A model, a dataset and a loss on a device of the server.

    The operator methods make no call: the server builds and verifies an operator
    when it is first used, or when the session is created with ``operators=``.

    Args:
        info: What the server said about it.
        dataset: What its inputs and its target are called, if that is known.
    """

    def __init__(self, info: SessionInfo, dataset: DatasetSpec | None = None) -> None:
        self._info, self._dataset = info, dataset
        self._origin: Origin | None = None  # the module, if it was exported here
        self._entered_in: Process | None = None
        self.last: ResultInfo | None = None
        """Where the latest gradient came from and what it cost."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the module: another process has one of its own."""
        return {**vars(self), "_origin": None}

    def _enter(self) -> None:
        self._entered_in = current_process()

    def _entered_here(self) -> bool:
        """Tell whether leaving a ``with`` ends the session: not in a forked child."""
        return self._entered_in == current_process()

    @property
    def info(self) -> SessionInfo:
        """What this client knows: as of the last `refresh`, update or creation."""
        return self._info

    @property
    def id(self) -> str:
        """What `Client.session` finds it by."""
        return self._info.id

    @property
    def layout(self) -> ParameterLayout:
        """Names, shapes and order of the parameters.

        Examples:
            >>> for p in session.layout.parameters:
            ...     print(p.name, p.shape, p.offset)
            1.weight (5, 4) 0
            1.bias (5,) 20
            3.weight (3, 5) 25
            3.bias (3,) 40
        """
        return self._info.layout

    @abstractmethod
    def operator(self, spec: OperatorSpec, *, expected_version: int | None = None) -> O:
        """Make any operator.

        Args:
            spec: The operator.
            expected_version: Refuse to compute at another parameter version.

        Returns:
            The operator.

        Raises:
            InvalidSpec: If its blocks do not cover the parameters.
        """

    @makes(LinearisedOptions)
    def hessian(self, options: LinearisedOptions) -> O:
        """Second derivative of the objective.

        Returns:
            ``scale * H + damping * I``.

        Examples:
            >>> H = session.hessian()
            >>> H.shape, H.dtype
            ((43, 43), dtype('float64'))
            >>> dense = H @ np.eye(43)
            >>> np.allclose(dense, dense.T)
            True
            >>> damped = session.hessian(damping=0.5) @ np.eye(43)
            >>> np.allclose(damped, dense + 0.5 * np.eye(43))
            True
            >>> blocks = session.hessian(block_sizes=[2, 2]) @ np.eye(43)  # one for each layer
            >>> bool(np.all(blocks[:25, 25:] == 0))
            True
        """
        return self._made(OperatorKind.HESSIAN, options)

    @makes(GgnOptions)
    def ggn(self, options: GgnOptions) -> O:
        """Generalised Gauss-Newton: the loss's Hessian between two Jacobians.

        Returns:
            ``scale * G + damping * I``.

        Examples:
            >>> G = session.ggn() @ np.eye(43)
            >>> bool(np.linalg.eigvalsh(G).min() > -1e-12)
            True
            >>> last = session.ggn(params="3.*")
            >>> last.layout.names
            ('3.weight', '3.bias')
            >>> np.allclose(last @ np.eye(18), G[25:, 25:])
            True
        """
        return self._made(OperatorKind.GGN, options)

    @makes(FisherOptions)
    def fisher(self, options: FisherOptions) -> O:
        """Type-1 Fisher: targets sampled from the model's own distribution.

        Returns:
            ``scale * F + damping * I``.

        Examples:
            >>> F = session.fisher(mc_samples=1000) @ np.eye(43)
            >>> G = session.ggn() @ np.eye(43)
            >>> bool(np.linalg.norm(F - G) < 0.1 * np.linalg.norm(G))  # equal in expectation
            True
        """
        return self._made(OperatorKind.FISHER, options)

    @makes(LinearisedOptions)
    def empirical_fisher(self, options: LinearisedOptions) -> O:
        """Uncentred second moment of the per-example gradients.

        Returns:
            ``scale * F + damping * I``.

        Examples:
            >>> E = session.empirical_fisher()
            >>> loss, gradient = session.gradient()
            >>> float(gradient @ (E @ gradient)) >= float(gradient @ gradient) ** 2
            True
        """
        return self._made(OperatorKind.EMPIRICAL_FISHER, options)

    @makes(LinearisedOptions)
    def jacobian_gram(self, options: LinearisedOptions) -> O:
        """Gram matrix of the outputs' Jacobian, ``J^T J``, whatever the loss.

        It is summed over all data points, positions and outputs. The eigenvalues that are
        not zero are those of the neural tangent kernel ``J J^T``.

        Returns:
            ``scale * J^T J + damping * I``.

        Examples:
            >>> K = session.jacobian_gram() @ np.eye(43)
            >>> bool(np.linalg.eigvalsh(K).min() > -1e-10)
            True
            >>> last_bias = session.jacobian_gram(params="3.bias") @ np.eye(3)
            >>> np.allclose(last_bias, session.info.data_points * np.eye(3))
            True
        """
        return self._made(OperatorKind.JACOBIAN_GRAM, options)

    def loss_jacobian(
        self,
        *,
        params: Sequence[str] | str | None = None,
        expected_version: int | None = None,
    ) -> J:
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
        return self._jacobian(JacobianOf.LOSSES, params, expected_version)

    def output_jacobian(
        self,
        *,
        params: Sequence[str] | str | None = None,
        expected_version: int | None = None,
    ) -> J:
        """Name the Jacobian of the model's outputs, as an operator.

        Args:
            params: Globs over names that choose the parameters that it is in, in this
                order; None: all.
            expected_version: Refuse to compute at another parameter version.

        Returns:
            [N C, P], the C numbers of a data point one after the other.
        """
        return self._jacobian(JacobianOf.OUTPUTS, params, expected_version)

    @abstractmethod
    def _jacobian(
        self,
        of: JacobianOf,
        params: Sequence[str] | str | None,
        expected_version: int | None,
    ) -> J: ...

    def probe(
        self,
        distribution: Distribution | str = Distribution.RADEMACHER,
        *,
        seed: int = 0,
        columns: int | None = None,
        first: int = 0,
    ) -> Probe:
        """Name random columns that the server makes: an operand that does not travel.

        The values are those of `curvd.tensors.random_probes.probes` (docs/probes.md).

        Args:
            distribution: ``rademacher`` or ``normal``.
            seed: In [0, 2^63).
            columns: K; None for one vector.
            first: Index of the first column in the seed's sequence.

        Returns:
            What stands for them.

        Examples:
            >>> probe = session.probe(seed=7, columns=3)
            >>> H = session.hessian()
            >>> H.multiply(probe).shape  # only the products travelled
            (43, 3)
            >>> v = curvd.tensors.random_probes.probes("rademacher", 7, range(3), 43, np.float64).T
            >>> np.allclose(H.multiply(probe), H @ v)
            True
        """
        return Probe(
            distribution=distribution,  # type: ignore[arg-type]
            seed=seed,
            columns=columns,
            first=first,
        )

    def __repr__(self) -> str:
        i = self._info
        name = f"{i.name!r} " if i.name else ""
        return (
            f"<{type(self).__name__} {name}P={i.layout.size} N={i.data_points} {i.dtype} "
            f"{i.loss.name} on {i.device}, version {i.version}, id {i.id!r}>"
        )

    def _made(self, kind: OperatorKind, options: OperatorOptions) -> O:
        spec = options.spec(kind, self._chosen(options.params))
        return self.operator(spec, expected_version=options.expected_version)

    def _chosen(self, params: Sequence[str] | str | None) -> tuple[str, ...] | None:
        if params is None:
            return None
        patterns = [params] if isinstance(params, str) else params
        if not patterns:
            msg = "params names nothing; None stands for all parameters"
            raise InvalidSpec(msg, params=0)
        return select(self.layout.names, check_patterns(patterns), aliases={})

    def _advance(self, version: int, digest: str) -> int:
        # Operators of the old version are gone on the server.
        self._info = dataclasses.replace(
            self._info, version=version, parameters_digest=digest, operators=()
        )
        return version
