"""The catalogue: what was written is there, whatever the disk does to one of its files."""

import os
import re
import sqlite3

import numpy as np
import pytest
from support.fake_device import MSE, middle

from curvd.contract.enums import Dtype, Mode
from curvd.contract.infos import ModelInfo, SessionInfo, SessionState
from curvd.contract.layout import ParameterLayout
from curvd.contract.specs import ModelSpec
from curvd.errors import DataLoss, DiskFull, FailedPrecondition
from curvd_server.storage import database
from curvd_server.storage.catalogue import Catalogue
from curvd_server.storage.ranges import LONGEST_LEASE_S
from curvd_server.storage.records import StoredModel, StoredSession, StoredVersion

FIRST, SECOND = "catalogue.sqlite", "catalogue.mirror.sqlite"


def session(id_="s", **changes):
    fields = {
        "id": id_,
        "name": "",
        "model_id": "m",
        "dataset_id": "d",
        "loss": MSE,
        "dtype": Dtype.FLOAT64,
        "mode": Mode.EVAL,
        "version": 1,
        "parameters_digest": "0" * 64,
        "layout": ParameterLayout.of({"a": (2,)}),
        "data_points": 4,
        "batches": 2,
        "device": "fake",
        "budget_bytes": 0,
        "operators": (),
        "state": SessionState.READY,
        "create_time_s": 1000.0,
        "expire_time_s": None,
        "params": (),
    }
    return StoredSession(
        info=SessionInfo(**fields),
        request_id="r",
        fingerprint="f",
        sources={"a": "1" * 64},
        **({"lease_s": None} | changes),
    )


def model(id_="m"):
    info = ModelInfo(id=id_, spec=ModelSpec(builder="mlp"), tensors=(), state_bytes=8)
    return StoredModel(info=info, digest="2" * 64, ties={}, buffers=frozenset({"b"}))


def version(number):
    return StoredVersion(
        version=number, parameters_digest="3" * 64, request_id="u", fingerprint="g"
    )


@pytest.fixture
def folder(tmp_path):
    """What a server has left: both files, with something in every table."""
    catalogue = Catalogue(tmp_path / FIRST)
    catalogue.add_model(model())
    for id_ in ("s", "t"):
        catalogue.add_session(session(id_))
    catalogue.add_version([session().info], version(2), {"a": "1" * 64})
    catalogue.plans["key"] = "{}"
    catalogue.close()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("1" * 64)).touch()
    return tmp_path


def contents(folder):
    """All that a catalogue says."""
    catalogue = Catalogue(folder / FIRST)
    try:
        stored, lost = catalogue.sessions()
        assert not lost
        found = catalogue.model("m"), stored, catalogue.version_of("s", "u")
        return *found, catalogue.plans.get("key", ""), catalogue.referrers()
    finally:
        catalogue.close()


def flipped(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_a_flipped_bit_in_either_file_loses_nothing(folder, name):
    before = contents(folder)
    clean = (folder / name).read_bytes()
    size = len(clean)
    rows = [m.start() for m in re.finditer(rb"[1-3]{64}", clean)]
    places = {*range(0, 100, 9), *rows, *(r + 40 for r in rows), *range(0, size, 4001)}
    for place in sorted(places):
        data = bytearray(clean)
        data[place] ^= 1 << place % 8
        (folder / name).write_bytes(data)
        assert contents(folder) == before, place
        assert contents(folder) == before, place  # and healed


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"no database" * 1000,
        lambda data: bytes(len(data)),
        None,
    ],
)
def test_a_file_that_is_ruined_or_gone_is_made_again_from_the_other(
    folder, name, damage
):
    before = contents(folder)
    path = folder / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    assert contents(folder) == before
    other = folder / (FIRST if name == SECOND else SECOND)
    other.unlink()
    assert contents(folder) == before
    if name == FIRST and damage is not None:
        assert (folder / f"{FIRST}.damaged").exists()


@pytest.mark.parametrize("damage", [b"", b"no database" * 1000, None])
def test_a_catalogue_that_is_lost_is_never_begun_anew_without_a_word(folder, damage):
    for name in (FIRST, SECOND):
        if damage is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damage)
    with pytest.raises(
        FailedPrecondition,
        match=r"does not know any more.*backup.*begin anew, move both",
    ):
        Catalogue(folder / FIRST)
    assert (folder / FIRST).exists() is (damage is not None)


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_journal_that_is_no_file_is_not_waited_for(folder, name, make):
    before = contents(folder)
    journal = folder / f"{name}-journal"
    journal.unlink(missing_ok=True)
    make(journal)
    assert contents(folder) == before


def test_a_crash_while_a_catalogue_is_made_leaves_none(tmp_path):
    (tmp_path / "catalogue.new").write_bytes(b"half")
    Catalogue(tmp_path / FIRST).close()
    (tmp_path / SECOND).unlink()
    Catalogue(tmp_path / FIRST).close()
    assert (tmp_path / SECOND).exists()


def both(folder, sql):
    """Change a row in both files, past its seal."""
    for name in (FIRST, SECOND):
        with sqlite3.connect(folder / name) as database:
            database.execute(sql)
        database.close()


