"""What a caller chooses from: enumerations whose values are their names on the wire."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from types import EllipsisType
from typing import Any, TypeVar

from curvd.errors import InvalidSpec

E = TypeVar("E", bound=enum.StrEnum)

Output = str | int | Sequence[str | int] | EllipsisType | None
"""Which of a module's results a loss takes, by name or index: one, several in a tuple,
all as they are returned (``...``), or the usual one (None)."""


class Dtype(enum.StrEnum):
    """Element type in which a session computes; values are safetensors' names.

    Examples:
        >>> curvd.Dtype("F64") is curvd.Dtype.FLOAT64
        True
    """

    FLOAT32 = "F32"
    FLOAT64 = "F64"
    BFLOAT16 = "BF16"


class Reduction(enum.StrEnum):
    """How the losses of the data points become one number."""

    MEAN = "mean"
    SUM = "sum"


class Mode(enum.StrEnum):
    """How layers that differ between training and evaluation behave."""

    EVAL = "eval"
    BATCH_STATISTICS = "batch_statistics"
    """BatchNorm normalises with the statistics of the session's fixed mini-batches."""


class InputStyle(enum.StrEnum):
    """How the dataset's inputs are handed to the model."""

    POSITIONAL = "positional"
    """``model(x1, x2, …)`` in the order of `DatasetSpec.inputs`."""
    KEYWORDS = "keywords"
    """``model(name1=x1, …)``."""
    MAPPING = "mapping"
    """``model({name1: x1, …})``."""


class LossName(enum.StrEnum):
    """The losses that a server knows by name."""

    CROSS_ENTROPY = "cross_entropy"
    MSE = "mse"
    BCE_WITH_LOGITS = "bce_with_logits"
    NLL = "nll"
    """Of outputs that are log-probabilities."""
    SMOOTH_L1 = "smooth_l1"
    CUSTOM = "custom"
    """A graph; see `curvd.export_loss`."""

    @property
    def has_classes(self) -> bool:
        """Whether integer targets are indices of classes, not numbers."""
        return self in (LossName.CROSS_ENTROPY, LossName.NLL)


class OperatorKind(enum.StrEnum):
    """Which linear map on parameter space."""

    HESSIAN = "hessian"
    GGN = "ggn"
    FISHER = "fisher"
    """Type-1 Fisher: targets sampled from the model's own distribution, each loss term
    (position of a sequence) by itself."""
    EMPIRICAL_FISHER = "empirical_fisher"
    """Uncentred second moment of the gradients of data points: a sequence is one, and
    its gradient is that of the sum over its positions."""
    JACOBIAN_GRAM = "jacobian_gram"
    """``J^T J``, J the Jacobian of the model's outputs, summed over all data points,
    positions and outputs, whatever the loss; the neural tangent kernel is ``J J^T``."""
    KFAC = "kfac"
    """The Fisher's Kronecker-factored approximation, a block for each linear layer."""
    EKFAC = "ekfac"
    """KFAC's eigenvectors, with the second moments of gradients along them."""

    @property
    def least_samples(self) -> int | None:
        """Fewest targets sampled per loss term, 0 if they may be exact; None: no samples."""
        return {OperatorKind.GGN: 0, OperatorKind.FISHER: 1}.get(self)

    @property
    def is_factored(self) -> bool:
        """Whether its eigenvectors are known, so that functions of it are products."""
        return self in (OperatorKind.KFAC, OperatorKind.EKFAC)


class FisherType(enum.StrEnum):
    """Which gradients of outputs Kronecker factors are made of."""

    MC = "mc"
    """Of targets sampled from the model's distribution."""
    TYPE2 = "type-2"
    """Columns of a square root of the Hessian of the loss, a backward pass for each."""
    EMPIRICAL = "empirical"
    """Of the targets of the dataset."""


class WeightSharing(enum.StrEnum):
    """How Kronecker factors see the positions that share a weight."""

    EXPAND = "expand"
    """Each position counts by itself."""
    REDUCE = "reduce"
    """Inputs are averaged and gradients summed over the positions of a data point."""


class OperatorFunction(enum.StrEnum):
    """What is made of an operator ``A`` whose eigenvectors are known."""

    NONE = "none"
    """The operator itself."""
    INVERSE = "inverse"
    """``(A + shift * I)^-1``."""
    INVERSE_ROOT = "inverse_root"
    """``(A + shift * I)^(-1/2)``."""


