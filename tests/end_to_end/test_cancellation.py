"""A client that disappears in the middle of a product stops it within one mini-batch."""

import asyncio
import contextlib
import gc
import threading
import time

import grpc
import numpy as np
import pytest
import raw

pytest.importorskip("torch")
import curvd
from curvd.contract.rpcs import RPCS
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.engine import building
from curvd_server.engine.tuning import autotune
from curvd_server.storage.snapshots import Snapshot

BATCHES, REACHED = 50, 3


class Watched(building.Operator):
    """Says when it has done some mini-batches, and goes on when the client is gone."""

    armed = False
    reached = threading.Event()
    done = 0

    def _batch_product(self, index, V, out, sizes, cancelled):
        if Watched.armed and index == REACHED:
            Watched.reached.set()
            gone = threading.Event()
            while not cancelled():
                gone.wait(0.001)
        super()._batch_product(index, V, out, sizes, cancelled)
        Watched.done += Watched.armed


def test_mini_batches_after_a_client_disappeared_are_not_computed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(building, "Operator", Watched)
    monkeypatch.setattr(autotune, "LONGEST_STEP_S", 0.0)  # one mini-batch at a time
    rng = np.random.default_rng(0)
    state = {"1.weight": rng.normal(size=(2, 3)), "1.bias": np.zeros(2)}
    data = {"x": rng.normal(size=(BATCHES, 3)), "y": rng.normal(size=(BATCHES, 2))}
    v = raw.file_of({"v": np.ones(8)})
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    with serve_in_thread(config) as target, grpc.insecure_channel(target) as channel:
        model = raw.register_model(
            channel, "mlp", '{"widths": [3, 2]}', raw.file_of(state)
        ).model
        dataset = raw.register_dataset(channel, raw.file_of(data), batch_size=1).dataset
        session = raw.create(channel, model.id, dataset.id)
        assert session.batches == BATCHES
        rpc = RPCS["MatVec"]
        stub = channel.stream_stream(rpc.path, rpc.request.dump, rpc.response.load)
        Watched.armed = True
        answers = stub(iter(raw.product("MatVec", session.id, v)), timeout=300)
        assert Watched.reached.wait(300)
        answers.cancel()
        # Waits for the device: what was given up is over when this returns.
        raw.call(
            channel, "Gradient", RPCS["Gradient"].request.message(session_id=session.id)
        )
        assert Watched.done == REACHED


def snapshots():
    """How many files are held in memory."""
    return sum(type(each) is Snapshot for each in gc.get_objects())


async def give_up(target, model, data, v):
    """Cancel a product in the middle, and end its session."""
    async with curvd.aio.connect(target) as client:
        session = await client.create_session(model, data, loss="mse")
        Watched.reached.clear()
        Watched.armed = True
        product = asyncio.ensure_future(session.hessian() @ v)
        assert await asyncio.to_thread(Watched.reached.wait, 300)
        product.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await product
        Watched.armed = False
        await session.delete()


def test_a_session_that_ended_after_cancelled_products_holds_no_data(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(building, "Operator", Watched)
    monkeypatch.setattr(autotune, "LONGEST_STEP_S", 0.0)  # one mini-batch at a time
    rng = np.random.default_rng(0)
    state = {"1.weight": rng.normal(size=(2, 3)), "1.bias": np.zeros(2)}
    points = {"x": rng.normal(size=(BATCHES, 3)), "y": rng.normal(size=(BATCHES, 2))}
    v = rng.normal(size=(8, 4000)).astype(np.float32)  # in several messages
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        model = client.register_model("mlp", {"widths": [3, 2]}, state)
        data = client.register_dataset(points, inputs=["x"], target="y", batch_size=1)
        gc.collect()
        before = snapshots()
        gc.disable()  # it looks for circles of references; there must be none
        try:
            asyncio.run(give_up(target, model, data, v))
            end_s = time.monotonic() + 60
            while snapshots() > before and time.monotonic() < end_s:
                client.healthy()
            assert snapshots() == before
        finally:
            gc.enable()
