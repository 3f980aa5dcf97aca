"""A graph is given again to a module that does the same, and to no other.

The truth is the eager module, far from where a proof looks; proofs are off in what compares
graphs, so that nothing else could find a wrong one.
"""

import functools
import os
import types

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd.errors import CurvdError, GradientMismatch  # noqa: E402
from curvd.exported import prepare  # noqa: E402
from curvd.graph import capture, forms, kept  # noqa: E402
from curvd.graph.evaluate import evaluate  # noqa: E402
from curvd.graph.manifest import inputs_of  # noqa: E402
from curvd.graph.structure import structure  # noqa: E402

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
FAR = 1000 * X
SCALE = 2.0
TABLE = {"scale": 2.0, "list": [3.0]}


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """Forget graphs, and count traces."""
    kept.KEPT.clear()
    counted = []
    original = capture.traced

    def traced(*args, **options):
        counted.append(1)
        return original(*args, **options)

    monkeypatch.setattr(capture, "traced", traced)
    yield counted
    kept.KEPT.clear()


class Net(nn.Module):
    """Two layers, and what a test does between them."""

    def __init__(self, between=None, **held):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.between = between
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        h = self.a(x)
        if self.between is not None:
            h = self.between(self, h)
        return self.b(h)


def exported(module):
    return curvd.export(module, X, check=False)


def run(model, inputs):
    tensors = [model.state[t.names[0]] for t in model.graph.tensors]
    return evaluate(model.graph, (inputs,), tensors)[0]


def assert_is(model, module, inputs=FAR):
    torch.testing.assert_close(run(model, inputs), module(inputs))


def test_an_equal_module_is_not_traced_again_and_has_its_own_tensors(afresh):
    first, second = Net(clamped, limit=5000.0), Net(clamped, limit=5000.0)
    exported(first)
    model = exported(second)
    assert len(afresh) == 1
    assert_is(model, second)
    assert model.state["a.weight"].data_ptr() == second.a.weight.data_ptr()
    kept.KEPT.clear()
    assert exported(second).graph == model.graph
    assert len(afresh) == 2


def test_a_caller_cannot_spoil_what_is_kept(afresh):
    net = Net(lambda net, h: h * torch.tensor([1.0, 2.0, 3.0, 4.0]))
    model = exported(net)
    model.graph.nodes.pop()
    for name, tensor in model.state.items():
        if name.startswith("_constants"):
            tensor.zero_()
    again = exported(net)
    assert len(afresh) == 1
    again.state[next(n for n in again.state if n.startswith("_constants"))].zero_()
    assert_is(exported(net), net)


def test_the_proof_is_made_of_a_kept_graph_too(afresh):
    curvd.export(Net(), X)
    other = Net()
    other.a.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(GradientMismatch, match="a hook on the parameter"):
        curvd.export(other, X)
    assert len(afresh) == 1


def test_a_loss_is_kept_like_a_module(afresh):
    def loss(factor):
        return lambda z, y: factor * ((z - y) ** 4).sum(1).mean()

    z, y = torch.randn(6, 3), torch.randn(6, 3)
    one, same, other = (curvd.export_loss(loss(f), z, y) for f in (2.0, 2.0, 3.0))
    assert len(afresh) == 2
    assert one == same
    assert one != other


def clamped(net, h):
    return h.clamp(max=net.limit)


def by_global(net, h):
    return h.clamp(max=1000 * SCALE)


def by_table(net, h):
    return h.clamp(max=1000 * TABLE["scale"] * TABLE["list"][0])


def by_environment(net, h):
    return h.clamp(max=float(os.environ.get("FLOOR_OF_TEST", "1000")))


def by_default(net, h, limit=1000.0):
    return h.clamp(max=limit)


def enclosed(limit):
    return lambda net, h: h.clamp(max=limit)


def closed(cell):
    return lambda net, h: h.clamp(max=cell[0])


def tied(together):
    net = Net(lambda net, h: net.c(h))
    net.c = nn.Linear(4, 4)
    if together:
        net.c.weight = net.a.weight
    return net


def ordered(first, second):
    net = Net()
    del net.a, net.b
    for name in (first, second):
        setattr(net, name, nn.Linear(4, 4))
    return net


