"""Which values a request may carry: one rule for each number and text of the contract.

They are checked before a method sees the request, so nothing that is out of range is
written anywhere. What depends on a session (its size, its device) or on other fields is
checked where that is known; what a field leaves out is the default, and never wrong.
`tests/storage/test_ranges.py` reads the contract and fails on a field without a rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from curvd.contract import (
    LONGEST_PATTERN,
    MOST_PATTERNS,
    QUERIES,
    query_messages,
    settings_of,
)
from curvd.errors import InvalidSpec, LimitExceeded

LONGEST_LEASE_S = 10 * 365 * 24 * 3600
"""Ten years; what lives longer needs no lease."""
_MOST = 1_000_000
"""Values of a repeated field, unless its rule says less."""
_PACKAGE = "curvd.v1."
_INT64 = 2**63 - 1
_LARGEST = 1e300
"""Of numbers that need only be finite."""
_FAR = 2**28
"""Upper ends that hardly anybody reaches."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number in [low, high]; NaN is in no range."""

    low: float
    high: float
    above: bool = False
    """Whether it must be above `low`."""
    unit: str = ""
    most: int = _MOST
    """Values, if it is repeated."""

    def check(self, name: str, value: float) -> None:
        """Refuse what is out of range.

        Raises:
            InvalidSpec: Unless the value is in it.
        """
        if (self.low < value if self.above else self.low <= value) and (
            value <= self.high
        ):
            return
        unit = f" {self.unit}" if self.unit else ""
        msg = f"{name} {self._wanted(value)}, got {value}{unit}"
        raise InvalidSpec(msg, **{name: value})

    def _wanted(self, value: float) -> str:
        """Say the range, or only the side that was missed if the other is far away."""
        positive = self.above or self.low == 1
        if self.high == _LARGEST and self.low < 0:
            return "must be finite"
        if self.high == _LARGEST:
            return f"must be {'positive and finite' if positive else 'finite and not negative'}"
        if value <= self.low <= 1 and self.low >= 0 and self.high >= _FAR:
            return "must be positive" if positive else "must not be negative"
        return f"must be in {'(' if self.above else '['}{self.low}, {self.high}]"


@dataclass(frozen=True, slots=True)
class Text:
    """Characters, or bytes."""

    longest: int
    most: int = _MOST

    def check(self, name: str, value: str | bytes) -> None:
        """Refuse what is too long.

        Raises:
            InvalidSpec: If it has more than `longest` characters.
        """
        if len(value) > self.longest:
            msg = f"{name} has {len(value)} characters; the limit is {self.longest}"
            raise InvalidSpec(msg, length=len(value), limit=self.longest)


@dataclass(frozen=True, slots=True)
class Count:
    """Messages of a repeated field; each is checked by itself."""

    most: int


Rule = Number | Text | Count

_ID, _NAME = Text(128), Text(128)
_TENSOR = Text(1024, most=100_000)
"""Name of a tensor, a parameter or an input."""
_VERSION = Number(0, _INT64)
_SEED = Number(0, _INT64)
_BYTES = Number(0, 2**62, unit="bytes")
_FINITE = Number(-_LARGEST, _LARGEST)
_NOT_NEGATIVE = Number(0, _LARGEST)
_POSITIVE = Number(0, _LARGEST, above=True)
_LEASE = Number(0, LONGEST_LEASE_S, above=True, unit="s")
_DIGEST = Text(64)
_CALLERS = Text(129, most=100)
"""Names of callers, or of groups."""
_PATTERN = Text(LONGEST_PATTERN, most=MOST_PATTERNS)


def _rules_of_queries() -> dict[str, Rule]:
    """Make the rules of the fields that carry a query's options, as their settings say."""
    rules: dict[str, Rule] = {}
    for rpc, query in QUERIES.items():
        message = query_messages.request_type(rpc).DESCRIPTOR
        settings = settings_of(query.options)
        for name, path in query_messages.carried(query.options, message).items():
            field, known = settings[name]
            if path[-1].cpp_type == FieldDescriptor.CPPTYPE_STRING:
                rule: Rule = _NAME
            elif ends := known.range_of(field):
                unit = "s" if name.endswith("_s") else ""
                rule = Number(*ends, above=known.positive, unit=unit)
            else:
                continue
            rules[path[-1].full_name.removeprefix(_PACKAGE)] = rule
    return rules


COMMON: Mapping[str, Rule] = {
    "session_id": _ID,
    "request_id": _ID,
    "expected_version": _VERSION,
    "store_as": _NAME,
    "result_type": Text(8),
    "lease": _LEASE,
    "page_size": Number(0, 2**31 - 1),
    "page_token": _ID,
}
"""By field, in whatever message: these mean the same everywhere."""