def test_a_row_that_both_files_have_lost_is_named_and_the_others_are_there(folder):
    both(folder, "UPDATE sessions SET record = x'ff' WHERE id = 's'")
    both(folder, "UPDATE models SET digest = 'x'")
    both(folder, "UPDATE plans SET plan = 'x'")
    catalogue = Catalogue(folder / FIRST)
    stored, lost = catalogue.sessions()
    assert [s.info.id for s in stored] == ["t"]
    assert "lost session 's'" in str(lost["s"])
    assert "delete the session and create it again" in str(lost["s"])
    with pytest.raises(DataLoss, match=r"lost model 'm'.*register the same content"):
        catalogue.model("m")
    assert catalogue.plans.get("key", "none") == "none"
    assert "1" * 64 in catalogue.referrers()
    catalogue.add_model(model())
    assert catalogue.model("m") == model()
    catalogue.delete_session("s")
    assert catalogue.sessions()[1] == {}
    catalogue.close()


def test_each_file_gives_the_row_that_the_other_has_lost(folder):
    before = contents(folder)
    for name, id_ in ((FIRST, "s"), (SECOND, "t")):
        with sqlite3.connect(folder / name) as database:
            database.execute("UPDATE sessions SET request_id = 'x' WHERE id = ?", [id_])
        database.close()
    assert contents(folder) == before


async def test_a_session_whose_record_is_lost_is_refused_until_it_is_deleted(tmp_path):
    with middle(tmp_path) as server:
        lost = await server.sessions.create(server.new())
        kept = await server.sessions.create(server.new(request_id="k"))
    both(tmp_path, f"UPDATE sessions SET record = x'00' WHERE id = '{lost.id}'")
    with middle(tmp_path) as server:
        assert [s.id for s in server.sessions.page(limit=9)[0]] == [kept.id]
        with pytest.raises(DataLoss, match=f"lost session '{lost.id}'"):
            server.sessions.get(lost.id)
        await server.sessions.delete(lost.id)
    with middle(tmp_path) as server:
        assert server.catalogue.sessions()[1] == {}


async def test_a_lease_of_ten_thousand_years_that_was_taken_once_bricks_nothing(
    tmp_path,
):
    with middle(tmp_path) as server:
        made = await server.sessions.create(server.new(lease_s=3.2e11))
    with middle(tmp_path) as server:
        (found,), _ = server.sessions.page(limit=9)
        assert found.id == made.id
        assert found.expire_time_s == 1000.0 + LONGEST_LEASE_S


def bounded(catalogue, pages):
    """Let neither file grow beyond so many pages: SQLite's own full disk."""
    for db in (catalogue._db._first, catalogue._db._second):
        db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_is_said_and_changes_nothing(folder):
    catalogue = Catalogue(folder / FIRST)
    before = catalogue.sessions()
    bounded(catalogue, 1)  # as many as there are
    large = session("u" * 100_000)
    with pytest.raises(DiskFull, match=r"disk .* is full, and nothing was changed"):
        catalogue.add_session(large)
    assert catalogue.sessions() == before
    catalogue.plans["other"] = "x" * 100_000  # may be lost
    bounded(catalogue, 1 << 20)
    catalogue.add_session(large)
    assert len(catalogue.sessions()[0]) == 3
    catalogue.close()


def test_what_only_the_second_file_cannot_take_is_kept_and_copied_later(folder):
    catalogue = Catalogue(folder / FIRST)
    catalogue._db._second.execute("PRAGMA max_page_count = 1")
    catalogue.add_session(session("u" * 100_000))
    catalogue.add_session(session("v"))
    catalogue.close()
    (folder / FIRST).unlink()
    assert [s.info.id[0] for s in contents(folder)[1]] == ["s", "t", "u", "v"]


def test_a_second_file_that_cannot_be_made_keeps_no_server_from_starting(
    folder, monkeypatch
):
    before = contents(folder)
    (folder / SECOND).write_bytes(b"rotten")

    def refuse(*args):
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(database, "_copy", refuse)
        assert contents(folder) == before
    assert contents(folder) == before
    (folder / FIRST).unlink()
    assert contents(folder) == before


def test_a_catalogue_that_cannot_be_written_is_one_error(folder):
    catalogue = Catalogue(folder / FIRST)
    catalogue._db._first.execute("PRAGMA query_only = ON")
    with pytest.raises(FailedPrecondition, match="cannot read or write its catalogue"):
        catalogue.add_session(session("w"))
    catalogue.close()


async def test_a_session_that_a_full_disk_cannot_forget_is_still_there(tmp_path):
    with middle(tmp_path) as server:
        made = await server.sessions.create(server.new())
        server.catalogue._db._first.execute("PRAGMA query_only = ON")
        with pytest.raises(FailedPrecondition):
            await server.sessions.delete(made.id)
        assert server.sessions.get(made.id).id == made.id
        async with server.sessions.lease(made.id) as lease:
            assert lease.problem.factor == np.ones(5).sum()
