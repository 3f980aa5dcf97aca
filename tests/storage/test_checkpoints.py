"""Checkpoints below one folder: what is read is what torch reads, and nothing is run."""

import io
import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from curvd.contract import TensorInfo
from curvd.errors import (
    CheckpointNotFound,
    CurvdError,
    FailedPrecondition,
    InvalidSpec,
    InvalidTensors,
    LimitExceeded,
    StateMismatch,
    Unavailable,
)
from curvd.tensors import chunks
from curvd_server.storage import Architecture
from curvd_server.storage.assembly import assembled
from curvd_server.storage.checkpoints import Checkpoints, chosen, pickled

A = np.arange(6.0, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.int64)


def read(root, name):
    """All tensors of a checkpoint."""
    pieces = Checkpoints(root).pieces(name)
    whole = assembled(pieces, limit_bytes=1 << 20)
    return chunks.load(whole.segments(), max_bytes=1 << 20)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "held"
    (folder / "run").mkdir(parents=True)
    save_file({"a": A, "b": B}, folder / "run" / "one.safetensors")
    return folder


@pytest.fixture
def sharded(root):
    folder = root / "run" / "shards"
    folder.mkdir()
    save_file({"a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B, "unused": B}, folder / "model-00002-of-00002.safetensors")
    first, second = sorted(file.name for file in folder.iterdir())
    index = {"weight_map": {"a": first, "b": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["run/one", "run/one.safetensors"])
def test_a_file_of_safetensors_is_a_checkpoint(root, name):
    found = read(root, name)
    np.testing.assert_array_equal(found["a"], A)
    np.testing.assert_array_equal(found["b"], B)


@pytest.mark.parametrize(
    "name", ["run/shards", "run/shards/model.safetensors.index.json"]
)
def test_an_index_says_which_file_has_which_tensor(root, sharded, name):
    found = read(root, name)
    assert set(found) == {"a", "b"}
    np.testing.assert_array_equal(found["b"], B)


def test_without_an_index_a_folder_is_all_of_its_files(root, sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert set(read(root, "run/shards")) == {"a", "b", "unused"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../held/run/one",
        "run/../run/one",
        "/etc/passwd",
        "run//one",
        ".hidden",
        "run/.x",
        "run/one\0",
        "run\\one",
        "a" * 1025,
        "~",
        "run/one/",
        "é",
    ],
)
def test_a_name_leads_nowhere_else(root, name):
    with pytest.raises(InvalidSpec, match="the name of a checkpoint is a path from"):
        Checkpoints(root).pieces(name)


@pytest.mark.parametrize("name", ["a\0b.distcp", "\ud800.distcp"])
def test_a_name_that_no_file_can_have_is_damage(root, name):
    with pytest.raises(InvalidTensors, match="which no file can be called"):
        File.at(root, root / name)


def test_a_link_that_leads_out_is_not_read(root, tmp_path, sharded):
    save_file({"a": A}, tmp_path / "secret.safetensors")
    (root / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (root / "up").symlink_to(tmp_path)
    (sharded / "model-00001-of-00002.safetensors").unlink()
    (sharded / "model-00001-of-00002.safetensors").symlink_to(
        tmp_path / "secret.safetensors"
    )
    for name in ("link", "up/secret", "run/shards"):
        with pytest.raises(
            FailedPrecondition, match=r"perhaps a link that leads out of it"
        ):
            read(root, name)
    (root / "within.safetensors").symlink_to(root / "run" / "one.safetensors")
    np.testing.assert_array_equal(read(root, "within")["a"], A)


def test_a_pipe_is_not_waited_for(root):
    os.mkfifo(root / "pipe.safetensors")
    with pytest.raises(CheckpointNotFound):
        read(root, "pipe")
    os.mkfifo(root / "run" / "two.safetensors")
    with pytest.raises(
        FailedPrecondition, match=r"two.safetensors .* is no file below"
    ):
        read(root, "run")


def test_what_is_not_there_is_named_with_what_is_near(root, sharded):
    with pytest.raises(
        CheckpointNotFound, match=r"'run/shrds' lies .* near it are 'shards'"
    ):
        read(root, "run/shrds")
    (root / "run" / "plain.pt").write_bytes(b"PK")
    with pytest.raises(
        CheckpointNotFound, match=r"pickles of torch\.save are not read"
    ):
        read(root, "run/plain.pt")
    with pytest.raises(CheckpointNotFound, match=r"its \.metadata"):
        read(root, "nowhere/at/all")
    with pytest.raises(
        CheckpointNotFound, match="operator can name one with checkpoints_root"
    ):
        Checkpoints(None).pieces("run/one")
    (sharded / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(InvalidSpec, match="has 2 indices"):
        read(root, "run/shards")


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("[]", "is no index"),
        ("{}", "is no index"),
        ("[" * 100_000, "is no index"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "is no index"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "is no index"),
        ('{"weight_map": {"a": 1}}', "is no index"),
        (
            '{"weight_map": {"z": "model-00001-of-00002.safetensors"}}',
            "lacks z, which its",
        ),
    ],
)
def test_an_index_that_is_none_is_refused(root, sharded, index, text):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidTensors, match=text):
        read(root, "run/shards")


def test_damaged_files_are_refused(root):
    whole = (root / "run" / "one.safetensors").read_bytes()
    for cut in (0, 4, 60, len(whole) - 1):
        (root / "cut.safetensors").write_bytes(whole[:cut])
        with pytest.raises(InvalidTensors, match="damaged, or not complete"):
            read(root, "cut")
    (root / "cut.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(LimitExceeded, match="is it a safetensors file"):
        read(root, "cut")


def test_a_file_that_is_written_to_meanwhile_is_read_again_later(root):
    pieces = Checkpoints(root).pieces("run/one")
    save_file({"a": A + 1, "b": B}, root / "run" / "one.safetensors")
    with pytest.raises(
        Unavailable, match=r"one\.safetensors was written to .* try again"
    ):
        pieces[0].read()


ONE = Architecture(
    {n: TensorInfo(n, "F32", (2, 3)) for n in ("0.w", "0.b", "tied", "1.mean")},
    {"tied": "0.w"},
    frozenset({"1.mean"}),
)


def named(root, *names, prefix=""):
    save_file(dict.fromkeys(names, A), root / "c.safetensors")
    found = chosen(Checkpoints(root).pieces("c"), ONE, prefix)
    return [piece.name for piece in found]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["0.w", "0.b"], ["0.w", "0.b"]),
        (["0.w", "0.b", "1.mean", "optimiser.0.w.exp"], ["0.w", "0.b", "1.mean"]),
        (["model.0.w", "model.0.b"], ["0.w", "0.b"]),
        (["model.module.0.w", "model.module.0.b"], ["0.w", "0.b"]),
        (["state.tied", "state.0.b"], ["tied", "0.b"]),
        (["m._orig_mod.0.w", "m.0._orig_mod.b"], ["0.w", "0.b"]),
        # The model's own names win.
        (["0.w", "0.b", "ema.0.w", "ema.0.b"], ["0.w", "0.b"]),
        # What lacks a parameter is no candidate.
        (["model.0.w", "model.0.b", "ema.0.w"], ["0.w", "0.b"]),
    ],
)
def test_what_stands_before_the_names_is_found_out(root, given, expected):
    assert sorted(named(root, *given)) == sorted(expected)


