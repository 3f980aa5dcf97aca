"""Products through the real service: one message, results that go on, what is stored."""

import hashlib
import zlib

import grpc
import numpy as np
import pytest
import raw
from support.fake_device import FakeDevice
from support.served import server

from curvd.contract.rpcs import RPCS, Framed
from curvd.errors import (
    InvalidSpec,
    InvalidVector,
    LimitExceeded,
    RequestIdReused,
    ResultNotKept,
    VectorNotFound,
)
from curvd.tensors import chunks as wire
from curvd.tensors import safetensors_header
from curvd.tensors.half_precision import narrow
from curvd.tensors.random_probes import probes
from curvd.v1 import curvature_service_pb2 as pb
from curvd_server.config import LimitsConfig

V = np.array([1.0, -2.0, 3.0, 0.5, 7.0])
RESULT = 5 * V  # the fake's Hessian is 5 times the identity

pytestmark = pytest.mark.usefixtures("answers")


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def channel(tmp_path, device):
    with server(tmp_path, device) as channel:
        yield channel


@pytest.fixture
def session_id(channel):
    return raw.fake_session(channel).id


def multiply(channel, session_id, arrays=None, **fields):
    """One message each way."""
    header = pb.ProductHeader(session_id=session_id, **fields)
    data = raw.file_of(arrays) if arrays else b""
    request = Framed(pb.MultiplyRequest(header=header), (memoryview(data),))
    response = raw.call(channel, "Multiply", request)
    assert response.message.HasField("header")
    assert response.message.HasField("summary")
    if not response.tensors[0].nbytes:
        return None
    return wire.load(iter(response.tensors), max_bytes=1 << 20)["result"]


def resume(data, offset):
    """What the caller has of a payload."""
    return pb.Resume(offset=offset, sha256=hashlib.sha256(data[:offset]).digest())


def applied(device):
    """Columns that were computed."""
    return sum(sum(operator.seen) for operator in device.operators)


def put(channel, session_id, name, array):
    header = pb.PutVectorHeader(session_id=session_id, name=name)
    first = pb.PutVectorRequest(header=header)
    data = memoryview(raw.file_of({"v": array}))
    return raw.call(channel, "PutVector", [first, *wire.pieces(data)]).vector


def get(channel, session_id, name, **fields):
    request = pb.GetVectorRequest(session_id=session_id, name=name, **fields)
    return raw.joined(raw.call(channel, "GetVector", request))[1]


def test_one_message_each_way_for_vectors_and_columns(channel, session_id):
    np.testing.assert_array_equal(multiply(channel, session_id, {"v": V}), RESULT)
    columns = np.stack([V, 2 * V])
    product = multiply(channel, session_id, {"v": columns})
    np.testing.assert_array_equal(product, 5 * columns)


@pytest.mark.parametrize(
    ("arrays", "kind"),
    [
        ({"v": V[:3]}, InvalidVector),
        ({"w": V}, InvalidVector),
        ({"v": V.astype("f4")}, InvalidVector),
        ({"v": V * np.inf}, InvalidVector),
    ],
)
def test_one_message_is_checked_like_a_stream(channel, session_id, arrays, kind):
    with pytest.raises(kind):
        multiply(channel, session_id, arrays)


def test_a_request_that_comes_again_is_answered_without_computing(
    channel, session_id, device
):
    for _ in range(3):
        product = multiply(channel, session_id, {"v": V}, request_id="r")
        np.testing.assert_array_equal(product, RESULT)
    assert applied(device) == 1
    multiply(channel, session_id, {"v": V})  # no id, nothing to recognise
    assert applied(device) == 2


def test_an_id_with_another_operand_or_operator_is_refused(channel, session_id):
    multiply(channel, session_id, {"v": V}, request_id="r")
    with pytest.raises(RequestIdReused, match="'r' came before with other content"):
        multiply(channel, session_id, {"v": 2 * V}, request_id="r")
    with pytest.raises(RequestIdReused):
        multiply(
            channel, session_id, {"v": V}, request_id="r", operator={"damping": 1.0}
        )


