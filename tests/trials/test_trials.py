"""Graphs of strangers are tried elsewhere: bounded, in turn, and ended with the call."""

import asyncio
import os
import select
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from support.fake_device import middle  # noqa: E402
from support.graphs import HONEST, Ref, W, X, graph, node  # noqa: E402

from curvd.contract.specs import SerializedGraph  # noqa: E402
from curvd.errors import (  # noqa: E402
    Internal,
    InvalidGraph,
    InvalidSpec,
    LimitExceeded,
    Overloaded,
)
from curvd_server.graph.decoder import canonical  # noqa: E402
from curvd_server.models.trial import try_builder, try_graphs  # noqa: E402
from curvd_server.trials import pool  # noqa: E402
from curvd_server.trials.pool import AT_ONCE, PEER, WAITING, Trials, _read  # noqa: E402

NONE = SerializedGraph()
MANY = 20_000


def serialized(message):
    return SerializedGraph(canonical(message))


def long_graph():
    """Thousands of operators, which take seconds even without memory."""
    nodes = [node("aten.tanh.default", Ref(2 + at)) for at in range(MANY)]
    return serialized(graph(node("aten.mm.default", X, W), *nodes))


def wide_graph():
    """One operator that returns tens of thousands of tensors."""
    zeros = node("aten.new_zeros.default", W, [65_000, 2])
    pieces = node("aten.unbind.int", Ref(2), 0)
    return serialized(graph(zeros, pieces, node("aten.stack.default", Ref(3))))


async def tried(model=NONE, loss=NONE, limit_bytes=1 << 30):
    return await Trials().of(model, loss, rows=2, limit_bytes=limit_bytes)


async def test_what_a_child_finds_out_is_what_this_process_would():
    model = serialized(HONEST[0])
    assert await tried(model) == try_graphs(model, NONE, rows=2, limit_bytes=1 << 30)


async def test_a_builder_of_ours_works_in_a_child():
    config = {"widths": [3, 2]}
    found = await Trials().of_builder("mlp", config)
    assert found == try_builder("mlp", config)
    assert list(found.tensors) == ["1.weight", "1.bias"]
    with pytest.raises(InvalidSpec, match="widths must be a list"):
        await Trials().of_builder("mlp", {"widths": [3, -1]})


async def test_without_a_graph_there_is_no_child():
    assert await tried() is None


@pytest.mark.parametrize(
    ("model", "loss", "error", "match"),
    [
        (b"\xff", b"", InvalidGraph, "no message of curvd.v1.Graph"),
        (b"", b"\xff", InvalidGraph, "no message of curvd.v1.Graph"),
        (
            canonical(graph(node("aten.from_file.default", X))),
            b"",
            InvalidGraph,
            "'aten.from_file.default' .*is not on the list",
        ),
        (
            canonical(graph(node("aten.tile.default", X, [2**20, 2**20]))),
            b"",
            LimitExceeded,
            "the device has 1073741824",
        ),
    ],
)
async def test_a_refusal_comes_back_with_its_type_and_words(model, loss, error, match):
    with pytest.raises(error, match=match) as caught:
        await tried(SerializedGraph(model), SerializedGraph(loss))
    with pytest.raises(error) as here:
        try_graphs(
            SerializedGraph(model),
            SerializedGraph(loss),
            rows=2,
            limit_bytes=1 << 30,
        )
    assert str(caught.value) == str(here.value)
    assert caught.value.metadata == here.value.metadata


@pytest.mark.parametrize(
    ("limit", "value", "make", "match"),
    [
        ("SECONDS", 0, long_graph, r"took more than 0 s of a processor"),
        ("BYTES", 16 << 20, wide_graph, r"(more than|or) 16777216 bytes"),
        ("WALL_S", 0.0, long_graph, r", 0 s in all"),
    ],
)
async def test_a_child_that_takes_too_much_is_ended(
    monkeypatch, limit, value, make, match
):
    monkeypatch.setattr(pool, limit, value)
    with pytest.raises(LimitExceeded, match=f"{match}.*fewer operators or layers"):
        await tried(make())
    monkeypatch.undo()
    assert await tried(serialized(HONEST[0]))


async def test_a_child_ends_with_its_caller(monkeypatch):
    begun, opened = asyncio.Event(), []
    pidfd_open = os.pidfd_open

    def open_twice(pid):
        opened.append(pidfd_open(pid))
        begun.set()
        return pidfd_open(pid)

    monkeypatch.setattr(os, "pidfd_open", open_twice)
    call = asyncio.create_task(tried(long_graph()))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert select.select(opened, [], [], 10)[0] == opened
    os.close(opened[0])


