"""A graph that runs with given values is a module whose tensors are exchanged for them."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

import curvd  # noqa: E402
from curvd_server.graph.decoder import canonical, decode  # noqa: E402
from curvd_server.graph.execution import GraphModule, Interpreter  # noqa: E402


class Tied(nn.Module):
    """One weight under two names, the second of which comes first in the tree of modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Module(), nn.Module()
        self.a.bias = nn.Parameter(torch.randn(4))
        self.b.weight = nn.Parameter(torch.randn(4, 4))
        self.b.register_buffer("scale", torch.tensor(3.0))
        self.a.weight = self.b.weight

    def forward(self, x):
        return self.b.scale * (x @ self.b.weight + self.a.bias).tanh() @ self.a.weight


@pytest.mark.parametrize("alias", ["a.weight", "b.weight"])
def test_values_come_under_any_of_a_tensors_names(alias):
    module, x = Tied().eval(), torch.randn(5, 4)
    exported = curvd.export(module, x, check=False)
    graph = GraphModule(Interpreter(decode(canonical(exported.graph))))
    state = {
        alias: torch.randn(4, 4, requires_grad=True),
        "a.bias": torch.randn(4, requires_grad=True),
        "b.scale": torch.tensor(2.0),
    }
    got = graph.at(state, (x,), {})
    assert torch.equal(got, functional_call(graph, state, (x,)))
    torch.testing.assert_close(got, functional_call(module, state, (x,)))
    leaves = [state[alias], state["a.bias"]]
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(functional_call(module, state, (x,)).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert all(p.is_meta for p in graph.parameters())


def test_tensors_without_a_value_are_the_modules_own():
    module, x = Tied().eval(), torch.randn(5, 4)
    exported = curvd.export(module, x, check=False)
    graph = GraphModule(Interpreter(decode(canonical(exported.graph))))
    assert graph.at({}, (x.to("meta"),), {}).is_meta


def test_a_copy_has_the_names_and_ties_of_a_deep_copy_and_its_own_free_parameters():
    exported = curvd.export(Tied().eval(), torch.randn(5, 4), check=False)
    graph = GraphModule(Interpreter(decode(canonical(exported.graph))))
    graph.use_batch_statistics()
    copied, deep = graph.copied({"a.bias"}), copy.deepcopy(graph)
    for listed in (nn.Module.named_parameters, nn.Module.named_buffers):
        for duplicates in (True, False):
            names = [
                [name for name, _ in listed(m, remove_duplicate=duplicates)]
                for m in (copied, deep, graph)
            ]
            assert names[0] == names[1] == names[2]
    assert repr(copied) == repr(deep)
    assert copied.a.weight is copied.b.weight is not graph.b.weight
    assert [p.requires_grad for p in copied.parameters()] == [
        name == "a.bias" for name, _ in graph.named_parameters()
    ]
    assert all(p.requires_grad for p in graph.parameters())
    state = {name: torch.randn(t.shape) for name, t in graph.state_dict().items()}
    x = torch.randn(5, 4)
    assert torch.equal(copied.at(state, (x,), {}), deep.at(state, (x,), {}))


class Turned(nn.Module):
    """Complex numbers, from a constant and from the data."""

    def forward(self, x):
        turn = torch.tensor([1, 1j, -2, 3j, 0.5], dtype=torch.complex128)
        return (torch.view_as_complex(x) * turn).abs()


@pytest.mark.parametrize("offset", [0, 8, 16, 24])
def test_complex_numbers_of_a_file_lie_anywhere(offset):
    x = torch.randn(7, 5, 2, dtype=torch.float64)
    exported = curvd.export(Turned(), x, check=False)
    graph = GraphModule(Interpreter(decode(canonical(exported.graph))))

    def moved(tensor):
        raw = np.zeros(tensor.nbytes + 128, np.uint8)
        start = -raw.ctypes.data % 64 + offset
        place = raw[start : start + tensor.nbytes].view(np.float64)
        place[:] = tensor.flatten().numpy()
        return torch.from_numpy(place.reshape(tensor.shape))

    state = {name: moved(t.double()) for name, t in exported.state.items()}
    got = functional_call(graph, state, (moved(x),))
    torch.testing.assert_close(got, Turned()(x), rtol=1e-14, atol=0)
