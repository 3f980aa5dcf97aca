"""The data directory: whose it is, what is said when it cannot be used, what is left."""

import errno
import os
import signal
import tempfile

import numpy as np
import pytest
import raw
from app.test_survival import child
from click.testing import CliRunner
from support import forked
from support.served import server

from curvd.cli import commands
from curvd.errors import DiskFull, FailedPrecondition, InvalidSpec, OutOfMemory
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.storage import data_directory
from curvd_server.system import faults


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path, mode):
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(FailedPrecondition, match=rf"mode {mode:04o}.*chmod go-w"):
        with server(folder):
            pass
    with server(folder / "curvd"):  # the remedy
        assert (folder / "curvd").stat().st_mode & 0o777 == 0o700


def test_a_folder_of_code_that_others_may_write_to_is_refused(tmp_path):
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(0o777)
    with pytest.raises(FailedPrecondition, match=r"others may write to .*compiled"):
        with server(tmp_path):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    os.chown(folder, 12345, 12345)
    with pytest.raises(FailedPrecondition, match="belongs to user 12345"):
        with server(folder):
            pass


@pytest.mark.parametrize("where", ["file", "file/below", "\0"])
def test_a_folder_that_is_none_is_one_line(tmp_path, where):
    pytest.importorskip("torch")
    (tmp_path / "file").touch()
    if where == "\0":
        place = "/proc/1/nowhere"
    else:
        place = str(tmp_path / where)
    result = CliRunner().invoke(commands.main, ["serve", "--data-dir", place])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert "Error: cannot use data_dir" in result.output
    assert "--data-dir" in result.output


def test_an_empty_name_is_not_the_current_folder():
    result = CliRunner().invoke(commands.main, ["serve", "--data-dir", ""])
    assert result.exit_code == 2
    assert "--data-dir" in result.output and "is empty: name a folder" in result.output


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, DiskFull), (errno.EACCES, InvalidSpec), (errno.EROFS, InvalidSpec)],
)
def test_a_disk_that_takes_nothing_is_said_at_the_start(
    tmp_path, monkeypatch, number, error
):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(data_directory, "_at_once", refuse)
    with pytest.raises(error, match=r"disk is full|cannot use data_dir"):
        with server(tmp_path):
            pass


def test_a_pipe_in_the_place_of_the_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(InvalidSpec, match="cannot use data_dir"):
        with server(tmp_path):
            pass


@pytest.mark.parametrize("name", ["blobs", "compiled", "mounts"])
def test_a_file_or_a_dead_link_in_the_place_of_a_folder_is_named(name, tmp_path):
    place = tmp_path / name
    place.write_text("")
    with pytest.raises(InvalidSpec, match=f"{name} is no folder.*move it away"):
        with server(tmp_path):
            pass
    place.unlink()
    place.symlink_to(tmp_path / "gone")
    with pytest.raises(InvalidSpec, match=f"{name} is a link to nothing"):
        with server(tmp_path):
            pass


def test_a_disk_that_is_almost_full_is_said_and_the_server_starts(
    tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr(data_directory, "_LITTLE_BYTES", 1 << 62)

    class Log:
        def warning(self, event, **values):
            said.append(event)

    monkeypatch.setattr(data_directory, "logger", Log)
    with server(tmp_path):
        pass
    assert said == ["disk almost full"]


def test_a_killed_server_leaves_nothing_behind(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    temporary, data_dir = tmp_path / "tmp", tmp_path / "data"
    temporary.mkdir()
    forked.begin()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with child(data_dir) as (process, channel):
        points = {"x": np.ones((4, 2)), "y": np.ones((4, 1))}
        state = {"1.weight": np.ones((1, 2)), "1.bias": np.zeros(1)}
        model = raw.register_model(
            channel, "mlp", '{"widths": [2, 1]}', raw.file_of(state)
        ).model
        dataset = raw.register_dataset(channel, raw.file_of(points)).dataset
        session = raw.create(channel, model.id, dataset.id)
        v = raw.file_of({"v": np.ones(3)})
        raw.call(channel, "MatVec", raw.product("MatVec", session.id, v))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(temporary.iterdir())
    with server(data_dir) as channel:
        raw.call(channel, "GetServerInfo", session_pb.GetServerInfoRequest())
    assert not (data_dir / "run").exists()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("Unable to allocate 8 TiB"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (OSError(errno.ENOMEM, "no memory"), OutOfMemory),
        (OSError(errno.ENOSPC, "no space"), DiskFull),
        (OSError(errno.EDQUOT, "quota"), DiskFull),
        (OSError(errno.EMFILE, "files"), OutOfMemory),
    ],
)
def test_a_shortage_anywhere_is_a_typed_error(tmp_path, monkeypatch, error, kind):
    def refuse(*args, **kwargs):
        raise error

    with server(tmp_path) as channel:
        raw.fake_session(channel)
        monkeypatch.setattr("curvd_server.sessions.store.SessionStore.page", refuse)
        with pytest.raises(kind, match="the server"):
            raw.call(channel, "ListSessions", session_pb.ListSessionsRequest())


def test_what_is_no_shortage_may_be_a_defect():
    assert faults.typed(OSError(errno.EINVAL, "x")) is None
    assert faults.typed(ValueError()) is None