class FactorBlockKind(enum.StrEnum):
    """What a block of a factored operator is made of."""

    KRONECKER = "kronecker"
    """A Kronecker product for each group of a linear layer."""
    DENSE = "dense"
    """A matrix, of the gradients of all data points, exactly."""
    DIAGONAL = "diagonal"
    """The diagonal alone, of the gradients of all data points."""
    ZERO = "zero"
    """The parameters are not used."""


class Tier(enum.StrEnum):
    """How much was prepared before an operator answered."""

    FIRST = "first"
    """The quickest to build: verified, with nothing traced or timed for it."""
    FINAL = "final"
    """The fastest of all that were timed."""


class Stage(enum.StrEnum):
    """What takes long, as a user sees it."""

    EXPORTING = "exporting"
    """The client writes a module as a graph, and proves that it is the module."""
    REGISTERING = "registering"
    """Model and dataset travel; counted in bytes."""
    WAITING = "waiting"
    """For a turn on the device, or for room there."""
    CHECKING = "checking"
    """Graphs are tried without memory, model and data are brought onto the device, and
    the gradient is compared with the loss; counted in these three."""
    VERIFYING = "verifying"
    """An AD mode, the detail, is compared with central differences in float64; counted in
    comparisons, of which most modes need few."""
    TUNING = "tuning"
    """Plans are traced and timed, the latest of which is the detail; counted in plans."""
    WARMING = "warming"
    """Linearisations are made and kept; counted in mini-batches, or joined ones."""
    COMPILING = "compiling"
    """Native code is made, beside whatever else goes on."""
    MULTIPLYING = "multiplying"
    """Products are computed; counted in columns, or data points."""


class Work(enum.StrEnum):
    """Why something takes long."""

    OPENING = "opening"
    """A session is created, or comes back onto the device."""
    BUILDING = "building"
    """An operator is built that a call waits for."""
    IMPROVING = "improving"
    """The last tier of an operator is prepared, or native code; nobody waits for it."""
    QUERY = "query"


class Which(enum.StrEnum):
    """Which end of a spectrum."""

    LARGEST = "largest"
    SMALLEST = "smallest"
    BOTH = "both"
    """Half of them from each end; an odd one more from the top."""
    LARGEST_MAGNITUDE = "largest_magnitude"


class Distribution(enum.StrEnum):
    """Of a probe's independent elements: mean zero, variance one."""

    RADEMACHER = "rademacher"
    """+1 and -1, equally likely."""
    NORMAL = "normal"


class Estimator(enum.StrEnum):
    """How a trace or a diagonal is estimated."""

    HUTCHINSON = "hutchinson"
    HUTCHPP = "hutch++"
    """Traces only."""
    EXCHANGEABLE = "exchangeable"
    """XTrace and XDiag."""


class JacobianOf(enum.StrEnum):
    """What a Jacobian is of; its rows belong to the data points."""

    LOSSES = "losses"
    """Of each data point's own loss, the sum of its terms: [N, P]."""
    OUTPUTS = "outputs"
    """Of the model's outputs, C numbers for each data point: [N C, P]."""


class Solver(enum.StrEnum):
    """How a linear system is solved."""

    CG = "cg"
    """For positive definite operators; stops and says so at negative curvature."""
    MINRES = "minres"
    """For any symmetric operator."""


class Stop(enum.StrEnum):
    """Why a query ended."""

    CONVERGED = "converged"
    PRODUCTS = "products"
    """The products that it was allowed are used up; the result is the best so far."""
    TIME = "time"
    """Its time is up; the result is the best so far."""
    STAGNATED = "stagnated"
    """The rounding of the operator allows no better."""
    NEGATIVE_CURVATURE = "negative_curvature"
    """The operator is not positive definite, and the algorithm needs that."""


def member(kind: type[E], value: str, what: str) -> E:
    """Find the member of an enumeration.

    Args:
        kind: The enumeration.
        value: A member, or its value.
        what: What is being chosen, for the message.

    Returns:
        The member.

    Raises:
        InvalidSpec: If there is none.
    """
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        msg = f"unknown {what} {value!r}; known: {known}"
        raise InvalidSpec(msg, value=value) from None


def element_type(value: Any) -> Dtype:
    """Find the element type that a caller names in any library's way.

    Args:
        value: ``"F32"``, ``"float32"``, ``np.float32``, ``np.dtype("float32")`` or
            ``torch.float32``, which are one thing.

    Returns:
        The type.

    Raises:
        InvalidSpec: If no session computes in it.
    """
    name = str(getattr(value, "__name__", value)).removeprefix("torch.")
    return member(Dtype, Dtype.__members__.get(name.upper(), name), "dtype")
