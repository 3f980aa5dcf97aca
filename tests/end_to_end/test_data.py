"""Data as it comes: mounted on the server, several inputs, masks, any element type."""

import hashlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.numpy import save_file  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd_server.app import serve_in_thread  # noqa: E402
from curvd_server.config import ServerConfig  # noqa: E402

N = 6


class Pooled(nn.Module):
    """Embeds tokens, averages those that a mask keeps, adds features; by name or dict."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(6, 3)

    def forward(self, batch=None, *, ids=None, mask=None, features=None, keep=None):
        if batch is not None:
            ids, mask, features, keep = (
                batch[n] for n in ("ids", "mask", "features", "keep")
            )
        weight = (mask * keep).unsqueeze(-1).to(self.tokens.weight.dtype)
        pooled = (self.tokens(ids) * weight).sum(1) / weight.sum(1)
        return self.head(torch.cat([torch.tanh(pooled), features], 1))


def pooled(config):
    """A builder of the server's operator."""
    return Pooled()


def module():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pooled().double()


def arrays():
    rng = np.random.default_rng(0)
    mask = np.ones((N, 5), np.int64)
    mask[1, 3:] = mask[4, 1:] = 0
    return {
        "ids": rng.integers(0, 7, (N, 5)).astype(np.int32),
        "mask": mask,
        "features": rng.normal(size=(N, 2)).astype(np.float32),
        "keep": rng.integers(0, 2, (N, 5)).astype(bool) | (np.arange(5) == 0),
        "y": rng.integers(0, 3, N).astype(np.uint8),
    }


INPUTS = ["ids", "mask", "features", "keep"]


def truth(v):
    """Hv by central differences of the eager module's gradient."""
    model, data = module(), {n: torch.from_numpy(a) for n, a in arrays().items()}
    inputs = {n: data[n] for n in INPUTS}
    inputs["features"] = inputs["features"].double()
    parameters = list(model.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(theta):
        nn.utils.vector_to_parameters(theta, parameters)
        loss = nn.functional.cross_entropy(model(inputs), data["y"].long())
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters))

    def quotient(step):
        ahead, behind = (
            gradient(start + s * step * torch.from_numpy(v)) for s in (1, -1)
        )
        return (ahead - behind) / (2 * step)

    return ((4 * quotient(1e-5) - quotient(2e-5)) / 3).numpy()


@pytest.fixture
def config(tmp_path):
    root = tmp_path / "datasets"
    root.mkdir()
    save_file({**arrays(), "unused": np.ones(3)}, root / "texts.safetensors")
    return ServerConfig(
        listen="127.0.0.1:0",
        data_dir=tmp_path / "data",
        datasets_root=root,
        builders={"pooled": "end_to_end.test_data:pooled"},
    )


def product(client, dataset):
    model = client.register_model("pooled", {}, module().state_dict())
    session = client.create_session(model, dataset, loss="cross_entropy", dtype="F64")
    v = np.random.default_rng(1).standard_normal(session.info.layout.size)
    return session, v, session.hessian() @ v


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("style", ["keywords", "mapping"])
def test_several_inputs_of_any_element_type_by_name(config, style):
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        dataset = client.register_dataset(
            arrays(), inputs=INPUTS, target="y", batch_size=4, input_style=style
        )
        _, v, got = product(client, dataset)
        assert error(got, truth(v)) <= 1e-6


def test_a_mounted_dataset_is_registered_by_name_and_survives_a_restart(config):
    options = {
        "inputs": INPUTS,
        "target": "y",
        "batch_size": 4,
        "input_style": "keywords",
    }
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        assert client.server_info().datasets == ("texts",)
        dataset = client.register_dataset(name="texts", **options)
        assert (dataset.name, dataset.data_points) == ("texts", N)
        assert sorted(t.name for t in dataset.tensors) == sorted([*INPUTS, "y"])
        assert client.register_dataset(name="texts", **options).id == dataset.id
        session, v, got = product(client, dataset)
        assert error(got, truth(v)) <= 1e-6
        state = {h.name for h in (config.data_dir / "blobs").iterdir()}
        mounted = config.datasets_root / "texts.safetensors"
        assert hashlib.sha256(mounted.read_bytes()).hexdigest() not in state
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        again = client.session(session.id)
        np.testing.assert_allclose(again.hessian() @ v, got, rtol=1e-12)
    save_file(arrays(), config.datasets_root / "texts.safetensors")
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        with pytest.raises(curvd.FailedPrecondition, match="'texts' was changed"):
            client.session(session.id).hessian() @ v


def test_what_the_server_has_is_registered_by_digest(config):
    options = {"inputs": INPUTS, "target": "y", "batch_size": 4}
    mounted = config.datasets_root / "texts.safetensors"
    digest = hashlib.sha256(mounted.read_bytes()).hexdigest()
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        # A file of the folder has a digest once it was used; until then nobody looks.
        with pytest.raises(curvd.DatasetNotFound, match=r"SHA-256 .* upload them"):
            client.register_dataset(digest=digest, **options)
        by_name = client.register_dataset(name="texts", **options)
        assert client.register_dataset(digest=digest, **options).id == by_name.id
        other = client.register_dataset(digest=digest, **(options | {"batch_size": 2}))
        assert (other.data_points, other.spec.batch_size) == (N, 2)
        for wrong in ("x", "../" * 20, digest.upper()):
            with pytest.raises(curvd.InvalidSpec, match="64 lower-case hexadecimal"):
                client.register_dataset(digest=wrong, **options)
        save_file(arrays(), mounted.with_name("local"))
        uploaded = client.register_dataset(mounted.with_name("local"), **options)
        local = hashlib.sha256(mounted.with_name("local").read_bytes()).hexdigest()
        again = client.register_dataset(digest=local, **options)
        assert again == uploaded


def test_what_is_not_mounted_is_refused(config):
    options = {"inputs": "ids", "target": "y", "batch_size": 4}
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        with pytest.raises(curvd.DatasetNotFound, match="near it are 'texts'"):
            client.register_dataset(name="text", **options)
        with pytest.raises(curvd.InvalidSpec, match="the name of a dataset"):
            client.register_dataset(name="../texts", **options)
        with pytest.raises(curvd.InvalidSpec, match="give tensors, or the name"):
            client.register_dataset(arrays(), name="texts", **options)
        with pytest.raises(curvd.InvalidSpec, match="inputs and target name nothing"):
            client.register_dataset(
                name="texts", inputs="nothing", target="y", batch_size=4
            )
