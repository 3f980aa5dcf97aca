"""Whose bytes are whose, against a model that only counts what refers to them."""

import asyncio
import random

import numpy as np
import pytest
from support.callers import calls_as
from support.fake_device import file_of, middle, put
from support.quotas import written

from curvd.contract.specs import ModelSpec
from curvd.errors import LimitExceeded
from curvd_server.sessions import Update
from curvd_server.storage import blob_store
from curvd_server.storage.blob_store import BlobStore
from curvd_server.system import Identity, Quotas

CALLERS = {name: Identity(name) for name in ("ann", "ben", "eve")}
STATES = [{"a": np.full(2, float(n)), "b": np.ones(3)} for n in range(3)]
DIGESTS = [file_of(state)[1] for state in STATES]
DAY_S = 24 * 3600.0
OF_SESSIONS = 1
"""The state that `Middle.new` registers a model with."""


class Walk:
    """Callers who register, update and delete; and what each of them should have.

    Args:
        server: Everything without RPCs.
        folder: Its data directory.
    """

    def __init__(self, server, folder):
        self.server, self.folder = server, folder
        self.models = {}  # (name, state, variant) -> id
        self.sessions = {}  # name -> (id, state that it was updated to)

    def needed_by(self, name):
        """The states that things of a caller refer to."""
        return {state for who, state, _ in self.models if who == name} | {
            state
            for who, (_, state) in self.sessions.items()
            if who == name and state is not None
        }

    async def register(self, name, state, variant):
        put(self.server.blobs, STATES[state])
        config = {"variant": variant} if variant else {}
        spec = ModelSpec(builder="two", config=config)
        model = self.server.registry.model(spec, DIGESTS[state])
        self.models[name, state, variant] = model.id

    async def open(self, name, state, variant):
        if name not in self.sessions:
            info = await self.server.sessions.create(self.server.new())
            self.sessions[name] = (info.id, None)
            self.models[name, OF_SESSIONS, 0] = info.model_id

    async def update(self, name, state, variant):
        if name in self.sessions:
            digest = put(self.server.blobs, STATES[state])
            session_id, _ = self.sessions[name]
            with self.server.blobs.held(digest):
                update = Update(digest=digest, source="", expected_version=None)
                await self.server.sessions.update(session_id, update)
            self.sessions[name] = (session_id, state)

    async def close(self, name, state, variant):
        if name in self.sessions:
            await self.server.sessions.delete(self.sessions.pop(name)[0])

    async def delete(self, name, state, variant):
        if name in self.sessions and (state, variant) == (OF_SESSIONS, 0):
            return  # it is needed
        model = self.models.pop((name, state, variant), None)
        if model is not None:
            await self.server.sessions.deletions.model(model)

    async def fail(self, name, state, variant):
        """Register what does not fit: it comes to nothing."""
        digest = put(self.server.blobs, STATES[state])
        self.server.registry.release(digest)

    def check(self):
        for name, caller in CALLERS.items():
            with calls_as(caller):
                have = {n for n, d in enumerate(DIGESTS) if self.has(d)}
            assert have == self.needed_by(name), name
        anybodys = set().union(*map(self.needed_by, CALLERS))
        files = {path.name for path in (self.folder / "blobs").iterdir()}
        assert files & set(DIGESTS) == {DIGESTS[n] for n in anybodys}

    def has(self, digest):
        return self.server.blobs.has(digest) and self.server.blobs.is_sound(digest)


@pytest.mark.parametrize("seed", range(6))
def test_bytes_are_there_for_whoever_has_something_that_needs_them(tmp_path, seed):
    chosen = random.Random(seed)

    async def steps(server, count):
        walk.server = server
        for _ in range(count):
            name = chosen.choice(list(CALLERS))
            act = chosen.choice([
                walk.register,
                walk.open,
                walk.update,
                walk.close,
                walk.delete,
                walk.delete,
                walk.fail,
            ])
            with calls_as(CALLERS[name]):
                await act(name, chosen.randrange(3), chosen.randrange(2))
            walk.check()

    walk = Walk(None, tmp_path)
    for _ in range(3):  # with restarts between
        with middle(tmp_path) as server:
            asyncio.run(steps(server, 40))


class Store:
    """Blobs, what refers to them, and what each caller finds."""

    def __init__(self, folder, **options):
        self.needed, self.folder = {}, folder / "blobs"
        self.blobs = BlobStore(
            self.folder, referrers=lambda digest: self.needed, **options
        )

    def put(self, *names, state=0):
        for name in names:
            with calls_as(Identity(name)):
                digest = put(self.blobs, STATES[state])
        return digest

    def finds(self, name, digest):
        with calls_as(Identity(name)):
            return self.blobs.has(digest)

    def files(self):
        return {path.name for path in self.folder.iterdir()}


