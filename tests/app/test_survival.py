"""What was acknowledged outlives the process, and a data directory has one owner."""

import concurrent.futures
import contextlib
import os
import signal
import sqlite3

import grpc
import numpy as np
import pytest
import raw
from support.forked import Forked
from support.served import server

from curvd.contract.infos import ModelInfo
from curvd.contract.specs import ModelSpec
from curvd.errors import (
    CurvdError,
    FailedPrecondition,
    NotFound,
    Unavailable,
)
from curvd.v1 import query_service_pb2 as query_pb
from curvd.v1 import session_service_pb2 as session_pb
from curvd.v1 import types_pb2 as types_pb
from curvd_server.storage.catalogue import Catalogue
from curvd_server.storage.records import StoredModel


@pytest.mark.usefixtures("answers")
def test_a_data_directory_has_one_server(tmp_path):
    with server(tmp_path), pytest.raises(FailedPrecondition, match="choose another"):
        with server(tmp_path):
            pass


CHILD = """
import sys
from pathlib import Path
from curvd_server.app import serve
from curvd_server.config import ServerConfig
serve(ServerConfig(listen="127.0.0.1:0", data_dir=Path(sys.argv[1]), drain_s=5.0))
"""


ENDLESS = """
from curvd_server import app
from curvd_server.service import query_service

def endless(*args, **keywords):
    yield
    print("endless", flush=True)
    while True:
        pass

query_service.nystrom = endless
query_service._PATIENCE_S = app._ENDING_S = 0.2
"""


@contextlib.contextmanager
def child(data_dir, program=CHILD, stderr=os.devnull):
    """A server process, and a channel to it."""
    with Forked(program, data_dir, stderr=stderr) as process:
        target = process.stdout.readline().split()[-1]
        with grpc.insecure_channel(target) as channel:
            yield process, channel


def test_what_was_acknowledged_survives_kill_9(tmp_path):
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    state = {"1.weight": rng.normal(size=(2, 3)), "1.bias": rng.normal(size=2)}
    data = {"x": rng.normal(size=(6, 3)), "y": rng.normal(size=(6, 2))}
    new = raw.file_of({"1.bias": np.zeros(2)})
    v = raw.file_of({"v": rng.normal(size=8)})
    with child(tmp_path) as (process, channel):
        model = raw.register_model(
            channel, "mlp", '{"widths": [3, 2]}', raw.file_of(state)
        ).model
        dataset = raw.register_dataset(channel, raw.file_of(data)).dataset
        session = raw.create(channel, model.id, dataset.id)
        header = session_pb.UpdateParametersHeader(
            session_id=session.id, values=raw.upload(new)
        )
        first = session_pb.UpdateParametersRequest(header=header)
        raw.call(channel, "UpdateParameters", [first, memoryview(new)])
        request = raw.product("MatVec", session.id, v)
        before = raw.joined(raw.call(channel, "MatVec", request))
        process.send_signal(signal.SIGKILL)
        process.wait()
    with child(tmp_path) as (process, channel):
        found = raw.call(
            channel, "GetSession", session_pb.GetSessionRequest(session_id=session.id)
        ).session
        assert (found.version, found.state) == (2, session_pb.SESSION_STATE_COLD)
        after = raw.joined(raw.call(channel, "MatVec", request))
        assert after[0].parameters_digest == before[0].parameters_digest
        # To the bit: the new process remembers how the old one computed.
        np.testing.assert_array_equal(after[1], before[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
        with pytest.raises((Unavailable, NotFound)):
            raw.call(
                channel, "GetServerInfo", session_pb.GetServerInfoRequest(), timeout=5
            )


def test_an_algorithm_that_never_returns_does_not_keep_the_process(tmp_path):
    pytest.importorskip("torch")
    state = {"1.weight": np.ones((1, 3)), "1.bias": np.ones(1)}
    data = {"x": np.ones((2, 3)), "y": np.ones((2, 1))}
    log = tmp_path / "log"
    program = ENDLESS + CHILD.replace("drain_s=5.0", "drain_s=0.2")
    with child(tmp_path / "data", program, log) as (process, channel):
        model = raw.register_model(
            channel, "mlp", '{"widths": [3, 1]}', raw.file_of(state)
        ).model
        dataset = raw.register_dataset(channel, raw.file_of(data)).dataset
        session = raw.create(channel, model.id, dataset.id)
        operator = types_pb.Operator(kind=types_pb.OPERATOR_KIND_GGN)
        query = query_pb.Query(session_id=session.id, operator=operator)
        request = query_pb.SketchRequest(query=query, rank=2)
        with concurrent.futures.ThreadPoolExecutor(1) as callers:
            answer = callers.submit(raw.call, channel, "Sketch", request, timeout=60)
            # It fails at once, if it does not come so far.
            answer.add_done_callback(lambda _: process.send_signal(signal.SIGTERM))
            assert process.stdout.readline() == "endless\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 1
            with pytest.raises(CurvdError):
                answer.result()
    written = log.read_text()
    assert "query Sketch of session" in written and "abandoned" in written
    # The stores were closed: the next server has all of it, and nothing to mend.
    with child(tmp_path / "data") as (process, channel):
        request = session_pb.GetSessionRequest(session_id=session.id)
        assert raw.call(channel, "GetSession", request).session.id == session.id


CATALOGUES = ("catalogue.sqlite", "catalogue.mirror.sqlite")


@pytest.mark.usefixtures("answers")
def test_a_catalogue_of_a_newer_curvd_is_left_alone(tmp_path):
    with server(tmp_path):
        pass
    for name in CATALOGUES:
        with sqlite3.connect(tmp_path / name) as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
    with pytest.raises(FailedPrecondition, match="has schema 99, this curvd reads"):
        with server(tmp_path):
            pass


def older(path, version):
    """Make a catalogue what an older curvd wrote: no seals, a log of its own."""
    path.with_name("catalogue.mirror.sqlite").unlink()
    with sqlite3.connect(path) as database:
        for table in ("models", "datasets", "sessions", "versions", "plans"):
            database.execute(f"ALTER TABLE {table} DROP COLUMN seal")
        database.execute("ALTER TABLE models DROP COLUMN buffers")
        database.execute("ALTER TABLE sessions DROP COLUMN remaining_s")
        if version < 2:  # before there were graphs
            database.execute("ALTER TABLE models DROP COLUMN graph")
        database.execute(f"PRAGMA user_version = {version}")
        database.execute("PRAGMA journal_mode = WAL")
    database.close()


@pytest.mark.parametrize("version", [1, 2])
def test_a_catalogue_of_an_older_curvd_is_read_on(tmp_path, version):
    path = tmp_path / "catalogue.sqlite"
    catalogue = Catalogue(path)
    info = ModelInfo(id="m", spec=ModelSpec(builder="mlp"), tensors=(), state_bytes=8)
    catalogue.add_model(StoredModel(info=info, digest="0" * 64, ties={"b": "a"}))
    catalogue.close()
    older(path, version)
    for _ in range(2):  # the change is made once
        catalogue = Catalogue(path)
        assert catalogue.model("m").info == info
        assert catalogue.model("m").ties == {"b": "a"}
        catalogue.close()