@pytest.mark.parametrize("cut", [1, 8, 12, 1000])
def test_an_operand_is_recognised_in_whatever_pieces_it_comes(
    channel, session_id, device, cut
):
    def ask(operand):
        file = memoryview(raw.file_of({"v": operand}))
        header, _ = raw.product("MatVec", session_id, file, request_id="r")
        cuts = [file[at : at + cut] for at in range(0, len(file), cut)]
        return raw.joined(raw.call(channel, "MatVec", [header, *cuts]))[1]

    multiply(channel, session_id, {"v": V}, request_id="r")
    np.testing.assert_array_equal(ask(V), RESULT)
    assert applied(device) == 1
    with pytest.raises(RequestIdReused, match="'r' came before with other content"):
        ask(V + np.eye(5)[4])


def test_results_of_an_older_version_are_not_taken_for_newer_ones(
    channel, session_id, device
):
    multiply(channel, session_id, {"v": V}, request_id="r")
    data = raw.file_of({"a": np.full(2, 3.0)})
    rpc = RPCS["UpdateParameters"]
    header = {"session_id": session_id, "values": raw.upload(data)}
    raw.call(
        channel,
        "UpdateParameters",
        [rpc.request.message(header=header), memoryview(data)],
    )
    product = multiply(channel, session_id, {"v": V}, request_id="r")
    np.testing.assert_array_equal(product, 9 * V)


def test_a_result_goes_on_at_its_byte_without_its_operand(channel, session_id, device):
    data = raw.file_of({"v": V})
    request = raw.product("MatVec", session_id, data, request_id="r")
    _, *chunks, _ = raw.call(channel, "MatVec", request)
    payload = bytes(chunks[1])
    again = raw.product(
        "MatVec",
        session_id,
        b"",
        request_id="r",
        resume=resume(payload, 16),
        checksum=True,
    )
    header, *chunks, summary = raw.call(channel, "MatVec", again)
    assert header.header.offset == 16
    assert bytes(chunks[1]) == payload[16:]
    assert summary.summary.crc32 == zlib.crc32(payload)
    assert applied(device) == 1


def test_a_result_that_is_not_kept_needs_its_operand(channel, session_id, device):
    again = raw.product(
        "MatVec", session_id, b"", request_id="new", resume=resume(b"", 0)
    )
    with pytest.raises(ResultNotKept, match="'new' is not kept any more"):
        raw.call(channel, "MatVec", again)
    payload = RESULT.tobytes()
    whole = raw.product(
        "MatVec",
        session_id,
        raw.file_of({"v": V}),
        request_id="new",
        resume=resume(payload, 24),
    )
    header, *chunks, _ = raw.call(channel, "MatVec", whole)
    assert header.header.offset == 24
    assert bytes(chunks[1]) == payload[24:]


def test_whoever_has_something_else_gets_all_of_it(channel, session_id):
    other = resume(b"\0" * 40, 24)
    data = raw.file_of({"v": V})
    parts = raw.call(
        channel, "MatVec", raw.product("MatVec", session_id, data, resume=other)
    )
    assert parts[0].header.offset == 0
    np.testing.assert_array_equal(raw.joined(parts)[1], RESULT)


def test_gradients_go_on_too(channel, session_id):
    payload = np.full(5, 5.0).tobytes()
    request = pb.GradientRequest(session_id=session_id, resume=resume(payload, 8))
    header, *chunks, _ = raw.call(channel, "Gradient", request)
    assert header.header.offset == 8
    assert bytes(chunks[1]) == payload[8:]


@pytest.mark.parametrize("name", ["MatMat", "Multiply"])
def test_where_nothing_can_go_on_it_is_refused(channel, session_id, name):
    with pytest.raises(InvalidSpec, match=name):
        if name == "MatMat":
            data = raw.file_of({"v": V[None]})
            request = raw.product(name, session_id, data, resume=resume(b"", 0))
            raw.call(channel, name, request)
        else:
            multiply(channel, session_id, {"v": V}, resume=resume(b"", 0))
    with pytest.raises(InvalidSpec, match="must not be negative"):
        bad = pb.Resume(offset=-1)
        request = raw.product(
            "MatVec", session_id, raw.file_of({"v": V}), resume=bad, request_id=""
        )
        raw.call(channel, "MatVec", request)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_few_bits_are_widened_and_results_rounded(channel, session_id, dtype):
    exact = np.array([1.0, -2.0, 3.0, 0.5, 7.0])  # all of them fit
    bits = narrow(exact, dtype)
    header = {"v": safetensors_header.TensorHeader(dtype, (5,), 0)}
    data = safetensors_header.dump_header(header) + bits.tobytes()
    request = raw.product("MatVec", session_id, data, result_type=dtype)
    parts = raw.call(channel, "MatVec", request)
    chunks = iter([p for p in parts if isinstance(p, memoryview)])
    result = wire.load(chunks, max_bytes=1 << 20)["result"]
    np.testing.assert_array_equal(result.view("u2"), narrow(5 * exact, dtype))


