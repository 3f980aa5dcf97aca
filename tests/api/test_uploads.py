"""What is there is not sent again, and what broke goes on where it was."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.fake_service import P

import curvd

BIG = {"w": np.arange(1 << 20, dtype=np.float64), "b": np.zeros(3)}
TOTAL = 8 * (1 << 20) + 24
CHUNKS = 5
"""Four of 2 MiB, and the rest; the header is one more."""


def test_content_that_is_there_is_not_sent_again(client, service):
    first = client.register_model("mlp", {}, BIG)
    sent = service.chunk_bytes["RegisterModel"]
    assert client.register_model("mlp", {}, BIG) == first
    assert service.chunk_bytes["RegisterModel"] == sent


@pytest.mark.parametrize("after", [1, 3, CHUNKS])
def test_a_broken_upload_goes_on_from_the_committed_offset(client, service, after):
    service.fail("RegisterModel", curvd.Unavailable("away"), after_in=0)
    client.register_dataset(
        {"x": np.ones(4), "y": np.ones(4)}, inputs="x", target="y", batch_size=2
    )
    whole = _size(client, service)
    service.uploads.clear()
    service.chunk_bytes.clear()
    # The first stream only asks; the second breaks in the middle.
    service.fail("RegisterModel", curvd.Unavailable("away"), after_in=9)
    service.fail("RegisterModel", curvd.Unavailable("away"), after_in=after)
    client.register_model("mlp", {}, BIG)
    assert service.chunk_bytes["RegisterModel"] == whole


def _size(client, service):
    client.register_model("mlp", {}, BIG)
    return service.chunk_bytes["RegisterModel"]


def test_a_lost_answer_uploads_nothing_twice(client, service):
    whole = _size(client, service)
    service.uploads.clear()
    service.chunk_bytes.clear()
    service.fail("RegisterModel", curvd.Unavailable("away"), after_out=0, times=2)
    client.register_model("mlp", {}, BIG)
    assert service.chunk_bytes["RegisterModel"] == whole


def test_an_upload_that_moves_forward_never_gives_up(connect, target, service):
    config = curvd.ClientConfig(
        retry=curvd.RetryConfig(first_s=0, longest_s=0, give_up_s=10.0)
    )
    for _ in range(CHUNKS):
        service.fail("RegisterModel", curvd.Unavailable("away"), after_in=9)
        service.fail("RegisterModel", curvd.Unavailable("away"), after_in=2)
    with connect(target, config=config) as client:
        client.register_model("mlp", {}, BIG)


def test_progress_counts_every_byte_once(client, service):
    seen = []
    client.register_model("mlp", {}, BIG, progress=lambda *at: seen.append(at))
    total = service.chunk_bytes["RegisterModel"]
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_progress_of_what_is_there_already_is_complete_at_once(client):
    client.register_model("mlp", {}, BIG)
    seen = []
    client.register_model("mlp", {}, BIG, progress=lambda *at: seen.append(at))
    assert len(seen) == 1
    assert seen[0][0] == seen[0][1] > TOTAL


def test_an_error_in_the_callback_reaches_the_caller(client):
    def callback(done, total):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        client.register_model("mlp", {}, BIG, progress=callback)


def test_a_bar_is_silent_where_stderr_is_no_terminal(client, capsys):
    client.register_model("mlp", {}, BIG, progress=True)
    assert capsys.readouterr() == ("", "")


def test_a_safetensors_file_is_sent_as_it_is(client, service, tmp_path):
    path = tmp_path / "state.safetensors"
    save_file({"a": np.ones((2, 3), np.float32)}, path)
    model = client.register_model("mlp", {}, path)
    assert model.state_bytes == path.stat().st_size
    assert list(service.uploads.values()) == [path.read_bytes()]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"abc", "its header does not end"),
        (b"\xff" * 16, "its header does not end"),
        (b"\x02" + b"\0" * 7 + b"{}" + b"rest", "has 4 bytes of payload"),
        (b"\x02" + b"\0" * 7 + b"[]", "is not a JSON object"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_here(
    client, service, tmp_path, content, text
):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(curvd.InvalidTensors, match=text):
        client.register_model("mlp", {}, path)
    assert service.calls == []


def test_a_file_that_is_not_there_is_named(client, tmp_path):
    with pytest.raises(curvd.InvalidTensors, match="nowhere: No such file"):
        client.register_model("mlp", {}, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"x": np.ones(4)}, "the tensors are x, but inputs and target name x, y"),
        (
            {"x": np.ones(4), "y": np.ones(4), "z": np.ones(4)},
            "the tensors are x, y, z",
        ),
        ({"x": np.ones(4), "y": np.ones(5)}, "same leading axis"),
        ({"x": np.ones(4), "y": np.float64(1)}, "same leading axis"),
        ({"x": np.ones(0), "y": np.ones(0)}, "same leading axis"),
    ],
)
def test_a_dataset_that_cannot_be_is_refused_here(client, service, tensors, text):
    with pytest.raises(curvd.InvalidSpec, match=text):
        client.register_dataset(tensors, inputs="x", target="y", batch_size=2)
    assert service.calls == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1.0, 2.0], "tensor 'a' is a list, not a NumPy array or torch tensor"),
        (np.ones(2, complex), "tensor 'a' has dtype complex128"),
        (np.array(["x"]), "tensor 'a' has dtype <U1"),
    ],
)
def test_a_tensor_that_cannot_travel_is_named(client, service, value, text):
    with pytest.raises(curvd.InvalidTensors, match=text):
        client.register_model("mlp", {}, {"a": value})
    assert service.calls == []


def test_a_config_that_is_not_json_is_refused_here(client, service):
    with pytest.raises(curvd.InvalidSpec, match="config must be JSON"):
        client.register_model("mlp", {"f": object()}, BIG)
    assert service.calls == []


@pytest.mark.parametrize("order", ["C", "F"])
def test_any_memory_layout_arrives_row_major(client, service, order):
    a = np.asarray(np.arange(24.0).reshape(4, 6)[:, ::2], order=order)
    client.register_model("mlp", {}, {"a": a[::-1]})
    (held,) = service.uploads.values()
    assert bytes(held).endswith(np.ascontiguousarray(a[::-1]).tobytes())


def test_torch_states_travel_bit_by_bit(client, service):
    torch = pytest.importorskip("torch")
    state = torch.nn.Sequential(
        torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)
    ).state_dict()
    model = client.register_model("mlp", {}, state)
    assert {t.name: t.dtype for t in model.tensors}["1.num_batches_tracked"] == "I64"
    half = client.register_model("mlp", {}, {"a": torch.ones(P, dtype=torch.bfloat16)})
    assert half.tensors == (curvd.TensorInfo("a", "F32", (P,)),)
