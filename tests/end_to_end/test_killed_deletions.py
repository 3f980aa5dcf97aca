"""The server is killed while it deletes: what it said has happened, and nothing else has.

With CURVD_KILLS=200 in the environment as many histories are tried.
"""

import os
import random
import sqlite3
import threading

import numpy as np
import pytest
import raw
from support.killed import Fallible
from support.served import Channels

from curvd.errors import CurvdError, NotFound, Unavailable
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import session_service_pb2 as session_pb

pytest.importorskip("torch")

KILLS = int(os.environ.get("CURVD_KILLS", "4"))
STEPS = 14
"""Steps of the disk among which a server ends itself; all deletions together take more."""
V = raw.file_of({"v": np.ones(5)})


@pytest.fixture(scope="module")
def servers():
    fallible = Fallible()
    yield fallible
    fallible.close()


class History:
    """What a caller has made and deleted, and what he was told of it."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.sound = {}
        """What is there: (kind, id) -> what a product of a session is to be."""
        self.gone, self.doubtful = set(), set()

    def make(self, channel):
        """Models, datasets that share bytes, and sessions, some with parameters of their own."""
        for number in range(3):
            state = {"a": np.full(2, 1.0 + number), "b": np.ones(3)}
            model = raw.register_model(
                channel, "two", "{}", raw.file_of(state)
            ).model.id
            points = {"x": np.full((4, 2), float(number // 2)), "y": np.ones(4)}
            dataset = raw.register_dataset(
                channel, raw.file_of(points), batch_size=1 + number
            ).dataset.id
            session = raw.create(channel, model, dataset).id
            factor = 5.0 + 2 * number
            for _ in range(number):
                values = {"b": np.full(3, self.random.random())}
                update(channel, session, raw.file_of(values))
                factor = 2 * (1.0 + number) + values["b"].sum()
            self.sound |= {
                ("model", model): None,
                ("dataset", dataset): None,
                ("session", session): factor,
            }

    def delete(self, channel):
        """Delete some of it, until the server dies or all is done."""
        kinds = ["session", "dataset", "model"]
        chosen = [key for kind in kinds for key in self.sound if key[0] == kind]
        # The last of each kind need one another, so at least these can all go.
        sure = chosen[2::3]
        spared = {
            key for key in chosen if key not in sure and self.random.random() < 0.3
        }
        for kind, name in chosen:
            if (kind, name) in spared:
                continue
            try:
                if kind == "session":
                    put_vector(channel, name)
                    if self.random.random() < 0.5:
                        delete_vector(channel, name)
                delete(channel, kind, name)
            except Unavailable:
                self.doubtful.add((kind, name))
                self.sound.pop((kind, name))
                return
            except CurvdError as error:
                assert error.reason == "STILL_IN_USE", error
            else:
                self.gone.add((kind, name))
                self.sound.pop((kind, name))

    def check(self, channel, folder):
        """Compare with what a server serves that has begun anew."""
        listed = {
            *(("model", m.id) for m in listing(channel, "Models")),
            *(("dataset", d.id) for d in listing(channel, "Datasets")),
            *(("session", s.id) for s in listing(channel, "Sessions")),
        }
        assert self.sound.keys() <= listed <= self.sound.keys() | self.doubtful
        assert not listed & self.gone
        for kind, name in self.gone | (self.doubtful - listed):
            with pytest.raises(NotFound):
                use(channel, kind, name, listed)
        for kind, name in listed:
            factor = use(channel, kind, name, listed)
            known = self.sound.get((kind, name))
            assert known is None or factor == pytest.approx(known, abs=0, rel=1e-15)
        # Of the disk nothing is left but what these need.
        files = {path.name for path in (folder / "blobs").iterdir()}
        assert files == needed(folder)


def put_vector(channel, session):
    header = curvature_pb.PutVectorHeader(session_id=session, name="v")
    first = curvature_pb.PutVectorRequest(header=header)
    raw.call(channel, "PutVector", [first, memoryview(V)])


def update(channel, session, data):
    header = session_pb.UpdateParametersHeader(
        session_id=session, values=raw.upload(data)
    )
    first = session_pb.UpdateParametersRequest(header=header)
    raw.call(channel, "UpdateParameters", [first, memoryview(data)])


def delete(channel, kind, name):
    rpc = f"Delete{kind.capitalize()}"
    request = raw.RPCS[rpc].request.message(**{f"{kind}_id": name})
    raw.call(channel, rpc, request)


def delete_vector(channel, session):
    request = raw.RPCS["DeleteVector"].request.message(session_id=session, name="v")
    raw.call(channel, "DeleteVector", request)


def listing(channel, kinds):
    rpc = f"List{kinds}"
    answer = raw.call(channel, rpc, raw.RPCS[rpc].request.message())
    return getattr(answer, kinds.lower())


def use(channel, kind, name, listed):
    """Use what is there: multiply in a session, or make one of a model or dataset."""
    made = None
    if kind != "session":
        ids = {k: n for k, n in listed if k != "session"} | {kind: name}
        if ids.keys() < {"model", "dataset"}:  # of the other kind nothing is left
            with pytest.raises(NotFound) as caught:
                raw.create(
                    channel, ids.get("model", "none"), ids.get("dataset", "none")
                )
            missing = "model" if "model" not in ids else "dataset"
            if (kind, name) in listed:
                assert missing in str(caught.value)
                return None
            raise caught.value
        made = raw.create(channel, ids["model"], ids["dataset"]).id
    session = made or name
    ask = curvature_pb.ListVectorsRequest(session_id=session)
    # They are in memory, and no restart brings any of them back, deleted or not.
    assert not raw.call(channel, "ListVectors", ask).vectors
    parts = raw.product("MatVec", session, V)
    answer = raw.call(channel, "MatVec", parts)
    chunks = b"".join(part for part in answer if isinstance(part, memoryview))
    if made:
        delete(channel, "session", made)
    return float(np.frombuffer(chunks[-8:])[0])


def needed(folder):
    """The digests in the catalogue, the same in both of its files."""
    found = []
    for name in ("catalogue.sqlite", "catalogue.mirror.sqlite"):
        with sqlite3.connect(folder / name) as db:
            rows = db.execute(
                "SELECT digest FROM models UNION SELECT digest FROM datasets"
            )
            digests = {digest for (digest,) in rows}
            for (sources,) in db.execute("SELECT sources FROM sessions"):
                digests |= {part for part in sources.split('"') if len(part) == 64}
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
            orphans = "SELECT * FROM versions WHERE session_id NOT IN (SELECT id FROM sessions)"
            assert db.execute(orphans).fetchall() == []
        db.close()
        found.append(digests)
    assert found[0] == found[1]
    return found[0]


def die(servers, folder, seed, *, dies_at=0, after_s=None):
    """Let a server die while it deletes; returns whether a deletion was cut off."""
    history = History(seed)
    with Channels(servers.start(folder)) as channel:
        history.make(channel)
    servers.kill()
    with Channels(servers.start(folder, dies_at=dies_at)) as channel:
        timer = threading.Timer(after_s or 0.0, servers.kill)
        if after_s is not None:
            timer.start()
        history.delete(channel)
    if after_s is None:
        servers.kill()
    else:
        timer.join()
    for _ in range(2):  # what is found again is found once more
        with Channels(servers.start(folder)) as channel:
            history.check(channel, folder)
        servers.kill()
    return bool(history.doubtful)


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_server_that_dies_between_two_steps(servers, tmp_path, seed):
    at = 1 + random.Random(seed).randrange(STEPS)
    assert die(servers, tmp_path / "data", seed, dies_at=at)


@pytest.mark.parametrize("seed", range(KILLS // 2))
def test_a_server_that_is_killed_at_any_moment(servers, tmp_path, seed):
    after_s = random.Random(1000 + seed).uniform(0.0, 0.3)
    die(servers, tmp_path / "data", 1000 + seed, after_s=after_s)
