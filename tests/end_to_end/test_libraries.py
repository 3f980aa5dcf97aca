"""Models of libraries by name, against central differences of the libraries' own."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd_server.app import serve_in_thread  # noqa: E402
from curvd_server.config import ServerConfig  # noqa: E402
from curvd_server.engine.objective.layer_patches import WideFloats  # noqa: E402
from curvd_server.models.libraries import _imported  # noqa: E402

N, BATCH = 5, 3
TEXT = {"vocab_size": 11, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {**TEXT, "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8}
LLAMA = {
    **TEXT,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
BERT = {
    "vocab_size": 11,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
VIT = {
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
}


def library(name):
    """The library, or a reason to skip."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'curvd[{name}]'")
    try:
        return _imported(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    found = [
        f"{name}:*"
        for name in ("timm", "torchvision", "transformers")
        if importlib.util.find_spec(name)
    ]
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=tmp_path_factory.mktemp("data"),
        libraries=found,
    )
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        yield client


def randomised(module):
    """Evaluation mode, float64, and no parameter zero or one."""
    g = torch.Generator().manual_seed(0)
    module = module.double().eval()
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=g, dtype=tensor.dtype)
            tensor += 0.1 * (noise.abs() if tensor.ndim == 1 else noise)
    return module


def difference(module, loss_of, v, step):
    """Hv by central differences of the gradient, Richardson extrapolated once."""
    parameters = list(module.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()
    v = torch.from_numpy(v)

    def gradient(theta):
        nn.utils.vector_to_parameters(theta, parameters)
        rows = torch.autograd.grad(
            loss_of(module), parameters, materialize_grads=True, allow_unused=True
        )
        return nn.utils.parameters_to_vector(rows)

    def quotient(step):
        ahead, behind = (gradient(start + s * step * v) for s in (1, -1))
        return (ahead - behind) / (2 * step)

    result = (4 * quotient(step) - quotient(2 * step)) / 3
    nn.utils.vector_to_parameters(start, parameters)
    return result.numpy()


def check(client, module, builder, config, data, loss_of, *, zero=(), **options):
    """Register, multiply, compare."""
    style = options.pop("input_style", "positional")
    step = options.pop("step", 1e-5)
    model = client.register_model(builder, config, module.state_dict())
    dataset = client.register_dataset(
        data,
        inputs=[n for n in data if n != "y"],
        target="y",
        batch_size=BATCH,
        input_style=style,
    )
    with client.create_session(model, dataset, dtype="F64", **options) as session:
        layout = session.info.layout
        assert layout.names == tuple(n for n, _ in module.named_parameters())
        v = np.random.default_rng(0).standard_normal(layout.size)
        for p in layout.parameters:
            if p.name in zero:  # a row of padding is a constant, whatever its values
                v[p.offset : p.offset + p.shape[1]] = 0
        want = difference(module, loss_of, v, step)
        got = session.hessian() @ v
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
        (_, plan), *_ = session.info.operators
        assert plan.difference_gap < 1e-5


def images(size):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, size, size, generator=g, dtype=torch.float64)
    return {"x": x, "y": torch.randint(0, 3, (N,), generator=g)}


@pytest.mark.usefixtures("untimed")  # tracing is the matter of tests/engine
@pytest.mark.parametrize(
    ("source", "name", "config", "size"),
    [
        ("timm", "vit_tiny_patch16_224", VIT, 8),
        (
            "timm",
            "resnet18",
            {
                "num_classes": 3,
                "channels": [4, 4, 8, 8],
                "stem_width": 4,
                "layers": [1, 1, 1, 1],
            },
            32,
        ),
        ("torchvision", "squeezenet1_1", {"num_classes": 3}, 32),
    ],
)
def test_image_classifiers(client, source, name, config, size):
    found = library(source)
    build = found.create_model if source == "timm" else found.models.get_model
    module = randomised(build(name, **config))
    data = images(size)
    check(
        client,
        module,
        f"{source}:{name}",
        config,
        data,
        lambda m: F.cross_entropy(m(data["x"]), data["y"]),
        loss="cross_entropy",
        step=1e-5 if name.startswith("vit") else 1e-8,  # no ReLU may reach its kink
    )


