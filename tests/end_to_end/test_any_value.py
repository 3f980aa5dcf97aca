"""Every field of every request at the ends of its type: a typed error or an answer.

Derived from the contract, against a real server: no value is a defect of curvd, none
hangs, and afterwards the server starts again and has what it acknowledged.
"""

import contextlib
import math

import numpy as np
import pytest
import raw
from google.protobuf.descriptor import FieldDescriptor

torch = pytest.importorskip("torch")
from support.requests import Requests, serving  # noqa: E402
from support.served import Channels  # noqa: E402

from curvd.contract.rpcs import RPCS  # noqa: E402
from curvd.errors import (  # noqa: E402
    CurvdError,
    DeadlineExceeded,
    Internal,
    SessionNotFound,
)
from curvd.v1 import session_service_pb2 as session_pb  # noqa: E402

PATIENCE_S = 120
TIMED = ("CreateSession", "OpenSession", "MatVec", "Influence")
"""RPCs whose operators have their plans timed: between them they set every field of a
session and of an operator, and other RPCs build the same ones in the same place."""
# --- what is wrong ----------------------------------------------------------------------

_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_REAL = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
_TEXTS = [
    "",
    "\0",
    "\x1b[2J\r\n\t\u202e",
    "../../etc/passwd",
    "é\u00ad\U0001f600",
    "[",
    "*" * 200,
    "x" * 129,
    "x" * 5000,
    "[]",
    "{",
    '{"widths": [1e999, "\\ud800"]}',
    '{"widths": ' + "[" * 50_000,
    "NaN",
    "%s%n{0}",
]


def values_of(field):
    """What a field of a request is set to."""
    kind = field.cpp_type
    if kind in _WHOLE:
        low, high = _WHOLE[kind]
        ends = [low, low + 1, -1, 0, 1, 3, 2**31, 2**53 + 1, high - 1, high]
        return sorted({v for v in ends if low <= v <= high})
    if kind in _REAL:
        tiny, huge = 5e-324, 1.7976931348623157e308
        return [math.nan, math.inf, -math.inf, -0.0, tiny, -tiny, -1.0, 1e-300, huge]
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        known = [v.number for v in field.enum_type.values]
        return [*known, -1, max(known) + 1, 2**31 - 1, -(2**31)]
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return [False, True]
    if field.type == FieldDescriptor.TYPE_BYTES:
        return [b"", b"\xff" * 31, b"\0" * 32, b"x" * 5000]
    return _TEXTS


def is_message(field):
    return field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE


def is_repeated(field):
    return field.is_repeated


def paths(descriptor, seen=()):
    """Fields of a message and of those in it; a graph has tests of its own."""
    for field in descriptor.fields:
        if is_message(field) and field.message_type.name == "Graph":
            continue
        yield (*seen, field)
        if is_message(field) and field not in seen:
            yield from paths(field.message_type, (*seen, field))


def changed(message, path, value):
    """Set the field at the end of a path; those on the way are made."""
    *way, last = path
    for field in way:
        inner = getattr(message, field.name)
        if is_repeated(field):
            message = inner[0] if len(inner) else inner.add()
        else:
            inner.SetInParent()
            message = inner
    if not is_repeated(last):
        setattr(message, last.name, value)
    else:
        del getattr(message, last.name)[:]
        getattr(message, last.name).extend(value)


def variants(rpc, base):
    """All changed requests of an RPC, and what was changed."""
    whole = rpc.request.message.DESCRIPTOR
    for path in paths(whole):
        if path[-1].name in ("chunk", "tensors") and len(path) == 1:
            continue
        name, last = ".".join(field.name for field in path), path[-1]
        if is_message(last):
            for how in ("cleared", "empty"):
                message = base()
                inner = message
                for field in path[:-1]:
                    inner = getattr(inner, field.name)
                    inner = inner.add() if is_repeated(field) else inner
                inner.ClearField(last.name)
                if how == "empty" and is_repeated(last):
                    getattr(inner, last.name).add()
                elif how == "empty":
                    getattr(inner, last.name).SetInParent()
                yield f"{name} {how}", message
            continue
        values = values_of(last)
        if is_repeated(last):
            values = [[], *([v] for v in values), [values[-1]] * 2, [values[1]] * 1001]
        for value in values:
            message = base()
            changed(message, path, value)
            yield f"{name} = {value!r:.60}", message


# --- how it is answered ------------------------------------------------------------------


def defects(server, name):
    """Send all variants of a request; list those that no caller should see."""
    found = []
    for what, message in variants(RPCS[name], lambda: server.right(name)[0]):
        try:
            answer = server.send(
                name, message, server.right(name)[1], patience_s=PATIENCE_S
            )
        except (Internal, DeadlineExceeded) as error:
            found.append(f"{what}: {type(error).__name__}: {error}")
        except CurvdError as error:
            if type(error) is CurvdError:
                found.append(f"{what}: {error}")
        else:
            if name == "OpenSession":
                answer = answer[-1]
            if name in ("CreateSession", "OpenSession") and answer.session.id:
                delete = session_pb.DeleteSessionRequest(session_id=answer.session.id)
                with contextlib.suppress(SessionNotFound):  # a lease of a nanosecond
                    raw.call(server.channel, "DeleteSession", delete)
    return found


@pytest.mark.parametrize("name", RPCS)
def test_no_value_of_any_field_is_a_defect(tmp_path, request, name):
    if name not in TIMED:
        request.getfixturevalue("untimed")
    with serving(tmp_path) as target, Channels(target) as channel:
        server = Requests(channel)
        before = server.product()
        assert defects(server, name) == []
        kept = server.session
        if name == "RenewSession":  # its lease may be over by now
            kept = server.session = server.create()
    with serving(tmp_path) as target, Channels(target) as channel:
        listed = raw.call(channel, "ListSessions", session_pb.ListSessionsRequest())
        assert kept in {s.id for s in listed.sessions}
        np.testing.assert_allclose(Requests(channel, kept).product(), before)