async def test_children_have_no_socket_and_no_secret_of_the_server(monkeypatch):
    monkeypatch.setenv("CURVD_TOKEN", "secret")
    pool._forget()  # as if it had been killed: there is a new one
    assert await tried(serialized(HONEST[0]))
    process = Path("/proc", str(pool._nursery[0].pid))
    assert b"secret" not in (process / "environ").read_bytes()
    targets = [os.readlink(entry) for entry in (process / "fd").iterdir()]
    assert len([t for t in targets if t.startswith("socket:")]) == 1


def counted(monkeypatch):
    """Count the children that are asked."""
    asked, answer = [], pool._answer

    async def counting(request):
        asked.append(request)
        return await answer(request)

    monkeypatch.setattr(pool, "_answer", counting)
    return asked


async def test_what_was_tried_is_not_tried_again_though_the_process_is_another(
    monkeypatch,
):
    asked, on = counted(monkeypatch), Trials()
    model = serialized(HONEST[0])
    first = await on.of(model, NONE, rows=2, limit_bytes=1 << 30)
    pool._forget()  # as if it had been killed
    again = await on.of(model, NONE, rows=2, limit_bytes=1 << 30)
    assert first == again == try_graphs(model, NONE, rows=2, limit_bytes=1 << 30)
    assert len(asked) == 1
    await on.of(model, NONE, rows=3, limit_bytes=1 << 30)
    await on.of(model, NONE, rows=2, limit_bytes=1 << 29)
    await on.of_builder("mlp", {"widths": [3, 2]})
    await on.of_builder("mlp", {"widths": [3, 4]})
    assert len(asked) == 5
    with pytest.raises(InvalidGraph):
        await on.of(model, SerializedGraph(b"\xff"), rows=2, limit_bytes=1 << 30)
    assert len(asked) == 6


async def test_a_refusal_is_not_remembered(monkeypatch):
    asked, on = counted(monkeypatch), Trials()
    for _ in range(2):
        with pytest.raises(LimitExceeded):
            await on.of(serialized(HONEST[0]), NONE, rows=2, limit_bytes=1)
    assert len(asked) == 2


async def test_what_is_remembered_of_trials_is_bounded(monkeypatch):
    on, two = Trials(), try_builder("mlp", {"widths": [3, 2]})
    monkeypatch.setattr(pool, "KNOWN_TENSORS", 7)
    on._remember(b"none", None)
    on._remember(b"a", two)
    on._remember(b"b", two)
    assert list(on._known) == [b"none", b"a", b"b"]
    on._remember(b"c", two)
    assert list(on._known) == [b"b", b"c"]


class Gate:
    """Children that end when they are let, in place of real ones."""

    def __init__(self, monkeypatch):
        self.begun, self.gate = [], asyncio.Semaphore(0)
        monkeypatch.setattr(pool, "_answer", self.answer)

    async def answer(self, request):
        self.begun.append(PEER.get())
        await self.gate.acquire()
        return b'{"found": null}'

    def call(self, on, peer):
        async def run():
            PEER.set(peer)
            return await on.of(SerializedGraph(b"x"), NONE, rows=2, limit_bytes=1)

        return asyncio.create_task(run())


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_peers_take_turns_and_one_of_them_waits_with_so_many_at_most(monkeypatch):
    gate, on = Gate(monkeypatch), Trials()
    greedy = [gate.call(on, "a") for _ in range(AT_ONCE + WAITING)]
    await settled()
    assert len(gate.begun) == AT_ONCE
    with pytest.raises(Overloaded, match=f"{WAITING} models of yours wait"):
        await gate.call(on, "a")
    modest = [gate.call(on, peer) for peer in "bc"]
    await settled()
    for _ in range(6):
        gate.gate.release()
        await settled()
    assert "".join(gate.begun[AT_ONCE:]) == "abcaaa"
    for _ in (*greedy, *modest):
        gate.gate.release()
    await asyncio.gather(*greedy, *modest)
    assert on._free == AT_ONCE and not on._waiting


async def test_who_leaves_while_he_waits_leaves_his_place(monkeypatch):
    gate, on = Gate(monkeypatch), Trials()
    calls = [gate.call(on, "a") for _ in range(AT_ONCE + 3)]
    await settled()
    calls[0].cancel()
    calls[AT_ONCE].cancel()
    await settled()
    for _ in calls:
        gate.gate.release()
    await asyncio.gather(*calls, return_exceptions=True)
    assert [call.cancelled() for call in calls].count(True) == 2
    assert on._free == AT_ONCE and not on._waiting


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"reason": "NO_SUCH"}',
        b'{"found": {"tensors": [1]}}',
        b'{"found": {"tensors": [["a", "F32", ["x"]]], "ties": {}, "buffers": []}}',
    ],
)
def test_an_answer_that_is_none_is_a_defect(data):
    with pytest.raises(Internal, match="gave no answer that can be read"):
        _read(data)


async def test_a_session_is_tried_with_its_own_mini_batches_before_it_is_loaded(
    tmp_path,
):
    with middle(tmp_path) as server:
        await server.sessions.create(server.new())
        assert server.device.tried == [(NONE, NONE, 2)]