def text(padded=True):
    """Ragged text, padded to one length, and its mask."""
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 11, (N, 6), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 4:] = mask[3, 2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def reference(kind, head, config):
    """The library's own module, by its class."""
    transformers = library("transformers")
    described = transformers.AutoConfig.for_model(kind, **config, use_cache=False)
    return randomised(getattr(transformers, head).from_config(described))


@pytest.mark.parametrize(
    ("kind", "config", "padded"),
    [("gpt2", GPT2, True), ("gpt2", GPT2, False), ("llama", LLAMA, True)],
)
def test_causal_language_models_with_padding(client, kind, config, padded):
    module = reference(kind, "AutoModelForCausalLM", config)
    batch = text(padded)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def loss_of(m):
        with WideFloats():
            logits = m(**batch).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    check(
        client,
        module,
        f"transformers:{kind}",
        {**config, "head": "causal_lm"},
        {**batch, "y": labels}
        if padded
        else {"input_ids": batch["input_ids"], "y": labels},
        loss_of,
        zero=["model.embed_tokens.weight"],
        input_style="keywords",
        loss={"name": "cross_entropy", "shift": True, "ignore_index": -100},
    )


def test_a_masked_language_model_with_its_tied_head(client):
    module = reference("bert", "AutoModelForMaskedLM", BERT)
    batch = text() | {"token_type_ids": torch.arange(6).ge(3).long().expand(N, 6)}
    y = torch.full((N, 6), -100)
    y[:, ::3] = 5
    check(
        client,
        module,
        "transformers:bert",
        {**BERT, "head": "masked_lm"},
        {**batch, "y": y},
        lambda m: F.cross_entropy(m(**batch).logits.flatten(0, 1), y.flatten()),
        zero=["bert.embeddings.word_embeddings.weight"],
        input_style="keywords",
        loss={"name": "cross_entropy", "ignore_index": -100},
    )


def test_a_model_without_a_head_gives_the_output_that_is_asked_for(client):
    module = reference("bert", "AutoModel", BERT)
    batch = text() | {"attention_mask": text()["attention_mask"].bool()}
    y = torch.randn(N, 8, generator=torch.Generator().manual_seed(3)).double()
    check(
        client,
        module,
        "transformers:bert",
        {**BERT, "head": "none", "output": "pooler_output"},
        {**batch, "y": y},
        lambda m: F.mse_loss(m(**batch).pooler_output, y),
        zero=["embeddings.word_embeddings.weight"],
        input_style="keywords",
        loss="mse",
    )


def test_an_output_that_is_not_there_names_those_that_are(client):
    module = reference("bert", "AutoModel", BERT)
    config = {**BERT, "output": "logits"}
    model = client.register_model("transformers:bert", config, module.state_dict())
    dataset = client.register_dataset(
        {"x": text()["input_ids"], "y": torch.zeros(N, 8)},
        inputs="x",
        target="y",
        batch_size=2,
    )
    with pytest.raises(
        curvd.InvalidSpec, match="no output 'logits'; it has last_hidden_state, pooler"
    ):
        client.create_session(model, dataset, loss="mse")


def test_data_that_does_not_fit_the_model_is_the_callers_mistake(client):
    module = library("timm").create_model("vit_tiny_patch16_224", **VIT)
    model = client.register_model("timm:vit_tiny_patch16_224", VIT, module.state_dict())
    data = {"x": np.zeros((2, 3, 9, 9)), "y": np.zeros(2, np.int64)}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=2)
    with pytest.raises(curvd.InvalidSpec, match=r"cannot run on this dataset: .*\(9\)"):
        client.create_session(model, dataset, loss="cross_entropy")


def test_upcasts_to_float32_do_not_keep_a_narrow_session_from_being_verified(client):
    module = reference("llama", "AutoModelForCausalLM", LLAMA)
    config = {**LLAMA, "head": "causal_lm"}
    model = client.register_model("transformers:llama", config, module.state_dict())
    ids = text(padded=False)["input_ids"]
    dataset = client.register_dataset(
        {"input_ids": ids, "y": ids}, inputs="input_ids", target="y", batch_size=BATCH
    )
    session = client.create_session(
        model,
        dataset,
        loss={"name": "cross_entropy", "shift": True},
        dtype="F32",
        validate_only=True,
    )
    (_, plan), *_ = session.info.operators
    assert plan.difference_gap < 1e-6


def test_the_server_lists_what_it_allows(client):
    assert {"mlp", "gpt"} < set(client.server_info().builders)
    with pytest.raises(curvd.BuilderNotFound, match="'timm:local-dir:/etc'"):
        client.register_model("timm:local-dir:/etc", {}, {})