def test_of_several_prefixes_the_caller_chooses(root):
    twice = ["model.0.w", "model.0.b", "ema.0.w", "ema.0.b"]
    with pytest.raises(
        InvalidSpec, match=r"2 times, with 'ema\.', 'model\.' .*prefix="
    ):
        named(root, *twice)
    assert sorted(named(root, *twice, prefix="ema.")) == ["0.b", "0.w"]
    with pytest.raises(StateMismatch, match="lacks 2 parameters of the model with 'x'"):
        named(root, *twice, prefix="x")
    with pytest.raises(
        StateMismatch, match=r"lacks 1 parameters of the model: 0\.b; it has"
    ):
        named(root, "0.w")


class Exploding:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch /tmp/unpickled",)


def test_a_pickle_is_read_and_nothing_is_called():
    found = pickled.read(pickle.dumps([Exploding(), {"a": (1, 2.5, None, True, b"x")}]))
    assert (found[0].name, found[0].args) == ("posix system", ("touch /tmp/unpickled",))
    assert found[1] == {"a": (1, 2.5, None, True, b"x")}
    assert not os.path.exists("/tmp/unpickled")


@pytest.mark.parametrize("protocol", range(2, 6))
@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text() | st.integers(), inner)
        ),
        max_leaves=20,
    )
)
def test_plain_values_are_what_pickle_itself_reads(protocol, value):
    assert pickled.read(pickle.dumps(value, protocol)) == value


