"""Models and datasets: strict, and the same content is the same thing."""

import numpy as np
import pytest
from support.fake_device import masked, middle, put

from curvd.contract.enums import Dtype
from curvd.contract.specs import DatasetSpec, ModelSpec
from curvd.errors import BuilderNotFound, InvalidSpec, LimitExceeded, StateMismatch
from curvd_server.storage.finite_values import (
    _INFINITE_FROM,
    check_finite_state,
    check_representable,
)
from curvd_server.storage.registry import MAX_CONFIG_BYTES, Registry, model_spec

TWO = ModelSpec(builder="two")
SPEC = DatasetSpec(inputs=("x",), target="y", batch_size=2)


@pytest.fixture
def server(tmp_path):
    with middle(tmp_path) as it:
        yield it


def register(server, **state):
    return server.registry.model(TWO, put(server.blobs, state))


def test_the_same_content_is_the_same_model(server):
    first = register(server, a=np.ones(2), b=np.ones(3))
    assert register(server, a=np.ones(2), b=np.ones(3)) == first
    assert register(server, a=np.zeros(2), b=np.ones(3)).id != first.id


def test_a_model_whose_bytes_are_missing_is_not_made(server):
    assert server.registry.model(TWO, "0" * 64) is None


def test_a_tied_tensor_may_come_under_any_or_all_of_its_names(server):
    register(server, a=np.ones(2), c=np.ones(3))
    register(server, a=np.ones(2), b=np.ones(3), c=np.ones(3))


def test_every_tensor_that_does_not_fit_is_named(server):
    with pytest.raises(StateMismatch) as caught:
        register(server, a=np.ones((2, 1)), z=np.ones(1), y=np.ones(1))
    assert str(caught.value) == (
        "the tensors do not fit the model: missing: b; unknown: z, y; "
        "of another shape: a [2, 1] instead of [2]"
    )


def test_kinds_of_elements_must_match_but_not_their_precision(server):
    register(server, a=np.ones(2, np.float32), b=np.ones(3, np.float16))
    with pytest.raises(StateMismatch, match="of another type: a I64 instead of F64"):
        register(server, a=np.ones(2, np.int64), b=np.ones(3))


def test_tied_tensors_that_differ_are_refused(server):
    with pytest.raises(StateMismatch, match="tied, but different: c and b"):
        register(server, a=np.ones(2), b=np.ones(3), c=np.zeros(3))


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_parameter_that_is_not_finite_is_named_with_its_index(server, value, dtype):
    b = np.array([1, 1, value], dtype)
    with pytest.raises(
        StateMismatch, match=r"parameter 'b' has -?(nan|inf) at index \[2"
    ):
        register(server, a=np.ones(2), b=b)


@pytest.mark.parametrize("bits", [0x7FC0, 0xFFC1, 0x7F80, 0xFF80])
def test_bfloat16_parameters_that_are_not_finite_are_seen_in_their_bits(bits):
    array = np.array([[0x3F80, bits]], np.uint16)
    with pytest.raises(StateMismatch, match=r"'w' has -?(nan|inf) at index \[0, 1\]"):
        check_finite_state("w", "BF16", array, is_buffer=False)
    if bits in (0x7F80, 0xFF80):
        check_finite_state("w", "BF16", array, is_buffer=True)
    else:
        with pytest.raises(StateMismatch, match="buffer 'w' has nan"):
            check_finite_state("w", "BF16", array, is_buffer=True)


@pytest.fixture
def masked_registry(server):
    return Registry(server.catalogue, server.blobs, masked)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["mask", "norm.running_mean", "norm.running_var"])
def test_buffers_may_be_infinite_but_not_nan_nor_statistics(
    server, masked_registry, name, value
):
    state = {"a": np.ones(2), "b": np.ones(3)}
    for buffer in ("mask", "norm.running_mean", "norm.running_var"):
        state[buffer] = np.zeros((2, 2))
    state[name][1, 0] = value
    digest = put(server.blobs, state)
    if name == "mask" and np.isinf(value):
        assert masked_registry.model(TWO, digest) is not None
    else:
        with pytest.raises(StateMismatch, match=rf"'{name}' has .* at index \[1, 0\]"):
            masked_registry.model(TWO, digest)


def test_what_a_sessions_type_cannot_hold_is_named():
    largest = float(np.finfo(np.float32).max)
    fine = {"w": np.array([largest, -largest, 0.0])}
    check_representable(fine, Dtype.FLOAT32, what="parameter")
    check_representable({"w": np.array([1e300])}, Dtype.FLOAT64, what="parameter")
    check_representable({"w": np.array([7])}, Dtype.FLOAT32, what="tensor")
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        with pytest.raises(InvalidSpec, match=r"'w' has -1e\+300 at index \[0, 1\]"):
            check_representable({"w": np.array([[0, -1e300]])}, dtype, what="tensor")
    with pytest.raises(InvalidSpec, match="open it as F64"):
        values = np.array([largest], np.float32)
        check_representable({"w": values}, Dtype.BFLOAT16, what="parameter")


