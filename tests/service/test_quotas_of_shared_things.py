"""Quotas of what callers take from each other: device, trials, compiler, connections."""

import asyncio
import functools
import json
import threading
import time

import numpy as np
import pytest
import raw
from support.callers import calls_as
from support.fake_device import FakeDevice
from support.quotas import TOKENS, refused, served, targeted, written

import curvd
from curvd.errors import InvalidSpec, LimitExceeded, Overloaded, Unavailable
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.system import Identity, Quotas
from curvd_server.transport import greeting, interceptors
from curvd_server.transport.limits import ConnectionLimits
from curvd_server.transport.refusals import Refusals

BUDGET = 1000
STATE = raw.file_of({"a": np.ones(2), "b": np.ones(3)})
POINTS = raw.file_of({"x": np.ones((4, 2)), "y": np.ones(4)})
TENSORS = len(STATE) + len(POINTS)


@pytest.fixture
def serving(tmp_path):
    """Start a server with quotas; gives a channel for each caller by name."""
    return functools.partial(served, tmp_path)


def delete(channel, session):
    raw.call(
        channel,
        "DeleteSession",
        session_pb.DeleteSessionRequest(session_id=session.id),
    )


def test_device_bytes(serving):
    limit = 2 * (TENSORS + BUDGET) + 10
    with serving(f"[callers.ann]\ndevice_bytes = {limit}\n") as channels:
        make = lambda name, **fields: raw.fake_session(channels[name], **fields)  # noqa: E731
        first, _ = (make("ann", budget_bytes=BUDGET) for _ in range(2))
        act = lambda: make("ann", budget_bytes=BUDGET)  # noqa: E731
        refused(LimitExceeded, "device_bytes", limit, act)
        refused(LimitExceeded, "device_bytes", limit, lambda: make("ann"))
        assert make("ben").budget_bytes > limit  # the server's default
        delete(channels["ann"], first)
        # What she leaves open is what she has left.
        left = make("ann")
        assert left.budget_bytes == BUDGET + 10
        delete(channels["ann"], left)
        act()


def test_device_bytes_are_held_again_after_a_restart(serving):
    limit = TENSORS + BUDGET
    quotas = f"[callers.ann]\ndevice_bytes = {limit}\n"
    with serving(quotas) as channels:
        raw.fake_session(channels["ann"], budget_bytes=BUDGET)
    with serving(quotas) as channels:
        act = lambda: raw.fake_session(channels["ann"], budget_bytes=0)  # noqa: E731
        refused(LimitExceeded, "device_bytes", limit, act)
        ask = session_pb.ListSessionsRequest()
        (there,) = raw.call(channels["ann"], "ListSessions", ask).sessions
        delete(channels["ann"], there)
        act()


class Refusing(FakeDevice):
    """A device onto which nothing is loaded with parameters of certain names."""

    def load(self, *arguments):
        if arguments[-1] == ("none",):
            raise InvalidSpec("no parameter has such a name")
        return super().load(*arguments)


def test_what_fails_to_open_or_is_only_checked_takes_nothing(serving):
    limit = TENSORS + BUDGET
    quotas = f"[callers.ann]\ndevice_bytes = {limit}\n"
    with serving(quotas, device=Refusing()) as channels:
        for _ in range(3):
            raw.fake_session(channels["ann"], budget_bytes=BUDGET, validate_only=True)
            with pytest.raises(InvalidSpec):
                raw.fake_session(channels["ann"], budget_bytes=BUDGET, params=["none"])
        raw.fake_session(channels["ann"], budget_bytes=BUDGET)


def test_who_shares_parameters_takes_only_data(serving):
    limit = TENSORS + 2 * BUDGET + len(POINTS)
    with serving(f"[callers.ann]\ndevice_bytes = {limit}\n") as channels:
        first = raw.fake_session(channels["ann"], budget_bytes=BUDGET)
        make = lambda: raw.call(  # noqa: E731
            channels["ann"],
            "CreateSession",
            session_pb.CreateSessionRequest(
                dataset_id=first.dataset_id,
                shares_with=first.id,
                budget_bytes=BUDGET,
            ),
        )
        make()
        refused(LimitExceeded, "device_bytes", limit, make)


