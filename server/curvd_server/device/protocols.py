"""What the server needs from whatever computes.

Problems and operators belong to whoever has the device's turn (`Batcher`): one thread
at a time, nearly always the device's own. Arrays are NumPy's; what stays on the device are
torch's tensors, which are named here and never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from curvd.contract import (
    DatasetSpec,
    DeviceInfo,
    Dtype,
    LossSpec,
    Mode,
    ModelSpec,
    OperatorSpec,
    ParameterLayout,
    PlanReport,
    SerializedGraph,
    Tier,
    WorkerInfo,
)
from curvd_server.storage import Architecture
from curvd_server.system import Poll

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from curvd_server.linalg import Runner

Array = NDArray[Any]


class Counted(Protocol):
    """What a query spends: products, or data points."""

    @property
    def done(self) -> int:
        """How many it has taken so far."""


class Operator(Protocol):
    """An operator that is built: verified and warm."""

    @property
    def report(self) -> PlanReport:
        """How it is computed; costs nothing."""

    @property
    def spent_s(self) -> float:
        """Seconds that it has computed, at earlier versions included."""

    @property
    def is_in_doubt(self) -> bool:
        """Whether its plan was chosen on a busy machine; see `Problem.choose_again`."""

    @property
    def shares(self) -> bool:
        """Whether columns together cost less than one after the other."""

    @property
    def is_remote(self) -> bool:
        """Whether other processes make its products, which may fall silent."""

    @property
    def size(self) -> int:
        """P, the length of the vectors that it multiplies."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of its products."""

    @property
    def device(self) -> torch.device:
        """Where its products are made."""

    @property
    def runner(self) -> Runner | None:
        """Runs algorithms that multiply by it in parts; None: they run here."""

    def apply(
        self, columns: Array, *, counts: Sequence[int] = (), cancelled: Poll
    ) -> Array:
        """Multiply columns, and leave them as they are: [K, P] -> [K, P].

        Args:
            columns: [K, P].
            counts: Columns of each request that is in them, whose result does not
                depend, to the bit, on the others; none: it is one.
            cancelled: Polled between mini-batches.
        """

    def multiply(self, columns: Tensor, *, cancelled: Poll) -> Tensor:
        """Multiply columns that are on the device, and leave them there: [K, P] -> [K, P].

        Args:
            columns: [K, P] in `dtype`.
            cancelled: Polled between mini-batches.
        """

    def eigenvalues(self, *, cancelled: Poll) -> Tensor | None:
        """Give all eigenvalues, in no order: [P] in float64; None: they are not known.

        Args:
            cancelled: Polled between mini-batches, if they have to be made.
        """

    def inverse(
        self, columns: Tensor, shift: float, *, cancelled: Poll
    ) -> Tensor | None:
        """Multiply columns that are on the device by ``(A + shift * I)^-1``.

        Args:
            columns: [K, P] in `dtype`.
            shift: Added to the diagonal.
            cancelled: Polled between mini-batches, if factors have to be made.

        Returns:
            [K, P]; None if the inverse is not known, or not defined.
        """

    def close(self) -> None:
        """Return its memory."""


class Problem(Protocol):
    """An objective at one version of its parameters."""

    @property
    def layout(self) -> ParameterLayout:
        """What a vector of length P means."""

    @property
    def batches(self) -> int:
        """Mini-batches per pass over the data."""

    def with_parameters(self, values: Mapping[str, Array]) -> Problem:
        """Make a new version; this one stays valid."""

    def sharing(self, other: Any) -> Problem:
        """Take the parameters of the same model on other data, in the same memory."""

    def gradient(self, *, cancelled: Poll) -> tuple[float, Array]:
        """Compute the loss and its gradient [P]."""

    def check(self, *, cancelled: Poll) -> None:
        """Compute a gradient of all data, and find out whether it is that of the loss.

        Raises:
            CurvatureUnverified: If it is not.
        """

    def points(
        self,
        compute: Callable[[Callable[[Poll], Any]], Any],
        *,
        limit: int | None,
        expired: Callable[[], bool],
    ) -> Counted:
        """Name its data points as what a query is about.

        Args:
            compute: Runs a job on the device, in its turn.
            limit: Most data points; None: all.
            expired: Whether the time is up.

        Raises:
            InvalidSpec: If a data point's loss depends on others.
        """

    def build(
        self,
        spec: OperatorSpec,
        *,
        budget_bytes: int,
        cancelled: Poll,
        tier: Tier = Tier.FINAL,
    ) -> Operator:
        """Verify and warm an operator.

        Args:
            spec: Which.
            budget_bytes: Memory for cached linearisations.
            cancelled: Polled between mini-batches.
            tier: ``first``: as soon as can be, for `improve` to go on with. ``final``:
                for good; nothing takes over later.
        """

    def improve(self, operator: Any, *, budget_bytes: int, cancelled: Poll) -> Operator:
        """Make the last tier of an operator; verified and warm.

        Args:
            operator: The first tier, which stays valid.
            budget_bytes: Memory for cached linearisations, in its place.
            cancelled: Polled between mini-batches.
        """

    def choose_again(
        self, operator: Any, *, budget_bytes: int, cancelled: Poll
    ) -> Operator | None:
        """Choose the plan of an operator anew, if nobody else wants the cores.

        Args:
            operator: The operator, which stays valid.
            budget_bytes: Memory for cached linearisations, in its place.
            cancelled: Polled between mini-batches.

        Returns:
            The operator with a better plan; None if it has the best, or cores are wanted.
        """

    def move(self, operator: Any) -> Operator:
        """Make another version's operator for this one; nothing is computed yet.

        Args:
            operator: What another version of this problem built.
        """


class Device(Protocol):
    """Where objectives are loaded."""

    @property
    def name(self) -> str:
        """For example ``cpu`` or ``cuda:0``."""

    @property
    def builders(self) -> tuple[str, ...]:
        """Names of the builders that are allowed, and globs over those of libraries."""

    @property
    def torch_version(self) -> str:
        """Of torch."""

    def describe(self) -> DeviceInfo:
        """Describe the device and its memory."""

    def workers(self) -> tuple[tuple[WorkerInfo, ...], int]:
        """Describe the workers by rank, and count how often one became ready.

        Returns:
            None, and 0, where the server itself computes; waits for nothing.
        """

    def architecture(self, spec: ModelSpec) -> Architecture:
        """Find out what a builder makes of a configuration; on any thread."""

    async def try_model(self, spec: ModelSpec) -> Architecture | None:
        """Find out what a builder or a graph makes, where that holds nobody up.

        Args:
            spec: Builder and configuration, or graph.

        Returns:
            The tensors of its state; None if only `architecture` can tell.
        """

    async def try_graphs(
        self, model: SerializedGraph, loss: SerializedGraph, *, rows: int
    ) -> Architecture | None:
        """Check what clients drew, without memory, before anything else is done with it.

        Args:
            model: A model; empty if a builder makes it.
            loss: A loss; empty if it is one of ours.
            rows: Data points of a mini-batch.

        Returns:
            The tensors of the model's state, if there is a model.

        Raises:
            InvalidGraph: If a graph is not sound.
            LimitExceeded: If it needs too much memory or time.
            Overloaded: If too many of the same peer wait to be tried.
        """

    def load(
        self,
        model: ModelSpec,
        state: Mapping[str, Array],
        arrays: Mapping[str, Array],
        data: DatasetSpec,
        loss: LossSpec,
        mode: Mode,
        dtype: Dtype,
        params: tuple[str, ...],
    ) -> Problem:
        """Bring a model, a dataset and a loss together."""