def test_a_wrong_escape_is_refused_where_warnings_are_errors():
    with pytest.raises(InvalidTensors, match="damaged"):
        pickled.read(b"S'\\('\n.")


@settings(max_examples=500)
@given(st.data())
def test_whatever_the_bytes_a_pickle_is_read_or_refused(data):
    good = pickle.dumps(
        [Exploding(), {"a": (1, 2.5)}, [1, [2]]], data.draw(st.integers(0, 5))
    )
    at = data.draw(st.integers(0, len(good)))
    bad = (
        good[:at]
        + data.draw(st.binary(max_size=8))
        + good[at + data.draw(st.integers(0, 3)) :]
    )
    try:
        pickled.read(bad)
    except InvalidTensors:
        pass


def test_keys_that_are_deep_are_refused():
    deep = b"(" * 0 + b")" + b"\x85" * 9_000
    with pytest.raises(InvalidTensors, match="a tuple as a key"):
        pickled.read(b"\x80\x02}" + deep + b"\x85Ns.")


def test_what_pickles_may_do_and_torch_does_not_is_refused():
    class Inst:
        pass

    with pytest.raises(InvalidTensors, match="opcode INST, which torch does not write"):
        pickled.read(b"(iposix\nsystem\n.")
    with pytest.raises(InvalidTensors, match="damaged"):
        pickled.read(b"")


torch = pytest.importorskip("torch")
import torch.distributed.checkpoint as dcp  # noqa: E402

from curvd_server.storage.checkpoints.files import File  # noqa: E402
from curvd_server.storage.checkpoints.torch_files import saved  # noqa: E402

EVERY = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
         torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip


def torch_saved(tmp_path, tensor, sizes=None, dtype=None, *, junk=b""):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    (tmp_path / "t").write_bytes(junk + buffer.getvalue())
    file = File.at(tmp_path, tmp_path / "t")
    name = str(dtype or tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape if sizes is None else sizes)
    return saved(file, len(junk), file.size - len(junk), name, shape)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize(
    "make",
    [lambda t: t, lambda t: t.T, lambda t: t[1:, ::2], lambda t: t[0, 0], lambda t: t[:0],
     lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t],
    ids=["plain", "transposed", "strided", "scalar", "empty", "parameter"],
)  # fmt: skip
def test_what_torch_saves_is_read_bit_by_bit(tmp_path, dtype, make):
    tensor = make((torch.arange(24).reshape(4, 6) % 7).to(dtype))
    found = torch_saved(tmp_path, tensor, junk=b"before")
    bits = tensor.detach()
    bits = bits.view(torch.uint16) if dtype is torch.bfloat16 else bits
    np.testing.assert_array_equal(found, bits.numpy())
    assert found.shape == tuple(tensor.shape)


def test_another_tensor_than_the_metadata_says_is_refused(tmp_path):
    with pytest.raises(InvalidTensors, match=r"shape \[2, 3\] where \[3, 2\] belongs"):
        torch_saved(tmp_path, torch.ones(2, 3), (3, 2))
    with pytest.raises(
        InvalidTensors, match="of torch FloatStorage where float64 belongs"
    ):
        torch_saved(tmp_path, torch.ones(2), dtype=torch.float64)
    with pytest.raises(InvalidTensors, match="where a plain tensor belongs"):
        torch_saved(tmp_path, torch.ones(2).to_sparse(), (2,))