def test_trial_seconds(serving, monkeypatch):
    pytest.importorskip("torch")
    from curvd_server.models import try_builder
    from curvd_server.trials import nursery, pool

    tried = []

    async def answer(request):
        tried.append(request)
        found = nursery._written(try_builder("mlp", {"widths": [3, 2]}))
        return json.dumps({"found": found, "seconds": 5.0}).encode()

    monkeypatch.setattr(pool, "_answer", answer)
    # Each name of a config is tried by itself, and none of them twice.
    state = raw.file_of({"1.weight": np.ones((2, 3), "f4"), "1.bias": np.ones(2, "f4")})
    configs = [f'{{"widths": [3, 2], "activation": "{a}"}}' for a in ("tanh", "relu")]
    with serving("[callers.ann]\ntrial_seconds = 4\n", device="real") as channels:
        register = lambda name, at: raw.register_model(  # noqa: E731
            channels[name], "mlp", configs[at], state
        )
        register("ann", 0)
        with pytest.raises(
            Overloaded, match=r"has spent 5.0 of 4 trial_seconds"
        ) as told:
            register("ann", 1)
        assert told.value.metadata["quota"] == "trial_seconds"
        assert told.value.metadata["owner"] == "ann"
        assert told.value.metadata["limit"] == "4"
        # A second and a hundredth of four more are free in so many seconds.
        assert 900 < told.value.retry_after_s < 950
        register("ann", 0)  # which is known, and costs nothing
        register("ben", 1)
        assert len(tried) == 2


def test_who_may_spend_nothing_is_not_told_to_come_back(tmp_path):
    quotas = Quotas(written(tmp_path / "q", "[callers.ann]\ntrial_seconds = 0\n"))
    with calls_as(Identity("ann")):
        refused(
            LimitExceeded,
            "trial_seconds",
            0,
            lambda: quotas.check_spent("trial_seconds"),
        )


def test_what_was_spent_is_free_again_little_by_little(tmp_path):
    now = [0.0]
    text = "[callers.ann]\ntrial_seconds = 60\n"
    quotas = Quotas(written(tmp_path / "q", text), lambda: now[0])
    with calls_as(Identity("ann")):
        quotas.spend("trial_seconds", 90.0)
        error = refused(
            Overloaded,
            "trial_seconds",
            60,
            lambda: quotas.check_spent("trial_seconds"),
        )
        now[0] += error.retry_after_s + 1e-6
        quotas.check_spent("trial_seconds")
        quotas.spend("trial_seconds", 1.0)
        with pytest.raises(Overloaded):
            quotas.check_spent("trial_seconds")
        now[0] += 7200.0
        quotas.check_spent("trial_seconds")
        quotas.spend("trial_seconds", 59.0)
        quotas.check_spent("trial_seconds")
    with calls_as(Identity("ben")):
        quotas.spend("trial_seconds", 1e9)
        quotas.check_spent("trial_seconds")


