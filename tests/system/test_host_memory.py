"""One limit for what is held in the host's memory, and who is told what."""

import gc

import numpy as np
import pytest
import raw
from service.test_result_cache import ASKED, kept
from support.fake_device import middle, put
from support.served import server

from curvd.errors import LimitExceeded, Overloaded
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.config import LimitsConfig
from curvd_server.device.batcher import Batcher
from curvd_server.sessions.stored_vectors import Vector, Vectors
from curvd_server.system import host_memory
from curvd_server.system.host_memory import CALLS, SNAPSHOTS, VECTORS, HostMemory


def test_what_does_not_fit_names_the_limit_and_who_holds_it():
    memory = HostMemory(100)
    memory.take(SNAPSHOTS, 60)
    memory.take(VECTORS, 30)
    with pytest.raises(
        LimitExceeded,
        match=r"11 bytes more for stored vectors exceed .* 100 bytes .*memory_bytes.*"
        "datasets and states 60, stored vectors 30. Delete sessions",
    ):
        memory.take(VECTORS, 11)
    memory.give(SNAPSHOTS, 60)
    memory.take(VECTORS, 11)
    assert memory.held() == {SNAPSHOTS: 0, VECTORS: 41}


def test_what_fits_when_the_calls_are_over_may_be_asked_for_again():
    memory = HostMemory(100)
    memory.take(CALLS, 60)
    with pytest.raises(Overloaded, match=r"retry in 1.0 s") as caught:
        memory.take(SNAPSHOTS, 50)
    assert caught.value.retry_after_s == 1.0
    with pytest.raises(LimitExceeded):
        memory.take(SNAPSHOTS, 101)


def test_caches_stand_in_nobodys_way_and_let_go():
    memory = HostMemory(100)
    results, _ = kept(memory=memory)
    for number in range(3):
        results.put(("s", str(number)), ASKED, number, 40)
    assert results.nbytes == 80  # the third found no room
    memory.take(VECTORS, 70)
    results.expire()
    assert results.nbytes == 0
    memory.give(VECTORS, 30)
    results.put(("s", "r"), ASKED, "value", 50)
    assert results.get(("s", "r"), ASKED) == "value"


def test_sessions_share_the_memory_of_stored_vectors():
    memory = HostMemory(100)
    one, other = Vectors("s", 100, memory), Vectors("t", 100, memory)
    one.put("v", Vector(np.zeros(8), 1))
    with pytest.raises(LimitExceeded, match="memory_bytes"):
        other.check_room("w", 64)
    with pytest.raises(LimitExceeded, match="memory_bytes"):
        other.put("w", Vector(np.zeros(8), 1))
    one.put("v", Vector(np.zeros(9), 1))  # in place of the other
    assert memory.held() == {VECTORS: 72}
    one.delete("v")
    other.put("w", Vector(np.zeros(8), 1))
    other.clear()
    assert memory.held() == {VECTORS: 0}


def test_calls_hold_what_they_reserve():
    memory = HostMemory(100)
    batcher = Batcher(
        run_columns=4,
        run_bytes=99,
        pending_columns=8,
        pending_bytes=1000,
        memory=memory,
    )
    try:
        with batcher.reserve(1, 60):
            assert memory.held() == {CALLS: 60}
            with pytest.raises(Overloaded, match="memory_bytes"):
                with batcher.reserve(1, 60):
                    pass
        assert memory.held() == {CALLS: 0}
        memory.take(VECTORS, 50)
        with pytest.raises(LimitExceeded, match="Delete stored vectors"):
            with batcher.reserve(1, 60):
                pass
    finally:
        batcher.close()


async def test_datasets_are_held_once_for_all_their_sessions(tmp_path):
    with middle(tmp_path) as it:
        digest = put(it.blobs, {"x": np.zeros(1000)})
        first, second = it.blobs.open(digest), it.blobs.open(digest)
        assert it.memory.held()[SNAPSHOTS] == first.total_bytes
        view = second.arrays["x"]
        del first, second
        gc.collect()
        assert it.memory.held()[SNAPSHOTS] > 8000  # somebody looks at it
        del view
        gc.collect()
        assert it.memory.held()[SNAPSHOTS] == 0


def test_a_dataset_that_does_not_fit_is_refused_and_the_server_is_up(tmp_path):
    limits = LimitsConfig(memory_bytes=100_000)
    large = raw.file_of({"x": np.zeros((4, 4000)), "y": np.zeros(4)})
    with server(tmp_path, limits=limits) as channel:
        with pytest.raises(
            LimitExceeded, match=r"datasets and states exceed .* 100000"
        ):
            raw.register_dataset(channel, large)
        made = raw.fake_session(channel)
        name = curvature_pb.PutVectorHeader(session_id=made.id, name="v")
        first = curvature_pb.PutVectorRequest(header=name)
        data = raw.file_of({"v": np.zeros((4000, 5))})
        with pytest.raises(LimitExceeded, match=r"stored vectors .*memory_bytes"):
            raw.call(channel, "PutVector", [first, memoryview(data)])


@pytest.mark.parametrize(
    ("text", "share"), [("1000\n", 800), ("max\n", None), (None, None)]
)
def test_the_limit_is_a_share_of_the_container_or_the_machine(
    tmp_path, monkeypatch, text, share
):
    class Path(type(tmp_path)):
        def read_text(self, *args):
            if text is None or "limit_in_bytes" in self.name:
                raise FileNotFoundError
            return text

    monkeypatch.setattr(host_memory, "Path", Path)
    total = host_memory.psutil.virtual_memory().total
    assert host_memory.default_bytes() == (int(total * 0.8) if share is None else share)
