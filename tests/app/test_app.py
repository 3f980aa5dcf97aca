"""The running server: the way of a request, and staying up."""

import asyncio
import contextlib
import json
import socket
import threading

import grpc
import numpy as np
import pytest
import raw
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.fake_device import FakeDevice
from support.loop_clock import LoopClock
from support.served import NOT_SERVING, SERVING, Channels, healthy, server, stub

from curvd.contract.rpcs import RPCS
from curvd.errors import (
    Cancelled,
    InvalidSpec,
    NotFound,
    Overloaded,
    Unavailable,
)
from curvd.tensors import safetensors_header
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server import app
from curvd_server.app import running
from curvd_server.config import LimitsConfig, ServerConfig

pytestmark = pytest.mark.usefixtures("answers")


def test_a_product_goes_all_the_way(tmp_path):
    v = np.arange(5.0)
    with server(tmp_path) as channel:
        session = raw.fake_session(channel)
        request = raw.product("MatVec", session.id, raw.file_of({"v": v}))
        header, result, summary = raw.joined(raw.call(channel, "MatVec", request))
    np.testing.assert_array_equal(result, 5 * v)
    assert (header.version, header.plan.mode) == (1, "fake")
    assert header.parameters_digest == session.parameters_digest
    assert (header.model_id, header.dataset_id) == (
        session.model_id,
        session.dataset_id,
    )
    assert (summary.runs, summary.run_columns) == (1, 1)


@pytest.mark.parametrize("columns", [0, 1, 7])
def test_columns_come_back_in_order_as_one_valid_file(tmp_path, columns):
    V = np.arange(columns * 5.0).reshape(columns, 5)
    with server(tmp_path, limits=LimitsConfig(run_columns=2)) as channel:
        session = raw.fake_session(channel)
        request = raw.product("MatMat", session.id, raw.file_of({"v": V}))
        _, result, summary = raw.joined(raw.call(channel, "MatMat", request))
    np.testing.assert_array_equal(result, 5 * V)
    assert summary.runs == -(-columns // 2)


def test_scale_and_damping_are_applied_to_what_others_share(tmp_path):
    v, device = np.arange(5.0), FakeDevice()
    with server(tmp_path, device) as channel:
        session = raw.fake_session(channel)
        operator = {"damping": 0.5, "scale": 2.0}
        request = raw.product(
            "MatVec", session.id, raw.file_of({"v": v}), operator=operator
        )
        _, result, _ = raw.joined(raw.call(channel, "MatVec", request))
    np.testing.assert_array_equal(result, 10.5 * v)
    assert len(device.built) == 1


def test_a_gradient_comes_with_its_loss(tmp_path):
    with server(tmp_path) as channel:
        session = raw.fake_session(channel)
        request = RPCS["Gradient"].request.message(session_id=session.id)
        header, gradient, _ = raw.joined(raw.call(channel, "Gradient", request))
    assert (header.loss, header.HasField("plan")) == (5.0, False)
    np.testing.assert_array_equal(gradient, np.full(5, 5.0))


def test_first_results_leave_before_the_last_column_arrives(tmp_path):
    file = raw.file_of({"v": np.ones((6, 5))})
    column = 5 * 8
    with server(tmp_path, limits=LimitsConfig(run_columns=2)) as channel:
        session = raw.fake_session(channel)
        head, *rest = raw.product("MatMat", session.id, file)
        (data,) = rest
        feed = raw.Feed(head, data[: len(data) - 4 * column])
        answers = stub(channel, "MatMat")(feed, timeout=300)
        assert next(answers).header.version == 1
        assert safetensors_header.load_header(bytes(next(answers))[8:])[
            "result"
        ].shape == (
            6,
            5,
        )
        assert next(answers).nbytes == 2 * column
        feed.add(data[len(data) - 4 * column :])
        feed.end()
        assert sum(p.nbytes for p in answers if isinstance(p, memoryview)) == 4 * column


def test_two_blocks_of_a_call_are_under_way_at_most(tmp_path):
    device = FakeDevice()
    with server(tmp_path, device, limits=LimitsConfig(run_columns=2)) as channel:
        session = raw.fake_session(channel)
        (operator,) = device.operators
        operator.gate.clear()
        file = raw.file_of({"v": np.ones((100, 5))})
        answers = stub(channel, "MatMat")(
            iter(raw.product("MatMat", session.id, file)), timeout=30
        )
        next(answers)
        assert operator.started.wait(300)
        operator.gate.set()
        list(answers)
    # Never more than the block that waited behind the one that ran.
    assert max(operator.seen) <= 2
    assert sum(operator.seen) == 100


def test_a_caller_who_disappears_stops_the_device(tmp_path):
    device = FakeDevice()
    with server(tmp_path, device) as channel:
        session = raw.fake_session(channel)
        (operator,) = device.operators
        operator.gate.clear()
        request = raw.product("MatVec", session.id, raw.file_of({"v": np.ones(5)}))
        answers = stub(channel, "MatVec")(iter(request), timeout=300)
        assert operator.started.wait(300)
        answers.cancel()
        # The gate stays shut: only giving up lets the next call through.
        gradient = RPCS["Gradient"].request.message(session_id=session.id)
        raw.call(channel, "Gradient", gradient)


def test_a_deadline_stops_the_device(tmp_path):
    device = FakeDevice()
    with server(tmp_path, device) as channel:
        session = raw.fake_session(channel)
        device.operators[0].gate.clear()
        request = raw.product("MatVec", session.id, raw.file_of({"v": np.ones(5)}))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub(channel, "MatVec")(iter(request), timeout=0.2))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gradient = RPCS["Gradient"].request.message(session_id=session.id)
        raw.call(channel, "Gradient", gradient)


