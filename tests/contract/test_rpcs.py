"""Hand-made framing and generated code are one wire format."""

from concurrent import futures

import grpc
import pytest
from support import fake_service

import curvd
from curvd.contract.rpcs import RPCS
from curvd.v1 import curvature_service_pb2 as pb
from curvd.v1 import curvature_service_pb2_grpc as pb_grpc
from curvd.v1 import session_service_pb2_grpc

CODEC = RPCS["MatVec"].request
SIZES = [0, 1, 127, 128, 16383, 16384, 2 << 20, (2 << 20) + 1]


def test_the_table_has_every_method_with_its_shape():
    shapes = {name: rpc.shape for name, rpc in RPCS.items()}
    assert (
        shapes.items()
        >= {
            "RegisterModel": "stream_unary",
            "RegisterDataset": "stream_unary",
            "CreateSession": "unary_unary",
            "GetSession": "unary_unary",
            "ListSessions": "unary_unary",
            "RenewSession": "unary_unary",
            "DeleteSession": "unary_unary",
            "UpdateParameters": "stream_unary",
            "GetServerInfo": "unary_unary",
            "MatVec": "stream_stream",
            "MatMat": "stream_stream",
            "Gradient": "unary_stream",
        }.items()
    )
    assert RPCS["MatVec"].path == "/curvd.v1.CurvatureService/MatVec"


@pytest.mark.parametrize("size", SIZES)
def test_a_chunk_is_the_generated_message_both_ways(size):
    data = bytes(size % 251 for _ in range(1)) * size
    assert (
        CODEC.dump(memoryview(data)) == pb.MatVecRequest(chunk=data).SerializeToString()
    )
    part = CODEC.load(pb.MatVecRequest(chunk=data).SerializeToString())
    assert isinstance(part, memoryview)
    assert part == data


def test_other_spellings_of_a_chunk_are_understood():
    twice = CODEC.dump(memoryview(b"a")) + CODEC.dump(memoryview(b"bc"))
    assert CODEC.load(twice) == b"bc"  # protobuf: the last one counts
    padded = b"\x12\x83\x00abc"  # a varint longer than it need be
    assert CODEC.load(padded) == b"abc"


def test_headers_are_messages():
    header = pb.MatVecRequest(header=pb.ProductHeader(session_id="s"))
    assert CODEC.load(CODEC.dump(header)) == header


@pytest.mark.parametrize(
    "data", [b"\x12\x05abc", b"\x12\xff\xff\xff\xff\xff\xff", b"\xff"]
)
def test_what_is_no_message_raises(data):
    from google.protobuf.message import DecodeError

    with pytest.raises(DecodeError):
        CODEC.load(data)


def test_a_generated_client_is_served_by_hand_made_framing(service, target):
    import numpy as np

    from curvd.tensors import chunks as wire

    with curvd.connect(target) as client:
        session = client.create_session("m", "d", loss="mse", dtype="F64")
    v = np.ones(fake_service.P)

    def requests():
        yield pb.MatVecRequest(header=pb.ProductHeader(session_id=session.id))
        for chunk in wire.chunks({"v": v}):
            yield pb.MatVecRequest(chunk=bytes(chunk))

    with grpc.insecure_channel(target) as channel:
        responses = list(pb_grpc.CurvatureServiceStub(channel).MatVec(requests()))
    chunks = [r.chunk for r in responses if r.WhichOneof("part") == "chunk"]
    result = wire.load(map(memoryview, chunks), max_bytes=1 << 20)["result"]
    np.testing.assert_allclose(result, fake_service.MATRIX @ v)


def test_a_generated_server_serves_hand_made_framing(streams):
    import numpy as np

    service = fake_service.FakeService()

    class Sessions(session_service_pb2_grpc.SessionServiceServicer):
        def CreateSession(self, request, context):
            return next(service.CreateSession(iter([request])))

    class Curvature(pb_grpc.CurvatureServiceServicer):
        def MatMat(self, requests, context):
            parts = (
                r if r.WhichOneof("part") == "header" else memoryview(r.chunk)
                for r in requests
            )
            for part in service.MatMat(parts):
                if isinstance(part, memoryview):
                    part = pb.MatMatResponse(chunk=bytes(part))
                yield part

    server = grpc.server(futures.ThreadPoolExecutor(2))
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(Sessions(), server)
    pb_grpc.add_CurvatureServiceServicer_to_server(Curvature(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with curvd.connect(f"127.0.0.1:{port}") as client:
            session = client.create_session("m", "d", loss="mse", dtype="F64")
            product = session.hessian() @ np.eye(fake_service.P)
    finally:
        server.stop(None).wait()
    np.testing.assert_allclose(product, fake_service.MATRIX)
