"""Models of libraries by name: what is let through, and what is not."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from support.reference import central_difference, columns, dense_ggn, error, problem_of
from support.zoo import Animal
from torch import nn

from curvd.contract.enums import Dtype
from curvd.contract.specs import DatasetSpec, LossSpec, ModelSpec, OperatorSpec
from curvd.errors import BuilderNotFound, FailedPrecondition, InvalidSpec, LimitExceeded
from curvd_server.device.torch_device import TorchDevice
from curvd_server.engine.building import build
from curvd_server.engine.objective.layer_patches import WideFloats
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.tuning.plan import Plan
from curvd_server.models import libraries, size_limit

TINY = {
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 3,
}
LLAMA = {
    "vocab_size": 11,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
}


def needs(*names):
    """Skip where a library is missing or does not load."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'curvd[{name}]'")
        try:
            libraries._imported(name)
        except FailedPrecondition as error:
            pytest.skip(f"{name} cannot be imported here: {error}")


def device(*allowed, model_bytes=1 << 28):
    return TorchDevice({}, "cpu", allowed=allowed, model_bytes=model_bytes)


def describe(builder, config, **options):
    needs(builder.partition(":")[0])
    where = device(f"{builder.partition(':')[0]}:*", **options)
    return where.architecture(ModelSpec(builder=builder, config=config))


def test_a_config_shapes_the_model():
    found = describe("timm:vit_tiny_patch16_224", TINY)
    assert found.tensors["patch_embed.proj.weight"].shape == (8, 3, 4, 4)
    assert found.tensors["head.weight"].shape == (3, 8)
    small = {"n_layer": 1, "vocab_size": 11, "head": "causal_lm"}
    found = describe("transformers:gpt2", small)
    assert found.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert (
        "h.1.ln_1.weight" not in describe("transformers:gpt2", {"n_layer": 1}).tensors
    )
    found = describe("torchvision:resnet18", {"num_classes": 7})
    assert found.tensors["fc.weight"].shape == (7, 512)


def test_the_whole_config_of_transformers_is_a_config():
    needs("transformers")
    import transformers

    own = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11, "num_labels": 5}
    own |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    whole = transformers.GPT2Config(**own).to_dict()
    for head in ("causal_lm", "sequence_classification"):
        found = describe("transformers:gpt2", {**whole, "head": head})
        brief = describe("transformers:gpt2", {**own, "head": head})
        assert found.tensors == brief.tensors
        assert found.ties == brief.ties
    assert found.tensors["score.weight"].shape == (5, 8)
    with pytest.raises(
        InvalidSpec, match=r"a 'gpt2'; register it as 'transformers:gpt2'"
    ):
        describe("transformers:bert", whole)
    with pytest.raises(InvalidSpec, match="unknown key 'quantization_config'"):
        describe("transformers:gpt2", {**whole, "quantization_config": {"bits": 4}})


@pytest.mark.parametrize("source", ["timm:vit_*", "timm:resnet18", "transformers:gpt2"])
def test_only_what_the_operator_allows_is_found(source):
    needs(source.partition(":")[0])
    where = device(source)
    assert source in where.builders
    for name in ("timm:resnet50", "transformers:bert", "os:system", "timm", "timm:"):
        with pytest.raises(BuilderNotFound, match="is allowed on this server; known"):
            where.architecture(ModelSpec(builder=name))


@pytest.mark.parametrize(
    "name",
    [
        "timm:hf-hub:someone/model",
        "timm:local-dir:/etc",
        "timm:../../etc/passwd",
        "transformers:someone/model",
        "torchvision:/etc/passwd",
        "timm:" + "a" * 65,
    ],
)
def test_a_name_is_never_a_place(name):
    needs(name.partition(":")[0])
    with pytest.raises(BuilderNotFound):
        describe(name, {})