def test_deleting_a_session_cancels_its_calls(tmp_path):
    device = FakeDevice()
    with server(tmp_path, device) as channel:
        session = raw.fake_session(channel)
        (operator,) = device.operators
        operator.gate.clear()
        caught = []

        def product():
            data = raw.file_of({"v": np.ones(5)})
            with pytest.raises(Cancelled, match="was deleted") as error:
                raw.call(channel, "MatVec", raw.product("MatVec", session.id, data))
            caught.append(error)

        thread = threading.Thread(target=product)
        thread.start()
        assert operator.started.wait(300)
        request = session_pb.DeleteSessionRequest(session_id=session.id)
        raw.call(channel, "DeleteSession", request)
        thread.join(300)
    assert caught
    assert operator.closed


def test_an_upload_that_broke_goes_on_and_sends_nothing_twice(tmp_path):
    data = raw.file_of({"a": np.ones(2), "b": np.arange(3.0)})
    header = session_pb.RegisterModelHeader(builder="two", state=raw.upload(data))
    first = session_pb.RegisterModelRequest(header=header)
    with server(tmp_path) as channel:
        feed = raw.Feed(first, memoryview(data)[:50])
        broken = stub(channel, "RegisterModel").future(feed, timeout=300)
        committed = 0
        while committed < 50:  # until the server has them
            answer = raw.call(channel, "RegisterModel", [first])
            committed = answer.upload_needed.committed_bytes
        broken.cancel()
        feed.end()
    with server(tmp_path) as channel:
        answer = raw.call(channel, "RegisterModel", [first])
        assert answer.upload_needed.committed_bytes == 50
        first.header.state.offset = 50
        rest = [first, memoryview(data)[50:]]
        model = raw.call(channel, "RegisterModel", rest).model
        assert [t.name for t in model.tensors] == ["a", "b"]
        again = raw.call(channel, "RegisterModel", [first])
        assert again.model == model


