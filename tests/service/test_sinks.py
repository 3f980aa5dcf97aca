"""Results on their way: the chunks of whoever takes long ones are joined."""

import asyncio
import zlib

import numpy as np
import pytest

from curvd.contract import RPCS
from curvd.http2 import messages
from curvd.tensors import chunks
from curvd.v1 import curvature_service_pb2 as pb
from curvd_server.service.result_encoding import Format
from curvd_server.service.sinks import StreamSink, deliver
from curvd_server.service.streams import LONGEST_CHUNK


@pytest.mark.parametrize(
    "longest, counts",
    [(0, [1, 1, 1, 1, 1, 1]), (10 << 20, [1, 1, 4]), (4 << 20, [1, 1, 2, 2])],
)
def test_a_result_is_the_same_however_long_its_chunks_are(monkeypatch, longest, counts):
    monkeypatch.setattr(messages, "_QUICK_BYTES_PER_S", 0)
    rows = np.random.default_rng(0).standard_normal(2_400_000, dtype=np.float32)
    sent = []

    async def send(part):
        sent.append(part)

    async def run():
        LONGEST_CHUNK.set(longest)
        sink = StreamSink(send, Format("F32", RPCS["MatVec"], checksum=True))
        await deliver(sink, pb.ResultHeader(), rows, pb.ResultSummary())

    asyncio.run(run())
    header, *parts, summary = sent
    assert header.HasField("header")
    pieces = [part if isinstance(part, tuple) else (part,) for part in parts]
    assert [len(views) for views in pieces] == counts
    views = [view for joined in pieces for view in joined]
    result = chunks.load(iter(views), max_bytes=rows.nbytes)["result"]
    assert np.array_equal(result, rows)
    assert summary.summary.crc32 == zlib.crc32(rows)
