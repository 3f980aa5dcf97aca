"""Data as people hold it is the same dataset, and the same curvature, as its tensors."""

import collections

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset  # noqa: E402

import curvd  # noqa: E402
from curvd.exported import prepare  # noqa: E402
from curvd.graph.data import opened  # noqa: E402

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
X, Y = torch.randn(10, 4), torch.randint(0, 3, (10,))
CE = nn.CrossEntropyLoss()


class Two(nn.Module):
    """Takes two inputs by name."""

    def __init__(self):
        super().__init__()
        self.net = NET

    def forward(self, a, b):
        return self.net(a + b)


class Rows(Dataset):
    """A data set with items of its own making."""

    def __len__(self):
        return len(X)

    def __getitem__(self, n):
        return X[n].numpy(), int(Y[n])


class Table:
    """What other libraries hold their columns in."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


class Batch(collections.UserDict):
    """What a tokenizer returns: no dict, but a mapping."""


def strided(tensor):
    return np.repeat(tensor.numpy(), 2, axis=0)[::2][::-1][::-1]


def sealed(tensor):
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


HELD = {
    "tensors": (X, Y),
    "a list of two": [X, Y],
    "NumPy": (X.numpy(), Y.numpy()),
    "NumPy in float64": (X.numpy().astype(np.float64), Y.numpy()),
    "mixed": (X, Y.numpy()),
    "short integers": (X, Y.numpy().astype(np.int16)),
    "unsigned integers": (X, Y.numpy().astype(np.uint32)),
    "another byte order": (X.numpy().astype(">f4"), Y.numpy().astype(">i8")),
    "strided memory": (strided(X), strided(Y)),
    "memory that is read only": (sealed(X), sealed(Y)),
    "lists of numbers": (X.tolist(), Y.tolist()),
    "another library's arrays": (Table(X.numpy()), Table(Y.numpy())),
    "an argument in a tuple": ((X,), Y),
    "a mapping by name": ({"input": X}, Y),
    "a mapping with labels": {"input": X, "labels": Y},
    "a tokenizer's batch": Batch(input=X.numpy(), labels=Y.tolist()),
    "a tokenizer's batch and targets": (Batch(input=X), Y),
    "TensorDataset": TensorDataset(X, Y),
    "a Dataset": Rows(),
    "a part of a Dataset": Subset(TensorDataset(X, Y), range(10)),
    "DataLoader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "DataLoader of rows": DataLoader(Rows(), batch_size=4),
    "a list of mini-batches": [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])],
    "two mini-batches": [(X[:6], Y[:6]), [X[6:], Y[6:].numpy()]],
    "mini-batches with labels": [
        {"input": X[:6], "labels": Y[:6]},
        Batch(input=X[6:], labels=Y[6:]),
    ],
    "a generator of mini-batches": "made anew",
}


def held(name):
    data = HELD[name]
    return (
        ((X[n : n + 4], Y[n : n + 4]) for n in (0, 4, 8))
        if data == "made anew"
        else data
    )


@pytest.mark.parametrize("name", HELD)
def test_data_is_read_as_its_tensors(name):
    data = opened(held(name), NET)
    given = data.inputs
    if isinstance(given, dict | tuple):
        (given,) = given.values() if isinstance(given, dict) else given
    assert given.dtype is torch.float32
    assert data.targets.dtype is torch.int64
    assert torch.equal(given, X)
    assert torch.equal(data.targets, Y)
    several = "batch" in name.split(" of ")[-1] or name.startswith("DataLoader")
    assert (data.batch_size is not None) is (several and "tokenizer" not in name)


@pytest.mark.parametrize(
    "name",
    [
        "NumPy in float64",
        "a tokenizer's batch",
        "DataLoader",
        "a generator of mini-batches",
    ],
)
def test_a_session_of_it_has_the_curvature_of_its_tensors(live_target, name):
    size = {} if "batches" in name or name == "DataLoader" else {"batch_size": 4}
    with curvd.connect(live_target) as client:
        plain = client.session_for(NET, CE, (X, Y), batch_size=4)
        session = client.session_for(NET, CE, held(name), **size)
        assert session.info.batches == 3
        v = torch.randn(plain.layout.size, generator=torch.Generator().manual_seed(1))
        loss = CE(NET(X), Y)
        gradient = torch.autograd.grad(loss, NET.parameters(), create_graph=True)
        along = sum((g * p).sum() for g, p in zip(gradient, parts(v), strict=True))
        truth = torch.autograd.grad(along, NET.parameters())
        want = torch.cat([t.reshape(-1) for t in truth])
        for found in (plain.hessian() @ v, session.hessian() @ v):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
        if "tokenizer" not in name:  # whose inputs have a name of their own
            assert session.info.dataset_id == plain.info.dataset_id


def parts(vector):
    sizes = [p.numel() for p in NET.parameters()]
    pairs = zip(torch.split(vector, sizes), NET.parameters(), strict=True)
    return [piece.reshape(p.shape) for piece, p in pairs]


def test_several_inputs_stay_apart():
    a, b = X, torch.randn(10, 4)
    loader = DataLoader(TensorDataset(a, b, Y), batch_size=4)
    for data in (((a, b), Y), TensorDataset(a, b, Y), loader):
        found = opened(data, Two())
        assert torch.equal(found.inputs[0], a)
        assert torch.equal(found.inputs[1], b)
    by_name = prepare(
        Two(), CE, {"a": a, "b": b, "labels": Y}, None, None, batch_size=4, check=False
    )
    assert {*by_name.data} == {"a", "b", "target"}


def test_mini_batches_of_mappings_are_matched_by_name():
    halves = [
        ({"a": X[:6], "b": 2 * X[:6]}, Y[:6]),
        ({"b": 2 * X[6:], "a": X[6:]}, Y[6:]),
    ]
    data = opened(halves, Two())
    assert list(data.inputs) == ["a", "b"]
    assert torch.equal(data.inputs["a"], X) and torch.equal(data.inputs["b"], 2 * X)
    labelled = [
        {"a": X[:6], "b": 2 * X[:6], "labels": Y[:6]},
        {"labels": Y[6:], "b": 2 * X[6:], "a": X[6:]},
    ]
    again = opened(labelled, Two())
    assert torch.equal(again.inputs["b"], 2 * X) and torch.equal(again.targets, Y)


def test_mini_batches_of_different_lengths_are_refused():
    padded = [(torch.ones(2, 7), Y[:2]), (torch.ones(2, 9), Y[2:4])]
    with pytest.raises(curvd.InvalidSpec, match=r"\[B, 7\] and \[B, 9\].*max_length"):
        opened(padded, NET)


def test_an_export_takes_arrays_too():
    ours = curvd.export(NET, X.numpy().astype(np.float64))
    assert ours.graph == curvd.export(NET, X).graph


@pytest.mark.parametrize("name", ["TensorDataset", "DataLoader", "two mini-batches"])
def test_a_dataset_is_registered_by_its_order(live_target, name):
    with curvd.connect(live_target) as client:
        named = client.register_dataset(
            {"x": X, "y": Y}, inputs="x", target="y", batch_size=4
        )
        found = client.register_dataset(
            held(name), inputs="x", target="y", batch_size=4
        )
        assert found.id == named.id
        with pytest.raises(curvd.InvalidSpec, match=r"1 inputs .* names 2: x, z"):
            client.register_dataset(
                held(name), inputs=["x", "z"], target="y", batch_size=4
            )


def test_a_batch_of_a_real_tokenizer(live_target):
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))
    lists = {"input": tokens.tolist(), "labels": Y[:6].tolist()}
    net = nn.Sequential(nn.Embedding(11, 2), nn.Flatten(), nn.Linear(10, 3))
    with curvd.connect(live_target) as client:
        session, plain = (
            client.session_for(net, CE, data, batch_size=3)
            for data in (transformers.BatchEncoding(lists), (tokens, Y[:6]))
        )
        assert session.info.dataset_id == plain.info.dataset_id