def test_a_result_that_does_not_fit_few_bits_is_an_error(channel, session_id):
    data = raw.file_of({"v": V * 1e5})
    with pytest.raises(InvalidSpec, match="does not fit F16, whose largest"):
        raw.call(
            channel,
            "MatVec",
            raw.product("MatVec", session_id, data, result_type="F16"),
        )
    with pytest.raises(InvalidSpec, match="result_type 'F32' is not offered"):
        multiply(channel, session_id, {"v": V}, result_type="F32")


def test_few_bits_must_be_finite(channel, session_id):
    header = {"v": safetensors_header.TensorHeader("BF16", (5,), 0)}
    data = safetensors_header.dump_header(header) + np.full(5, 0x7F80, "u2").tobytes()
    with pytest.raises(InvalidVector, match="has inf at index 0"):
        raw.call(channel, "MatVec", raw.product("MatVec", session_id, data))


def test_probes_need_not_travel(channel, session_id):
    probe = {"seed": 7, "first_index": 2, "columns": 3}
    product = multiply(channel, session_id, operand={"probe": probe})
    expected = 5 * probes("rademacher", 7, range(2, 5), 5, dtype="f8")
    np.testing.assert_array_equal(product, expected)
    one = multiply(channel, session_id, operand={"probe": {"seed": 7}})
    np.testing.assert_array_equal(one, 5 * probes("rademacher", 7, [0], 5)[0])
    with pytest.raises(
        InvalidSpec, match=r"seed must be in \[0, 9223372036854775807\]"
    ):
        multiply(channel, session_id, operand={"probe": {"seed": 2**63}})
    with pytest.raises(InvalidVector, match=r"shape \[1, 5\]"):
        request = raw.product(
            "MatVec", session_id, b"", operand={"probe": {"columns": 1}}
        )
        raw.call(channel, "MatVec", request)


def test_a_matrix_of_probes_goes_on_behind_its_last_column(channel, session_id):
    """Its stream broke before the summary: nothing is missing but that."""
    probe = {"seed": 7, "first_index": 5, "columns": 0}
    request = raw.product("MatMat", session_id, b"", operand={"probe": probe})
    parts = raw.call(channel, "MatMat", request)
    chunks = iter([p for p in parts if isinstance(p, memoryview)])
    assert wire.load(chunks, max_bytes=1 << 20)["result"].shape == (0, 5)
    assert parts[-1].WhichOneof("part") == "summary"


def test_what_is_too_large_for_one_message_is_refused_before_it_is_computed(
    tmp_path, device
):
    probe = {"columns": 110_000}  # of 5 float64
    limits = LimitsConfig(run_columns=110_000)  # or it takes thousands of runs
    with server(tmp_path, device, limits=limits) as channel:
        session_id = raw.fake_session(channel).id
        with pytest.raises(LimitExceeded, match="one message holds 4128768 at most"):
            multiply(channel, session_id, operand={"probe": probe})
        assert applied(device) == 0
        multiply(channel, session_id, operand={"probe": probe}, store_as="w")
        assert get(channel, session_id, "w").shape == (110_000, 5)


def test_no_chunks_may_follow_what_does_not_travel(channel, session_id):
    data = raw.file_of({"v": V})
    request = raw.product("MatVec", session_id, data, operand={"probe": {}})
    with pytest.raises(InvalidSpec, match="no chunks may follow"):
        raw.call(channel, "MatVec", request)