@pytest.mark.parametrize(
    ("builder", "config", "message"),
    [
        ("timm:resnet18", {"pretrained": True}, "unknown key 'pretrained'"),
        ("timm:resnet18", {"checkpoint_path": "x"}, "unknown key 'checkpoint_path'"),
        ("timm:resnet18", {"pretrained_cfg": {"file": "x"}}, "unknown key"),
        ("timm:resnet18", {"cache_dir": "/"}, "unknown key"),
        (
            "timm:resnet18",
            {"act_layer": "os.system"},
            "timm:resnet18 refuses its config",
        ),
        ("timm:resnet18", {"act_layer": "a/b"}, "act_layer must be .* got 'a/b'"),
        (
            "timm:resnet18",
            {"num_classes": 2**21},
            "num_classes must be a number, at mo",
        ),
        ("timm:resnet18", {"drop_rate": float("nan")}, "drop_rate must be .*'nan'"),
        ("timm:resnet18", {"layers": [[[1]]]}, "layers must be a number"),
        ("timm:resnet18", {"layers": [1] * 5000}, "layers must be a number"),
        ("timm:resnet18", {"num_classes": {"a": 1}}, "num_classes must be a number"),
        ("timm:no_such_model", {}, "has no model 'no_such_model'"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "unknown key 'weights'"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, "has no model 'fasterrcnn"),
        (
            "transformers:bert",
            {"auto_map": {"AutoModel": "a.b"}},
            "unknown key 'auto_map",
        ),
        ("transformers:bert", {"_attn_implementation": "x"}, "unknown key '_attn"),
        ("transformers:bert", {"attn_implementation": "x"}, "unknown key 'attn"),
        ("transformers:bert", {"name_or_path": "x"}, "unknown key 'name_or_path"),
        ("transformers:bert", {"quantization_config": {}}, "unknown key 'quant"),
        ("transformers:bert", {"trust_remote_code": True}, "unknown key 'trust"),
        ("transformers:bert", {"hidden_act": "a/b"}, "hidden_act must be .* got 'a/b'"),
        ("transformers:bert", {"hidden_act": "os.system"}, "refuses its config"),
        ("transformers:bert", {"hidden_size": 7}, "refuses its config: ValueError"),
        ("transformers:bert", {"head": "exec"}, "head must be one of .* got 'exec'"),
        ("transformers:bert", {"head": ["none"]}, "head must be one of"),
        ("transformers:bert", {"output": 3}, "output must be the name of a field"),
        (
            "transformers:llama",
            {"rope_parameters": {"a": {"b": 1}}},
            "rope_parameters mu",
        ),
        (
            "transformers:timm_backbone",
            {"backbone": "resnet18"},
            "unknown key 'backbone",
        ),
        ("transformers:rag", {"index_path": "x"}, "unknown key 'index_path'"),
        ("transformers:no_such_type", {}, "has no model 'no_such_type'"),
    ],
)
def test_what_is_no_architecture_is_refused(builder, config, message):
    with pytest.raises(InvalidSpec, match=message):
        describe(builder, config)


@pytest.mark.parametrize(
    ("builder", "config", "message"),
    [
        (
            "timm:vit_tiny_patch16_224",
            {"embed_dim": 2**20},
            "more than 268435456 bytes",
        ),
        (
            "timm:vit_tiny_patch16_224",
            {**TINY, "embed_dim": 2, "depth": 2**20},
            "more than 500 layers",
        ),
        ("transformers:llama", {}, r"more than 268435456 bytes \(upload_bytes\)"),
        ("transformers:llama", {**LLAMA, "num_hidden_layers": 2**20}, "500 layers"),
    ],
)
def test_a_model_that_is_too_large_is_refused_before_it_has_memory(
    builder, config, message, monkeypatch
):
    monkeypatch.setattr(size_limit, "MOST_MODULES", 500)
    with pytest.raises(LimitExceeded, match=message):
        describe(builder, config)


def test_the_limit_ends_with_the_build():
    with pytest.raises(LimitExceeded):
        describe("transformers:llama", {})
    nn.Linear(2**13, 2**13, device="meta")  # 256 MiB, and nobody minds


def test_nothing_is_fetched_and_nothing_unpickled():
    needs("timm", "transformers")
    seen = []
    watching = True

    def audit(event, args):
        if watching and (event.startswith("socket.") or event == "pickle.find_class"):
            seen.append(event)

    sys.addaudithook(audit)
    try:
        describe("timm:resnet18", {"num_classes": 3})
        describe("transformers:llama", {**LLAMA, "head": "causal_lm"})
    finally:
        watching = False  # a hook cannot be removed
    assert seen == []


def test_a_library_that_does_not_load_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    libraries._imported.cache_clear()
    with pytest.raises(FailedPrecondition, match=r"pip install .*\.\[transformers\]"):
        libraries._imported("transformers")
    libraries._imported.cache_clear()


