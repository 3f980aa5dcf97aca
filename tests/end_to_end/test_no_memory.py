"""A host without memory: whatever cannot be allocated, the caller gets a typed error."""

import errno
import mmap
import os
import sys

import numpy as np
import pytest
import raw

torch = pytest.importorskip("torch")
from support.requests import Requests, serving  # noqa: E402
from support.served import Channels  # noqa: E402

from curvd.contract.rpcs import RPCS  # noqa: E402
from curvd.errors import CurvdError, OutOfMemory, ResourceExhausted  # noqa: E402
from curvd.tensors.buffer_pool import Pool  # noqa: E402
from curvd.v1 import session_service_pb2 as session_pb  # noqa: E402

NUMPY = MemoryError("Unable to allocate 8.00 TiB for an array")
TORCH = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8796093022208 bytes. Error code 12 (Cannot allocate memory)"
)
SYSTEM = OSError(errno.ENOMEM, "Cannot allocate memory")
ALLOCATORS = [
    (np, "empty", NUMPY),
    (np, "zeros", NUMPY),
    (np, "concatenate", NUMPY),
    (np, "ascontiguousarray", NUMPY),
    (Pool, "take", NUMPY),
    (torch, "empty", TORCH),
    (torch, "zeros", TORCH),
    (torch, "empty_like", TORCH),
    (torch, "from_numpy", TORCH),
    (mmap, "mmap", SYSTEM),
    (os, "memfd_create", SYSTEM),
]


def asked_by_the_server():
    """Whether code of the server is what called an allocator."""
    frame = sys._getframe(2)
    while frame is not None:
        if "curvd_server" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class Exhausted:
    """An allocator that has nothing left for the server."""

    def __init__(self, original, error):
        self.original, self.error, self.refused = original, error, 0

    def __call__(self, *args, **kwargs):
        if asked_by_the_server():
            self.refused += 1
            raise self.error
        return self.original(*args, **kwargs)

    def __get__(self, instance, owner):
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    with (
        serving(tmp_path_factory.mktemp("data")) as target,
        Channels(target) as channel,
    ):
        yield Requests(channel)


@pytest.mark.parametrize("name", RPCS)
def test_whatever_cannot_be_allocated_is_a_typed_error(requests, monkeypatch, name):
    before = requests.product()
    for place, what, error in ALLOCATORS:
        allocator = Exhausted(getattr(place, what), error)
        with monkeypatch.context() as patch:
            patch.setattr(place, what, allocator)
            try:
                requests.send(name, *requests.right(name))
            except CurvdError as caught:
                typed = isinstance(caught, OutOfMemory | ResourceExhausted)
                assert typed or not allocator.refused, (what, caught)
    np.testing.assert_array_equal(requests.product(), before)


def test_a_session_whose_opening_found_no_memory_is_not_there(requests, monkeypatch):
    listed = session_pb.ListSessionsRequest()
    before = raw.call(requests.channel, "ListSessions", listed).sessions
    for place, what, error in ALLOCATORS:
        with monkeypatch.context() as patch:
            patch.setattr(place, what, Exhausted(getattr(place, what), error))
            message, chunks = requests.right("CreateSession")
            message.operators.add().kind = "OPERATOR_KIND_EMPIRICAL_FISHER"
            try:
                made = requests.send("CreateSession", message, chunks).session
            except OutOfMemory:
                continue
        request = session_pb.DeleteSessionRequest(session_id=made.id)
        raw.call(requests.channel, "DeleteSession", request)
    after = raw.call(requests.channel, "ListSessions", listed).sessions
    assert {s.id for s in after} == {s.id for s in before}
