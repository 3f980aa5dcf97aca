"""Datasets that lie on the server: found by name, used in place, never elsewhere."""

import errno
import os
import pathlib

import numpy as np
import pytest
from support.fake_device import file_of

from curvd.errors import DatasetNotFound, FailedPrecondition, InvalidSpec, NotFound
from curvd_server.storage.blob_store import BlobStore
from curvd_server.storage.mounts import Mounts

DATA = {"x": np.arange(8.0).reshape(4, 2), "y": np.zeros(4)}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "datasets"
    folder.mkdir()
    return folder


@pytest.fixture
def mounts(root, tmp_path):
    return Mounts(root, tmp_path / "mounts")


def put(root, name, arrays=DATA):
    data, digest = file_of(arrays)
    (root / f"{name}.safetensors").write_bytes(data)
    return digest


def test_datasets_are_listed_and_found_by_name(root, mounts):
    digest = put(root, "digits-val.v1")
    put(root, "a_b")
    (root / "notes.txt").write_text("no dataset")
    assert mounts.names() == ("a_b", "digits-val.v1")
    assert mounts.digest("digits-val.v1") == digest
    assert mounts.path(digest) == root / "digits-val.v1.safetensors"
    assert mounts.path("0" * 64) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "a..b",
        "-x",
        "x\0",
        "é",
        "x" * 129,
    ],
)
def test_a_name_is_never_a_path(mounts, name):
    with pytest.raises(InvalidSpec, match="the name of a dataset"):
        mounts.digest(name)


def test_a_link_that_leads_out_of_the_folder_is_no_dataset(root, mounts, tmp_path):
    put(tmp_path, "secret")
    put(root, "inside")
    os.symlink(tmp_path / "secret.safetensors", root / "outside.safetensors")
    os.symlink(root / "inside.safetensors", root / "again.safetensors")
    (root / "folder.safetensors").mkdir()
    assert mounts.names() == ("again", "inside")
    with pytest.raises(DatasetNotFound):
        mounts.digest("outside")
    with pytest.raises(DatasetNotFound):
        mounts.digest("folder")


def test_a_link_that_leads_to_itself_hides_no_other_dataset(root, mounts):
    put(root, "d")
    (root / "loop.safetensors").symlink_to("loop.safetensors")
    assert mounts.names() == ("d",)
    with pytest.raises(DatasetNotFound):
        mounts.digest("loop")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_named(root, mounts, monkeypatch, number):
    put(root, "d")

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(FailedPrecondition, match=r"'d' cannot be read: .*operator"):
        mounts.digest("d")


def test_a_name_that_is_not_there_names_what_is_near(root, mounts, tmp_path):
    put(root, "imagenet-val")
    with pytest.raises(DatasetNotFound, match="near it are 'imagenet-val'"):
        mounts.digest("imagnet-val")
    with pytest.raises(DatasetNotFound, match=r"operator can mount .* datasets_root"):
        Mounts(None, tmp_path / "m").digest("imagenet-val")
    assert Mounts(None, tmp_path / "m").names() == ()


def test_a_file_is_hashed_once(root, mounts, tmp_path, monkeypatch):
    digest = put(root, "d")
    mounts.digest("d")
    monkeypatch.setattr("hashlib.file_digest", None)
    again = Mounts(root, tmp_path / "mounts")  # after a restart, too
    assert again.digest("d") == digest


def test_a_file_that_was_changed_is_noticed(root, mounts):
    digest = put(root, "d")
    mounts.digest("d")
    other = put(root, "d", {**DATA, "y": np.ones(4)})
    path = root / "d.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert not mounts.holds(digest)
    with pytest.raises(FailedPrecondition, match="'d' was changed since"):
        mounts.path(digest)
    assert mounts.digest("d") == other
    path.unlink()
    with pytest.raises(FailedPrecondition, match="'d' is gone since"):
        mounts.path(other)


def test_a_mounted_file_is_a_blob_that_is_never_copied_to_disk_or_removed(
    root, mounts, tmp_path
):
    digest = put(root, "d")
    blobs = BlobStore(tmp_path / "blobs", mounts)
    assert not blobs.has(digest)
    with pytest.raises(NotFound):
        blobs.open(digest)
    mounts.digest("d")
    assert blobs.has(digest)
    np.testing.assert_array_equal(blobs.open(digest).arrays["x"], DATA["x"])
    blobs.release(digest)
    blobs.sweep(now_s=1e12, monotonic_s=1e6)
    assert blobs.has(digest)
    assert not list((tmp_path / "blobs").iterdir())


def rewritten(path, change):
    """Change a file in place, and set its time of modification back."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    with path.open("r+b") as file:
        file.write(change(data))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(data):
    data[-1] ^= 1
    return data


def test_a_file_that_was_rewritten_under_its_old_time_is_noticed(
    root, mounts, tmp_path
):
    digest = put(root, "d")
    mounts.digest("d")
    blobs = BlobStore(tmp_path / "blobs", mounts)
    held = blobs.open(digest).arrays["y"]
    rewritten(root / "d.safetensors", flip)
    with pytest.raises(FailedPrecondition, match="'d' was changed since"):
        blobs.open(digest)
    np.testing.assert_array_equal(held, DATA["y"])  # of whoever had it open
    assert (root / "d.safetensors").exists()  # it is its owner's, not ours to move
    assert mounts.digest("d") != digest


def test_a_file_that_rotted_before_the_start_is_noticed(root, mounts, tmp_path):
    digest = put(root, "d")
    mounts.digest("d")
    rewritten(root / "d.safetensors", flip)
    blobs = BlobStore(tmp_path / "blobs", Mounts(root, tmp_path / "mounts"))
    assert not blobs.is_sound(digest)


def test_a_file_that_is_cut_while_it_is_used_ends_nobody(root, mounts, tmp_path):
    rows = np.arange(1 << 16, dtype=float)
    digest = put(root, "d", {"x": rows, "y": rows})
    mounts.digest("d")
    held = BlobStore(tmp_path / "blobs", mounts).open(digest).arrays["x"]
    os.truncate(root / "d.safetensors", 10)
    np.testing.assert_array_equal(held, rows)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": 1}', "\x00\xff"])
def test_a_record_of_a_mounted_file_that_rotted_is_made_again(
    root, mounts, tmp_path, damage
):
    digest = put(root, "d")
    mounts.digest("d")
    (tmp_path / "mounts" / digest).write_text(damage)
    assert mounts.path(digest) is None
    assert mounts.digest("d") == digest
    assert mounts.path(digest) == root / "d.safetensors"


def test_bytes_may_still_be_uploaded_after_a_mounted_file_changed(
    root, mounts, tmp_path
):
    data, digest = file_of(DATA)
    put(root, "d")
    mounts.digest("d")
    (root / "d.safetensors").unlink()
    blobs = BlobStore(tmp_path / "blobs", mounts)
    assert not blobs.has(digest)
    with blobs.upload(digest, offset=0, total_bytes=len(data)) as upload:
        upload.write(memoryview(data))
        assert upload.finish()
    np.testing.assert_array_equal(blobs.open(digest).arrays["x"], DATA["x"])
