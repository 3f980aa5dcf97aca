"""Mistakes that are easily made: each is told what was given, what is needed, and how to
get it."""

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import curvd  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
NET = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
X, Y = torch.randn(20, 8), torch.randint(0, 3, (20,))
NUMBERS = torch.randn(20, 3)
CE = nn.CrossEntropyLoss()
CONVOLUTION = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 3))
TOKENS = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(15, 3))


class Scalar(nn.Module):
    """Computes its loss itself."""

    def __init__(self):
        super().__init__()
        self.net = NET

    def forward(self, x):
        return self.net(x).mean()


class Named(nn.Module):
    """Returns a dict."""

    def __init__(self):
        super().__init__()
        self.net = NET

    def forward(self, x):
        return {"scores": self.net(x), "hidden": self.net[0](x)}


def branching(outputs, targets):
    if outputs.isnan().any():
        return outputs.new_zeros(())
    return F.mse_loss(outputs, targets)


def bring(module, loss, data, **options):
    return lambda client, session: client.session_for(
        module, loss, data, batch_size=10, **options
    )


def given(what):
    return lambda client, session: session.update_parameters(what())


def blocks(sizes):
    return lambda client, session: session.hessian(block_sizes=sizes)


# What is done wrong: the call, what was given, what is needed, how to get it.
MISTAKES = {
    "no data points": (
        bring(NET, CE, (X[:0], Y[:0])),
        r"no data points \(inputs \[0, 8\], targets \[0\]\)",
        "at least one",
        "a filter or a slice",
    ),
    "no data points in an export": (
        lambda client, session: curvd.export(NET, X[:0]),
        "'input': 0",
        "N > 0",
        "one leading batch axis",
    ),
    "fewer targets than inputs": (
        bring(NET, CE, (X, Y[:10])),
        r"inputs \[20, 8\], targets \[10\]",
        "a target for each data point",
        r"inputs\[:n\] and targets\[:n\]",
    ),
    "float targets for cross-entropy": (
        bring(NET, CE, (X, Y.float())),
        r"the targets are float32 \[N\]",
        r"class indices, integers, or probabilities .* \[N, 3\]",
        r"targets\.long\(\)",
    ),
    "float targets for a function": (
        bring(NET, F.cross_entropy, (X, Y.double())),
        r"float64 \[N\]",
        "class indices",
        r"targets\.long\(\).*MSELoss",
    ),
    "short integers for cross-entropy": (
        bring(NET, CE, (X, Y.int())),
        r"int32 \[N\]",
        "as int64",
        r"targets\.long\(\)",
    ),
    "one-hot targets": (
        bring(NET, CE, (X, F.one_hot(Y, 3))),
        r"int64 \[N, 3\]",
        r"of shape \[N\]",
        r"targets\.argmax\(1\)",
    ),
    "a column of targets": (
        bring(NET, CE, (X, Y[:, None])),
        r"int64 \[N, 1\]",
        r"of shape \[N\]",
        r"targets\.squeeze\(1\)",
    ),
    "classes that begin at one": (
        bring(NET, CE, (X, Y + 1)),
        "the targets have 3",
        "class indices are 0 to 2",
        "subtract the smallest",
    ),
    "yes and no for binary cross-entropy": (
        bring(NET, nn.BCEWithLogitsLoss(), (X, NUMBERS > 0)),
        r"bool \[N, 3\]",
        "numbers of floating point",
        r"targets\.float\(\)",
    ),
    "texts where numbers were wanted": (
        bring(NET, CE, (np.array(["a", "b"]), Y[:2])),
        "the input: an array of <U1",
        "no numbers to compute with",
        "tokenizer",
    ),
    "an array of objects": (
        bring(NET, CE, (np.array([[1.0], None], dtype=object), Y)),
        "the input: an array of object",
        "no numbers to compute with",
        "rows of different lengths by padding",
    ),
    "rows of different lengths": (
        bring(NET, CE, ([[1.0, 2.0], [1.0]], Y)),
        "lists of different lengths",
        r"array \[N, \.\.\.\]",
        "padding=True",
    ),
    "inputs without targets": (
        bring(NET, CE, X),
        "got a Tensor without targets",
        r"a pair \(inputs, targets\)",
        "a DataLoader",
    ),
    "several inputs beside the targets": (
        bring(NET, CE, (X, X, Y)),
        "a tuple of 3",
        r"\(inputs, targets\)",
        r"\(\(a, b\), targets\)",
    ),
    "a mapping without labels": (
        bring(NET, CE, {"input": X, "y": Y}),
        "this dict has 'input', 'y'",
        "the targets as 'labels'",
        r"the pair \(mapping, targets\)",
    ),
    "whole data without a batch size": (
        lambda client, session: client.session_for(NET, CE, (X, Y)),
        "here a tuple",
        "needs batch_size=",
        "a DataLoader",
    ),
    "a generator that was read before": (
        bring(NET, CE, iter(())),
        "no mini-batches",
        "begins anew",
        "a list or a DataLoader",
    ),
    "a scalar output": (
        bring(Scalar(), CE, (X, Y)),
        r"output has shape \[\]",
        r"\[B, \.\.\.\]",
        "return one row per data point",
    ),
    "inputs of the wrong width": (
        bring(NET, CE, (X[:, :5], Y)),
        r"layer '0', Linear.* fails on float32 \[B, 5\]",
        r"it takes \[\.\.\., 8\]",
        "give inputs of that width",
    ),
    "inputs and targets swapped": (
        bring(NET, nn.MSELoss(), (NUMBERS, X)),
        r"fails on float32 \[B, 3\]",
        r"data is \(inputs, targets\)",
        r"it takes the targets.*swapped\?",
    ),
    "inputs of another type": (
        bring(NET, CE, (X.double(), Y)),
        r"fails on float64 \[B, 8\]",
        "parameters are float32",
        r"inputs\.to\(torch\.float32\)",
    ),
    "integers of the right width": (
        bring(NET, CE, (X.long().numpy(), Y)),
        r"fails on int64 \[B, 8\]",
        "parameters are float32",
        r"inputs\.to\(torch\.float32\)",
    ),
    "integers of the wrong width": (
        bring(NET, CE, (X[:, :5].long(), Y)),
        r"fails on int64 \[B, 5\]",
        r"it takes \[\.\.\., 8\]",
        "give inputs of that width",
    ),
    "bytes for a convolution": (
        bring(CONVOLUTION, CE, (torch.ones(len(X), 1, 2, 2).byte(), Y)),
        r"layer '0', Conv2d.* fails on uint8 \[B, 1, 2, 2\]",
        "parameters are float32",
        r"inputs\.to\(torch\.float32\)",
    ),
    "tokens of 16 bits": (
        bring(TOKENS, CE, (torch.ones(len(X), 5).short(), Y)),
        r"layer '0', Embedding\(7, 3\), fails on int16 \[B, 5\]",
        "integers as int64",
        r"inputs\.long\(\)",
    ),
    "tokens of floating point": (
        bring(TOKENS, CE, (torch.ones(len(X), 5), Y)),
        r"fails on float32 \[B, 5\]",
        "integers as int64",
        r"inputs\.long\(\)",
    ),
    "a sparse tensor": (
        bring(NET, CE, (X.to_sparse(), Y)),
        "the input: a Tensor that is",
        "sparse",
        r"\.to_dense\(\)",
    ),
    "SciPy's sparse matrix": (
        bring(NET, CE, (scipy.sparse.csr_array(X.numpy()), Y)),
        "the input: a csr_array that is",
        "sparse",
        r"\.toarray\(\)",
    ),
    "rows of different lengths, nested": (
        bring(
            NET,
            CE,
            (torch.nested.as_nested_tensor([X[:2], X[2:]], layout=torch.jagged), Y),
        ),
        "the input: a NestedTensor that is",
        "nested",
        r"pad it, torch\.nested\.to_padded_tensor",
    ),
    "masked inputs": (
        bring(NET, CE, (np.ma.masked_greater(X.numpy(), 1), Y)),
        "the input: a MaskedArray that is",
        "masked",
        r"\.filled\(value\)",
    ),
    "masked targets": (
        bring(NET, CE, (X, np.ma.masked_greater(Y.numpy(), 1))),
        "the targets: a MaskedArray that is",
        "masked",
        r"\.filled\(value\)",
    ),
    "a masked query": (
        lambda client, session: session.influence((
            np.ma.masked_greater(X.numpy(), 1),
            Y,
        )),
        "0 of the data points is",
        "masked",
        r"\.filled\(value\)",
    ),
    "a sparse update": (
        given(lambda: {"0.weight": NET[0].weight.detach().to_sparse()}),
        "tensor '0.weight' is",
        "sparse",
        r"\.to_dense\(\)",
    ),
    "a masked update": (
        given(
            lambda: {"2.bias": np.ma.masked_array(np.ones(3, np.float32), [1, 0, 0])}
        ),
        "tensor '2.bias' is",
        "masked",
        r"\.filled\(value\)",
    ),
    "an update without values": (
        given(dict),
        "no values",
        "at least one parameter",
        "a filter left none",
    ),
    "single data points from a loader": (
        bring(NET, CE, DataLoader(TensorDataset(X, Y), batch_size=None)),
        r"inputs \[8\], targets \[\]",
        "one leading axis B",
        "give the DataLoader a batch_size",
    ),
    "single data points whose targets are vectors": (
        bring(
            NET, nn.MSELoss(), DataLoader(TensorDataset(X, NUMBERS), batch_size=None)
        ),
        r"inputs \[8\], targets \[3\]",
        "one leading axis B",
        "give the DataLoader a batch_size",
    ),
    "single data points in a list": (
        bring(NET, CE, [(X[0], 0), (X[1], 1), (X[2], 0)]),
        r"inputs \[8\], targets 0",
        "one leading axis B",
        "or stack them",
    ),
    "a loader of nothing": (
        bring(NET, CE, DataLoader(TensorDataset(X[:0], Y[:0]))),
        "this DataLoader is empty",
        "no data points",
        "a filter or a slice",
    ),
    "a loader that drops all": (
        bring(NET, CE, DataLoader(TensorDataset(X, Y), batch_size=999, drop_last=True)),
        "this DataLoader is empty",
        "a mini-batch of 999",
        "drop_last=False",
    ),
    "mini-batches with different inputs": (
        bring(NET, CE, [({"input": X}, Y), ({"x": X}, Y)]),
        "the first has 'input', number 1 'x'",
        "different inputs",
        "give all the same",
    ),
    "a loss with branches": (
        bring(NET, branching, (X, NUMBERS)),
        r"^the loss \(test_misleading_errors\.py:\d+ in branching\)",
        "decides by the values",
        r"use torch\.where",
    ),
    "a loss class": (
        bring(NET, nn.CrossEntropyLoss, (X, Y)),
        "the class CrossEntropyLoss",
        "an instance",
        r"CrossEntropyLoss\(\)",
    ),
    "a loss that is none": (
        bring(NET, 3.0, (X, Y)),
        "got float",
        "a function of outputs and targets",
        r"nn\.CrossEntropyLoss\(\)",
    ),
    "a loss of torch in create_session": (
        lambda client, session: client.create_session("m", "d", loss=CE),
        "got CrossEntropyLoss",
        "by name, as a dict or as a LossSpec",
        "session_for.*export_loss",
    ),
    "a function as module": (
        bring(lambda x: x @ x.T, CE, (X, Y)),
        "got the function <lambda>",
        r"an nn\.Module",
        r"class Model\(nn\.Module\)",
    ),
    "a method as module": (
        lambda client, session: curvd.export(NET.forward, X),
        "the method forward of a Sequential",
        r"an nn\.Module",
        "the module itself",
    ),
    "a class as module": (
        bring(nn.Linear, CE, (X, Y)),
        "the class Linear",
        "an instance",
        r"Linear\(…\)",
    ),
    "a state as module": (
        bring(NET.state_dict(), CE, (X, Y)),
        "OrderedDict",
        r"an nn\.Module",
        "that it is loaded into",
    ),
    "a module as model": (
        lambda client, session: client.register_model(NET),
        "got a Sequential",
        r"what curvd\.export returns",
        r"curvd\.export\(module, inputs\)",
    ),
    "two names of one parameter as an update": (
        given(lambda: {"_orig_mod.0.bias": Y, "0.bias": Y}),
        "'_orig_mod.0.bias' and '0.bias'",
        "both are parameter '0.bias'",
        "give one of them",
    ),
    "a generator as an update": (
        given(lambda: NET.named_parameters()),
        "the generator _?named",
        "arrays by name",
        r"dict\(module\.named_parameters\(\)\)",
    ),
    "a list as an update": (
        given(lambda: list(NET.parameters())),
        "got a list",
        "arrays by name",
        r"\{name: value\}",
    ),
    "blocks in elements, one for a tensor": (
        blocks([32, 4, 12, 3]),
        "sum to 51",
        r"4 parameters \(tensors\)",
        r"block_sizes=\[1, 1, 1, 1\]",
    ),
    "blocks in elements, one for a layer": (
        blocks([36, 15]),
        "sum to 51",
        r"4 parameters \(tensors\)",
        r"block_sizes=\[2, 2\]",
    ),
    "blocks that fit nothing": (
        blocks([3]),
        "sum to 3",
        r"4 parameters \(tensors\)",
        r"block_sizes=\[1\] \* 4",
    ),
    "a name of an output that is one tensor": (
        bring(NET, CE, (X, Y), output="logits"),
        "no output 'logits'",
        "it is one tensor",
        "leave output= out",
    ),
    "a name of an output that is not there": (
        bring(Named(), CE, (X, Y), output="logits"),
        "result of type dict has no output 'logits'",
        "it has 'scores', 'hidden'",
        "as output=",
    ),
}


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