def test_a_chain_of_products_moves_nothing(channel, session_id):
    stored = put(channel, session_id, "v", V)
    assert (stored.name, list(stored.shape), stored.dtype) == ("v", [5], "F64")
    for source, name in (("v", "w"), ("w", "w"), ("w", "x")):
        nothing = multiply(
            channel, session_id, operand={"stored": source}, store_as=name
        )
        assert nothing is None
    np.testing.assert_array_equal(get(channel, session_id, "x"), 125 * V)
    np.testing.assert_array_equal(get(channel, session_id, "v"), V)
    request = pb.ListVectorsRequest(session_id=session_id)
    listed = raw.call(channel, "ListVectors", request).vectors
    assert [v.name for v in listed] == ["v", "w", "x"]


def test_damping_does_not_touch_what_is_stored(channel, session_id):
    put(channel, session_id, "v", np.stack([V, V]))
    shifted = multiply(
        channel, session_id, operand={"stored": "v"}, operator={"damping": 1.0}
    )
    np.testing.assert_array_equal(shifted, 6 * np.stack([V, V]))
    np.testing.assert_array_equal(get(channel, session_id, "v"), np.stack([V, V]))


def test_a_stored_product_is_made_once_by_one_request(channel, session_id, device):
    put(channel, session_id, "v", V)
    for _ in range(3):  # it takes the place of its own operand
        fields = {"operand": {"stored": "v"}, "store_as": "v", "request_id": "r"}
        multiply(channel, session_id, **fields)
    np.testing.assert_array_equal(get(channel, session_id, "v"), RESULT)
    assert applied(device) == 1
    with pytest.raises(RequestIdReused):
        multiply(channel, session_id, **fields, operator={"damping": 1.0})


def test_large_results_are_stored_block_by_block(tmp_path):
    with server(tmp_path, limits=LimitsConfig(run_columns=2)) as channel:
        session_id = raw.fake_session(channel).id
        columns = np.arange(35.0).reshape(7, 5)
        data = raw.file_of({"v": columns})
        request = raw.product("MatMat", session_id, data, store_as="w")
        header, summary = raw.call(channel, "MatMat", request)
        assert header.header.version == 1
        assert summary.summary.runs == 4
        np.testing.assert_array_equal(get(channel, session_id, "w"), 5 * columns)


def test_stored_vectors_are_bounded_named_and_checked(tmp_path):
    with server(tmp_path, limits=LimitsConfig(stored_bytes=100)) as channel:
        session_id = raw.fake_session(channel).id
        put(channel, session_id, "v", V)
        put(channel, session_id, "v", 2 * V)  # in place of the other
        put(channel, session_id, "w", V)
        with pytest.raises(LimitExceeded, match="stores 80 bytes of vectors; 40 more"):
            put(channel, session_id, "x", V)
        with pytest.raises(LimitExceeded, match="stored_bytes"):
            multiply(channel, session_id, {"v": V}, store_as="x")
        with pytest.raises(InvalidSpec, match="needs a name"):
            put(channel, session_id, "", V)
        with pytest.raises(InvalidVector, match="has nan"):
            put(channel, session_id, "v", V * np.nan)
        request = pb.DeleteVectorRequest(session_id=session_id, name="w")
        raw.call(channel, "DeleteVector", request)
        with pytest.raises(VectorNotFound, match="'w'"):
            raw.call(channel, "DeleteVector", request)
        with pytest.raises(VectorNotFound, match="put it again"):
            multiply(channel, session_id, operand={"stored": "w"})


def test_the_generated_stub_speaks_one_message_too(channel, session_id):
    from curvd.v1 import curvature_service_pb2_grpc as pb_grpc

    header = pb.ProductHeader(session_id=session_id)
    request = pb.MultiplyRequest(header=header, tensors=raw.file_of({"v": V}))
    response = pb_grpc.CurvatureServiceStub(channel).Multiply(request)
    result = wire.load(iter([memoryview(response.tensors)]), max_bytes=1 << 20)
    np.testing.assert_array_equal(result["result"], RESULT)
    with pytest.raises(grpc.RpcError):
        pb_grpc.CurvatureServiceStub(channel).Multiply(
            pb.MultiplyRequest(header=header, tensors=b"no file")
        )
