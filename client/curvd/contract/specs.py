"""The domain's values: frozen, hashable, free of torch and grpc.

Letters: ``K`` columns, ``P`` parameters, ``N`` data points, ``B`` batch size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from curvd.contract.enums import (
    Distribution,
    FisherType,
    InputStyle,
    LossName,
    OperatorFunction,
    OperatorKind,
    Reduction,
    WeightSharing,
    member,
)
from curvd.contract.selection import check_patterns
from curvd.errors import InvalidSpec

Normaliser = Literal["points", "sum", "counted"]
"""What a custom loss returns for a mini-batch: a mean, a sum, or a sum and a weight."""


class SerializedGraph(bytes):
    """The bytes of a ``curvd.v1.Graph``; prints as its digest."""

    @property
    def digest(self) -> str:
        """SHA-256, or nothing if there is no graph."""
        return hashlib.sha256(self).hexdigest() if self else ""

    def __repr__(self) -> str:
        return f"<graph {self.digest or 'elsewhere'}>"


_LOSS_OPTIONS = (
    ("ignore_index", None, (LossName.CROSS_ENTROPY, LossName.NLL)),
    ("label_smoothing", 0.0, (LossName.CROSS_ENTROPY,)),
    ("shift", False, (LossName.CROSS_ENTROPY,)),
    ("beta", 1.0, (LossName.SMOOTH_L1,)),
    ("graph", SerializedGraph(), (LossName.CUSTOM,)),
    (
        "class_weights",
        None,
        (LossName.CROSS_ENTROPY, LossName.NLL, LossName.BCE_WITH_LOGITS),
    ),
)
"""Option, its default, and the losses that have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A loss by name.

    The objective is over the whole dataset: ``mean`` divides by the weight of all
    counted targets (ignored ones excluded, class weights included), ``mse``,
    ``smooth_l1`` and ``bce_with_logits`` by the number of elements, as torch does for
    one big batch.

    Examples:
        >>> curvd.LossSpec(name="cross_entropy", ignore_index=-100).reduction
        <Reduction.MEAN: 'mean'>
        >>> curvd.LossSpec(name="mse", ignore_index=-100)
        Traceback (most recent call last):
            ...
        curvd.errors.InvalidSpec: ignore_index belongs to cross_entropy and nll, not mse
    """

    name: LossName
    reduction: Reduction = Reduction.MEAN
    ignore_index: int | None = None
    """Targets with this class index count nothing (cross_entropy, nll); torch's is
    -100."""
    class_weights: tuple[float, ...] | None = None
    """One weight per class (cross_entropy, nll), or per output (bce:
    ``pos_weight``)."""
    label_smoothing: float = 0.0
    """In [0, 1] (cross_entropy)."""
    shift: bool = False
    """Hold the logits at position t against the target at t + 1, as causal language
    models are trained (cross_entropy)."""
    beta: float = 1.0
    """Errors below it are squared (smooth_l1)."""
    graph: SerializedGraph = field(default_factory=SerializedGraph)
    """What computes it (custom); empty where it is not at hand."""
    weight_decay: tuple[tuple[str, float], ...] = ()
    """Penalty ``coefficient / 2 * |p|^2`` by globs over parameters' names; the first
    that matches counts. A number stands for all parameters, a mapping for its items."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", member(LossName, self.name, "loss"))
        object.__setattr__(
            self, "reduction", member(Reduction, self.reduction, "reduction")
        )
        if not 0.0 <= self.label_smoothing <= 1.0:
            msg = f"label_smoothing must be in [0, 1], got {self.label_smoothing}"
            raise InvalidSpec(msg, label_smoothing=self.label_smoothing)
        if not (math.isfinite(self.beta) and self.beta > 0):
            msg = f"beta must be finite and above 0, got {self.beta}; for l1 take a small one"
            raise InvalidSpec(msg, beta=self.beta)
        for option, default, owners in _LOSS_OPTIONS:
            if getattr(self, option) != default and self.name not in owners:
                msg = f"{option} belongs to {' and '.join(owners)}, not {self.name}"
                raise InvalidSpec(msg, loss=self.name, option=option)
        object.__setattr__(self, "graph", SerializedGraph(self.graph))
        object.__setattr__(self, "weight_decay", weight_decay(self.weight_decay))
        if self.class_weights is not None:
            weights = tuple(float(w) for w in self.class_weights)
            object.__setattr__(self, "class_weights", weights)
            if not weights or any(not math.isfinite(w) or w < 0 for w in weights):
                msg = f"class_weights must be finite and not negative, got {weights}"
                raise InvalidSpec(msg, class_weights=weights)


