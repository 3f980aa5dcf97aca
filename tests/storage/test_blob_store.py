"""Blobs: whole or not there, verified, resumable, and gone when nothing needs them."""

import errno
import hashlib
import json
import os
from typing import NamedTuple

import numpy as np
import pytest
from support.callers import calls_as
from support.fake_device import file_of, put

from curvd.errors import (
    DataLoss,
    DiskFull,
    FailedPrecondition,
    InvalidSpec,
    InvalidTensors,
    LimitExceeded,
    NotFound,
    Unavailable,
)
from curvd_server.storage import partial_upload, sound_files
from curvd_server.storage.blob_store import BlobStore
from curvd_server.system import Identity

ARRAYS = {"x": np.arange(6.0).reshape(2, 3), "n": np.arange(3)}


@pytest.fixture
def needed():
    """What refers to blobs: digest -> names of owners."""
    return {}


@pytest.fixture
def blobs(tmp_path, needed):
    return BlobStore(tmp_path / "blobs", referrers=lambda digest: needed)


def test_a_blob_comes_back_as_views_of_one_snapshot(blobs):
    digest = put(blobs, ARRAYS)
    blob = blobs.open(digest)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(blob.arrays[name], array)
        assert not blob.arrays[name].flags.owndata


def test_writing_to_a_view_does_not_change_the_file(blobs):
    digest = put(blobs, ARRAYS)
    blobs.open(digest).arrays["x"][:] = 0
    np.testing.assert_array_equal(blobs.open(digest).arrays["x"], ARRAYS["x"])


def test_an_upload_goes_on_where_it_broke_even_after_a_restart(blobs, tmp_path):
    data, digest = file_of(ARRAYS)
    with (
        pytest.raises(ConnectionError),
        blobs.upload(digest, offset=0, total_bytes=len(data)) as upload,
    ):
        upload.write(memoryview(data)[:100])
        raise ConnectionError
    restarted = BlobStore(tmp_path / "blobs")
    assert restarted.committed_bytes(digest) == 100
    assert not restarted.has(digest)
    with restarted.upload(digest, offset=100, total_bytes=len(data)) as upload:
        upload.write(memoryview(data)[100:])
        assert upload.finish()
    assert restarted.open(digest).total_bytes == len(data)


def test_an_upload_that_ends_early_is_kept_but_not_complete(blobs):
    data, digest = file_of(ARRAYS)
    with blobs.upload(digest, offset=0, total_bytes=len(data)) as upload:
        upload.write(memoryview(data)[:-1])
        assert not upload.finish()
    assert blobs.committed_bytes(digest) == len(data) - 1


def test_two_uploads_of_the_same_bytes_help_each_other(blobs):
    data, digest = file_of(ARRAYS)
    view, size = memoryview(data), len(data)
    with (
        blobs.upload(digest, offset=0, total_bytes=size) as first,
        blobs.upload(digest, offset=0, total_bytes=size) as second,
    ):
        first.write(view[:100])
        second.write(view[:150])
        first.write(view[100:])
        assert first.finish()
        second.write(view[150:])
        assert second.finish()
    assert blobs.open(digest).arrays.keys() == ARRAYS.keys()


def test_bytes_with_another_digest_are_dropped_and_both_digests_named(blobs):
    data, digest = file_of(ARRAYS)
    lie = "0" * 64
    with blobs.upload(lie, offset=0, total_bytes=len(data)) as upload:
        upload.write(memoryview(data))
        with pytest.raises(InvalidTensors, match=f"{digest}.*{lie}"):
            upload.finish()
    assert blobs.committed_bytes(lie) == 0
    assert not blobs.has(lie)