def test_a_tensor_that_reaches_out_of_its_storage_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(torch.ones(4), buffer)
    forged = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(forged, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                assert content.count(b"K\x01\x85") == 1  # the stride
                content = content.replace(b"K\x01\x85", b"K\x63\x85")
            new.writestr(info, content)
    (tmp_path / "t").write_bytes(forged.getvalue())
    file = File.at(tmp_path, tmp_path / "t")
    with pytest.raises(InvalidTensors, match="last element is at 297 of 4"):
        saved(file, 0, file.size, "float32", (4,))


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_of_one_process_is_what_torch_loads(root):
    state = {
        "model": {
            "a": torch.randn(3, 4),
            "h": torch.randn(5).bfloat16(),
            "n": torch.tensor(3),
        },
        "step": 7,
        "note": "text",
    }
    dcp.save(state, checkpoint_id=root / "run" / "step-7", no_dist=True)
    found = read(root, "run/step-7")
    assert set(found) == {"model.a", "model.h", "model.n"}
    np.testing.assert_array_equal(found["model.a"], state["model"]["a"].numpy())
    assert found["model.n"] == 3
    np.testing.assert_array_equal(
        found["model.h"], state["model"]["h"].view(torch.uint16).numpy()
    )
    (root / "run" / "step-7" / ".metadata").write_bytes(b"\x80\x04N.")
    with pytest.raises(
        InvalidTensors, match=r"not what torch\.distributed\.checkpoint wr"
    ):
        read(root, "run/step-7")


@pytest.mark.filterwarnings("ignore")
def test_metadata_that_names_other_files_reads_none_of_them(root, tmp_path):
    dcp.save({"a": torch.ones(3)}, checkpoint_id=root / "c", no_dist=True)
    metadata = (root / "c" / ".metadata").read_bytes()
    assert metadata.count(b"\x8c\x0c__0_0.distcp") == 1
    for other in (b"../../secret", b"/etc/passwd0", b"..dirdir/abc"):
        forged = metadata.replace(b"__0_0.distcp", other)
        (root / "c" / ".metadata").write_bytes(forged)
        with pytest.raises(InvalidTensors, match="which is not in it"):
            read(root, "c")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The files of a small checkpoint, and their folder."""
    folder = tmp_path_factory.mktemp("root") / "c"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    return folder, {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "bytes_", [b"(", b"N", b"]", b"\x85", b"\x94", b"\x80\x04", b"Q", b"(t", b")N"]
)
def test_megabytes_that_say_nothing_are_refused_when_that_shows(bytes_):
    walked = []
    flood = b"\x80\x04N" + bytes_ * (3 << 20)
    reader = pickled._Reader

    class Counting(reader):
        def take(self, name, arg):
            walked.append(name)
            super().take(name, arg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickled, "_Reader", Counting)
        with pytest.raises(InvalidTensors, match=r"damaged: .* (in a row|that wait)"):
            pickled.read(flood)
    assert len(walked) < 210_000


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_large_collections_are_no_flood(protocol):
    value = {
        "list": list(range(30_000)),
        "none": [None] * 30_000,
        "tuple": tuple(range(9_000)),
        "dict": {i: (i, None) for i in range(5_000)},
    }
    assert pickled.read(pickle.dumps(value, protocol)) == value


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_whatever_the_bytes_a_distributed_checkpoint_is_read_or_refused(sound, data):
    folder, files = sound
    name = data.draw(st.sampled_from(sorted(files)))
    good = files[name]
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + data.draw(st.binary(min_size=1, max_size=4)) + good[at + 1 :]
    (folder / name).write_bytes(bad)
    try:
        read(folder.parent, "c")
    except CurvdError:
        pass
    finally:
        (folder / name).write_bytes(good)