def weight_decay(
    value: float | Mapping[str, float] | Sequence[tuple[str, float]],
) -> tuple[tuple[str, float], ...]:
    """Read a weight decay as pairs of a glob and its coefficient.

    Args:
        value: A number for all parameters, coefficients by glob, or the pairs.

    Returns:
        The pairs, in order; none for a number that is 0.

    Raises:
        InvalidSpec: If a coefficient is negative or not finite, or a glob is empty.
        LimitExceeded: If there are too many globs, or one is too long.
    """
    if isinstance(value, int | float):
        value = {"*": value} if value else {}
    items = value.items() if isinstance(value, Mapping) else value
    pairs = tuple((str(glob), float(c)) for glob, c in items)
    check_patterns([glob for glob, _ in pairs], "weight_decay")
    for glob, coefficient in pairs:
        if not (math.isfinite(coefficient) and coefficient >= 0):
            msg = (
                f"weight_decay of {glob!r} must be finite and not negative, "
                f"got {coefficient}"
            )
            raise InvalidSpec(msg, pattern=glob, coefficient=coefficient)
    return pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSpec:
    """A linear map ``scale * f(A) + damping * I`` on the parameter space of a session.

    ``f(A)`` is ``A`` itself, unless `function` says otherwise.

    Examples:
        >>> spec = curvd.OperatorSpec(kind="ggn", damping=0.1)
        >>> session.operator(spec).shape
        (43, 43)
        >>> curvd.OperatorSpec(kind="hessian", mc_samples=3)
        Traceback (most recent call last):
            ...
        curvd.errors.InvalidSpec: mc_samples=3 does not fit operator hessian
    """

    kind: OperatorKind = OperatorKind.HESSIAN
    block_sizes: tuple[int, ...] | None = None
    """Parameters (tensors) per diagonal block, in order; None keeps all cross terms."""
    damping: float = 0.0
    scale: float = 1.0
    mc_samples: int = 0
    """Sampled targets per data point (ggn: 0 is exact; fisher: at least 1)."""
    seed: int = 0
    """Fixes the sampled targets to the bit."""
    parameters: tuple[str, ...] | None = None
    """Names of those that it acts on, in this order, the others fixed; None: all."""
    fisher: FisherType | None = None
    """Which gradients Kronecker factors are made of (kfac, ekfac: mc unless said)."""
    sharing: WeightSharing | None = None
    """How they see shared weights (kfac, ekfac: expand unless said)."""
    function: OperatorFunction = OperatorFunction.NONE
    """``f`` (kfac, ekfac)."""
    shift: float = 0.0
    """Added to the diagonal of ``A`` inside of ``f``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", member(OperatorKind, self.kind, "operator"))
        self._check_factors()
        if self.block_sizes is not None:
            sizes = tuple(int(n) for n in self.block_sizes)
            object.__setattr__(self, "block_sizes", sizes)
            if not sizes or min(sizes) <= 0:
                msg = f"block_sizes must be positive, got {sizes}"
                raise InvalidSpec(msg, block_sizes=sizes)
        if self.parameters is not None:
            names = tuple(self.parameters)
            object.__setattr__(self, "parameters", names)
            if not names or len(set(names)) < len(names):
                msg = (
                    f"parameters must be names, each once and at least one, got {names}"
                )
                raise InvalidSpec(msg, parameters=names)
        for name in ("damping", "scale"):
            if not math.isfinite(getattr(self, name)):
                msg = f"{name} must be finite, got {getattr(self, name)}"
                raise InvalidSpec(msg, **{name: getattr(self, name)})
        least = self._least_samples
        if self.mc_samples == 0 and least:
            object.__setattr__(self, "mc_samples", least)
        if self.mc_samples < 0 or (self.mc_samples and least is None):
            of = f" of fisher type {self.fisher}" if self.fisher else ""
            msg = f"mc_samples={self.mc_samples} does not fit operator {self.kind}{of}"
            raise InvalidSpec(msg, mc_samples=self.mc_samples, operator=self.kind)
        if not 0 <= self.seed < 2**63:
            msg = f"seed must be in [0, 2**63), got {self.seed}"
            raise InvalidSpec(msg, seed=self.seed)

    @property
    def _least_samples(self) -> int | None:
        if self.kind.is_factored:
            return 1 if self.fisher is FisherType.MC else None
        return self.kind.least_samples

    def _check_factors(self) -> None:
        """Fill in what Kronecker factors are made of, and refuse it of other operators."""
        function = member(OperatorFunction, self.function, "function")
        object.__setattr__(self, "function", function)
        if self.kind.is_factored:
            fisher = member(FisherType, self.fisher or FisherType.MC, "fisher type")
            sharing = member(
                WeightSharing, self.sharing or WeightSharing.EXPAND, "weight sharing"
            )
            object.__setattr__(self, "fisher", fisher)
            object.__setattr__(self, "sharing", sharing)
            if self.block_sizes is not None:
                msg = (
                    f"{self.kind} has blocks of its own, those of its Kronecker products; "
                    f"leave block_sizes={self.block_sizes} out"
                )
                raise InvalidSpec(msg, block_sizes=self.block_sizes)
        elif self.fisher or self.sharing or function is not OperatorFunction.NONE:
            msg = (
                f"fisher, sharing and function belong to kfac and ekfac, not {self.kind}; "
                "its inverse is what solve computes"
            )
            raise InvalidSpec(msg, operator=self.kind)
        if not (math.isfinite(self.shift) and self.shift >= 0):
            msg = (
                "the damping inside of an inverse (shift) must be finite and not negative, "
                f"got {self.shift}"
            )
            raise InvalidSpec(msg, shift=self.shift)
        if self.shift and function is OperatorFunction.NONE:
            msg = f"shift={self.shift} is inside of a function; without one say damping"
            raise InvalidSpec(msg, shift=self.shift)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """An architecture by name, or as a graph; its state travels beside it."""

    builder: str
    """Empty: a graph makes it."""
    config: Mapping[str, object] = field(default_factory=dict)
    """JSON values only."""
    graph: SerializedGraph = field(default_factory=SerializedGraph)
    """Where it is at hand."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", SerializedGraph(self.graph))


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """How named tensors become mini-batches.

    Examples:
        >>> curvd.DatasetSpec(inputs=("x",), target="y", batch_size=32).names
        ('x', 'y')
    """

    inputs: tuple[str, ...]
    target: str
    batch_size: int
    input_style: InputStyle = InputStyle.POSITIONAL

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(
            self, "input_style", member(InputStyle, self.input_style, "input_style")
        )
        if not self.inputs or len({*self.inputs, self.target}) != len(self.inputs) + 1:
            msg = (
                "inputs and target must be distinct names and at least one input, "
                f"got {self.inputs} and {self.target!r}"
            )
            raise InvalidSpec(msg, inputs=self.inputs, target=self.target)
        if self.batch_size < 1:
            msg = f"batch_size must be at least 1, got {self.batch_size}"
            raise InvalidSpec(msg, batch_size=self.batch_size)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors: inputs and target."""
        return (*self.inputs, self.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Random columns that the server makes: an operand that does not travel.

    Examples:
        >>> curvd.Probe(seed=7, columns=3).shape(43)
        (3, 43)
    """

    distribution: Distribution = Distribution.RADEMACHER
    seed: int = 0
    columns: int | None = None
    """K; None for one vector."""
    first: int = 0
    """Index of the first column in the seed's sequence."""

    def __post_init__(self) -> None:
        kind = member(Distribution, self.distribution, "distribution")
        object.__setattr__(self, "distribution", kind)
        last = self.first + max(0, (self.columns or 1) - 1)
        if not 0 <= self.seed < 2**63 or self.first < 0 or last >= 2**63:
            msg = (
                "seed and the indices of probes must be in [0, 2**63), got "
                f"{self.seed} and {self.first} to {last}"
            )
            raise InvalidSpec(msg, seed=self.seed, first=self.first)
        if self.columns is not None and self.columns < 1:
            msg = f"a probe has at least 1 column, got {self.columns}"
            raise InvalidSpec(msg, columns=self.columns)

    def shape(self, size: int) -> tuple[int, ...]:
        """Tell its shape: [P] or [K, P].

        Args:
            size: P.

        Returns:
            The shape.
        """
        return (size,) if self.columns is None else (self.columns, size)