def test_whoever_went_on_with_bytes_that_were_dropped_asks_again(blobs):
    data, digest = file_of(ARRAYS)
    wrong, size = bytes(len(data)), len(data)
    with (
        blobs.upload(digest, offset=0, total_bytes=size) as liar,
        blobs.upload(digest, offset=0, total_bytes=size) as honest,
    ):
        honest.write(memoryview(data)[:50])
        liar.write(memoryview(wrong))
        with pytest.raises(InvalidTensors):
            liar.finish()
        with pytest.raises(Unavailable, match="ask again"):
            honest.write(memoryview(data)[50:])


def test_bytes_that_rotted_between_two_uploads_are_sent_again(blobs, tmp_path):
    data, digest = file_of(ARRAYS)
    size = len(data)
    with blobs.upload(digest, offset=0, total_bytes=size) as upload:
        upload.write(memoryview(data)[:100])
    part = tmp_path / "blobs" / f"{digest}.part"
    part.write_bytes(b"!" + part.read_bytes()[1:])
    with blobs.upload(digest, offset=100, total_bytes=size) as upload:
        upload.write(memoryview(data)[100:])
        with pytest.raises(Unavailable, match="the 100 bytes that were here before"):
            upload.finish()
    assert blobs.committed_bytes(digest) == 0


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if isinstance(how, float):
        data[int(how * (len(data) - 1))] ^= 1
    elif how == "truncated":
        del data[len(data) // 2 :]
    elif how == "emptied":
        data.clear()
    elif how == "swapped":
        data[:] = file_of({"other": np.ones(3)})[0]
    path.write_bytes(data)


DAMAGES = [0.0, 0.2, 0.5, 1.0, "truncated", "emptied", "swapped"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_blob_that_was_damaged_is_moved_aside_and_can_come_again(
    tmp_path, how, restart
):
    needed_by = ["model m", "session s"]
    folder = tmp_path / "blobs"
    refer = {}
    options = {
        "needed_by": lambda digest: needed_by,
        "referrers": lambda digest: refer,
    }
    blobs = BlobStore(folder, **options)
    digest, other = put(blobs, ARRAYS), put(blobs, {"x": np.zeros(1)})
    assert blobs.open(digest).total_bytes
    damaged(folder / digest, how)
    if restart:
        blobs = BlobStore(folder, **options)
    with pytest.raises(
        DataLoss, match=r"lost what model m; session s needs.*upload the same content"
    ) as caught:
        blobs.open(digest)
    assert caught.value.metadata["digest"] == digest
    assert (folder / f"{digest}.damaged").exists()
    refer[other] = {""}
    for monotonic_s in (0, 1e6):
        blobs.sweep(now_s=1e12, monotonic_s=monotonic_s)
    assert (folder / f"{digest}.damaged").exists()
    assert not blobs.has(digest)
    assert blobs.open(other).arrays["x"] == 0  # nothing else is lost
    assert put(blobs, ARRAYS) == digest
    np.testing.assert_array_equal(blobs.open(digest).arrays["x"], ARRAYS["x"])


def test_a_blob_is_hashed_at_its_first_use_after_a_start_only(
    blobs, tmp_path, monkeypatch
):
    digest = put(blobs, ARRAYS)
    asked = []

    class Watched(sound_files.Snapshot):
        def __init__(self, path, *, digest):
            asked.append(digest)
            super().__init__(path, digest=digest)

    monkeypatch.setattr(sound_files, "Snapshot", Watched)
    blobs.open(digest)
    restarted = BlobStore(tmp_path / "blobs")
    restarted.open(digest)
    restarted.open(digest)
    assert restarted.is_sound(digest)
    assert asked == [False, True, False]  # as it came, its bytes were hashed


def test_a_blob_that_the_disk_cannot_read_is_damaged(blobs, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name, use in (("Snapshot", blobs.open), ("digest_of", blobs.is_sound)):
        digest = put(blobs, ARRAYS)
        os.utime(tmp_path / "blobs" / digest, (1, 1))
        with monkeypatch.context() as patch:
            patch.setattr(sound_files, name, refuse)
            if name == "Snapshot":
                with pytest.raises(
                    DataLoss, match="cannot be read; the file was moved"
                ):
                    use(digest)
            else:
                assert not use(digest)
        assert not blobs.has(digest)


def test_a_blob_that_the_server_may_not_read_stays_where_it_is(
    blobs, tmp_path, monkeypatch
):
    digest = put(blobs, {"x": np.ones(3)})
    os.utime(tmp_path / "blobs" / digest, (1, 1))
    opened = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith(digest):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        for use in (blobs.open, blobs.is_sound):
            with pytest.raises(FailedPrecondition, match=r"may not read .*operator"):
                use(digest)
    np.testing.assert_array_equal(blobs.open(digest).arrays["x"], np.ones(3))


def test_those_who_have_a_blob_open_share_its_memory(blobs, monkeypatch):
    digest = put(blobs, ARRAYS)
    first = blobs.open(digest)
    monkeypatch.setattr(sound_files, "Snapshot", None)
    second = blobs.open(digest)
    first.arrays["x"][:] = 0
    np.testing.assert_array_equal(second.arrays["x"], ARRAYS["x"])


def test_a_blob_that_is_cut_while_it_is_used_ends_nobody(blobs, tmp_path):
    values = np.arange(1 << 16, dtype=float)
    digest = put(blobs, {"x": values})
    held = blobs.open(digest).arrays["x"]
    os.truncate(tmp_path / "blobs" / digest, 10)
    np.testing.assert_array_equal(held, values)


def test_a_blob_that_is_needed_but_gone_is_lost(tmp_path):
    blobs = BlobStore(tmp_path / "blobs", needed_by=lambda digest: ["dataset d"])
    with pytest.raises(
        DataLoss, match=r"dataset d needs: .* not in the data directory"
    ):
        blobs.open("0" * 64)


def test_a_gap_is_refused(blobs):
    with (
        pytest.raises(InvalidSpec, match=r"upload\.offset 5 is beyond the 0 bytes"),
        blobs.upload("0" * 64, offset=5, total_bytes=10),
    ):
        pass


def test_more_than_announced_is_refused(blobs):
    with blobs.upload("0" * 64, offset=0, total_bytes=10) as upload:
        with pytest.raises(InvalidTensors, match="more than the 10 bytes"):
            upload.write(memoryview(bytes(11)))


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"]
)
def test_a_name_is_never_a_path(blobs, name):
    for use in (blobs.has, blobs.open, blobs.committed_bytes):
        with pytest.raises(InvalidSpec, match="64 lower-case hexadecimal digits"):
            use(name)


def _keep(blobs, data):
    """Keep any bytes as a blob with the right digest."""
    digest = hashlib.sha256(data).hexdigest()
    with blobs.upload(digest, offset=0, total_bytes=len(data)) as upload:
        upload.write(memoryview(data))
        assert upload.finish()
    return digest


def _file(header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (
        (len(text) if length is None else length).to_bytes(8, "little") + text + payload
    )


def _one(dtype, shape, offsets, payload=bytes(8)):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return _file({"x": entry}, payload)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (_one("F32", [2], [0, 8], b""), "0 bytes of payload"),
        (_one("F32", [2], [0, 8], bytes(9)), "9 bytes of payload"),
        (_one("F32", [9], [0, 8]), "36 bytes"),
        (_one("F32", [1], [4, 8]), "gap"),
        (_one("PY", [1], [0, 8]), "element type"),
        (_file(b"[]"), "not a JSON object"),
        (_file(b"{}", length=999), "ends within its header"),
    ],
)
def test_a_file_that_lies_about_itself_is_refused(blobs, data, match):
    with pytest.raises(InvalidTensors, match=match):
        blobs.open(_keep(blobs, data))


def test_an_oversized_header_is_refused_before_it_is_read(blobs):
    with pytest.raises(
        LimitExceeded, match="announces 1099511627776 bytes; the limit is"
    ):
        blobs.open(_keep(blobs, _file(b"{}", length=1 << 40)))


def test_a_blob_that_is_not_there_is_not_found(blobs):
    with pytest.raises(NotFound, match="is not on this server"):
        blobs.open("0" * 64)


def test_a_blob_goes_when_nothing_needs_it_and_stays_when_held(blobs, needed):
    digest = put(blobs, ARRAYS)
    needed[digest] = {""}
    blobs.release(digest)
    assert blobs.has(digest)
    del needed[digest]
    with blobs.held(digest):
        blobs.release(digest)
        blobs.sweep(now_s=0, monotonic_s=0)
        assert blobs.has(digest)
        mapped = blobs.open(digest).arrays["x"]
    blobs.sweep(now_s=0, monotonic_s=0)
    assert not blobs.has(digest)
    np.testing.assert_array_equal(mapped, ARRAYS["x"])


HOUR_S, DAY_S = 3600.0, 24 * 3600.0


def names(blobs):
    return sorted(path.name for path in blobs._directory.iterdir())


def test_a_sweep_removes_what_is_old_and_not_needed(blobs, needed, tmp_path):
    kept, dropped = put(blobs, ARRAYS), put(blobs, {"x": np.zeros(1)})
    needed[kept] = {""}
    part = tmp_path / "blobs" / ("1" * 64 + ".part")
    part.touch()
    now_s = part.stat().st_mtime
    for hours in (0, 1, 12):
        blobs.sweep(now_s=now_s + hours * HOUR_S, monotonic_s=hours * HOUR_S)
        assert len(names(blobs)) == 3
    blobs.sweep(now_s=now_s + DAY_S + 9, monotonic_s=DAY_S)
    assert names(blobs) == [kept]
    assert not blobs.has(dropped)


@pytest.mark.parametrize("step_s", [2 * HOUR_S, DAY_S + 9])
def test_a_step_of_the_clock_removes_no_upload(blobs, tmp_path, step_s):
    data, digest = file_of(ARRAYS)
    with blobs.upload(digest, offset=0, total_bytes=len(data)) as upload:
        upload.write(memoryview(data)[:100])
    now_s = (tmp_path / "blobs" / f"{digest}.part").stat().st_mtime
    blobs.sweep(now_s=now_s + step_s, monotonic_s=0)
    blobs.sweep(now_s=now_s + step_s + 60, monotonic_s=60)
    assert blobs.committed_bytes(digest) == 100
    blobs.sweep(now_s=now_s - step_s, monotonic_s=61)  # and back
    blobs.sweep(now_s=now_s - step_s + DAY_S + 9, monotonic_s=DAY_S + 61)
    assert blobs.committed_bytes(digest) == 0


def test_a_sweep_leaves_what_is_held_or_under_way(blobs):
    held = put(blobs, ARRAYS)
    with blobs.held(held), blobs.upload("1" * 64, offset=0, total_bytes=10) as upload:
        upload.write(memoryview(b"x"))
        for monotonic_s in (0, DAY_S):
            blobs.sweep(now_s=1e12, monotonic_s=monotonic_s)
        assert len(names(blobs)) == 2


def begun(blobs, digit, nbytes, announced=None):
    digest = str(digit) * 64
    with blobs.upload(digest, offset=0, total_bytes=announced or nbytes) as upload:
        upload.write(memoryview(bytes(nbytes)))
    return digest


def test_uploads_that_nobody_goes_on_with_make_room_the_oldest_first(tmp_path):
    blobs = BlobStore(tmp_path / "blobs", partial_bytes=100)
    oldest, newer = begun(blobs, 1, 40), begun(blobs, 2, 40)
    os.utime(tmp_path / "blobs" / f"{oldest}.part", (0, 0))
    latest = begun(blobs, 3, 50)
    assert [blobs.committed_bytes(d) for d in (oldest, newer, latest)] == [0, 40, 50]


def test_nobody_drives_out_the_uploads_of_others_by_many_of_his_own(
    tmp_path, monkeypatch
):
    blobs = BlobStore(tmp_path / "blobs", partial_bytes=100)
    for limit in (1000, 4):
        monkeypatch.setattr(partial_upload, "MOST_PARTIALS", limit)
        with calls_as(Identity("ann")):
            hers = begun(blobs, 0, 30)
        with calls_as(Identity("ben")):
            size = 30 if limit > 4 else 1
            his = [begun(blobs, digit, size) for digit in range(1, 8)]
            assert blobs.committed_bytes(his[-1]) > 0
        with calls_as(Identity("ann")):
            assert blobs.committed_bytes(hers) == 30


def test_uploads_under_way_are_reserved_as_large_as_they_were_announced(tmp_path):
    blobs = BlobStore(tmp_path / "blobs", partial_bytes=100)
    with blobs.upload("1" * 64, offset=0, total_bytes=80):
        with pytest.raises(
            LimitExceeded, match=r"1 uploads of 80 bytes.*partial_bytes"
        ):
            begun(blobs, 2, 21)
        begun(blobs, 2, 20)
    with pytest.raises(LimitExceeded, match="101 more would exceed the limit of 100"):
        begun(blobs, 3, 101)


def test_there_is_a_largest_number_of_uploads(tmp_path, monkeypatch):
    monkeypatch.setattr(partial_upload, "MOST_PARTIALS", 2)
    blobs = BlobStore(tmp_path / "blobs")
    for digit in range(4):
        begun(blobs, digit, 8)
    assert len(names(blobs)) == 2


def test_an_upload_that_the_disk_cannot_hold_is_refused_at_once(blobs, monkeypatch):
    monkeypatch.setattr(
        partial_upload.shutil, "disk_usage", lambda path: Usage(free=99)
    )
    with pytest.raises(
        DiskFull, match="needs 100 bytes more, and the disk has 99 free"
    ):
        begun(blobs, 1, 10, announced=100)
    digest = begun(blobs, 2, 10, announced=99)
    monkeypatch.setattr(
        partial_upload.shutil, "disk_usage", lambda path: Usage(free=89)
    )
    begun(blobs, 2, 10, announced=99)  # what is there needs no more room
    assert blobs.committed_bytes(digest) == 10


class Usage(NamedTuple):
    free: int


class Full:
    """A file on a disk that takes no more."""

    def __init__(self, file, number):
        self._file, self._number = file, number

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        raise OSError(self._number, os.strerror(self._number))

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize(
    ("number", "error", "match"),
    [
        (errno.ENOSPC, DiskFull, "disk is full: have the server's operator free some"),
        (errno.EDQUOT, DiskFull, "disk is full"),
        (errno.EROFS, FailedPrecondition, "cannot write its data directory: Read-only"),
    ],
)
def test_a_disk_that_takes_no_more_is_said_and_the_upload_goes_on_later(
    blobs, number, error, match
):
    data, digest = file_of(ARRAYS)
    view = memoryview(data)
    with blobs.upload(digest, offset=0, total_bytes=len(data)) as upload:
        upload.write(view[:100])
        partial = upload._partial
        file, partial.file = partial.file, Full(partial.file, number)
        with pytest.raises(error, match=match):
            upload.write(view[100:])
        partial.file = file
    assert blobs.committed_bytes(digest) == 100
    with blobs.upload(digest, offset=100, total_bytes=len(data)) as upload:
        upload.write(view[100:])
        assert upload.finish()


def test_a_folder_that_was_removed_meanwhile_is_made_anew(tmp_path):
    folder = tmp_path / "blobs"
    blobs = BlobStore(folder)
    folder.rmdir()
    assert blobs.has(put(blobs, {"w": np.arange(3.0)}))
    # Where it cannot be made, that is said.
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(FailedPrecondition, match="cannot write its data directory"):
        put(blobs, {"w": np.arange(4.0)})