RULES: Mapping[str, Rule] = {
    "RegisterModelHeader.builder": _NAME,
    "Upload.digest": _DIGEST,
    "Upload.total_bytes": _BYTES,
    "Upload.offset": _BYTES,
    "RegisterDatasetHeader.inputs": Text(1024, most=1000),
    "RegisterDatasetHeader.target": _TENSOR,
    "RegisterDatasetHeader.batch_size": Number(1, 2**53),
    "RegisterDatasetHeader.name": _NAME,
    "DeleteModelRequest.model_id": _ID,
    "DeleteDatasetRequest.dataset_id": _ID,
    "CreateSessionRequest.model_id": _ID,
    "CreateSessionRequest.dataset_id": _ID,
    "CreateSessionRequest.operators": Count(100),
    "CreateSessionRequest.budget_bytes": _BYTES,
    "CreateSessionRequest.name": _NAME,
    "CreateSessionRequest.shares_with": _ID,
    "CreateSessionRequest.params": _PATTERN,
    "UpdateParametersHeader.parts": Text(64, most=10_000),
    "Checkpoint.name": Text(1024),
    "Checkpoint.prefix": _TENSOR,
    "RegisterModelHeader.share_with": _CALLERS,
    "RegisterDatasetHeader.share_with": _CALLERS,
    "CreateSessionRequest.share_with": _CALLERS,
    "Loss.ignore_index": Number(-(2**62), 2**62),
    "Loss.class_weights": _NOT_NEGATIVE,
    "Loss.label_smoothing": Number(0.0, 1.0),
    "Loss.beta": _POSITIVE,
    "Loss.weight_decay": Count(MOST_PATTERNS),
    "WeightDecay.pattern": _PATTERN,
    "WeightDecay.coefficient": _NOT_NEGATIVE,
    "Operator.block_sizes": Number(1, 2**32 - 1),
    "Operator.damping": _FINITE,
    "Operator.scale": _FINITE,
    "Operator.shift": _NOT_NEGATIVE,
    "Operator.mc_samples": Number(0, 100_000),
    "Operator.seed": _SEED,
    "Operator.parameters": _TENSOR,
    "Resume.offset": _BYTES,
    "Resume.sha256": Text(32),
    "Operand.stored": _NAME,
    "ProbeOperand.seed": _SEED,
    "ProbeOperand.first_index": _SEED,
    "ProbeOperand.columns": Number(0, 2**32 - 1),
    "PutVectorHeader.name": _NAME,
    "GetVectorRequest.name": _NAME,
    "DeleteVectorRequest.name": _NAME,
    "CombineVectorsRequest.terms": Count(1000),
    "VectorTerm.name": _NAME,
    "VectorTerm.coefficient": _FINITE,
    "InnerProductsRequest.left": Text(128, most=1000),
    "InnerProductsRequest.right": Text(128, most=1000),
    "OrthonormaliseVectorsRequest.names": Text(128, most=1000),
    "OrthonormaliseVectorsRequest.tolerance": Number(0.0, 1.0),
    "SolveHeader.diagonal_samples": Number(0, 1000),
    "SolveHeader.seed": _SEED,
    "MarginalLikelihoodRequest.priors": Number(1e-100, 1e100, most=1000),
    "MarginalLikelihoodRequest.parameter_priors": Count(1000),
    "ParameterPriors.by_parameter": Number(1e-100, 1e100, most=2**31 - 1),
    "ParameterPriors.stored": _NAME,
    "InfluenceHeader.rows": Number(0, _INT64),
    "InfluenceHeader.stored": _NAME,
    "InfluenceHeader.other_session_id": _ID,
    "JacobianProductHeader.operand": _NAME,
    "JacobianProductHeader.parameters": _TENSOR,
    "SolveHeader.b": _NAME,
    "SolveHeader.dampings": Number(-_LARGEST, _LARGEST, most=64),
    "SolveHeader.x0": _NAME,
    "SolveHeader.preconditioner": _NAME,
    **_rules_of_queries(),
}
"""By message and field, of those that are not `COMMON`."""

ELSEWHERE: Mapping[str, str] = {
    "RegisterModelHeader.config_json": "registration.model_spec: 1 MiB, a JSON object",
    "Graph": "graph.decode: all that is in it",
    "*.chunk": "the transport: one message; then wire.Assembler",
    "MultiplyRequest.tensors": "the transport: one message; then wire.Assembler",
}
"""What has its rule in another place, and where."""


def rule_of(field: FieldDescriptor) -> Rule | None:
    """Find the rule of a field; None if it is judged elsewhere."""
    found = RULES.get(field.full_name.removeprefix(_PACKAGE))
    return COMMON.get(field.name) if found is None else found


def check(message: Message) -> None:
    """Refuse a request with a value that is out of range.

    Args:
        message: The message that a caller gave, not checked yet.

    Raises:
        InvalidSpec: If a number or a text is; the message names field and range.
        LimitExceeded: If a field has too many values.
    """
    for field, value in message.ListFields():
        check_value = _check_of(field)
        if check_value is not None:
            check_value(value)


@functools.cache
def _check_of(field: FieldDescriptor) -> Callable[[Any], None] | None:
    """Find what checks a field's value; every call asks, so the answers are kept.

    Args:
        field: A field of the contract, of which there are finitely many.

    Returns:
        The check; None if nothing is to be checked here.
    """
    rule, kind = rule_of(field), field.message_type
    each: Callable[[Any], None] | None = None
    if kind is not None and kind.full_name == f"{_PACKAGE}Graph":
        return None
    if kind is not None and kind.full_name == Duration.DESCRIPTOR.full_name:
        if isinstance(rule, Number):
            each = functools.partial(_check_duration, field.name, rule)
    elif kind is not None:
        each = check
    elif isinstance(rule, Number | Text):
        each = functools.partial(rule.check, field.name)
    if not isinstance(field.default_value, list):  # it is not repeated
        return each
    most = _MOST if rule is None else rule.most
    return functools.partial(_check_all, field.name, most, each)


def _check_duration(name: str, rule: Number, value: Duration) -> None:
    rule.check(name, value.seconds + value.nanos / 1e9)


def _check_all(
    name: str, most: int, each: Callable[[Any], None] | None, values: Any
) -> None:
    if len(values) > most:
        msg = f"{name} has {len(values)} values; the limit is {most}"
        raise LimitExceeded(msg, values=len(values), limit=most)
    if each is not None:
        for value in values:
            each(value)