def test_upcasts_do_not_narrow_a_float64_computation():
    x = torch.randn(3, 4, dtype=torch.float64)
    with WideFloats():
        assert x.float().dtype is torch.float64
        assert x.to(torch.float32).dtype is torch.float64
        assert x.to(dtype=torch.float32).dtype is torch.float64
        assert x.softmax(-1, torch.float32).dtype is torch.float64
        assert nn.functional.softmax(x, -1, dtype=torch.float32).dtype is torch.float64
        assert x.to(torch.bfloat16).dtype is torch.bfloat16
    assert x.float().dtype is torch.float32


def encoder() -> nn.Module:
    """What vision transformers of torchvision consist of."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu")
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(20, 3))


@pytest.mark.parametrize("mode", ["double_backward", "forward_over_reverse"])
def test_an_encoder_layer_takes_no_path_without_derivatives(mode):
    problem = problem_of(Animal("encoder", encoder, "sequences"))
    V = columns(problem, 1)
    for kind in ("hessian", "ggn"):
        spec, plan = OperatorSpec(kind=kind), Plan(mode)
        operator = build(problem, spec, budget_bytes=2**20, plan=plan, tuning_s=0.0)
        assert operator.plan == plan
        want = central_difference(problem, V[0])
        want = want if kind == "hessian" else V[0] @ dense_ggn(problem)
        assert error(operator.apply(V)[0], want) < 1e-6


@pytest.mark.parametrize(
    ("kind", "masked"), [("gpt2", False), ("bert", True), ("llama", True)]
)
def test_masks_do_not_keep_a_transformer_from_being_traced(kind, masked):
    needs("transformers")
    config = {
        "gpt2": {"n_layer": 1, "n_embd": 4, "n_head": 1, "vocab_size": 7},
        "bert": {**LLAMA, "vocab_size": 7},
        "llama": {**LLAMA, "vocab_size": 7},
    }[kind]
    make = libraries.find(f"transformers:{kind}", ["*"], limit_bytes=2**30)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make({**config, "head": "causal_lm"})
    ids = torch.randint(1, 7, (5, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[4, 2:] = 0  # in the second mini-batch only: no trace may decide by values
    arrays = {"input_ids": ids, "attention_mask": mask, "y": ids}
    inputs = ("input_ids", "attention_mask") if masked else ("input_ids",)
    problem = Problem.load(
        module,
        {},
        arrays,
        DatasetSpec(inputs=inputs, target="y", batch_size=3, input_style="keywords"),
        LossSpec(name="cross_entropy", shift=True),
        dtype=Dtype.FLOAT64,
    )
    V = columns(problem, 1)
    for name, row in problem.model.fixed:
        p = next(p for p in problem.layout.parameters if p.name == name)
        start = p.offset + row * p.shape[1]
        V[0, start : start + p.shape[1]] = 0
    plan = Plan("program")
    operator = build(problem, OperatorSpec(), budget_bytes=2**24, plan=plan, tuning_s=0)
    assert operator.plan == plan
    assert error(operator.apply(V)[0], central_difference(problem, V[0])) < 1e-6


def test_experts_are_multiplied_in_float64():
    needs("transformers")
    make = libraries.find("transformers:mixtral", ["*"], limit_bytes=2**30)
    experts = {"num_local_experts": 3, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make({**LLAMA, **experts, "vocab_size": 7, "head": "causal_lm"})
    ids = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(0))
    problem = Problem.load(
        module,
        {},
        {"x": ids, "y": ids},
        DatasetSpec(inputs=("x",), target="y", batch_size=3),
        LossSpec(name="cross_entropy", shift=True),
        dtype=Dtype.FLOAT64,
    )
    V, plan = columns(problem, 1), Plan("double_backward")
    operator = build(problem, OperatorSpec(), budget_bytes=2**24, plan=plan, tuning_s=0)
    assert error(operator.apply(V)[0], central_difference(problem, V[0])) < 1e-6


def test_an_absent_mask_keeps_everything():
    needs("transformers")
    transformers = libraries._imported("transformers")
    config = {"n_layer": 1, "n_embd": 4, "n_head": 1, "vocab_size": 7}
    make = libraries.find("transformers:gpt2", ["*"], limit_bytes=2**30)
    ours = make({**config, "head": "causal_lm"}).eval()
    described = transformers.AutoConfig.for_model("gpt2", **config)
    theirs = transformers.AutoModelForCausalLM.from_config(described).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(1, 7, (5, 4), generator=torch.Generator().manual_seed(0))
    want = theirs(input_ids=ids).logits
    for got in (
        ours(ids),
        ours(input_ids=ids),
        ours(input_ids=ids, attention_mask=None),
    ):
        torch.testing.assert_close(got, want)
