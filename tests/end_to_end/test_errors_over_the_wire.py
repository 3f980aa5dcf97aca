"""Every kind of bad input gets its typed error from the real server, and a message
that says what to do. Nothing here goes through the client's own checks."""

import json

import grpc
import numpy as np
import pytest
import raw
from google.rpc import error_details_pb2, status_pb2

from curvd import errors
from curvd.contract import statuses
from curvd.contract.rpcs import RPCS
from curvd.v1 import session_service_pb2 as session_pb

RNG = np.random.default_rng(0)
STATE = {"1.weight": RNG.normal(size=(2, 3)), "1.bias": RNG.normal(size=2)}
DATA = {"x": RNG.normal(size=(6, 3)), "y": RNG.normal(size=(6, 2))}
CONFIG = '{"widths": [3, 2]}'
P = 8


@pytest.fixture(scope="module")
def channel(live_target):
    with grpc.insecure_channel(live_target) as channel:
        yield channel


@pytest.fixture(scope="module")
def session(channel):
    model = raw.register_model(channel, "mlp", CONFIG, raw.file_of(STATE)).model
    dataset = raw.register_dataset(channel, raw.file_of(DATA)).dataset
    return raw.create(channel, model.id, dataset.id)


def lie(entries, payload=bytes(64), length=None):
    """A safetensors file with any header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + payload


def entry(dtype="F64", shape=(8,), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NOT_FILES = {
    "truncated payload": (lie({"v": entry()}, bytes(63)), "InvalidTensors"),
    "more than announced": (lie({"v": entry()}, bytes(65)), "InvalidTensors"),
    "shape and offsets disagree": (lie({"v": entry(shape=[9])}), "InvalidTensors"),
    "a gap": (lie({"v": entry(offsets=[8, 72])}, bytes(72)), "InvalidTensors"),
    "an overlap": (lie({"v": entry(), "w": entry()}), "InvalidTensors"),
    "an unknown type": (lie({"v": entry("PICKLE")}), "InvalidTensors"),
    "a negative size": (lie({"v": entry(shape=[-8])}), "InvalidTensors"),
    "not JSON": (lie(b"\x80\x04."), "InvalidTensors"),
    "a header that never ends": (lie(b"{}", b"", length=1000), "InvalidTensors"),
    "an oversized header": (lie(b"{}", b"", length=1 << 40), "LimitExceeded"),
    "nothing": (b"", "InvalidTensors"),
}


@pytest.mark.parametrize("name", ["MatVec", "MatMat"])
@pytest.mark.parametrize(
    ("file", "error"), NOT_FILES.values(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_an_operand_that_is_no_file(channel, session, name, file, error):
    if name == "MatMat" and error == "InvalidTensors":
        file = file.replace(b"[8]", b"[1, 8]")
    with pytest.raises(getattr(errors, error)):
        raw.call(channel, name, raw.product(name, session.id, file))


@pytest.mark.parametrize(
    ("file", "error"),
    [v for k, v in NOT_FILES.items() if k != "nothing"],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_upload_that_is_no_file(channel, file, error):
    with pytest.raises(getattr(errors, error)):
        raw.register_model(channel, "mlp", CONFIG, file)
    with pytest.raises(getattr(errors, error)):
        raw.register_dataset(channel, file)


@pytest.mark.parametrize(
    ("v", "match"),
    [
        ({"v": np.ones(P + 1)}, r"shape \[9\]; this session's is \[8\]"),
        ({"v": np.ones((1, P))}, r"shape \[1, 8\]"),
        ({"v": np.ones(P, np.float32)}, "element type F32; this session's is F64"),
        ({"v": np.ones(P, np.int64)}, "element type I64"),
        ({"w": np.ones(P)}, "one tensor named 'v'"),
        ({"v": np.ones(P), "w": np.ones(P)}, "one tensor named 'v'"),
        ({}, "the tensors sent are none"),
        ({"v": np.array([0, 0, 0, np.nan, 0, 0, 0, 0])}, "nan at index 3.*'1.weight'"),
        ({"v": np.full(P, np.inf)}, "operands must be finite"),
    ],
)
def test_an_operand_that_does_not_fit(channel, session, v, match):
    with pytest.raises(errors.InvalidVector, match=match):
        raw.call(channel, "MatVec", raw.product("MatVec", session.id, raw.file_of(v)))


def test_a_column_that_is_not_finite_is_named(channel, session):
    V = np.zeros((100, P))
    V[70, 7] = -np.inf
    with pytest.raises(errors.InvalidVector, match=r"column 70 has -inf.*'1\.bias'"):
        data = raw.file_of({"v": V})
        raw.call(channel, "MatMat", raw.product("MatMat", session.id, data))


@pytest.mark.parametrize("name", ["MatVec", "MatMat"])
def test_a_stream_that_does_not_begin_with_a_header(channel, name):
    for parts in ([], [memoryview(raw.file_of({"v": np.ones(P)}))]):
        with pytest.raises(errors.InvalidSpec, match="first message of the stream"):
            raw.call(channel, name, parts)


def test_a_session_that_is_not_there(channel):
    v = raw.file_of({"v": np.ones(P)})
    requests = {
        "MatVec": raw.product("MatVec", "no", v),
        "MatMat": raw.product("MatMat", "no", v),
        "Gradient": RPCS["Gradient"].request.message(session_id="no"),
        "GetSession": session_pb.GetSessionRequest(session_id="no"),
        "RenewSession": session_pb.RenewSessionRequest(session_id="no"),
        "DeleteSession": session_pb.DeleteSessionRequest(session_id="no"),
        "UpdateParameters": [
            session_pb.UpdateParametersRequest(
                header=session_pb.UpdateParametersHeader(
                    session_id="no", values=raw.upload(v)
                )
            )
        ],
    }
    for name, request in requests.items():
        with pytest.raises(errors.SessionNotFound, match="no session 'no'"):
            raw.call(channel, name, request)


def test_another_version(channel, session):
    v = raw.file_of({"v": np.ones(P)})
    request = raw.product("MatVec", session.id, v, expected_version=7)
    with pytest.raises(errors.VersionMismatch, match="at version 1, not 7"):
        raw.call(channel, "MatVec", request)


@pytest.mark.parametrize(
    ("operator", "match"),
    [
        ({"block_sizes": [1, 2]}, "block_sizes sum to 3"),
        ({"block_sizes": [0, 2]}, "block_sizes must be positive"),
        ({"damping": float("nan")}, "damping must be finite"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"mc_samples": 3}, "mc_samples=3 does not fit operator hessian"),
        ({"seed": 2**63}, "seed must be in"),
        ({"kind": 99}, "operator_kind must be one of"),
    ],
)
def test_an_operator_that_makes_no_sense(channel, session, operator, match):
    v = raw.file_of({"v": np.ones(P)})
    with pytest.raises(errors.InvalidSpec, match=match):
        request = raw.product("MatVec", session.id, v, operator=operator)
        raw.call(channel, "MatVec", request)


def test_a_builder_that_is_not_allowed(channel):
    with pytest.raises(errors.BuilderNotFound, match="known: mlp"):
        raw.register_model(channel, "torch.nn:Linear", "{}", raw.file_of(STATE))


@pytest.mark.parametrize("config", ["[]", "{", '{"widths": "x"}', '{"layers": 1}'])
def test_a_config_that_the_builder_refuses(channel, config):
    with pytest.raises(errors.InvalidSpec):
        raw.register_model(channel, "mlp", config, raw.file_of(STATE))


def test_a_state_that_does_not_fit(channel):
    wrong = {"1.weight": np.ones((3, 2)), "weight": np.ones(1)}
    with pytest.raises(errors.StateMismatch) as caught:
        raw.register_model(channel, "mlp", CONFIG, raw.file_of(wrong))
    for name in (
        "missing: 1.bias",
        "unknown: weight",
        "1.weight [3, 2] instead of [2, 3]",
    ):
        assert name in str(caught.value)


def test_a_state_with_very_many_wrong_names_still_arrives_as_itself(channel):
    wrong = {f"layers.{i}.weight": np.ones(1) for i in range(2000)}
    with pytest.raises(errors.StateMismatch, match="more characters"):
        raw.register_model(channel, "mlp", CONFIG, raw.file_of(wrong))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"digest": "0" * 64}, "nothing of them was kept"),
        ({"digest": "../../etc/passwd"}, "64 lower-case hexadecimal digits"),
        ({"offset": 1}, "beyond the 0 bytes"),
        ({"total_bytes": 20}, "more than the 20 bytes"),
        ({"total_bytes": -1}, "total_bytes must not be negative"),
    ],
)
def test_an_upload_that_lies_about_itself(channel, change, match):
    data = raw.file_of({"x": RNG.normal(size=(6, 3)), "y": DATA["y"]})
    with pytest.raises(errors.InvalidArgument, match=match):
        raw.register_dataset(channel, data, announced=raw.upload(data, **change))


def test_an_upload_over_the_limit_is_refused_by_what_it_announces(channel):
    announced = raw.upload(b"", total_bytes=1 << 50)
    with pytest.raises(errors.LimitExceeded, match="upload_bytes"):
        raw.register_dataset(channel, b"", announced=announced)


@pytest.mark.parametrize(
    ("arrays", "fields", "match"),
    [
        ({"x": np.ones((6, 3))}, {}, "inputs and target name x, y"),
        (DATA | {"z": np.ones(6)}, {}, "inputs and target name x, y"),
        (DATA | {"y": np.ones((5, 2))}, {}, "the same leading axis"),
        (DATA | {"x": np.full((6, 3), np.nan)}, {}, "not finite in data point 0"),
        (DATA, {"batch_size": 0}, "batch_size must be at least 1"),
        (DATA, {"inputs": ["y"]}, "distinct names"),
        (DATA, {"inputs": []}, "at least one input"),
    ],
)
def test_a_dataset_that_is_none(channel, arrays, fields, match):
    with pytest.raises(errors.InvalidSpec, match=match):
        raw.register_dataset(channel, raw.file_of(arrays), **fields)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"model_id": "no"}, "ModelNotFound", "no model 'no'"),
        ({"dataset_id": "no"}, "DatasetNotFound", "no dataset 'no'"),
        ({"dtype": 0}, "InvalidSpec", "dtype must be one of"),
        ({"loss": {}}, "InvalidSpec", "loss_name must be one of"),
        ({"budget_bytes": -1}, "InvalidSpec", "budget_bytes must not be negative"),
        ({"lease": {"seconds": -1}}, "InvalidSpec", "lease must be positive"),
        ({"name": "x" * 129}, "InvalidSpec", "the limit is 128"),
        ({"request_id": "x" * 129}, "InvalidSpec", "the limit is 128"),
        ({"operators": [{"block_sizes": [9]}]}, "InvalidSpec", "block_sizes sum to 9"),
    ],
)
def test_a_session_that_cannot_be(channel, session, fields, error, match):
    ids = {"model_id": session.model_id, "dataset_id": session.dataset_id}
    with pytest.raises(getattr(errors, error), match=match):
        raw.create(channel, **(ids | fields))


def test_a_model_that_cannot_run_on_the_data(channel, session):
    data = raw.file_of({"x": RNG.normal(size=(6, 5)), "y": DATA["y"]})
    dataset = raw.register_dataset(channel, data).dataset
    with pytest.raises(errors.InvalidSpec, match="'mlp' cannot run on this dataset"):
        raw.create(channel, session.model_id, dataset.id)


def test_a_request_id_with_other_content(channel, session):
    ids = (session.model_id, session.dataset_id)
    first = raw.create(channel, *ids, request_id="once")
    assert raw.create(channel, *ids, request_id="once").id == first.id
    with pytest.raises(errors.RequestIdReused, match="'once'"):
        raw.create(channel, *ids, request_id="once", name="other")


def test_an_error_speaks_google_too(channel):
    rpc = RPCS["GetSession"]
    stub = channel.unary_unary(rpc.path, rpc.request.dump, rpc.response.load)
    with pytest.raises(grpc.RpcError) as caught:
        stub(session_pb.GetSessionRequest(session_id="no"), timeout=300)
    details = dict(caught.value.trailing_metadata())[statuses.DETAILS_KEY]
    info, resource = status_pb2.Status.FromString(details).details
    error = error_details_pb2.ErrorInfo()
    assert info.Unpack(error)
    assert (error.reason, error.domain) == ("SESSION_NOT_FOUND", "curvd")
    about = error_details_pb2.ResourceInfo()
    assert resource.Unpack(about)
    assert (about.resource_type, about.resource_name) == ("curvd.session", "no")
