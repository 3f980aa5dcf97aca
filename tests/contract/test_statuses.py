"""Exceptions and statuses are one table, and gRPC's own errors never get through."""

import threading

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from support import fake_service
from support.client_fixtures import QUICK

import curvd
from curvd.contract.statuses import RpcError, dump, load, translated
from curvd.errors import BY_CODE, BY_REASON

ONCE = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=0))


@pytest.mark.parametrize("kind", BY_REASON.values(), ids=lambda k: k.__name__)
def test_every_error_survives_the_wire(kind):
    error = kind("what is wrong", retry_after_s=1.5, limit=3, name="x")
    back = load(error.code, str(error), dump(error))
    assert type(back) is kind
    assert str(back) == "what is wrong"
    assert back.retry_after_s == 1.5
    assert back.metadata == {"limit": "3", "name": "x"}


@pytest.mark.parametrize("kind", BY_REASON.values(), ids=lambda k: k.__name__)
def test_every_error_reaches_the_caller_as_itself(connect, target, service, kind):
    service.fail("GetServerInfo", kind("what is wrong", value=1))
    with connect(target, config=ONCE) as client:
        with pytest.raises(kind, match="what is wrong") as caught:
            client.server_info()
    assert type(caught.value) is kind
    assert caught.value.metadata == {"value": "1"}
    assert isinstance(caught.value.__cause__, grpc.RpcError | RpcError)


@pytest.mark.parametrize(
    "code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK]
)
def test_a_status_without_details_becomes_the_general_class(code):
    error = load(code.name, "text", None)
    assert type(error) is BY_CODE.get(code.name, curvd.Internal)


def test_foreign_details_are_ignored():
    info = error_details_pb2.ErrorInfo(reason="INVALID_VECTOR", domain="elsewhere")
    status = status_pb2.Status(code=8, message="m")
    status.details.add().Pack(info)
    status.details.append(any_pb2.Any(type_url="x/unknown.Type", value=b"\xff"))
    assert type(load("RESOURCE_EXHAUSTED", "m", status.SerializeToString())) is (
        curvd.ResourceExhausted
    )
    assert type(load("NOT_FOUND", "m", b"\xff\xff")) is curvd.NotFound


def test_metadata_named_like_an_argument_is_harmless():
    error = curvd.CurvdError("m")
    error.metadata = {"message": "a", "retry_after_s": "b"}
    assert load("UNKNOWN", "m", dump(error)).metadata == error.metadata


def test_an_error_of_ours_passes_unchanged():
    with pytest.raises(curvd.InvalidSpec, match="mine"), translated("t"):
        raise curvd.InvalidSpec("mine")


def test_no_server_is_unavailable_and_names_the_target(connect):
    with connect("127.0.0.1:1", config=ONCE) as client:
        with pytest.raises(
            curvd.Unavailable, match=r"no curvd server answers at 127\.0\.0\.1:1"
        ):
            client.server_info()


def test_a_missing_method_is_unimplemented(connect):
    class Old(fake_service.FakeService):
        """Offers less."""

    server = grpc.server(fake_service.futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with connect(f"127.0.0.1:{port}", config=ONCE) as client:
            with pytest.raises(curvd.Unimplemented, match="UNIMPLEMENTED from 127"):
                client.server_info()
    finally:
        server.stop(None).wait()


def test_a_silent_server_ends_with_the_deadline(connect):
    class Silent(fake_service.FakeService):
        def handle(self, rpc, request, context):
            ended = threading.Event()
            context.add_callback(ended.set)
            ended.wait()
            yield from ()

    with fake_service.serving(Silent()) as target:
        with connect(target, deadline_s=0.05) as client:
            with pytest.raises(curvd.DeadlineExceeded, match="DEADLINE_EXCEEDED from"):
                client.server_info()


def test_a_message_that_names_very_many_things_arrives_whole(connect, target, service):
    text = "missing: " + ", ".join(f"layer.{i}.weight" for i in range(1000))
    service.fail("GetServerInfo", curvd.StateMismatch(text, missing=text))
    with connect(target, config=QUICK) as client:
        with pytest.raises(curvd.StateMismatch) as caught:
            client.server_info()
    assert str(caught.value) == text


def test_an_early_refusal_of_a_long_request_keeps_its_reason(client, streams):
    """grpc.aio would report INTERNAL: a write fails after the server has answered."""
    import numpy as np

    session = client.create_session("m", "d", loss="mse", dtype="F64")
    H = session.hessian(expected_version=7)
    for _ in range(20):
        with pytest.raises(curvd.VersionMismatch):
            H @ np.ones((fake_service.P, 2000))