def with_buffer(value, persistent=True):
    net = Net(lambda net, h: h.clamp(max=net.top))
    net.register_buffer("top", torch.tensor(value), persistent=persistent)
    return net


def frozen(net):
    net.a.weight.requires_grad_(False)
    return net


def hooked(factor):
    net = Net()
    net.a.register_forward_hook(lambda layer, args, out: out.clamp(max=factor))
    return net


def patched(net, limit):
    def forward(self, x):
        return self.b(self.a(x).clamp(max=limit))

    net.forward = types.MethodType(forward, net)
    return net


def in_batches(limit):
    return lambda net, h: h.clamp(max=100.0) if len(h) > limit else h


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Net(clamped, limit=5000.0), Net(clamped, limit=100.0)),
        (Net(enclosed(5000.0)), Net(enclosed(100.0))),
        (Net(closed([5000.0])), Net(closed([100.0]))),
        (Net(nn.Hardtanh(-9e3, 9e3).forward and clamped, limit=9e3), Net()),
        (Net(), patched(Net(), 100.0)),
        (patched(Net(), 5000.0), patched(Net(), 100.0)),
        (hooked(5000.0), hooked(100.0)),
        (Net(), hooked(100.0)),
        (
            Net(lambda net, h: h * net.by, by=torch.full((4,), 2.0)),
            Net(lambda net, h: h * net.by, by=torch.full((4,), 3.0)),
        ),
        (with_buffer(5000.0), with_buffer(100.0)),
        (with_buffer(5000.0, persistent=False), with_buffer(100.0, persistent=False)),
        (tied(True), tied(False)),
        (tied(False), tied(True)),
        (ordered("a", "b"), ordered("b", "a")),
        (Net(lambda net, h: h), Net(lambda net, h: h.relu())),
        (Net(lambda net, h: h.double().float()), Net(lambda net, h: h.half().float())),
        (Net(lambda net, h: F.softplus(h, 1, 9)), Net(lambda net, h: F.softplus(h, 1, 3))),
        (Net(lambda net, h: h + h.flip(1)), Net(lambda net, h: h + h.flip(0))),
        (Net(lambda net, h: h[:, :2].repeat(1, 2)), Net(lambda net, h: h[:, 2:].repeat(1, 2))),
    ],
)  # fmt: skip
def test_a_module_that_does_something_else_gets_another_graph(first, second):
    for module in (first, second, first):
        assert_is(exported(module), module)


@pytest.mark.parametrize(
    ("between", "change"),
    [
        (by_global, lambda patch: patch.setitem(globals(), "SCALE", 0.01)),
        (by_table, lambda patch: patch.setitem(TABLE, "scale", 0.01)),
        (by_table, lambda patch: patch.setitem(TABLE, "list", [0.01])),
        (by_environment, lambda patch: patch.setenv("FLOOR_OF_TEST", "10")),
        (by_default, lambda patch: patch.setattr(by_default, "__defaults__", (10.0,))),
        (clamped, lambda patch: patch.setattr(Net, "forward", lambda self, x: self.b(x))),
        (clamped, lambda patch: patch.setattr(clamped, "__code__", by_table.__code__)),
        (
            lambda net, h: F.relu(h),
            lambda patch: patch.setattr(F, "relu", lambda h: h.clamp(0, 10)),
        ),
        (clamped, lambda patch: patch.setattr(nn.Linear, "forward", lambda m, x: x @ m.weight.T)),
        (
            lambda net, h: torch.arange(4.0) * 1e-3 * h,
            lambda patch: patch.setattr(torch, "arange", lambda n: torch.ones(int(n))),
        ),
    ],
)  # fmt: skip
def test_what_code_reads_from_elsewhere_is_seen(between, change):
    net = Net(between, limit=1e5)
    assert_is(exported(net), net)
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        assert_is(exported(net), net)
    assert_is(exported(net), net)


def test_an_attribute_that_changes_between_two_sessions_is_seen():
    net = Net(clamped, limit=5000.0)
    exported(net)
    net.limit = 100.0
    assert_is(exported(net), net)


def test_which_parameters_train_is_seen():
    free, held = exported(Net()), exported(frozen(Net()))
    assert free.parameters == ("a.weight", "a.bias", "b.weight", "b.bias")
    assert held.parameters == ("a.bias", "b.weight", "b.bias")