class Feed(raw.Feed):
    """A request that says when its parts are wanted."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.wanted = threading.Event()

    def __next__(self):
        if not self._parts:
            self.wanted.set()
        return super().__next__()


def uploading(channel, value):
    """A call that goes on until its feed is given the rest."""
    state = raw.file_of({"a": np.full(2, value), "b": np.ones(3)})
    header = session_pb.RegisterModelHeader(
        builder="two", config_json="{}", state=raw.upload(state)
    )
    feed = Feed(session_pb.RegisterModelRequest(header=header))
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(raw.call(channel, "RegisterModel", feed))
    )
    thread.start()
    assert feed.wanted.wait(60)

    def end():
        feed.add(memoryview(state))
        feed.end()
        thread.join(60)
        return answers

    return end


def test_connections(serving, monkeypatch):
    # grpcio's clients are answered by ourselves: each method has its own connection.
    monkeypatch.setattr(greeting, "is_ours", lambda beginning, *, tls: True)
    paced = []

    class Noted(Refusals):
        async def pace(self, caller, remaining_s):
            paced.append(caller)
            await super().pace(caller, remaining_s)

    monkeypatch.setattr(interceptors, "Refusals", Noted)
    with serving("[callers.ann]\nconnections = 2\n") as channels:
        listing = lambda name: raw.call(  # noqa: E731
            channels[name], "ListSessions", session_pb.ListSessionsRequest()
        )
        for _ in range(5):  # one without a call makes room
            listing("ann")
        # As those who are refused, who makes another one go has so many a second.
        assert paced == ["ann"] * 3
        ends = [uploading(channels["ann"], float(n)) for n in range(2)]
        try:
            for _ in range(3):
                with pytest.raises(Overloaded) as told:
                    listing("ann")
                assert told.value.metadata["quota"] == "connections"
                assert told.value.metadata["owner"] == "ann"
                assert "'ann' has 2 of 2 connections" in str(told.value)
                assert "[callers.ann]" in str(told.value)
                listing("ben")
        finally:
            answers = [end() for end in ends]
        assert all(answer[0].model.owner == "ann" for answer in answers)
        listing("ann")


def test_connections_beyond_the_quota_are_in_nobodys_way(serving, monkeypatch):
    put_off = threading.Semaphore(0)

    class Slow(Refusals):
        async def pace(self, caller, remaining_s):
            put_off.release()
            await asyncio.sleep(60)

    monkeypatch.setattr(interceptors, "Refusals", Slow)
    # grpcio's clients are answered by ourselves: each method has its own connection.
    monkeypatch.setattr(greeting, "is_ours", lambda beginning, *, tls: True)
    quotas, limits = "[callers.ann]\nconnections = 1\n", ConnectionLimits(connections=4)
    with serving(quotas, connections=limits) as channels:
        info = lambda name: raw.call(  # noqa: E731
            channels[name], "GetServerInfo", session_pb.GetServerInfoRequest()
        )

        def fail():
            with pytest.raises(Unavailable):
                info("ann")

        end = uploading(channels["ann"], 1.0)
        threads = [threading.Thread(target=fail) for _ in range(3)]
        for thread in threads:
            thread.start()
            assert put_off.acquire(timeout=60)
        # All that the server has room for are open, and each has a call under way.
        for thread in threads:
            assert info("ben").status.connections == 4
            thread.join(60)
            assert not thread.is_alive()
        assert end()[0].model.owner == "ann"


class Multiplier:
    """Multiplies by some operators until they are in their last tier, and further on."""

    def __init__(self, client, *kinds):
        small_net = pytest.importorskip("support.small_net")
        session = small_net.open_session(client, plan="first", operators=kinds)
        self.operators = [getattr(session, kind)() for kind in kinds]
        self.v = np.ones(session.layout.size)

    def until(self, over):
        """Multiply, with time for the device to be idle, until something is so."""
        for _ in range(200):
            for operator in self.operators:
                operator @ self.v
            if over():
                return
            time.sleep(0.15)
        raise AssertionError("it never came to that")


def test_compile_jobs(tmp_path, monkeypatch, caplog):
    pytest.importorskip("torch")
    from curvd_server.engine import Compiler
    from curvd_server.engine.tuning import plan as plans
    from curvd_server.engine.tuning.autotune import Plan

    made, gate = [], threading.Event()

    def make(self, text, package):
        made.append(text)
        assert gate.wait(120)
        raise RuntimeError("no compiler here")

    def put_off():
        lines = map(json.loads, caplog.messages)
        return [line for line in lines if line["event"] == "not compiled yet"]

    monkeypatch.setattr(Compiler, "_make", make)
    monkeypatch.setattr(plans, "ranked", lambda *_: iter([Plan("program", 1)]))
    caplog.set_level("WARNING", "curvd_server")
    quotas = "[callers.ann]\ncompile_jobs = 1\n"
    with (
        targeted(tmp_path, quotas, "real", compile_after_s=1e-6) as target,
        curvd.connect(target, token=TOKENS["ann"]) as client,
    ):
        ann = Multiplier(client, "hessian", "ggn")
        try:
            ann.until(put_off)
            assert len(made) == 1
        finally:
            gate.set()
        line = put_off()[0]
        facts = {key: line[key] for key in ("quota", "owner", "limit")}
        assert facts == {"quota": "compile_jobs", "owner": "ann", "limit": "1"}
        assert "'ann' has 1 of 1 compile_jobs" in line["error"]
        # When the first is over, the other is asked for at a product to come.
        ann.until(lambda: len(set(made)) > 1)


def test_those_of_others_do_not_count(tmp_path):
    quotas = Quotas(written(tmp_path / "q", "[default]\ncompile_jobs = 1\n"))
    for name in ("ann", "ben"):
        with calls_as(Identity(name)):
            quotas.take("compile_jobs", 1)
            with pytest.raises(Overloaded, match="the program goes on as it is"):
                quotas.take("compile_jobs", 1)
