"""Every number and text of the contract has a rule, and nothing passes outside it."""

import math

import pytest
import raw
from google.protobuf.descriptor import FieldDescriptor
from support.served import server

from curvd.contract.rpcs import RPCS, Framed
from curvd.errors import CurvdError, InvalidSpec, LimitExceeded
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import query_service_pb2 as query_pb
from curvd.v1 import session_service_pb2 as session_pb
from curvd.v1 import types_pb2 as types_pb
from curvd_server.storage.ranges import (
    ELSEWHERE,
    LONGEST_LEASE_S,
    RULES,
    Count,
    Text,
    check,
    rule_of,
)

FREE = {FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_ENUM}
"""Whatever is in them is judged where they are converted."""


def fields():
    """Every field that a request can carry, by its name in the table."""
    found, seen = {}, set()

    def visit(descriptor):
        if descriptor.full_name in seen:
            return
        seen.add(descriptor.full_name)
        for field in descriptor.fields:
            name = field.full_name.removeprefix("curvd.v1.")
            kind = field.message_type
            if kind is None or kind.full_name == "google.protobuf.Duration":
                found[name] = field
            elif kind.name not in ELSEWHERE:
                visit(kind)

    for rpc in RPCS.values():
        visit(rpc.request.message.DESCRIPTOR)
    return found


FIELDS = fields()


def test_every_number_and_text_of_the_contract_has_a_rule():
    without = [
        name
        for name, field in FIELDS.items()
        if field.type not in FREE
        and rule_of(field) is None
        and name not in ELSEWHERE
        and f"*.{field.name}" not in ELSEWHERE
    ]
    assert without == [], "write a rule into curvd_server.storage.ranges"


def test_no_rule_is_for_a_field_that_is_not_there():
    counts = {name for name, rule in RULES.items() if isinstance(rule, Count)}
    assert set(RULES) - counts <= set(FIELDS)


def beyond(rule, field):
    """Values just outside a rule, as far as the field's type has them."""
    integral = field.cpp_type in (
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_UINT32,
        FieldDescriptor.CPPTYPE_UINT64,
    )
    if isinstance(rule, Text):
        blank = b"x" if field.type == FieldDescriptor.TYPE_BYTES else "x"
        return [blank * (rule.longest + 1)]
    if integral:
        return [rule.low - 1, rule.high + 1]
    return [
        *([rule.low] if rule.above else [math.nextafter(rule.low, -math.inf)]),
        math.nextafter(rule.high, math.inf),
        math.nan,
        math.inf,
    ]


def within(rule):
    if isinstance(rule, Text):
        return []
    return [rule.high] if rule.above else [rule.low, rule.high]


def message_with(name, value):
    """A message of the contract with one field set; None if it cannot have the value."""
    field = FIELDS[name]
    kinds = (session_pb, curvature_pb, query_pb, types_pb)
    (kind,) = (
        getattr(m, field.containing_type.name)
        for m in kinds
        if hasattr(m, field.containing_type.name)
    )
    message = kind()
    try:
        if field.message_type is not None:
            target = getattr(message, field.name)
            target.SetInParent()
            target.seconds = int(value)
            target.nanos = round((value - int(value)) * 1e9)
        elif hasattr(getattr(message, field.name), "append"):
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    except (ValueError, OverflowError):
        return None  # the wire cannot carry it either
    return message


CHECKED = [
    name
    for name, field in FIELDS.items()
    if rule_of(field) is not None and not isinstance(rule_of(field), Count)
]


@pytest.mark.parametrize("name", CHECKED)
def test_what_is_outside_a_rule_is_refused_and_named(name):
    rule, field = rule_of(FIELDS[name]), FIELDS[name]
    for value in beyond(rule, field):
        message = message_with(name, value)
        # A default that is not on the wire cannot be told from one that is left out.
        if message is not None and message.ListFields():
            with pytest.raises(InvalidSpec, match=field.name):
                check(message)
    for value in within(rule):
        message = message_with(name, value)
        if message is not None:
            check(message)


def test_values_are_found_however_deep_they_lie():
    request = curvature_pb.MatVecRequest()
    request.header.operator.damping = math.nan
    with pytest.raises(InvalidSpec, match="damping must be finite, got nan"):
        check(request)
    request = session_pb.CreateSessionRequest()
    request.operators.add().seed = 1 << 63
    with pytest.raises(
        InvalidSpec, match=r"seed must be in \[0, 9223372036854775807\]"
    ):
        check(request)


def test_repeated_fields_have_a_number_of_values():
    request = session_pb.CreateSessionRequest(params=["*"] * 1001)
    with pytest.raises(
        LimitExceeded, match="params has 1001 values; the limit is 1000"
    ):
        check(request)
    request = session_pb.CreateSessionRequest()
    request.operators.extend([types_pb.Operator()] * 101)
    with pytest.raises(LimitExceeded, match="operators has 101 values"):
        check(request)


YEARS = 365 * 24 * 3600


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [
        (10_000 * YEARS, 0),
        (0, 0),
        (-1, 0),
        (0, -5),
        (2**62, 0),
        (LONGEST_LEASE_S, 10**6),
    ],
)
def test_a_lease_out_of_range_is_refused_and_nothing_is_written(
    tmp_path, seconds, nanos
):
    with server(tmp_path) as channel:
        lease = {"seconds": seconds, "nanos": nanos}
        with pytest.raises(InvalidSpec, match=r"lease must be (in|positive)"):
            raw.fake_session(channel, lease=lease)
        made = raw.fake_session(channel, lease={"seconds": LONGEST_LEASE_S})
        request = session_pb.RenewSessionRequest(session_id=made.id, lease=lease)
        with pytest.raises(InvalidSpec, match=r"lease must be (in|positive)"):
            raw.call(channel, "RenewSession", request)
        listed = raw.call(channel, "ListSessions", session_pb.ListSessionsRequest())
        assert [s.expire_time.seconds for s in listed.sessions] == [
            made.expire_time.seconds
        ]


def test_every_rpc_is_checked_before_its_method(tmp_path):
    """With a text that is too long, wherever a request has one."""
    with server(tmp_path) as channel:
        for name, rpc in RPCS.items():
            request = rpc.request.message()
            inner = request
            if hasattr(request, "header"):
                inner = request.header
            if hasattr(inner, "query"):
                inner = inner.query
            texts = [
                f.name
                for f in inner.DESCRIPTOR.fields
                if rule_of(f) is not None
                and f.type == FieldDescriptor.TYPE_STRING
                and isinstance(getattr(inner, f.name), str)
            ]
            if not texts:
                continue
            setattr(inner, texts[0], "x" * 5000)
            sent = [request] if rpc.client_streams else request
            if rpc.request.framed:
                sent = Framed(request, ())
            with pytest.raises(CurvdError, match=f"{texts[0]} has 5000 characters"):
                raw.call(channel, name, sent)