def test_who_sent_bytes_for_nothing_loses_them_as_if_nobody_else_had_them(tmp_path):
    store = Store(tmp_path)
    shared, alone = store.put("ann", "eve", state=0), store.put("eve", state=1)
    store.needed[shared] = {"ann"}
    found = []
    now_s = (store.folder / alone).stat().st_mtime
    for hours in (0, 1, 23, 25, 26):
        times = {"now_s": now_s + 3600 * hours, "monotonic_s": 3600 * hours}
        store.blobs.sweep(**times)
        found.append([store.finds("eve", digest) for digest in (shared, alone)])
    assert found == [[True, True]] * 3 + [[False, False]] * 2
    assert store.files() == {shared}
    assert store.finds("ann", shared)


@pytest.mark.parametrize("step_s", [DAY_S + 9, -DAY_S])
def test_a_step_of_the_clock_ends_no_claim(tmp_path, step_s):
    store = Store(tmp_path)
    digest = store.put("ann", "eve")
    store.needed[digest] = {"ann"}
    now_s = (store.folder / digest).stat().st_mtime + step_s
    store.blobs.sweep(now_s=now_s, monotonic_s=0)
    store.blobs.sweep(now_s=now_s + 60, monotonic_s=60)
    assert store.finds("eve", digest)
    store.blobs.sweep(now_s=now_s + DAY_S + 70, monotonic_s=DAY_S + 70)
    assert not store.finds("eve", digest)


def test_who_holds_bytes_of_another_keeps_only_the_file_and_only_meanwhile(tmp_path):
    store = Store(tmp_path)
    digest = store.put("ann")
    with calls_as(Identity("eve")), store.blobs.held(digest):
        store.blobs.release(digest, "ann")
        assert not store.finds("ann", digest)
        assert not store.finds("eve", digest)
        store.blobs.sweep(now_s=0, monotonic_s=0)
        assert store.files() == {digest}
    store.blobs.sweep(now_s=0, monotonic_s=0)
    assert store.files() == set()


def test_what_a_caller_takes_from_himself_while_he_holds_it_stays_so_long(tmp_path):
    store = Store(tmp_path)
    digest = store.put("ann", "eve")
    store.needed[digest] = {"ann"}
    with calls_as(Identity("eve")), store.blobs.held(digest):
        store.blobs.release(digest)
        assert store.finds("eve", digest)
    store.blobs.sweep(now_s=0, monotonic_s=0)
    assert not store.finds("eve", digest)
    assert store.finds("ann", digest)


def test_what_was_sent_for_nothing_makes_room_for_what_its_sender_sends(
    tmp_path, monkeypatch
):
    size = len(file_of(STATES[0])[0])
    file = written(tmp_path / "q", f"[callers.ann]\ndisk_bytes = {size + 10}\n")
    store = Store(tmp_path, quotas=Quotas(file))
    first = store.put("ann", "eve", state=0)
    with pytest.raises(LimitExceeded):  # it may be a part that is about to be committed
        store.put("ann", state=1)
    monkeypatch.setattr(blob_store, "_ABANDONED_S", -1.0)
    second = store.put("ann", state=1)
    assert [store.finds("ann", digest) for digest in (first, second)] == [False, True]
    assert store.finds("eve", first)
    store.needed[second] = {"ann"}
    with pytest.raises(LimitExceeded):
        store.put("ann", state=2)
    assert store.finds("ann", second)


def test_what_an_operator_sends_for_a_session_without_owner_goes_with_it(tmp_path):
    olga = Identity("olga", frozenset({"operator"}))

    async def update(server):
        with calls_as(olga):
            digest = put(server.blobs, STATES[0])
            await server.sessions.update(session.id, Update(digest=digest))
            return digest

    async def delete(server):
        with calls_as(olga):
            await server.sessions.delete(session.id)

    with middle(tmp_path) as server:
        session = asyncio.run(server.sessions.create(server.new()))
        digest = asyncio.run(update(server))
        with calls_as(olga):
            server.blobs.sweep(now_s=0, monotonic_s=0)
            assert not server.blobs.has(digest)  # it is hers no more
        assert server.blobs.has(digest)
        asyncio.run(delete(server))
        assert not (tmp_path / "blobs" / digest).exists()
