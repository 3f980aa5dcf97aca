"""A caller's module is after an export what it was before: no cache of its code holds a trace."""

import contextlib
import functools
import threading
import types
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import curvd
from curvd.errors import CurvdError
from curvd.graph import unfilled
from curvd.graph.evaluate import evaluate
from curvd.graph.kept import KEPT

TABLES = {}
SEEN = []


@functools.lru_cache(None)
def table(width):
    return torch.arange(width, dtype=torch.float64) / width


@functools.lru_cache(None)
def row_table(rows):
    return torch.ones(rows, 1, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh():
    for forget in (TABLES.clear, SEEN.clear, table.cache_clear, row_table.cache_clear):
        forget()
    KEPT.clear()


class Net(nn.Module):
    """Two layers, and something that is added to the input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.held, self.by_rows, self.calls = None, {}, 0
        self.box = types.SimpleNamespace(table=None, tables=[{}])
        self.double()

    def extra(self, x):
        raise NotImplementedError

    def forward(self, x):
        return self.last(torch.tanh(self.first(x + self.extra(x))))


class ByLru(Net):
    def extra(self, x):
        return table(x.shape[1])


class ByGlobal(Net):
    def extra(self, x):
        if x.shape[1] not in TABLES:
            TABLES[x.shape[1]] = torch.arange(x.shape[1], dtype=x.dtype)
        return TABLES[x.shape[1]]


class ByAttribute(Net):
    def extra(self, x):
        if self.held is None:
            self.held = torch.arange(x.shape[1], dtype=x.dtype)
        return self.held


class ByObject(Net):
    def extra(self, x):
        if self.box.table is None:
            self.box.table = torch.arange(x.shape[1], dtype=x.dtype)
        return self.box.table


class ByBuffer(Net):
    def extra(self, x):
        if not hasattr(self, "late"):
            late = torch.arange(x.shape[1], dtype=x.dtype) / 3
            self.register_buffer("late", late, persistent=False)
        return self.late


class ByRows(Net):
    """Keeps something for each batch size."""

    def extra(self, x):
        if x.shape[0] not in self.by_rows:
            self.by_rows[x.shape[0]] = torch.ones(x.shape[0], 1, dtype=x.dtype)
        return self.by_rows[x.shape[0]]


class ByRowsInside(Net):
    def extra(self, x):
        kept = self.box.tables[0]
        if x.shape[0] not in kept:
            kept[x.shape[0]] = torch.ones(x.shape[0], 1, dtype=x.dtype)
        return kept[x.shape[0]]


class ByRowsGlobal(Net):
    def extra(self, x):
        if x.shape[0] not in TABLES:
            TABLES[x.shape[0]] = torch.ones(x.shape[0], 1, dtype=x.dtype)
        return TABLES[x.shape[0]]


class ByRowsLru(Net):
    def extra(self, x):
        return row_table(x.shape[0])


class Latest(Net):
    """Keeps what it saw, and counts."""

    def extra(self, x):
        self.calls, self.held = self.calls + 1, x
        SEEN.append(x.shape[0])
        return 0.5


FILLED = (ByLru, ByGlobal, ByAttribute, ByObject, ByBuffer, Latest)
BY_ROWS = (ByRows, ByRowsInside, ByRowsGlobal, ByRowsLru)


def all_tensors():
    """What the caches outside of modules hold."""
    yield from TABLES.values()
    yield table(4)
    for rows in range(1, 600):
        yield row_table(rows)
    yield row_table(10_007)


@pytest.mark.parametrize("kind", FILLED)
def test_what_a_first_call_keeps_has_values(kind):
    net, same, x = kind(), kind(), torch.randn(6, 4, dtype=torch.float64)
    model = curvd.export(net, (x,))
    expected = same(x)
    tensors = [model.state[t.names[0]] for t in model.graph.tensors]
    found = evaluate(model.graph, (x,), tensors)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", BY_ROWS)
def test_what_is_kept_for_a_batch_size_is_no_trace(kind):
    net, same = kind(), kind()
    x = torch.randn(6, 4, dtype=torch.float64)
    try:
        curvd.export(net, (x,))
    except CurvdError:
        pass  # refused; the module must work all the same
    sizes = (1, 2, 3, 5, 6, 7, 11, 509, 10_007)
    for size in sizes:
        rows = torch.randn(size, 4, dtype=torch.float64)
        assert type(net(rows)) is torch.Tensor
        torch.testing.assert_close(net(rows), same(rows), rtol=0, atol=0)
    assert not any(isinstance(t, FakeTensor) or t.is_meta for t in all_tensors())


def test_what_had_a_value_has_it_afterwards():
    net = Latest()
    x = torch.randn(6, 4, dtype=torch.float64)
    net(x)
    torch.manual_seed(3)
    following = torch.rand(2)
    torch.manual_seed(3)
    curvd.export(net, (x,))
    assert net.held is x
    assert torch.equal(torch.rand(2), following)


def test_a_call_moves_no_running_statistics():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    before = {n: b.clone() for n, b in net.named_buffers()}
    rows = torch.randn(6, 4)
    curvd.export(net, (rows,), mode="batch_statistics")
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


def test_containers_of_a_module_stay_the_same_objects():
    net = ByRowsInside()
    shared = net.by_rows, net.box, net.box.tables
    try:
        curvd.export(net, (torch.randn(6, 4, dtype=torch.float64),))
    except CurvdError:
        pass
    assert all(
        a is b
        for a, b in zip(shared, (net.by_rows, net.box, net.box.tables), strict=True)
    )


class Bound(nn.Module):
    """Keeps one of its own methods, so that its code reaches the module by another way."""

    def __init__(self, held):
        super().__init__()
        self.layer, self.held = nn.Linear(4, 2), held
        self.way = self.called

    def called(self, x):
        return self.layer(x)

    def forward(self, x):
        return self.way(x)


@pytest.mark.parametrize(
    "held",
    [
        {"a": {"n": 0}},
        [[1, 2], [3]],
        [{"lr": 0.1, "rows": [torch.ones(2)]}],
        (1, [2]),
        {"a": ([], {"b": ()})},
        OrderedDict(a=[1], b=defaultdict(list, c=[2])),
        deque([[1]]),
        {"a": torch.ones(2), "b": [0.1, float("nan"), 10**30]},
    ],
    ids=repr,
)
def test_containers_in_one_another_stay_the_same_objects(held):
    def objects(item):
        yield id(item)
        if isinstance(item, dict):
            item = list(item.values())
        if isinstance(item, list | tuple | deque):
            for part in item:
                yield from objects(part)

    module, before = Bound(held), [*objects(held)]
    curvd.export(module.eval(), torch.rand(6, 4))
    assert module.held is held
    assert [*objects(module.held)] == before


def test_another_thread_s_changes_are_left_alone():
    net = ByAttribute()
    with unfilled.unfilled(net):
        net.calls = 7
        net.by_rows["steps"] = [1, 2]
        net.held = torch.empty(3, device="meta")
    assert (net.calls, net.by_rows, net.held) == (7, {"steps": [1, 2]}, None)


def test_a_training_goes_on_beside_an_export():
    """Another thread calls the module all the time, in the mode that it is in."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    x = torch.randn(9, 4)
    seen, ended = [], threading.Event()

    def trains():
        with contextlib.suppress(BaseException):
            while not ended.is_set():
                alive = net[1].training and net(x).device.type == "cpu"
                seen.append(alive)
        seen.append(ended.is_set())

    training = threading.Thread(target=trains)
    training.start()
    try:
        for _ in range(3):
            KEPT.clear()
            curvd.export(net, x, mode="eval", check=False)
    finally:
        ended.set()
        training.join()
    assert all(seen)


def doubled(self, x):
    return 2 * self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_module_holds_may_call_the_module_itself(training):
    net, x = Net().train(training), torch.randn(6, 4, dtype=torch.float64)
    net.forward = types.MethodType(doubled, net)
    model = curvd.export(net, (x,))
    tensors = [model.state[t.names[0]] for t in model.graph.tensors]
    assert len(tensors) == 4
    found = evaluate(model.graph, (x,), tensors)[0]
    torch.testing.assert_close(found, net(x), rtol=1e-12, atol=0)
    assert net.training is training


class Slotted:
    __slots__ = ("kept",)

    def __init__(self):
        self.kept = []


class Keeps(nn.Module):
    """Keeps what it saw wherever code can."""

    by_class, by_objects = [], UserDict()

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.nested, self.slotted = {"a": {"b": []}}, Slotted()
        self.several, self.queue = set(), deque()
        self.layer.register_forward_hook(watching)
        self.told = closed_over()

    def forward(self, x, _kept=[]):  # noqa: B006
        h = self.layer(x)
        for kept in (_kept, SEEN, self.by_class, self.slotted.kept, self.queue):
            kept.append(h)
        self.nested["a"]["b"].append((h, 1))
        self.several.add(h)
        self.by_objects[len(self.by_objects)] = h
        watching.latest = [*getattr(watching, "latest", []), h]
        self.told(h)
        return h * 1.0

    def kept(self):
        yield from (*self.forward.__defaults__[0], *SEEN, *self.by_class)
        yield from (*self.slotted.kept, *self.queue, *self.several)
        yield from (h for h, _ in self.nested["a"]["b"])
        yield from (*self.by_objects.values(), *watching.latest)
        yield from (*watching.__defaults__[0], *self.told(None))


def watching(layer, inputs, outputs, kept=[]):  # noqa: B006
    kept.append(outputs)


def closed_over():
    last, every = None, ()

    def tell(h):
        nonlocal last, every
        if h is not None:
            last, every = h, (*every, h)
        return [last, *every]

    return tell


def test_nothing_that_code_keeps_is_a_trace():
    net, x = Keeps(), torch.randn(6, 4, dtype=torch.float64)
    curvd.export(net, (x,))
    assert len(list(net.kept())) >= 13
    assert not any(isinstance(t, FakeTensor) or t.is_meta for t in net.kept())


class Made(nn.Module):
    """Draws at random what it needs on its first call."""

    def __init__(self):
        super().__init__()
        self.first, self.noise = nn.Linear(4, 5).double(), None

    def forward(self, x):
        if self.noise is None:
            self.noise = torch.randn(5, dtype=x.dtype)
            self.scale = nn.Parameter(torch.randn(5, dtype=x.dtype))
            self.last = nn.Linear(5, 3).double()
        return self.last(torch.tanh(self.first(x) + self.noise) * self.scale)


def test_what_a_first_call_draws_is_the_module_s_afterwards():
    net, x = Made(), torch.randn(6, 4, dtype=torch.float64)
    model = curvd.export(net, (x,))
    assert set(model.parameters) == {n for n, _ in net.named_parameters()}
    tensors = [model.state[t.names[0]] for t in model.graph.tensors]
    found = evaluate(model.graph, (x,), tensors)[0]
    torch.testing.assert_close(found, net(x), rtol=1e-12, atol=0)


class Dropping(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
        self.double()

    def forward(self, x):
        return super().forward(x) * (2.0 if self.training else 1.0)


def test_a_mode_is_that_of_all_layers():
    net, x = Dropping().train(), torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(curvd.InvalidGraph, match="random"):
        curvd.export(net, (x,))
    model = curvd.export(net, (x,), mode="eval")
    assert all(layer.training for layer in net.modules())
    tensors = [model.state[t.names[0]] for t in model.graph.tensors]
    found = evaluate(model.graph, (x,), tensors)[0]
    torch.testing.assert_close(found, net.eval()(x), rtol=1e-12, atol=0)


class Narrow(nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x).sin()


def test_autocast_that_is_off_changes_nothing():
    net, x = Narrow(4, 3).double(), torch.randn(6, 4, dtype=torch.float64)
    model = curvd.export(net, (x,))
    tensors = [model.state[t.names[0]] for t in model.graph.tensors]
    found = evaluate(model.graph, (x,), tensors)[0]
    torch.testing.assert_close(found, net(x), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_module_of_a_trace_is_refused_with_a_remedy():
    traced = torch.jit.trace(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(curvd.InvalidSpec, match="traced from"):
        curvd.export(traced, (torch.randn(6, 4),))


class Gate(nn.Module):
    """A layer that writes to its parent, which it knows in one way or another."""

    def __init__(self, write):
        super().__init__()
        self.layer, self.write = nn.Linear(4, 3).double(), write

    def forward(self, x):
        self.write(self.layer(x).sigmoid())
        return x


class Gated(nn.Module):
    def __init__(self, knows):
        super().__init__()
        self.layer, self.gate = nn.Linear(4, 3).double(), torch.ones(1, 3).double()
        self.child = Gate(knows(self))

    def set(self, gate):
        self.gate = gate

    def forward(self, x):
        return self.layer(self.child(x)) * self.gate


def by_list(parent):
    held = [parent]
    return lambda gate: setattr(held[0], "gate", gate)


def by_weakref(parent):
    held = weakref.ref(parent)
    return lambda gate: setattr(held(), "gate", gate)


def by_global(parent):
    global PARENT
    PARENT = parent
    return lambda gate: setattr(PARENT, "gate", gate)


@pytest.mark.parametrize(
    "knows",
    [
        by_list,
        by_weakref,
        by_global,
        lambda parent: parent.set,
        lambda parent: functools.partial(setattr, parent, "gate"),
        lambda parent: types.MethodType(Gated.set, parent),
    ],
)
def test_what_a_layer_writes_to_its_parent_is_read_there(knows):
    net, x = Gated(knows), torch.randn(6, 4, dtype=torch.float64)
    try:
        model = curvd.export(net, (x,))
    except curvd.GradientMismatch:  # a copy of such a function writes to the original
        assert knows in {by_list, by_weakref, by_global}
        return
    tensors = [model.state[t.names[0]] for t in model.graph.tensors]
    assert len(tensors) == 4
    found = evaluate(model.graph, (x,), tensors)[0]
    torch.testing.assert_close(found, net(x), rtol=1e-12, atol=0)
