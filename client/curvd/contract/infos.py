"""What a server says about what it holds for callers, and about results: never changed."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from curvd.contract.enums import Dtype, FactorBlockKind, Mode, Stop, Tier
from curvd.contract.layout import ParameterLayout
from curvd.contract.specs import DatasetSpec, LossSpec, ModelSpec, OperatorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorBlock:
    """A block of the diagonal of a factored operator."""

    parameters: tuple[str, ...]
    """Names of its parameters, or of those that some of its elements belong to."""
    kind: FactorBlockKind
    reason: str = ""
    """Why it is no Kronecker product; empty if it is one."""
    groups: int = 1
    """Groups of a linear layer, which have a product each."""
    inputs: int = 1
    """Inputs of a group, and one more if there is a bias."""
    outputs: int = 1
    """Outputs of a group; the number of elements, if it is no Kronecker product."""
    diagonal_inputs: bool = False
    """Whether the inputs' factor is a diagonal, as an embedding's is."""
    diagonal_outputs: bool = False
    """Whether the outputs' factor is a diagonal, as one that would be too large is."""
    whole_gradients: bool = False
    """Whether factors are second moments of whole gradients, as of a tied weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """How an operator is computed, and the evidence that it is right."""

    mode: str
    """AD mode, e.g. ``kept_double_backward``."""
    columns_at_once: int
    """Columns that go through the linear part together."""
    batches: int
    """Mini-batches per product."""
    kept_batches: int
    """Mini-batches whose linearisation stays in memory; the rest are recomputed."""
    kept_bytes: int
    """Memory held by the kept linearisations."""
    compiled: bool
    symmetry_gap: float
    """``|u.Av - v.Au|`` relative to its magnitude, float64, on a slice of the data."""
    difference_gap: float
    """Largest relative error of a parameter's rows against central differences."""
    seconds_per_product: float
    """Measured for one column when the operator was built."""
    peak_bytes: int
    """Predicted peak device memory of one product, parameters and data included."""
    tier: Tier = Tier.FINAL
    """Which tier this is; one that takes over is as right, and may round differently."""
    busy: float = 0.0
    """Seconds per second of computing in which plans were timed, waiting for a core
    included; 1: a quiet machine; 0: nothing was timed, or the system does not tell."""
    revision: int = 0
    """How often a plan that was chosen anew, on a quiet machine, took over."""
    blocks: tuple[FactorBlock, ...] = ()
    """Of a factored operator, where operators are listed; results do not repeat them."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A named tensor of a dataset or a model state."""

    name: str
    dtype: str
    """safetensors element type, for example ``F32``."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A registered model."""

    id: str
    spec: ModelSpec
    tensors: tuple[TensorInfo, ...]
    state_bytes: int
    graph_digest: str = ""
    """SHA-256 of the graph; empty: a builder made it."""
    owner: str = ""
    """Name of the caller whose it is; empty: nobody's in particular."""
    shared_with: tuple[str, ...] = ()
    """Other callers who may use it: names, and groups behind an "@"."""
    create_time_s: float | None = None
    """When it was registered, in seconds since the epoch; None: nobody took note."""
    session_ids: tuple[str, ...] = ()
    """Sessions that needed it at that moment, as far as the caller sees them."""
    other_sessions: int = 0
    """How many more did; told to whoever may delete it."""

    def __repr__(self) -> str:
        made = repr(self.spec.builder) if self.spec.builder else "graph"
        return (
            f"<ModelInfo {made} of {len(self.tensors)} tensors, {self.state_bytes} bytes, "
            f"id {self.id!r}>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """A registered dataset."""

    id: str
    spec: DatasetSpec
    tensors: tuple[TensorInfo, ...]
    data_points: int
    """``N``."""
    total_bytes: int
    name: str = ""
    """Its name on the server; empty if it was uploaded."""
    owner: str = ""
    """Name of the caller whose it is; empty: nobody's in particular."""
    shared_with: tuple[str, ...] = ()
    """Other callers who may use it: names, and groups behind an "@"."""
    create_time_s: float | None = None
    """When it was registered, in seconds since the epoch; None: nobody took note."""
    session_ids: tuple[str, ...] = ()
    """Sessions that needed it at that moment, as far as the caller sees them."""
    other_sessions: int = 0
    """How many more did; told to whoever may delete it."""

    def __repr__(self) -> str:
        shapes = ", ".join(f"{t.name} {list(t.shape)}" for t in self.tensors)
        return (
            f"<DatasetInfo N={self.data_points} B={self.spec.batch_size}: {shapes}, "
            f"id {self.id!r}>"
        )


class SessionState(enum.StrEnum):
    """Where a session is in its life."""

    READY = "ready"
    COLD = "cold"
    """Restored from disk after a restart; warms up at its first use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """A model, a dataset and a loss on a device, as of one moment."""

    id: str
    """Empty if it was only validated."""
    name: str
    model_id: str
    dataset_id: str
    loss: LossSpec
    dtype: Dtype
    mode: Mode
    version: int
    """Current parameter version; starts at 1."""
    parameters_digest: str
    """SHA-256 over the parameters of this version."""
    layout: ParameterLayout
    data_points: int
    batches: int
    device: str
    budget_bytes: int
    operators: tuple[tuple[OperatorSpec, PlanReport], ...]
    """Operators built so far at this version."""
    state: SessionState
    create_time_s: float
    """Seconds since the epoch."""
    expire_time_s: float | None
    """When the lease ends unless a call renews it; None: never."""
    params: tuple[str, ...] = ()
    """The globs that chose the parameters; empty: all of them."""
    plan: Tier = Tier.FIRST
    """Which tier the first answer of an operator waits for."""
    parameters_of: str = ""
    """The same in all sessions that share these parameters; empty: no other does."""
    owner: str = ""
    """Name of the caller whose it is; empty: nobody's in particular."""
    shared_with: tuple[str, ...] = ()
    """Other callers who may use it: names, and groups behind an "@"."""

    @property
    def family(self) -> str:
        """The same for all sessions that share its parameters, and no others."""
        return self.parameters_of or self.id

    def __repr__(self) -> str:
        name = f"{self.name!r} " if self.name else ""
        return (
            f"<SessionInfo {name}P={self.layout.size} N={self.data_points} {self.dtype} "
            f"{self.loss.name} on {self.device}, version {self.version}, {self.state}, "
            f"{len(self.operators)} operators, id {self.id!r}>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVector:
    """A vector that a session keeps: an operand that does not travel."""

    name: str
    shape: tuple[int, ...]
    """[P] or [K, P]: columns lead inside."""
    dtype: str
    """safetensors element type."""
    version: int
    """Parameter version that was current when it was stored."""
    values: tuple[float, ...] = ()
    """[K] Eigenvalues that belong to the vectors, if a query made them: of the operator
    without its scale and damping. What has them may precondition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultInfo:
    """Where a result comes from, and what it cost."""

    version: int
    """Parameter version that the result belongs to."""
    parameters_digest: str
    model_id: str
    dataset_id: str
    plan: PlanReport | None
    """None for gradients."""
    loss: float | None = None
    """The objective's value; gradients only."""
    queue_s: float = 0.0
    compute_s: float = 0.0
    runs: int = 0
    """Device runs that the request took part in."""
    run_columns: int = 0
    """Columns in those runs, other callers' included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryInfo:
    """Where a result comes from, why the query ended, and what it cost.

    Examples:
        >>> found = session.hessian().trace(samples=10)
        >>> found.products, found.version, found.info.stopped
        (10, 1, <Stop.CONVERGED: 'converged'>)
    """

    version: int
    """Parameter version that the result belongs to."""
    parameters_digest: str
    model_id: str
    dataset_id: str
    plan: PlanReport | None
    """Where it began; None where no operator was asked."""
    stopped: Stop
    products: int
    """Columns multiplied, exactly."""
    elapsed_s: float
    queue_s: float
    """Seconds that products waited for the device."""
    compute_s: float
    plans: tuple[PlanReport, ...] = ()
    """All that computed products, in order: a better one may take over between two."""
