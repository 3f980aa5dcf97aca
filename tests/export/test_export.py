"""What cannot be exported is refused: operator, line of the user's module, remedy."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402


class Model(nn.Module):
    """One layer, and whatever a test wants to do with it."""

    def __init__(self, body, **members):
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body
        for name, member in members.items():
            setattr(self, name, member)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        return self.body(self, self.layer(x), x)


def counted(model, y, x):
    model.seen.add_(1.0)
    return y


def cast(model, y, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.layer(y)


def branch(model, y, x):
    return y if y.sum() > 0 else -y


def nested(model, y, x):
    scratch = y.clone()
    with torch.no_grad():
        scratch.add_(1.0)
    return scratch + y


def overlapping(model, y, x):
    scratch = torch.zeros(x.shape[0], 4)
    flat = scratch.reshape(-1)
    flat.add_(1.0)
    return y + scratch + flat.sum()


def written_out(model, y, x):
    with torch.no_grad():
        torch.div(y, 2, out=x)
    return y


CASES = {
    "dropout": (lambda m, y, x: F.dropout(y), r"dropout.*module\.eval\(\)"),
    "random": (lambda m, y, x: y + torch.randn_like(y), r"randn_like.*random"),
    "noise": (lambda m, y, x: y * torch.bernoulli(x.abs()), r"bernoulli.*random"),
    "attention": (
        lambda m, y, x: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5),
        "dropout",
    ),
    "input": (
        lambda m, y, x: x.relu_() + y,
        r"relu_.*an input, a parameter or a buffer",
    ),
    "slice of an input": (lambda m, y, x: x[:, 0].add_(1.0).sum() + y, "writes to"),
    "parameter": (
        lambda m, y, x: y + m.layer.weight.detach().mul_(2).sum(),
        "writes to",
    ),
    "buffer": (counted, r"add_.*writes to"),
    "autocast": (cast, r"autocast.*the session has a dtype"),
    "branch": (branch, r"values of tensors.*torch\.where"),
    "number": (lambda m, y, x: y * y.sum().item(), "torch|item"),
    "numpy": (lambda m, y, x: y + y.detach().numpy().sum(), "numpy.*torch's operators"),
    "float": (lambda m, y, x: y * float(y.norm()), r"float\(\).*tensors instead"),
    "out": (written_out, r"div.*out=.*module\.eval\(\)"),
    "shape from values": (lambda m, y, x: y[y > 0].cumsum(0)[-1] + y, "a mask"),
    "batch size": (lambda m, y, x: y.reshape(3, 2, 2), r"batch size.*x\.shape\[0\]"),
    "cond": (
        lambda m, y, x: torch.cond(y.sum() > 0, lambda z: z * 2, lambda z: z, (y,)),
        r"cond.*torch\.where|cannot be traced|values",
    ),
    "memory": (lambda m, y, x: y.as_strided((2, 2), (1, 1)).sum() + y, "slices"),
    "uninitialised": (lambda m, y, x: y + torch.empty_like(y), "uninitialised"),
    "eigenvalues": (
        lambda m, y, x: y @ torch.linalg.eig(m.layer.weight)[0].real.diag(),
        r"linalg_eig.*not one that servers run",
    ),
    "complex": (lambda m, y, x: torch.fft.fft(y), "complex.*view_as_real"),
    "outer memory": (nested, "writes to"),
    "perhaps a copy": (overlapping, "seen in another way"),
    "no tensor": (lambda m, y, x: None, "no tensor at output"),
}


@pytest.mark.parametrize(("body", "match"), CASES.values(), ids=CASES)
def test_a_refusal_says_what_to_do(body, match):
    kind = (curvd.InvalidGraph, curvd.InvalidSpec)
    with pytest.raises(kind, match=match):
        curvd.export(Model(body), torch.randn(5, 4))


@pytest.mark.parametrize(
    "name", ["random", "input", "autocast", "eigenvalues", "buffer"]
)
def test_a_refusal_names_the_line_of_the_users_module(name):
    body, _ = CASES[name]
    with pytest.raises(curvd.InvalidGraph) as refusal:
        curvd.export(Model(body), torch.randn(5, 4))
    line = Model.forward.__code__.co_firstlineno + 1
    assert refusal.value.metadata["source"] == f"test_export.py:{line} in forward"
    assert f"(test_export.py:{line} in forward)" in str(refusal.value)


def test_gradients_flow_where_they_did():
    """Through a region with gradients inside of one without, and nowhere else."""
    from curvd_server.graph.decoder import canonical, decode
    from curvd_server.graph.execution.interpret import Interpreter
    from curvd_server.graph.execution.module import GraphModule

    def body(model, y, x):
        with torch.no_grad():
            scale = y.abs().sum(1, keepdim=True)
            with torch.enable_grad():
                z = torch.tanh(model.layer(y))
            lost = z * scale
        return z * scale + lost

    module, x = Model(body).double(), torch.randn(5, 4, dtype=torch.float64)
    exported = curvd.export(module, x)
    run = GraphModule(Interpreter(decode(canonical(exported.graph))))
    state = {n: t.clone().requires_grad_() for n, t in exported.state.items()}
    got = torch.func.functional_call(run, state, (x,)).sum()
    want = module(x).sum()
    assert got.detach() == want.detach()
    (got,) = torch.autograd.grad(got, state["layer.weight"])
    (want,) = torch.autograd.grad(want, module.layer.weight)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)


def test_embeddings_that_scale_gradients_are_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4, scale_grad_by_freq=True)

        def forward(self, x):
            return self.table(x)

    with pytest.raises(curvd.InvalidGraph, match=r"scale_grad_by_freq.*leave it out"):
        curvd.export(Scaled(), torch.tensor([[0, 1], [1, 2], [3, 4]]))


def test_recurrent_dropout_is_refused_in_training_mode_only():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.cell(x)[0]

    curvd.export(Recurrent().eval(), torch.randn(3, 2, 4))
    with pytest.raises(curvd.InvalidGraph, match=r"random.*module\.eval\(\)"):
        curvd.export(Recurrent().train(), torch.randn(3, 2, 4))


def test_an_output_is_chosen_by_name_or_index():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            return {"loss": None, "small": self.a(x), "large": self.b(x)}

    module, x = Several(), torch.randn(5, 4)
    assert curvd.export(module, x).graph.nodes[0].source
    first, second = (curvd.export(module, x, output=o) for o in (None, "large"))
    assert len(first.graph.nodes) == len(second.graph.nodes) == 1
    assert first.graph != second.graph
    with pytest.raises(curvd.InvalidSpec, match="no output 'medium'"):
        curvd.export(module, x, output="medium")


def test_inputs_are_named_after_the_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, image, *, scale, on=True):
            return self.layer(image) * scale["by"]

    inputs = {"image": torch.randn(5, 4), "scale": {"by": torch.randn(5, 1)}}
    assert curvd.export(Two(), inputs).inputs == ("image", "by")
    exported = curvd.export(
        nn.Bilinear(4, 4, 2), (torch.randn(5, 4), torch.randn(5, 4))
    )
    assert exported.inputs == ("input1", "input2")


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ((torch.randn(5, 4), torch.randn(6, 4)), "one leading batch axis"),
        ((), "must be tensors"),
        (torch.tensor(1.0), "must be tensors"),
    ],
)
def test_inputs_need_a_common_batch_axis(inputs, match):
    with pytest.raises(curvd.InvalidSpec, match=match):
        curvd.export(nn.Bilinear(4, 4, 2), inputs)


def test_one_data_point_is_enough_for_an_example():
    assert curvd.export(nn.Linear(4, 3), torch.randn(1, 4)).graph.nodes


def test_exporting_changes_nothing():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    x = torch.randn(5, 4)
    fast = torch.backends.mha.get_fastpath_enabled()
    module[0].weight.grad = torch.ones(4, 4)
    chance = torch.get_rng_state()
    curvd.export(module, x, mode="batch_statistics")
    after = module.state_dict()
    assert torch.equal(module[0].weight.grad, torch.ones(4, 4))
    assert torch.equal(chance, torch.get_rng_state()) and module[1].training
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.is_grad_enabled()


def test_a_large_graph_is_refused(monkeypatch):
    from curvd.contract import graph_ops

    monkeypatch.setattr(graph_ops, "MAX_NODES", 3)
    with pytest.raises(curvd.LimitExceeded, match=r"5 operators.*the limits are 3"):
        curvd.export(nn.Sequential(*[nn.Tanh() for _ in range(5)]), torch.randn(5, 4))


def test_without_torch_exporting_says_what_to_install():
    code = (
        "import sys, importlib.util, curvd\n"
        "importlib.util.find_spec = lambda name: None\n"
        "try:\n    curvd.export(None, None)\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "exporting a module needs torch: "
        "pip install -c constraints.txt '.[torch]' in a checkout of curvd\nFalse\n"
    )