def test_an_update_is_uploaded_like_a_model(tmp_path):
    data = raw.file_of({"b": np.zeros(3)})
    with server(tmp_path) as channel:
        session = raw.fake_session(channel)
        header = session_pb.UpdateParametersHeader(
            session_id=session.id, values=raw.upload(data), request_id="r"
        )
        first = session_pb.UpdateParametersRequest(header=header)
        asked = raw.call(channel, "UpdateParameters", [first])
        assert asked.upload_needed.committed_bytes == 0
        sent = raw.call(channel, "UpdateParameters", [first, memoryview(data)])
        assert sent.version.version == 2
        assert raw.call(channel, "UpdateParameters", [first]) == sent
        v = np.ones(5)
        request = raw.product("MatVec", session.id, raw.file_of({"v": v}))
        header, result, _ = raw.joined(raw.call(channel, "MatVec", request))
    assert header.version == 2
    np.testing.assert_array_equal(result, 2 * v)


def test_the_server_describes_itself(tmp_path):
    with server(tmp_path) as channel:
        info = raw.call(channel, "GetServerInfo", session_pb.GetServerInfoRequest())
    assert list(info.builders) == ["two"]
    assert info.limits.columns == LimitsConfig().columns
    assert info.devices[0].free_bytes == 1


def test_health_answers(tmp_path):
    with server(tmp_path) as channel:
        assert healthy(channel) == SERVING
        assert healthy(channel, "curvd.v1.CurvatureService") == SERVING


def test_reflection_answers_whoever_is_not_our_client(tmp_path, answers):
    with server(tmp_path) as channel:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers_to = reflected.ServerReflectionInfo(iter([ask]), timeout=300)
        if answers == "direct":
            with pytest.raises(grpc.RpcError) as caught:
                next(answers_to)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            return
        answer = next(answers_to)
    names = {s.name for s in answer.list_services_response.service}
    assert {"curvd.v1.SessionService", "grpc.health.v1.Health"} <= names


def test_a_port_has_one_server(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidSpec, match=f"cannot listen on {listen}"):
            with server(tmp_path, listen=listen):
                pass


def test_a_defect_does_not_show_its_insides(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeDevice, "describe", lambda self: 1 / 0)
    with server(tmp_path) as channel:
        ask = session_pb.GetServerInfoRequest()
        with pytest.raises(
            Exception, match="ZeroDivisionError in GetServerInfo"
        ) as got:
            raw.call(channel, "GetServerInfo", ask)
    assert "division by zero" not in str(got.value)


def test_the_traceback_of_a_defect_is_logged_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(FakeDevice, "describe", lambda self: 1 / 0)
    with server(tmp_path) as channel:
        with pytest.raises(Exception, match="ZeroDivisionError"):
            raw.call(channel, "GetServerInfo", session_pb.GetServerInfoRequest())
    assert caplog.text.count("division by zero") == 1


def test_what_clients_send_is_refused_before_it_fills_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    long = "x" * 100_000
    with server(tmp_path) as channel:
        ask = curvature_pb.ListVectorsRequest(session_id=long)
        with pytest.raises(InvalidSpec, match="session_id has 100000 characters"):
            raw.call(channel, "ListVectors", ask)
        gradient = curvature_pb.GradientRequest(session_id=long, request_id="r")
        with pytest.raises(InvalidSpec, match="session_id has 100000 characters"):
            raw.call(channel, "Gradient", gradient)
    assert max(len(r.getMessage()) for r in caplog.records) < 2000


async def test_a_draining_server_refuses_new_calls_and_finishes_old_ones(tmp_path):
    device = FakeDevice()
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path, drain_s=60.0)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(config, device=device))
        with Channels(server.target) as channel:
            session = await asyncio.to_thread(raw.fake_session, channel)
            (operator,) = device.operators
            operator.gate.clear()
            data = raw.file_of({"v": np.ones(5)})
            request = raw.product("MatVec", session.id, data)
            old = asyncio.create_task(
                asyncio.to_thread(raw.call, channel, "MatVec", request)
            )
            await asyncio.to_thread(operator.started.wait, 10)
            # Whoever watches must not hold up the end.
            watching = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), timeout=60
            )
            seen = lambda: next(watching).status  # noqa: E731
            assert await asyncio.to_thread(seen) == SERVING
            draining = asyncio.create_task(stack.aclose())
            assert await asyncio.to_thread(seen) == NOT_SERVING
            ask = session_pb.GetServerInfoRequest()
            with pytest.raises(Unavailable, match="shutting down"):
                await asyncio.to_thread(raw.call, channel, "GetServerInfo", ask)
            assert not draining.done()
            operator.gate.set()
            _, result, _ = raw.joined(await old)
            np.testing.assert_array_equal(result, np.full(5, 5.0))
            async with asyncio.timeout(20):
                await draining