@pytest.fixture(scope="module")
def session(client):
    with client.session_for(NET, CE, (X, Y), batch_size=10) as session:
        yield session


@pytest.mark.parametrize(
    ("call", "got", "needed", "remedy"), MISTAKES.values(), ids=MISTAKES
)
def test_a_mistake_is_told_what_was_given_what_is_needed_and_how_to_get_it(
    client, session, call, got, needed, remedy
):
    with pytest.raises(curvd.InvalidArgument) as caught:
        call(client, session)
    for part in (got, needed, remedy):
        assert re.search(part, str(caught.value)), part


def test_the_same_calls_without_the_mistake_are_answered(client, session):
    named = client.session_for(
        Named(), CE, (X, Y), batch_size=10, output="scores", check=False
    )
    assert (named.hessian() @ np.ones(51, np.float32)).shape == (51,)
    assert session.hessian(block_sizes=[2, 2]).shape == (51, 51)
    assert session.update_parameters(NET.state_dict()) == 2


def test_hints_name_install_commands_that_the_readme_shows():
    shown = {
        extra.strip()
        for found in re.findall(
            r"(?:-c constraints\.txt )?'\.\[([a-z,]+)\]'",
            (ROOT / "README.md").read_text(),
        )
        for extra in found.split(",")
    }
    assert curvd.errors.install("torch").startswith(
        "pip install -c constraints.txt '.[torch]'"
    )
    sources = [*ROOT.glob("client/**/*.py"), *ROOT.glob("server/**/*.py")]
    hints = [
        hint
        for path in sources
        for hint in re.findall(
            r"'\.\[(\w+)\]'|extra=\"(\w+)\"",
            path.read_text(),
        )
    ]
    extras = {extra for hint in hints for extra in hint if extra}
    assert {"torch", "plot", "progress", "scipy"} <= extras
    assert extras <= shown
    assert not [p for p in sources if "pip install 'curvd[" in p.read_text()]