def test_the_limits_of_types_are_where_torch_rounds_to_infinity():
    torch = pytest.importorskip("torch")
    for dtype, kind in (
        (Dtype.FLOAT32, torch.float32),
        (Dtype.BFLOAT16, torch.bfloat16),
    ):
        limit = _INFINITE_FROM[dtype]
        assert torch.tensor(limit, dtype=torch.float64).to(kind).isinf()
        below = torch.tensor(np.nextafter(limit, 0), dtype=torch.float64)
        assert not below.to(kind).isinf()


def test_bytes_that_came_to_nothing_are_removed(server):
    digest = put(server.blobs, {"z": np.ones(1)})
    server.registry.release(digest)
    assert not server.blobs.has(digest)
    model = register(server, a=np.ones(2), b=np.ones(3))
    kept = server.catalogue.model(model.id).digest
    server.registry.release(kept)
    assert server.blobs.has(kept)


def test_what_was_damaged_is_welcome_again(server, tmp_path):
    model = register(server, a=np.ones(2), b=np.ones(3))
    digest = server.catalogue.model(model.id).digest
    data = put(server.blobs, {"x": np.ones((4, 2)), "y": np.arange(4)})
    dataset = server.registry.dataset(SPEC, data)
    for blob in (digest, data):
        (tmp_path / "blobs" / blob).write_bytes(b"rotten")
    assert server.registry.model(TWO, digest) is None
    assert server.registry.dataset(SPEC, data) is None
    assert register(server, a=np.ones(2), b=np.ones(3)) == model
    put(server.blobs, {"x": np.ones((4, 2)), "y": np.arange(4)})
    assert server.registry.dataset(SPEC, data) == dataset


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        "nan",
        "[" * 100_000,
        '{"x": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"x": NaN}',
        '{"x": -Infinity}',
    ],
)
def test_a_config_is_a_json_object(text):
    with pytest.raises(InvalidSpec, match="config_json"):
        model_spec("two", text)


def test_a_config_has_a_limit():
    with pytest.raises(LimitExceeded, match="config_json has"):
        model_spec("two", " " * (MAX_CONFIG_BYTES + 1))


def test_the_same_content_is_the_same_dataset(server):
    digest = put(server.blobs, {"x": np.ones((4, 2)), "y": np.arange(4)})
    first = server.registry.dataset(SPEC, digest)
    assert (first.data_points, first.id) == (
        4,
        server.registry.dataset(SPEC, digest).id,
    )
    other = DatasetSpec(inputs=("x",), target="y", batch_size=3)
    assert server.registry.dataset(other, digest).id != first.id


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": np.ones((4, 2))}, "inputs and target name x, y"),
        (
            {"x": np.ones(4), "y": np.ones(4), "z": np.ones(4)},
            "the tensors are x, y, z",
        ),
        ({"x": np.ones(4), "y": np.ones(3)}, "the same leading axis N > 0"),
        ({"x": np.ones(()), "y": np.ones(())}, "the same leading axis N > 0"),
        ({"x": np.ones((0, 2)), "y": np.ones(0)}, "the same leading axis N > 0"),
        (
            {"x": np.array([1, np.inf]), "y": np.ones(2)},
            "'x' is not finite in data point 1",
        ),
    ],
)
def test_a_dataset_that_is_none_is_refused(server, arrays, match):
    with pytest.raises(InvalidSpec, match=match):
        server.registry.dataset(SPEC, put(server.blobs, arrays))


@pytest.fixture(scope="module")
def device():
    """Builds architectures with torch."""
    compute = pytest.importorskip("curvd_server.device.torch_device")
    return compute.TorchDevice({"values": "support.fake_device:looks_at_values"}, "cpu")


def test_buffers_are_told_from_parameters(device):
    found = device.architecture(ModelSpec(builder="cnn", config={"widths": [2]}))
    assert found.buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_ties_are_found(device):
    found = device.architecture(ModelSpec(builder="gpt", config={"layers": 1}))
    assert found.ties == {"head.weight": "tokens.weight"}
    assert found.tensors["head.weight"].shape == (256, 128)


def test_a_large_architecture_is_checked_without_its_memory(device):
    config = {"widths": [65536, 65536, 65536, 65536, 65536]}
    found = device.architecture(ModelSpec(builder="mlp", config=config))
    assert found.tensors["1.weight"].shape == (65536, 65536)


def test_a_builder_that_needs_values_is_built_with_memory(device):
    found = device.architecture(ModelSpec(builder="values"))
    assert found.tensors["weight"].shape == (1, 2)


def test_a_builder_that_is_not_allowed_is_not_found(device):
    with pytest.raises(BuilderNotFound, match=r"'os:system' is allowed.*known: mlp"):
        device.architecture(ModelSpec(builder="os:system"))


def test_a_builder_names_what_it_dislikes(device):
    with pytest.raises(InvalidSpec, match="widths"):
        device.architecture(ModelSpec(builder="mlp", config={"widths": "x"}))