def test_regions_without_gradients_are_seen():
    def cut(net, h):
        with torch.no_grad():
            return h * 2

    free, cut_off = Net(lambda net, h: h * 2), Net(cut)
    curvd.export(free, X)
    assert "aten.detach.default" in [
        n.operator for n in curvd.export(cut_off, X).graph.nodes
    ]
    assert keys(free, cut_off, Net(lambda net, h: h.detach() * 2)) == 3


def test_types_by_default_and_by_autocast_are_seen():
    def cast(net, h):
        with torch.autocast("cpu", torch.bfloat16):
            return (h @ h.new_ones(4, 4)).float()

    assert keys(Net(lambda net, h: (h @ h.new_ones(4, 4)).float()), Net(cast)) == 2
    net = Net(lambda net, h: h + torch.zeros(4))
    before = structure(net_of(net), rows())
    torch.set_default_dtype(torch.float64)
    try:
        assert structure(net_of(net), rows()) != before
    finally:
        torch.set_default_dtype(torch.float32)


def test_chance_is_seen(afresh):
    net = Net(lambda net, h: F.dropout(h, 0.5, net.training))
    exported(net.eval())
    with pytest.raises(CurvdError, match="random"):
        exported(net.train())


@pytest.mark.parametrize(
    "between",
    [
        in_batches(5),
        lambda net, h: h * (1.0 if float(h.sum()) > -1e9 else 2.0),
        lambda net, h: h * (1.0 if max(h.flatten().tolist()) < 1e9 else 2.0),
        lambda net, h: h * float(h.detach().numpy().max() < 1e9),
        lambda net, h: torch.stack([row for row in h]),
    ],
)
def test_what_cannot_be_traced_is_refused_though_a_like_module_was_traced(between):
    exported(Net(lambda net, h: h))
    with pytest.raises(CurvdError):
        exported(Net(between))


def test_what_differs_at_one_batch_size_only_the_proof_of_a_session_finds(afresh):
    """No run at other sizes can tell; the session's own are compared by numbers."""
    other = Net(lambda net, h: 2 * h if len(h) == 5 else h)
    opened = functools.partial(
        prepare, loss="mse", data=(X, X[:, :3]), output=None, mode=None, check=True
    )
    opened(Net(lambda net, h: h), batch_size=5)
    opened(other, batch_size=6)
    with pytest.raises(GradientMismatch, match="with 5 data points"):
        opened(other, batch_size=5)
    assert len(afresh) == 1


def test_a_module_that_remembers_its_calls_is_traced_each_time(afresh):
    def counting(net, h):
        net.calls += 1
        return h * net.calls

    def listing(net, h):
        net.seen.append(len(net.seen))
        return h * 2

    for net in (Net(counting, calls=0), Net(listing, seen=[])):
        assert structure(net_of(net), rows()) is None
        assert vars(net)["calls" if hasattr(net, "calls") else "seen"] in (0, [])


def test_what_a_module_did_between_two_other_runs_is_not_kept(afresh):
    def after(count):
        seen = [0]

        def between(net, h):
            seen[0] += 1
            return h.clamp(max=5000.0 if seen[0] <= count else 100.0)

        return between

    exported(Net(after(2)))  # two runs, and then a trace
    net = Net(lambda net, h: h.clamp(max=5000.0))
    assert_is(exported(net), net)
    assert len(afresh) == 2


def test_hidden_parameters_and_modes_of_torch_make_nobody_sure():
    hidden = [nn.Parameter(torch.ones(4))]
    assert structure(net_of(Net(lambda net, h: h * hidden[0])), rows()) is None
    view = Net()
    view.part = view.a.weight.detach()[0]
    view.between = lambda net, h: h * net.part
    assert structure(net_of(view), rows()) is None
    with torch.device("cpu"):
        assert structure(net_of(Net()), rows()) is None
    assert structure(net_of(Net()), rows()) is not None


def test_a_module_is_left_as_it_was():
    net = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 3, batch_first=True)
    ).train()
    net.register_forward_pre_hook(lambda m, args: None)
    net.forward = types.MethodType(
        lambda self, x: self[2](self[1](self[0](x))[:, None])[0], net
    )
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    identities = [id(t) for t in (*net.parameters(), *net.buffers())]
    assert structure(net_of(net), rows()) is not None
    assert [id(t) for t in (*net.parameters(), *net.buffers())] == identities
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert net(X).device.type == "cpu"


