"""What the server says about what it has and did: values, never changed."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from curvd.contract.enums import (
    Dtype,
    FactorBlockKind,
    Mode,
    Stage,
    Stop,
    Tier,
    Work,
)
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
class Limits:
    """What a server refuses to exceed."""

    upload_bytes: int
    operand_bytes: int
    header_bytes: int
    columns: int
    pending_columns: int
    sessions: int
    default_budget_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """A device that computes."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    """How far one stage of an opening is, or of other work that takes long.

    Examples:
        >>> progress = curvd.StageProgress(stage="tuning", done=2, total=8, elapsed_s=3.0)
        >>> print(progress)
        tuning, 2 of 8
        >>> progress.left_s
        9.0
    """

    stage: Stage
    detail: str = ""
    """What it is about right now, for people."""
    done: int = 0
    total: int | None = None
    """How much there is at most; None: nobody knows."""
    elapsed_s: float = 0.0
    """Since this stage, with this detail, began."""

    @property
    def left_s(self) -> float | None:
        """Seconds that remain at most, at the pace so far; None if nothing tells."""
        return left_s(self.done, self.total, self.elapsed_s)

    def __str__(self) -> str:
        what = f"{self.stage} {self.detail}".rstrip()
        if self.total is None:
            return f"{what}, {self.done}" if self.done else what
        unit = " bytes" if self.stage is Stage.REGISTERING else ""
        return f"{what}, {self.done} of {self.total}{unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Something that goes on right now at a server, and takes long."""

    work: Work
    session_id: str
    """Empty while a session is created."""
    session_name: str
    """The caller's label of the session."""
    subject: str
    """The kind of the operator, or the name of the query; may be empty."""
    progress: StageProgress
    elapsed_s: float
    """Since it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A process that has a share of the data, where a server computes with several."""

    rank: int
    """From 0; consecutive ranks have consecutive shards."""
    device: str
    host: str
    """Name of the machine that it runs on; empty: it is being started."""
    pid: int
    """Its process there; 0: it is being started."""
    shards: int
    """How many of the shards it has, of data with mini-batches for all of them."""
    ready: bool
    """Whether it holds all that it should, and answers."""
    restarts: int
    """How often another one took its place."""
    lost: str
    """Why the latest one was lost; empty: none was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """How a server fares: what it has done since it began, and what it holds now.

    The numbers are those of all callers together.
    """

    uptime_s: float
    """Seconds since it began."""
    calls: int
    """Calls that have ended."""
    failed_calls: int
    """Those of them that failed, or were cancelled."""
    calls_under_way: int
    products: int
    """Products of callers that ran; a MatMat is one for each of its blocks of columns."""
    columns: int
    """Columns of these."""
    query_columns: int
    """Columns that queries have multiplied."""
    queue_requests: int
    """Requests that wait for the device."""
    queue_columns: int
    """Columns of products under way."""
    queue_bytes: int
    """Memory of products under way."""
    ready_sessions: int
    """Sessions on the device."""
    cold_sessions: int
    """Sessions that warm up at their next use."""
    operators: Mapping[str, int]
    """Operators that are built, by tier: ``first``, ``final``, ``native`` for native code."""
    memory_bytes: Mapping[str, int]
    """Memory of the host that is held, by what for."""
    memory_limit_bytes: int
    """The limit of that."""
    connections: int
    """Connections that are open; 0 where grpcio has the port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server is and offers."""

    version: str
    torch_version: str
    limits: Limits
    devices: tuple[DeviceInfo, ...]
    builders: tuple[str, ...]
    capabilities: tuple[str, ...]
    datasets: tuple[str, ...] = ()
    """Names of the datasets that lie on the server."""
    activities: tuple[Activity, ...] = ()
    """What takes long and goes on right now, the oldest first."""
    workers: tuple[WorkerInfo, ...] = ()
    """The processes that compute, by rank; none: the server itself does."""
    generation: int = 0
    """How often a worker became ready; it grows when one is lost and comes back."""
    status: ServerStatus | None = None
    """How it fares; None: it does not say, as older ones."""

    def __repr__(self) -> str:
        devices = ", ".join(d.name for d in self.devices)
        return (
            f"<ServerInfo curvd {self.version}, torch {self.torch_version}, {devices}, "
            f"{len(self.builders)} builders, {len(self.datasets)} datasets>"
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


def left_s(done: int, total: int | None, elapsed_s: float) -> float | None:
    """Say how long the rest takes at most, at the pace so far.

    Args:
        done: How much is done.
        total: How much there is at most; None: nobody knows.
        elapsed_s: Seconds that it has taken.

    Returns:
        Seconds; None if nothing tells.
    """
    if not total or not done:
        return None
    return elapsed_s * max(0, total - done) / done


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryProgress:
    """Where a running query is.

    Examples:
        >>> print(
        ...     curvd.QueryProgress(
        ...         iteration=3, products=4, estimates=(1.4,), residuals=(0.01,), elapsed_s=0.2
        ...     )
        ... )
        4 products, estimates 1.4, errors 1.0e-02
    """

    iteration: int
    products: int
    estimates: tuple[float, ...]
    """What is known of the result: eigenvalues, or the one number asked for."""
    residuals: tuple[float, ...]
    """Residual norms or standard errors that belong to the estimates."""
    elapsed_s: float
    total: int | None = None
    """Products at most; None if the query ends when it is good enough."""
    share: float | None = None
    """Share of the work that is done, as far as residuals tell; None if nothing tells."""

    @property
    def left_s(self) -> float | None:
        """Seconds that remain at most, at the pace so far; None if nothing tells."""
        if self.share is not None:
            return self.elapsed_s * (1 / self.share - 1) if self.share > 0 else None
        return left_s(self.products, self.total, self.elapsed_s)

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        parts = [f"{self.products}{of} products"]
        if self.share is not None:
            parts.append(f"{self.share:.0%} done")
        if self.estimates:
            parts.append("estimates " + " ".join(f"{x:.6g}" for x in self.estimates))
        if self.residuals:
            parts.append("errors " + " ".join(f"{x:.1e}" for x in self.residuals))
        return ", ".join(parts)


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