def test_whoever_leaves_in_the_middle_of_a_result_leaves_nothing_behind(
    tmp_path, caplog
):
    columns = 20_000
    with server(tmp_path) as channel:
        session = raw.fake_session(channel)
        request = raw.product(
            "MatMat", session.id, raw.file_of({"v": np.ones((columns, 5))})
        )
        for parts in (0, 1, 2, 5):
            answers = stub(channel, "MatMat")(iter(request), timeout=300)
            for _ in range(parts):
                next(answers)
            answers.cancel()
        ask = session_pb.DeleteSessionRequest(session_id=session.id)
        raw.call(channel, "DeleteSession", ask)
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


def test_deleting_a_session_ends_a_call_whose_client_does_not_read(tmp_path):
    with server(tmp_path) as channel:
        session = raw.fake_session(channel)
        file = raw.file_of({"v": np.ones((1_000_000, 5))})
        request = raw.product("MatMat", session.id, file)
        answers = stub(channel, "MatMat")(iter(request), timeout=300)
        next(answers)
        ask = session_pb.DeleteSessionRequest(session_id=session.id)
        thread = threading.Thread(target=raw.call, args=(channel, "DeleteSession", ask))
        thread.start()
        with pytest.raises(grpc.RpcError) as caught:
            list(answers)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert "was deleted" in caught.value.details()
        thread.join(300)


def test_a_full_queue_says_when_to_come_back(tmp_path):
    device = FakeDevice()
    limits = LimitsConfig(pending_columns=2)
    with server(tmp_path, device, limits=limits) as channel:
        session = raw.fake_session(channel)
        (operator,) = device.operators
        operator.gate.clear()
        two = raw.file_of({"v": np.ones((2, 5))})
        answers = stub(channel, "MatMat")(
            iter(raw.product("MatMat", session.id, two)), timeout=30
        )
        assert operator.started.wait(300)
        one = raw.product("MatVec", session.id, raw.file_of({"v": np.ones(5)}))
        with pytest.raises(Overloaded, match="the queue is full: 2 columns") as caught:
            raw.call(channel, "MatVec", one)
        assert caught.value.retry_after_s > 0
        operator.gate.set()
        list(answers)
        raw.call(channel, "MatVec", one)


def test_a_call_is_one_line_of_log(tmp_path, caplog):
    caplog.set_level("INFO", logger="curvd_server")
    metadata = (("authorization", "Bearer secret"),)
    with server(tmp_path, token="secret") as channel:
        ask = session_pb.GetSessionRequest(session_id="no")
        with pytest.raises(NotFound):
            raw.call(channel, "GetSession", ask, metadata=metadata)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    (line,) = [line for line in lines if line["event"] == "call"]
    assert (line["rpc"], line["code"]) == ("GetSession", "NOT_FOUND")
    assert {"seconds", "peer", "timestamp"} <= line.keys()
    assert "secret" not in caplog.text


def test_memory_that_was_freed_goes_back_to_the_system_every_minute(
    tmp_path, monkeypatch
):
    loop_clock, trimmed = LoopClock(monkeypatch), []
    monkeypatch.setattr(app, "trim_allocator", lambda: trimmed.append(True))
    with server(tmp_path) as channel:
        while len(trimmed) < 3:
            loop_clock.advance(1.0)
        assert raw.call(channel, "GetServerInfo", session_pb.GetServerInfoRequest())