def test_what_is_kept_is_bounded_by_number_and_bytes():
    net, graphs = Net(), kept.Graphs(most=2, most_bytes=10_000)
    model = exported(net)
    found = [kept.Key((bytes([k]),), ()) for k in range(3)]
    for key in found:
        graphs.keep(key, model.graph, model.state)
    assert graphs.find(found[0], net) is None
    assert graphs.find(found[2], net) is not None
    large = {"_constants.c": torch.zeros(2500)}
    graphs.keep(found[0], model.graph, large)
    assert graphs.find(found[0], net) is None
    assert graphs.nbytes == 0


def net_of(net):
    return capture.Chosen(net, None)


def rows():
    from curvd.graph.examples import few
    from curvd.graph.manifest import inputs_of

    return inputs_of(lambda x: None, few(X))


def keys(*nets):
    found = [structure(net_of(net), rows()) for net in nets]
    assert None not in found
    return len(set(found))


def layers():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
    return {
        "encoder": (encoder.eval(), torch.randn(3, 5, 8)),
        "lstm": (nn.LSTM(4, 3, batch_first=True), torch.randn(3, 5, 4)),
        "conv": (
            nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.MaxPool1d(2)).eval(),
            torch.randn(3, 2, 9),
        ),
        "numbers": (Net(lambda net, h: h + torch.arange(4) * 2 + h.new_ones(4)), X[:3]),
        "spectrum": (Net(lambda net, h: torch.fft.rfft(h).abs()[:, :1] + h), X[:3]),
        "views": (Net(lambda net, h: h.t().reshape(-1, 4).unfold(1, 2, 2).sum(2) @ h.new_ones(2, 4)), X[:3]),  # noqa: E501
        "in place": (Net(lambda net, h: h.mul(2).add_(1).relu_()), X[:3]),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(layers()))
def test_forms_that_are_remembered_are_those_that_torch_computes(name, monkeypatch):
    module, inputs = layers()[name]
    wrapper, rows = capture.Chosen(module, None), inputs_of(module.forward, inputs)
    with monkeypatch.context() as none:
        none.setattr("curvd.graph.structure.recalled", lambda key: None)
        want = structure(wrapper, rows)
    assert want is not None
    forms._forms.clear()
    missed = []

    def remember(key, result, taken):
        missed.append(str(key[0]))
        forms.remember(key, result, taken)

    monkeypatch.setattr("curvd.graph.structure.remember", remember)
    assert structure(wrapper, rows) == want
    assert forms._forms and missed
    missed.clear()
    assert structure(wrapper, rows) == want
    # Their schemas say that they return tensors of their own, and they return views.
    assert set(missed) <= {"aten._unsafe_view.default", "aten.unsafe_split.Tensor"}


def test_no_form_is_remembered_of_what_shares_memory():
    x = torch.empty(3, 4, device="meta")
    aten = torch.ops.aten
    for func, given in (
        (aten.t.default, [x]),
        (aten.add_.Tensor, [x, x]),
        (aten.split.Tensor, [x, 2]),
        (aten.add.out, [x, x, x]),
    ):
        assert forms.key_of(func, given) is None, func
    key = forms.key_of(aten.add.Tensor, [x, 1])
    assert key is not None
    forms.remember(key, x, {x.untyped_storage()._cdata})
    assert forms.recalled(key) is None
    others = [
        forms.key_of(aten.add.Tensor, [x, other])
        for other in (True, 1.0, x, x[:, :1], x.t().contiguous().t(), x.double())
    ]
    assert len({key, *others}) == 7


def test_forms_are_forgotten_when_they_are_many(monkeypatch):
    monkeypatch.setattr(forms, "KEPT", 3)
    forms._forms.clear()
    x = torch.empty(3, device="meta")
    for number in range(5):
        key = forms.key_of(torch.ops.aten.add.Tensor, [x, number])
        forms.remember(key, torch.empty(3, device="meta"), set())
        assert forms.recalled(key).shape == (3,)
    assert len(forms._forms) == 2
