"""Whatever rots in a data directory: a typed error, nothing else lost, the server up."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import raw
from support.served import server

from curvd.errors import CurvdError, DataLoss, FailedPrecondition, Internal
from curvd.v1 import session_service_pb2 as session_pb

STATES = {
    name: raw.file_of({"a": np.full(2, value), "b": np.full(3, value)})
    for name, value in (("old", 1.0), ("other", 2.0))
}
UPDATE = raw.file_of({"b": np.full(3, 4.0)})
DATA = {
    name: raw.file_of({"x": np.full((4, 2), value), "y": np.ones(4)})
    for name, value in (("sent", 1.0), ("mounted", 2.0), ("other", 3.0))
}
BEGUN = raw.file_of({"x": np.arange(50.0)})
V = raw.file_of({"v": np.ones(5)})


def digest(data):
    return hashlib.sha256(data).hexdigest()


def model(channel, name):
    return raw.register_model(channel, "two", "{}", STATES[name]).model.id


def sent(channel, name):
    return raw.register_dataset(channel, DATA[name]).dataset.id


def mounted(channel):
    header = session_pb.RegisterDatasetHeader(
        inputs=["x"], target="y", batch_size=4, name="d"
    )
    request = [session_pb.RegisterDatasetRequest(header=header)]
    return raw.call(channel, "RegisterDataset", request).dataset.id


def update(channel, session_id):
    header = session_pb.UpdateParametersHeader(
        session_id=session_id, values=raw.upload(UPDATE)
    )
    first = session_pb.UpdateParametersRequest(header=header)
    return raw.call(channel, "UpdateParameters", [first, memoryview(UPDATE)])


def multiplied(channel, session_id):
    """The first element of a product: the sum of the parameters."""
    parts = raw.call(channel, "MatVec", raw.product("MatVec", session_id, V))
    return raw.joined(parts)[1][0]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What a server with everything has left, and its three sessions."""
    folder = tmp_path_factory.mktemp("rot")
    root = folder / "datasets"
    root.mkdir()
    (root / "d.safetensors").write_bytes(DATA["mounted"])
    with server(folder / "data", datasets_root=root) as channel:
        ids = {
            "sent": raw.create(
                channel, model(channel, "old"), sent(channel, "sent")
            ).id,
            "mounted": raw.create(channel, model(channel, "old"), mounted(channel)).id,
            "other": raw.create(
                channel, model(channel, "other"), sent(channel, "other")
            ).id,
        }
        update(channel, ids["sent"])
        part = session_pb.RegisterDatasetHeader(
            inputs=["x"], target="y", batch_size=4, tensors=raw.upload(BEGUN)
        )
        first = session_pb.RegisterDatasetRequest(header=part)
        raw.call(channel, "RegisterDataset", [first, memoryview(BEGUN)[:200]])
    return folder, ids


EXPECTED = {"sent": 14.0, "mounted": 5.0, "other": 10.0}
KINDS = {
    # What is damaged, and the sessions that need it.
    f"data/blobs/{digest(STATES['old'])}": {"sent", "mounted"},
    f"data/blobs/{digest(DATA['sent'])}": {"sent"},
    f"data/blobs/{digest(UPDATE)}": {"sent"},
    f"data/blobs/{digest(BEGUN)}.part": set(),
    f"data/mounts/{digest(DATA['mounted'])}": {"mounted"},
    "datasets/d.safetensors": {"mounted"},
    "data/catalogue.sqlite": set(),
    "data/catalogue.mirror.sqlite": set(),
    "data/catalogue.sqlite.reserve": set(),
}


def changed(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flipped(place):
    def flip(data):
        data = bytearray(data)
        data[int(place * (len(data) - 1))] ^= 1
        return bytes(data)

    return changed(flip)


def replaced(make):
    def replace(path):
        path.unlink()
        make(path)

    return replace


DAMAGES = {
    "header": flipped(0.0),
    "names": flipped(0.05),
    "middle": flipped(0.5),
    "end": flipped(1.0),
    "truncated": changed(lambda data: data[: len(data) // 2]),
    "longer": changed(lambda data: data + b"more"),
    "emptied": changed(lambda data: b""),
    "swapped": changed(lambda data: STATES["other"]),
    "gone": replaced(lambda path: None),
    "a folder": replaced(lambda path: path.mkdir()),
    "a pipe": replaced(os.mkfifo),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
}


def test_the_table_has_every_file(left):
    folder, _ = left
    found = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    }
    needless = {digest(STATES["other"]), digest(DATA["other"])}  # of the same kinds
    empty = {name for name in found if not (folder / name).stat().st_size}
    assert found - empty - {f"data/blobs/{d}" for d in needless} == set(KINDS)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", KINDS)
def test_what_rotted_is_named_and_nothing_else_is_lost(left, tmp_path, name, how):
    folder, ids = left
    shutil.copytree(folder, tmp_path / "copy")
    path, data_dir = tmp_path / "copy" / name, tmp_path / "copy/data"
    DAMAGES[how](path)
    with server(data_dir, datasets_root=tmp_path / "copy/datasets") as channel:
        refused = set()
        for session, expected in EXPECTED.items():
            try:
                assert multiplied(channel, ids[session]) == expected
            except CurvdError as error:
                assert isinstance(error, DataLoss | FailedPrecondition), error
                assert not isinstance(error, Internal)
                assert "again" in str(error)  # what to do
                refused.add(session)
        # A record of a mounted file may have rotted where it does no harm.
        assert refused == KINDS[name] or (
            name.startswith("data/mounts") and refused < KINDS[name]
        )
        listed = raw.call(channel, "ListSessions", session_pb.ListSessionsRequest())
        assert {s.id for s in listed.sessions} == set(ids.values())
        healed(channel, ids, name)


def healed(channel, ids, name):
    """Bring the same content again: everything works as before."""
    model(channel, "old")
    sent(channel, "sent")
    update(channel, ids["sent"])
    for session in ("sent", "other"):
        assert multiplied(channel, ids[session]) == EXPECTED[session]
    if name != "datasets/d.safetensors":  # that is its owner's
        mounted(channel)
        assert multiplied(channel, ids["mounted"]) == EXPECTED["mounted"]
    raw.register_dataset(channel, raw.file_of({"x": np.ones(4), "y": np.ones(4)}))
