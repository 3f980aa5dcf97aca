"""What the front asks of workers, and what they answer: the protocol of the fleet.

Problems and operators are named by numbers that the front gives; a problem is one version
of the parameters, so a command names the version that it means. Arrays travel beside a
message, in the order that its class says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from curvd.contract import (
    DatasetSpec,
    Dtype,
    LossSpec,
    Mode,
    ModelSpec,
    OperatorSpec,
    ParameterLayout,
    PlanReport,
    Tier,
)
from curvd_server.engine.tuning import Choice
from curvd_server.linalg import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A shard of the data: consecutive mini-batches whose products are added up first."""

    index: int
    """Among all shards; they are added in this order."""
    start: int
    """Index of its first mini-batch, in the whole dataset."""
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A worker is there; the first message of a connection."""

    rank: int
    incarnation: int
    """How often the rank was started; tells who was ended and who came instead."""
    pid: int
    host: str
    device: str
    torch_version: str
    refused: str = ""
    """Why it cannot compute there, for example without such a device; it ends then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """A worker is not frozen; nobody asked."""

    parameter_bytes: int = 0
    """Of the shards of parameters that it holds; 0: it holds whole ones."""
    whole_bytes: int = 0
    """Of whole parameters that it had gathered at once; the most until now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Make a problem of some shards. Arrays: `state`, then `arrays`, in their order."""

    problem: int
    model: ModelSpec
    state: tuple[str, ...]
    """Names of parameters and buffers."""
    arrays: tuple[str, ...]
    """Names of the dataset's tensors, of which only these shards' rows are sent."""
    data: DatasetSpec
    loss: LossSpec
    mode: Mode
    dtype: Dtype
    params: tuple[str, ...]
    parts: tuple[Part, ...]
    """Consecutive."""
    counted: float | None
    """Weight of all targets that count; None: not known yet, `Normalise` follows."""
    steps: int = 0
    """Mini-batches that all workers go through at once, each its own; 0: not at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A problem is there."""

    layout: ParameterLayout
    used: tuple[str, ...]
    """Parameters and constants that it depends on."""
    dtype: str
    """Of its products, as NumPy names it."""
    counted: tuple[float, ...]
    """Weight of the targets that count, of each shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalise:
    """Divide a mean by the targets that count in all shards."""

    problem: int
    counted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Meet the other workers, with whom parameters are shared; nothing cached is kept."""

    place: str
    """Path of a file that is not there yet, the same for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """Run a model on a few data points, in step with the others."""

    problem: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInStep:
    """Verify an operator and build it, in step with the others."""

    operator: int
    problem: int
    spec: OperatorSpec
    budget_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltInStep:
    """An operator is there, at all workers alike."""

    choice: Choice
    report: PlanReport
    sizes: tuple[int, ...]
    """Bytes of the linearisation of each mini-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeAnew:
    """Make an operator that the others have; nothing is computed."""

    operator: int
    problem: int
    spec: OperatorSpec
    budget_bytes: int
    choice: Choice
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Make a new version beside the old one. Arrays: `state`, in its order."""

    problem: int
    old: int
    state: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Make a problem with the data of one and the parameters of another, not copied."""

    problem: int
    old: int
    like: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Say under which key the plan of an operator is remembered."""

    problem: int
    part: int
    spec: OperatorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Decide:
    """Verify an operator on one shard and choose its plan, for all."""

    problem: int
    part: int
    spec: OperatorSpec
    budget_bytes: int
    """For this shard."""
    tier: Tier
    plans: Mapping[str, str]
    """What is remembered under the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A plan that is right."""

    choice: Choice
    verified: frozenset[int]
    """Sizes of mini-batches that it was compared with."""
    plans: Mapping[str, str]
    """What is to be remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Build an operator by a plan."""

    operator: int
    problem: int
    spec: OperatorSpec
    budget_bytes: Mapping[str, int]
    """Of each shard, by its index in decimal."""
    choice: Choice
    verified: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An operator is there."""

    reports: tuple[PlanReport, ...]
    """Of each shard."""
    mixes: bool
    """Whether columns of several requests go through together, on all shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """Make an operator for another version of its problem; nothing is computed."""

    operator: int
    old: int
    problem: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Relax:
    """Give back what an operator keeps, before its successor is built."""

    operator: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Forget problems and operators; unknown ones are passed over."""

    problems: tuple[int, ...] = ()
    operators: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Multiply columns. Arrays: V [K, P]."""

    operator: int
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """Partial products of each shard. Arrays: [K, P] of each, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """Differentiate the objective."""

    problem: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Losses and gradients of each shard. Arrays: [P] of each, in order."""

    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Compute a gradient, and compare that of a few data points with differences."""

    problem: int
    part: int
    """The shard whose gradient is compared; the others' are only computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Begin an algorithm on segments of its vectors; `Paused` answers.

    Arrays: `small` that are the same for all; then for each segment its elements of each
    vector among the arguments, [..., own].
    """

    program: int
    algorithm: str
    """Its name, one of `linalg.ALGORITHMS`."""
    arguments: str
    """As `packing.pack` writes them."""
    small: int
    size: int
    """P."""
    dtype: str
    """Of vectors, as NumPy names it."""
    segments: tuple[Part, ...]
    """Of this worker: elements in place of mini-batches."""
    limit: int | None
    """Most columns that may be multiplied."""
    expired: bool
    """Whether the time is up."""


Ask = Literal["sum", "join", "product", "result"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """A program has come to where it needs what the others have, or to its end.

    Arrays: `small` of its result; then what each segment contributes, one array, or all
    vectors of its result.
    """

    asks: tuple[Ask, ...]
    """What each segment needs: a sum over P, whole vectors, a product; or its end."""
    digests: tuple[str, ...]
    """Of all that decides how each segment goes on."""
    progress: tuple[Progress, ...]
    """Since it was last resumed."""
    result: str = ""
    """At its end, as `packing.pack` writes it."""
    small: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Go on. Arrays: the sum or the whole vectors; of a product each segment's part."""

    program: int
    expired: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Forget a program, wherever it is; needs no answer."""

    program: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Under which a plan is remembered."""

    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """It is done, and there is nothing to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """It raised one of our errors."""

    reason: str
    message: str
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """It raised something else, which is a defect or torch's."""

    message: str
    trace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """It left what was in step, because others had, or were somewhere else."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop what came under a number, between two mini-batches; needs no answer."""

    asked: int


Command = (
    Load
    | Normalise
    | Move
    | Share
    | Join
    | Try
    | BuildInStep
    | MakeAnew
    | Recall
    | Decide
    | Build
    | Follow
    | Relax
    | Close
    | Product
    | Gradient
    | Check
    | Begin
    | Resume
)
Answer = (
    Loaded
    | Key
    | Decided
    | Built
    | BuiltInStep
    | Arrived
    | Gradients
    | Paused
    | Done
    | Refused
    | Failed
    | Left
)
Message = Command | Answer | Hello | Alive | Cancel | End

KINDS: Mapping[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}
"""All messages by name."""
